"""Contenders side by side: interleaved rounds, one process (or launcher) each, an equality gate before any speed.

A contender is a command whose last line on stdout is one JSON object: the figures it measured itself (imports and other
one-time work left out) and the proof of what it computed. Every round runs every contender once, in an order that
rotates, so that a machine that slows down slows all of them. A gate looks at the proofs of every round and raises
`Unequal`; only then are medians and ratios worth printing.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MATERIALS = REPOSITORY / "build" / "benchmarks"  # shards, models and checkpoints made once; safe to delete
OUTPUT_KEPT = 3000  # characters of a failed contender's output that the error shows

Output = dict[str, Any]
Gate = Callable[[Mapping[str, Output]], None]


class Unequal(Exception):
    """Two contenders did not compute the same; their speeds cannot be compared."""


class Failed(Exception):
    """A contender's command failed, ran too long, or printed no JSON."""


@dataclass(frozen=True)
class Contender:
    """`command`: argv, no shell. `peer`: somebody else's way, that the goal is measured against."""

    name: str
    command: list[str]
    peer: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """`figure`: the key every contender prints, in `unit`. `goal`: how many times better ours should be than the best peer.

    `limit`: what ours should reach by itself, in `unit`. `gate` gets the outputs of one round by contender name.
    `notes`: what a reader must know to judge the row.
    """

    work: str
    figure: str
    unit: str
    contenders: list[Contender]
    gate: Gate
    goal: float | None = None
    limit: float | None = None
    higher_is_better: bool = True
    notes: str = ""
    timeout_seconds: float = 900.0


@dataclass(frozen=True)
class Result:
    """Medians over rounds. `ratio`: ours over the best peer's, turned so that more is better; None without peers."""

    comparison: Comparison
    rounds: list[dict[str, Output]]

    def values(self, name: str) -> list[float]:
        return [float(outputs[name][self.comparison.figure]) for outputs in self.rounds]

    def median(self, name: str) -> float:
        return statistics.median(self.values(name))

    @property
    def ours(self) -> str:
        return next(one.name for one in self.comparison.contenders if not one.peer)

    def ratio_to(self, peer: str) -> float:
        """Median over rounds of (ours / peer's) of the same round: what slows a whole round cancels."""
        pairs = zip(self.values(self.ours), self.values(peer), strict=True)
        return statistics.median(
            mine / theirs if self.comparison.higher_is_better else theirs / mine for mine, theirs in pairs
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


def measure(comparison: Comparison, rounds: int, say: Callable[[str], None] = print) -> Result:
    """Run all rounds, then the gate on each. Raises Failed, Unequal."""
    outputs: list[dict[str, Output]] = []
    contenders = comparison.contenders
    for index in range(rounds):
        order = contenders[index % len(contenders) :] + contenders[: index % len(contenders)]
        outputs.append({})
        for contender in order:
            say(f"  round {index + 1} of {rounds}: {contender.name}")
            outputs[-1][contender.name] = run(contender, comparison.timeout_seconds)
        comparison.gate(outputs[-1])
    return Result(comparison, outputs)


def run(contender: Contender, timeout_seconds: float) -> Output:
    """The JSON object on the last line of stdout, with `wall_seconds` of the whole command added. Raises Failed."""
    start = time.perf_counter()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **contender.environment,
    }
    process = subprocess.Popen(
        contender.command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a launcher's ranks must not outlive a time-out
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Failed(f"{contender.name}: no end within {timeout_seconds:.0f} seconds") from None
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise Failed(f"{contender.name}: exit status {process.returncode}\n{output[-OUTPUT_KEPT:]}")
    return {**json.loads(lines[-1]), "wall_seconds": time.perf_counter() - start}


def python(*arguments: str | Path) -> list[str]:
    """argv for a script in the environment that runs the benchmarks."""
    return [sys.executable, *map(str, arguments)]


def launched(ranks: int, *arguments: str | Path) -> list[str]:
    """argv for a script on `ranks` ranks by the deepspeed launcher of the same environment."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", str(ranks), *map(str, arguments)]


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
