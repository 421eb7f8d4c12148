"""What the worker's loop costs beside the engine: its seconds outside ``step()`` over the engine's inside it.

    python -m benchmarks.publishing --dtype float32 bfloat16
    python -m benchmarks.publishing --watched
    python -m benchmarks.publishing --engine vllm --python .venv-vllm/bin/python \\
        --vllm-args "enable_prefix_caching=false enforce_eager=true"

The workload of ``benchmarks.workload`` runs through a real worker process (32 rows) and a Valkey of its own that syncs
each write to the disk. The loop's seconds are those between two steps, and the processor's in talks beside steps. Jobs
that nobody reads along are reported every ``publish_unread_seconds``; with --watched somebody reads along each job, and
what happened is published by one pipeline a step, at most every ``publish_seconds``. Prints the median of the runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from benchmarks.queue_depth import serving
from benchmarks.rig import await_it, describe_machine, find, running_workers
from benchmarks.workload import RUNNING, Item, english, make_workload
from core.models.source import resolve
from core.request import Request, SamplingParams
from jobs import commands
from jobs.job import NewJob
from jobs.runner import Runner
from jobs.settings import StoreSettings
from jobs.store import Store

BEAT_SECONDS = 2.5  #: after so long a worker has told its counters again
LOAD_SECONDS = 600  #: vLLM may compile before it serves
RUN_SECONDS = 600  #: for all jobs, on a machine that does other things too
numbers = itertools.count()


def main() -> None:
    """Measure each dtype, and print one line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--engine", default="torch", choices=["torch", "vllm"])
    parser.add_argument("--python", default=sys.executable, help="the worker's: vLLM has an environment of its own")
    parser.add_argument("--vllm-args", default="", help="see docs/vllm.md")
    parser.add_argument("--watched", action="store_true", help="somebody reads along each job")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    items = make_workload(tokenizer(english())["input_ids"])
    print("| dtype | loop outside step() over step(), median | of each run | steps a run | ms a step: engine, loop |")
    print("|---|---|---|---|---|", flush=True)
    for dtype in arguments.dtype:
        with serving() as url:
            settings = {"engine": arguments.engine, "vllm_args": arguments.vllm_args, "model": folder, "dtype": dtype}
            with running_workers(url, 1, python=arguments.python, max_running=RUNNING, **settings) as [process]:
                store = Store(StoreSettings(redis_url=url))
                await_worker(store, process)
                print(row(dtype, measure(store, items, arguments.repeats, watched=arguments.watched)), flush=True)
                store.close()
    command = " ".join(["python -m benchmarks.publishing", *sys.argv[1:]])
    print(f"\n{describe_machine()}, {time.strftime('%Y-%m-%d')}, `{command}`")


def await_worker(store: Store, process: subprocess.Popen[bytes]) -> None:
    """Return once it serves; say so where it never will."""
    await_it(lambda: process.poll() is not None or find(store, "bench0"), "worker", seconds=LOAD_SECONDS)
    if process.poll() is not None:
        raise SystemExit(f"the worker ended with {process.returncode} before it served")


def measure(store: Store, items: Sequence[Item], repeats: int, *, watched: bool) -> list[dict[str, float]]:
    """The worker's counters of each run, after a warm-up."""
    counters = [run(store, items[:4], watched=watched)]
    for _ in range(repeats):
        counters.append(run(store, items, watched=watched))
    names = ("loop_seconds", "step_seconds", "steps")
    return [{name: after[name] - before[name] for name in names} for before, after in itertools.pairwise(counters)]


def run(store: Store, items: Sequence[Item], *, watched: bool) -> dict[str, float]:
    """Queue the items, wait for their ends; what the worker has counted since it was born."""
    ids = [submit(store, item) for item in items]
    if watched:
        reader = Runner(store.connection, 86_400)
        reader.answers([commands.follow(job_id, -1) for job_id in ids])
    await_it(lambda: not (store.queue().queued or store.queue().running), "end", seconds=RUN_SECONDS)
    if any(store.get(job_id).state != "succeeded" for job_id in ids):
        raise SystemExit("a job did not succeed")
    time.sleep(BEAT_SECONDS)
    return dict(await_it(lambda: find(store, "bench0"), "worker").stats)


def submit(store: Store, item: Item) -> str:
    params = SamplingParams(max_tokens=item.answer_tokens, ignore_eos=True)
    job_id = f"job_{next(numbers):032x}"
    store.submit(NewJob(id=job_id, request=Request(token_ids=item.token_ids, params=params, cache_salt=job_id)))
    return job_id


def row(dtype: str, runs: list[dict[str, float]]) -> str:
    """One line of the table."""
    ratios = [each["loop_seconds"] / each["step_seconds"] for each in runs]
    steps = statistics.median(each["steps"] for each in runs)
    engine, loop = (
        statistics.median(each[name] / each["steps"] for each in runs) * 1000
        for name in ("step_seconds", "loop_seconds")
    )
    cells = f"{', '.join(f'{ratio:.2%}' for ratio in ratios)} | {steps:.0f} | {engine:.1f}, {loop:.2f}"
    return f"| {dtype} | {statistics.median(ratios):.2%} | {cells} |"


if __name__ == "__main__":
    main()
