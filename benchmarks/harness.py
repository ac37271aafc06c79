"""Contenders side by side: interleaved rounds, processes of their own, an equality gate before any speed.

A contender is a command that prints one JSON object a round: the figures it measured itself (imports and other one-time
work left out) and the proof of what it computed. Every round runs every contender once, in an order that rotates, so
that a machine that slows down slows all of them. A gate looks at the proofs of every round and raises `Unequal`; only
then are medians and ratios worth printing.
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
from benchmarks.processes import Failed as Failed

MATERIALS = REPOSITORY / "build" / "benchmarks"  # shards, models and checkpoints made once; safe to delete

LEAST_PATIENCE_SECONDS = 60.0

Output = dict[str, Any]
Gate = Callable[[Mapping[str, Output]], None]
Key = tuple[str, ...]


class Unequal(Exception):
    """Two contenders did not compute the same; their speeds cannot be compared."""


@dataclass(frozen=True)
class Contender:
    """`command`: argv, no shell, on `ranks` ranks (None: it knows of none). `peer`: somebody else's way, that the goal is measured against.

    `stays`: the process lives through all rounds and takes its turn in each (`processes.turns`); else every round has a
    new one. `figure`: the comparison's unless given. Contenders with the same command share its processes, and tell
    several figures at once.
    """

    name: str
    command: list[str]
    peer: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int | None = None
    stays: bool = False
    figure: str = ""

    @property
    def key(self) -> Key:
        """What its processes are."""
        return (*self.command, *map(str, sorted(self.environment.items())), str(self.ranks))


@dataclass(frozen=True)
class Comparison:
    """`figure`: the key every contender prints, in `unit`. `goal`: how many times better ours should be than the best peer.

    `limit`: what ours should reach by itself, in `unit`. `gate` gets the outputs of one round by contender name.
    `rounds`: at most so many, where a figure does not vary. `hopeless`: a peer that in the first round is so many times
    worse than the best one is not run again. `notes`: what a reader must know to judge the row.
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
    """Medians over rounds. `ratio`: ours over the best peer's, turned so that more is better; None without peers."""

    comparison: Comparison
    rounds: list[dict[str, Output]]

    def values(self, name: str) -> dict[int, float]:
        """The figure by number of the round; a hopeless peer has but one."""
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
        """Median over rounds of (ours / peer's) of the same round: what slows a whole round cancels."""
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
        """What is written to disk and shown as a row."""
        told = self.comparison
        return {
            "work": told.work,
            "figure": told.figure,
            "unit": told.unit,
            "higher_is_better": told.higher_is_better,
            "goal": told.goal,
            "limit": told.limit,
            "medians": {one.name: self.median(one.name) for one in told.contenders},
            "ratios": {one.name: self.ratio_to(one.name) for one in told.contenders if one.peer},
            "ratio_to_best_peer": self.ratio,
            "notes": told.notes,
            "rounds": self.rounds,
        }


def measure(
    comparison: Comparison,
    rounds: int,
    say: Callable[[str], None] = print,
    deadline: float = math.inf,
    patience: float = math.inf,
    instead: Callable[[Failed], Output] | None = None,
) -> Result:
    """Run all rounds, and the gate on each. Raises Failed, Unequal.

    deadline: of `time.monotonic`, when everybody has to be done. patience: how many times as long as ours, start included, a
    peer may take (LEAST_PATIENCE_SECONDS in any case). instead: what a peer that fails or is late has told; None: an error, as it is for
    ours.
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
                    seconds = min(seconds, max(LEAST_PATIENCE_SECONDS, waited))
                try:
                    outputs[-1][contender.name] = _turn(contender, seconds, staying)
                except Failed as failure:
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
    """One round of one contender. Raises Failed."""
    if contender.key in staying:
        return staying[contender.key].turn(timeout_seconds)
    environment = {**contender.environment, **({TURNS: "1"} if contender.stays else {})}
    running = Running(contender.name, contender.command, environment, contender.ranks)
    if contender.stays:
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
    """Without the peers that the first round showed to be far from the best of them."""
    if comparison.hopeless is None:
        return contenders
    sign = 1 if comparison.higher_is_better else -1
    speed = {one.name: comparison.figure_of(one, first[one.name]) ** sign for one in contenders if one.peer}
    best = max(speed.values(), default=0.0)
    return [one for one in contenders if not one.peer or speed[one.name] * comparison.hopeless >= best]


def python(*arguments: str | os.PathLike[str]) -> list[str]:
    """argv for a script in the environment that runs the benchmarks."""
    return [sys.executable, *map(str, arguments)]


def no_gate(outputs: Mapping[str, Output]) -> None:
    """For works whose result is a file that the contender itself has compared."""


def same(key: str, tolerance: float = 0.0) -> Gate:
    """All contenders print `key` equal; a number or a list of numbers may differ by `tolerance`, relative."""

    def gate(outputs: Mapping[str, Output]) -> None:
        reference_name, reference = next(iter(outputs.items()))
        for name, output in outputs.items():
            if not _close(output[key], reference[key], tolerance):
                raise Unequal(f"{key}: {reference_name} {reference[key]!r}, {name} {output[key]!r}")

    return gate


def close_to(what: str, found: float, expected: float, tolerance: float) -> None:
    """`tolerance` is relative to what is expected. Raises Unequal, also for what is not a number."""
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
