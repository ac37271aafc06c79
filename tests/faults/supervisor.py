"""Supervisor that kills ranks at random instants and starts the same command again until the run is finished."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults import oracle
from tests.faults.conftest import Case
from tests.faults.forked_ranks import ForkedRanks

_SURVIVOR_SECONDS = 10.0  # for the other rank to end by itself, before it is killed
_ANYWHERE_SHARE = 0.3  # of the kills that may fall anywhere, the others after the first step of a start


@dataclass
class Tally:
    """Counts of kills, restarts and steps of some runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by victims: "rank 0", "rank 1", "both"
    instants: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    hung: int = 0  # starts whose other rank did not end by itself in time
    steps: int = 0
    steps_done: int = 0  # with repeated ones
    seconds: float = 0.0

    def report(self) -> str:
        victims = ", ".join(f"{victim} {count}" for victim, count in sorted(self.kills.items()))
        instants = ", ".join(f"{instant} {count}" for instant, count in sorted(self.instants.items()))
        return (
            f"{self.kills.total()} kills in {self.runs} runs ({victims}; {instants}), {self.restarts} restarts, "
            f"{self.steps_done - self.steps} of {self.steps_done} steps repeated, 0 lost; "
            f"{self.hung} survivors ended by the supervisor; {self.seconds:.0f} s"
        )


def supervise(case: Case, chance: random.Random, max_kills: int, tally: Tally) -> None:
    """Start the run until it is finished, killing it up to `max_kills` times; then compare it with its reference."""
    start, kills = time.monotonic(), 0
    longest, longest_training = (
        4.0,
        2.0,
    )  # seconds of a start, and from its first step on; increased when measured
    assert case.reference is not None
    while True:
        begun = time.monotonic()
        with case.start() as ranks:
            if kills == max_kills:
                ranks.wait(300)
            elif chance.random() < _ANYWHERE_SHARE:
                _wait(ranks, begun + chance.uniform(0.0, longest))
            else:
                _wait(ranks, begun + 120, lambda: bool(_recorded_packs(case, case.num_starts)))
                first = time.monotonic()
                _wait(ranks, first + chance.uniform(0.0, longest_training))
                longest_training = max(longest_training, time.monotonic() - first)
            if None not in ranks.statuses:
                break
            instant = _instant(case)
            victims = chance.choice([(0,), (1,), (0, 1)])
            ranks.kill(victims)
            kills += 1
            longest = max(longest, time.monotonic() - begun)
            _wait(ranks, time.monotonic() + _SURVIVOR_SECONDS)
            tally.hung += None in ranks.statuses
        tally.kills["both" if len(victims) == 2 else f"rank {victims[0]}"] += 1
        tally.instants[instant] += 1
        oracle.assert_same_so_far(case.run, case.reference)
    assert ranks.statuses == [0, 0], [path.read_text()[-3000:] for path in ranks.outputs]
    case.assert_same()
    tally.runs += 1
    tally.restarts += case.num_starts - 1
    tally.steps += len(case.reference.steps)
    tally.steps_done += _steps_done(case)
    tally.seconds += time.monotonic() - start


def _wait(ranks: ForkedRanks, deadline: float, is_reached: Callable[[], bool] = lambda: False) -> None:
    """Wait until the deadline, the end of all ranks, or `is_reached`."""
    while time.monotonic() < deadline and None in ranks.statuses and not is_reached():
        time.sleep(0.01)


def _instant(case: Case) -> str:
    """Return the activity of the current start. (Before its first step, staging directories are of earlier starts.)"""
    if not _recorded_packs(case, case.num_starts):
        return "in the start"
    return "in a save" if list(case.run.checkpoints.glob(".step-*.tmp")) else "in a step"


def _recorded_packs(case: Case, start: int) -> list[dict]:
    """Return the packs that rank 0 has recorded in that start."""
    file = case.records / f"{start:05d}-0.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _steps_done(case: Case) -> int:
    starts = range(1, case.num_starts + 1)
    return sum(len({line["step"] for line in _recorded_packs(case, start)}) for start in starts)
