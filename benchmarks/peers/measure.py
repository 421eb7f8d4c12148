"""The run itself: systems take turns, A B C A B C, and of each turn it is known who else used the processors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.seat import Seat, read_cpu
from benchmarks.peers.systems import SYSTEMS

WARM_ITEMS = 8
SETTLE_SECONDS = 2.0  #: after a turn, before the next one is timed: threads that spin for work have stopped by then
QUIET_SHARE = 0.05  #: of one core, by the others, that counts as undisturbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One system over the workload, once."""

    seconds: float
    tokens: int
    idle_cores: float  #: used by the other systems, which should all be waiting
    foreign_cores: float  #: used by the rest of the machine
    answers: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True, eq=False)
class Outcome:
    """What a system did."""

    facts: Mapping[str, Any]
    turns: list[Turn] = field(default_factory=list)
    perplexity: float | None = None
    cannot: str = ""  #: why there is no perplexity

    @property
    def median(self) -> float:
        return statistics.median(turn.tokens_per_second for turn in self.turns)


def measure(seats: Mapping[str, Seat], items: int, repeats: int, attempts: int) -> dict[str, Outcome]:
    """Warm all up, then let each have its turn, ``repeats`` times; a disturbed turn is taken again.

    Args:
        items: of the workload.
        attempts: how often a turn is taken at most until nobody disturbs it; the quietest one counts.
    """
    outcomes = {name: Outcome(facts=seat.facts) for name, seat in seats.items()}
    for seat in seats.values():
        seat.ask(f"run {WARM_ITEMS}")
    for name, seat in seats.items():
        answer = seat.ask("perplexity")
        outcomes[name].perplexity, outcomes[name].cannot = answer.get("perplexity"), answer.get("cannot", "")
    for _ in range(repeats):
        for name in seats:
            turn = _quiet_turn(seats, name, SYSTEMS[name].items or items, attempts)
            outcomes[name].turns.append(turn)
            print(
                f"{SYSTEMS[name].label}: {turn.tokens_per_second:.1f} tokens/s "
                f"(others {turn.idle_cores:.2f}, machine {turn.foreign_cores:.2f} cores)",
                flush=True,
            )
    return outcomes


def _quiet_turn(seats: Mapping[str, Seat], name: str, items: int, attempts: int) -> Turn:
    best = _turn(seats, name, items)
    for _ in range(attempts - 1):
        if best.foreign_cores <= QUIET_SHARE:
            break
        best = min(best, _turn(seats, name, items), key=lambda turn: turn.foreign_cores)
    return best


def _turn(seats: Mapping[str, Seat], name: str, items: int) -> Turn:
    time.sleep(SETTLE_SECONDS)
    before, start = read_cpu(seats), time.monotonic()
    answer = seats[name].ask(f"run {items}")
    after, elapsed = read_cpu(seats), time.monotonic() - start
    used = {seat: after.seats[seat] - before.seats[seat] for seat in seats}
    idle = sum(seconds for seat, seconds in used.items() if seat != name)
    foreign = max(0.0, after.machine - before.machine - sum(used.values()))
    return Turn(
        seconds=answer["seconds"],
        tokens=sum(map(len, answer["answers"])),
        idle_cores=idle / elapsed,
        foreign_cores=foreign / elapsed,
        answers=answer["answers"],
    )
