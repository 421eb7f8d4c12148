"""Kill everything in a house that is at work, and count what went wrong.

    python -m benchmarks.chaos                     ten minutes: mixed load, a random fault every 5 s
    python -m benchmarks.chaos --judge instant     1,500 jobs, a SIGKILL every 0.7 s for 30 s, Valkey's twice
    python -m benchmarks.chaos --judge tiny        300 jobs of a tiny model in float32, 8 SIGKILLs: the same tokens

Exits 1 where a promise was broken. The last report of each is in ``benchmarks/reports/chaos.md``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.faults import Saboteur, Tally
from benchmarks.chaos.house import ROOT, House, living
from benchmarks.chaos.judge import judge_instant, judge_tiny
from benchmarks.chaos.load import Load
from benchmarks.chaos.watch import Watch, save, stamp
from tests.conftest import start_valkey

REPORT = ROOT / "benchmarks" / "reports" / "chaos.md"
FAULT_SECONDS = 5.0
CLIENTS = 24


def main() -> int:
    arguments = parse()
    start = time.monotonic()
    runs = {"": mixed, "instant": judge_instant, "tiny": judge_tiny}
    lines, violations = runs[arguments.judge](arguments)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    words = ["python -m benchmarks.chaos", *sys.argv[1:]]
    head = [f"`{' '.join(words)}`, {stamp()}, {machine()}; {minutes} min {seconds} s in all.", ""]
    tail = ["", f"Violations: {len(violations) or 'none'}.", *(f"* {each}" for each in violations[:20])]
    report = [*head, *lines, *tail]
    print("\n".join(report))
    save(REPORT, {"": "Mixed load", "instant": "Judged: instant", "tiny": "Judged: tiny"}[arguments.judge], report)
    return 1 if violations else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of mixed load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--judge", choices=["instant", "tiny"], default="")
    return parser.parse_args()


def mixed(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Mixed load and random faults for so many minutes; the report's lines, and what was violated."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        folder = Path(name)
        (folder / "scratch").mkdir()
        scratch = start_valkey(folder / "scratch", fsync="everysec")
        flags = ("--engine", "instant", "--instant-step-ms", "5", "--workers", str(arguments.workers))
        try:
            with living(folder, *flags) as house:
                return run_mixed(house, Watch(house, scratch), arguments)
        finally:
            scratch.process.kill()
            scratch.process.wait()


def run_mixed(house: House, watch: Watch, arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    load = Load(house, arguments.seed, CLIENTS)
    saboteur = Saboteur(house, arguments.seed, lambda job_id: not job_id.startswith("poison"))
    load.start()
    watch.start()
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end and house.process.poll() is None:
        due = time.monotonic() + FAULT_SECONDS
        saboteur.strike()
        time.sleep(max(0.0, due - time.monotonic()))
    if (code := house.process.poll()) is not None:
        said = [line for line in house.log.read_text().splitlines() if not line.startswith("api ")]
        raise SystemExit("\n".join([*said[-30:], f"headrace up ended with exit code {code}: a promise is broken"]))
    load.finish()
    watch.finish()
    watch.audit()
    left = house.running()
    violations = [*load.violations, *saboteur.violations, *watch.violations]
    violations += [f"still running: {left}"] * bool(left) + (watch.leaks() if arguments.minutes >= 5 else [])
    return [*table(saboteur.tallies), "", *facts(load, watch)], violations


def table(tallies: dict[str, Tally]) -> list[str]:
    lines = ["| fault | times | jobs touched | recovery, median s | worst s |", "|---|---|---|---|---|"]
    for name, tally in sorted(tallies.items()):
        median, worst = statistics.median(tally.seconds), max(tally.seconds)
        lines.append(f"| {name} | {len(tally.seconds)} | {tally.jobs} | {median:.2f} | {worst:.2f} |")
    return lines


def facts(load: Load, watch: Watch) -> list[str]:
    ends = ", ".join(f"{name} {count}" for name, count in sorted(load.ended.items()))
    grown = ", ".join(f"{name} {early:.0f} → {late:.0f}" for name, (early, late) in watch.growth().items())
    return [
        f"{load.jobs} jobs ({ends}); {watch.audits} audits of atomic snapshots.",
        "",
        f"Second quarter → last quarter, MB a process (keys: number of Redis keys): {grown}.",
    ]


def machine() -> str:
    models = [line.partition(": ")[2] for line in cpu_lines() if line.startswith("model name")]
    return f"{platform.system()} {platform.machine()}, {len(models)} × {models[0] if models else platform.processor()}"


def cpu_lines() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else ()


if __name__ == "__main__":
    sys.exit(main())
