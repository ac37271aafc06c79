"""Somebody who kills ranks at random instants and, like a patient user, starts the same command again until it is done."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults import oracle
from tests.faults.conftest import Case
from tests.faults.lives import Life

_SURVIVORS_SECONDS = 10.0  # then they are killed, as launchers do it at once
_IN_THE_START = 0.3  # so many kills fall anywhere in a life, the others after its first step


@dataclass
class Tally:
    """What was done to some runs, and what it cost them. Nothing of them may be lost: the oracle sees to that."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # "rank 0", "rank 1", "both" -> how often
    instants: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    held: int = 0  # lives whose other rank did not end by itself in time
    steps: int = 0  # that count
    taken: int = 0  # repeated ones too
    seconds: float = 0.0

    def report(self) -> str:
        killed = ", ".join(f"{who} {count}" for who, count in sorted(self.kills.items()))
        when = ", ".join(f"{instant} {count}" for instant, count in sorted(self.instants.items()))
        return (
            f"{self.kills.total()} kills in {self.runs} runs ({killed}; {when}), {self.restarts} restarts, "
            f"{self.taken - self.steps} of {self.taken} steps repeated, 0 lost; "
            f"{self.held} survivors ended by the supervisor; {self.seconds:.0f} s"
        )


def supervise(case: Case, chance: random.Random, most_kills: int, tally: Tally) -> None:
    """Start the run until it is finished, and kill it up to `most_kills` times on the way; then ask the oracle."""
    start, kills = time.monotonic(), 0
    longest, working = 4.0, 2.0  # seconds of a life, and of it from its first step on; learned on the way
    assert case.reference is not None
    while True:
        begun = time.monotonic()
        with case.start() as life:
            if kills == most_kills:
                life.wait(300)
            elif chance.random() < _IN_THE_START:
                _wait(life, begun + chance.uniform(0.0, longest))
            else:
                _wait(life, begun + 120, lambda: bool(_lines(case, case.num_lives)))
                first = time.monotonic()
                _wait(life, first + chance.uniform(0.0, working))
                working = max(working, time.monotonic() - first)
            if _ended(life):
                break
            instant = _instant(case)
            victims = chance.choice([(0,), (1,), (0, 1)])
            life.kill(victims)
            kills += 1
            longest = max(longest, time.monotonic() - begun)
            _wait(life, time.monotonic() + _SURVIVORS_SECONDS)
            tally.held += None in life.statuses
        tally.kills["both" if len(victims) == 2 else f"rank {victims[0]}"] += 1
        tally.instants[instant] += 1
        oracle.so_far(case.run, case.reference)
    assert life.statuses == [0, 0], [path.read_text()[-3000:] for path in life.outputs]
    case.same()
    tally.runs += 1
    tally.restarts += case.num_lives - 1
    tally.steps += len(case.reference.steps)
    tally.taken += _steps_taken(case)
    tally.seconds += time.monotonic() - start


def _wait(life: Life, deadline: float, enough: Callable[[], bool] = lambda: False) -> None:
    """Until the deadline, the end of all ranks, or until it is enough."""
    while time.monotonic() < deadline and None in life.statuses and not enough():
        time.sleep(0.01)


def _ended(life: Life) -> bool:
    return None not in life.statuses


def _instant(case: Case) -> str:
    """What the life is at, as its files tell. (What lies there before its first step, an earlier one has left.)"""
    if not _lines(case, case.num_lives):
        return "in the start"
    return "in a save" if list(case.run.checkpoints.glob(".step-*.tmp")) else "in a step"


def _lines(case: Case, life: int) -> list[dict]:
    """Packs that rank 0 has taken in that life."""
    file = case.records / f"{life:05d}-0.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _steps_taken(case: Case) -> int:
    return sum(len({line["step"] for line in _lines(case, life)}) for life in range(1, case.num_lives + 1))
