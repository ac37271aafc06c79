"""Comparison of contenders in interleaved rounds and separate processes, with a check of equal results.

A contender is a command that prints one JSON object per round: its own measurements (without imports and other one-time
work) and a proof of its results. Every round runs every contender once, in rotating order, so that a slow phase of the
machine affects all. A gate compares the proofs of every round and raises `Unequal`.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import REPOSITORY as REPOSITORY
from benchmarks.processes import TURNS, Running
from benchmarks.processes import ContenderFailed as ContenderFailed

MATERIALS = REPOSITORY / "build" / "benchmarks"  # shards, models and checkpoints made once; safe to delete

MIN_PATIENCE_SECONDS = 60.0

Output = dict[str, Any]
Gate = Callable[[Mapping[str, Output]], None]
Key = tuple[str, ...]


class Unequal(Exception):
    """Two contenders have different results, so their speeds cannot be compared."""


@dataclass(frozen=True)
class Contender:
    """One command to compare. `command`: argv without a shell; `ranks`: see `Running`; `peer`: another tool.

    `stays`: one process runs all rounds (`processes.turns`); else every round starts a new one. `figure`: default is the
    comparison's. Contenders with the same command share processes and read several figures from one output.
    """

    name: str
    command: list[str]
    peer: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int | None = None
    is_persistent: bool = False
    figure: str = ""

    @property
    def key(self) -> Key:
        """Identity of its processes."""
        return (*self.command, *map(str, sorted(self.environment.items())), str(self.ranks))


@dataclass(frozen=True)
class Comparison:
    """One row of the table. `figure`: key of the contenders' output, in `unit`.

    `goal`: required ratio of ours to the best peer. `limit`: required value of ours, in `unit`. `gate`: called with the
    outputs of each round by contender name. `rounds`: maximum, for figures that do not vary. `hopeless`: a peer that is
    this many times worse than the best one in the first round is not run again. `notes`: printed below the table.
    """

    work: str
    figure: str
    unit: str
    contenders: list[Contender]
    gate: Gate
    goal: float | None = None
    limit: float | None = None
    higher_is_better: bool = True
    rounds: int | None = None
    hopeless: float | None = None
    notes: str = ""
    timeout_seconds: float = 900.0

    def figure_of(self, contender: Contender, output: Output) -> float:
        return float(output[contender.figure or self.figure])


@dataclass(frozen=True)
class Result:
    """Outputs of all rounds. `ratio`: ours to the best peer, above 1 if ours is better; None without peers."""

    comparison: Comparison
    rounds: list[dict[str, Output]]

    def values(self, name: str) -> dict[int, float]:
        """Return the figure by number of the round; a hopeless peer has one only."""
        contender = next(one for one in self.comparison.contenders if one.name == name)
        return {
            number: self.comparison.figure_of(contender, outputs[name])
            for number, outputs in enumerate(self.rounds)
            if name in outputs
        }

    def median(self, name: str) -> float:
        return statistics.median(self.values(name).values())

    @property
    def ours(self) -> str:
        return next(one.name for one in self.comparison.contenders if not one.peer)

    def ratio_to(self, peer: str) -> float:
        """Return the median over rounds of ours / peer's of the same round, so that slow rounds cancel."""
        mine = self.values(self.ours)
        return statistics.median(
            mine[number] / theirs if self.comparison.higher_is_better else theirs / mine[number]
            for number, theirs in self.values(peer).items()
        )

    @property
    def ratio(self) -> float | None:
        peers = [one.name for one in self.comparison.contenders if one.peer]
        return min((self.ratio_to(peer) for peer in peers), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON-compatible values."""
        comparison = self.comparison
        return {
            "work": comparison.work,
            "figure": comparison.figure,
            "unit": comparison.unit,
            "higher_is_better": comparison.higher_is_better,
            "goal": comparison.goal,
            "limit": comparison.limit,
            "medians": {one.name: self.median(one.name) for one in comparison.contenders},
            "ratios": {one.name: self.ratio_to(one.name) for one in comparison.contenders if one.peer},
            "ratio_to_best_peer": self.ratio,
            "notes": comparison.notes,
            "rounds": self.rounds,
        }


def measure(
    comparison: Comparison,
    rounds: int,
    say: Callable[[str], None] = print,
    deadline: float = math.inf,
    patience: float = math.inf,
    instead: Callable[[ContenderFailed], Output] | None = None,
) -> Result:
    """Run all rounds, and the gate on each. Raises ContenderFailed, Unequal.

    `deadline`: on the clock of `time.monotonic`. `patience`: maximum time of a peer in multiples of ours, start included
    (MIN_PATIENCE_SECONDS at least). `instead`: returns the output of a peer that fails or is late; None raises.
    """
    ours = next((one.name for one in comparison.contenders if not one.peer), "")
    outputs: list[dict[str, Output]] = []
    rounds = min(rounds, comparison.rounds or rounds)
    contenders = comparison.contenders
    staying: dict[Key, Running] = {}
    try:
        for index in range(rounds):
            order = contenders[index % len(contenders) :] + contenders[: index % len(contenders)]
            outputs.append({})
            for contender in order:
                done = [one for one in order if one.name in outputs[-1] and one.key == contender.key]
                if done:
                    outputs[-1][contender.name] = outputs[-1][done[0].name]
                    continue
                say(f"  round {index + 1} of {rounds}: {contender.name}")
                seconds = min(comparison.timeout_seconds, deadline - time.monotonic())
                if contender.peer and ours in outputs[-1]:
                    waited = patience * outputs[-1][ours]["wall_seconds"]
                    seconds = min(seconds, max(MIN_PATIENCE_SECONDS, waited))
                try:
                    outputs[-1][contender.name] = _turn(contender, seconds, staying)
                except ContenderFailed as failure:
                    if instead is None or not contender.peer:
                        raise
                    outputs[-1][contender.name] = instead(failure)
            comparison.gate(outputs[-1])
            contenders = _hopeful(comparison, contenders, outputs[0])
            for key in staying.keys() - ({one.key for one in contenders} if index + 1 < rounds else set()):
                staying.pop(key).end()
    finally:
        for running in staying.values():
            running.kill()
    return Result(comparison, outputs)


def _turn(contender: Contender, timeout_seconds: float, staying: dict[Key, Running]) -> Output:
    """Run one round of one contender. Raises ContenderFailed."""
    if contender.key in staying:
        return staying[contender.key].turn(timeout_seconds)
    environment = {**contender.environment, **({TURNS: "1"} if contender.is_persistent else {})}
    running = Running(contender.name, contender.command, environment, contender.ranks)
    if contender.is_persistent:
        staying[contender.key] = running
        return running.turn(timeout_seconds)
    try:
        output = running.turn(timeout_seconds)
        running.end()
        return output
    finally:
        running.kill()


def _hopeful(
    comparison: Comparison, contenders: list[Contender], first: dict[str, Output]
) -> list[Contender]:
    """Return the contenders without the peers that were hopeless in the first round."""
    if comparison.hopeless is None:
        return contenders
    sign = 1 if comparison.higher_is_better else -1
    speed = {one.name: comparison.figure_of(one, first[one.name]) ** sign for one in contenders if one.peer}
    best = max(speed.values(), default=0.0)
    return [one for one in contenders if not one.peer or speed[one.name] * comparison.hopeless >= best]


def python(*arguments: str | os.PathLike[str]) -> list[str]:
    """Return argv for a script in the interpreter of the benchmarks."""
    return [sys.executable, *map(str, arguments)]


def no_gate(outputs: Mapping[str, Output]) -> None:
    """Gate without a check, for contenders that compare results themselves."""


def equal_outputs(key: str, tolerance: float = 0.0) -> Gate:
    """Return a gate that requires equal values of `key`; numbers may differ by the relative `tolerance`."""

    def gate(outputs: Mapping[str, Output]) -> None:
        reference_name, reference = next(iter(outputs.items()))
        for name, output in outputs.items():
            if not _close(output[key], reference[key], tolerance):
                raise Unequal(f"{key}: {reference_name} {reference[key]!r}, {name} {output[key]!r}")

    return gate


def close_to(what: str, found: float, expected: float, tolerance: float) -> None:
    """Raise Unequal unless `found` is within the relative `tolerance` of `expected`; NaN is unequal."""
    if not abs(found - expected) <= tolerance * abs(expected):
        raise Unequal(f"{what}: {found!r}, expected {expected!r}")


def _close(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            _close(a, b, tolerance) for a, b in zip(one, other, strict=True)
        )
    if tolerance and isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= tolerance * max(abs(one), abs(other))
    return bool(one == other)
