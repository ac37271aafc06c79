"""Evaluation: problems a second to the same answers, and what a second rank is worth. See benchmarks/README.md."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.harness import REPOSITORY, Comparison, Contender, Output, Unequal, no_gate, python

HERE = Path(__file__).resolve().parent
PROBLEMS, PROBLEMS_OF_A_PAIR, SLOTS = 24, 12, 12
PROBLEMS_OF_RANKS, SLOTS_OF_A_RANK = 64, 8
MODEL = "GPT-2 6 x 384 that knows the problems by heart, fp32, one core"


def comparisons() -> Iterator[Comparison]:
    subprocess.run(python(HERE / "material.py"), check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    yield _speed(
        f"evaluation, unified, calculator on: {PROBLEMS} problems, {SLOTS} at a time",
        [_ours(PROBLEMS), _peer("generate", PROBLEMS), _peer("continuous", PROBLEMS)],
        goal=1.4,
        notes=f"{MODEL}; gate: equal texts and numbers of tokens for every problem. The goal against static batches "
        "(generate) is 2x, against continuous batching 1.4x.",
    )
    yield _speed(
        f"evaluation, unified, calculator off: {SLOTS} problems, {SLOTS} at a time",
        [_ours(SLOTS, "--without_calculator"), _peer("lm_eval", SLOTS, "--without_calculator")],
        goal=2.0,
        notes="lm-evaluation-harness has no calculator. One batch, so that nothing can be refilled.",
    )
    yield _speed(
        f"evaluation, decomposer and solver in turn: {PROBLEMS_OF_A_PAIR} problems",
        [_ours(PROBLEMS_OF_A_PAIR, "--pair"), _peer("in_turn", PROBLEMS_OF_A_PAIR)],
        goal=3.0,
        notes="the peer solves one problem at a time, and each turn reads everything before it anew.",
    )
    slots, problems = str(SLOTS_OF_A_RANK), str(PROBLEMS_OF_RANKS)
    command = python(HERE / "ranks.py", "--slots", slots, "--problems", problems)
    splits = {
        "ours": "queue",
        "fixed split": "fixed",
        "ours, in forward passes": "queue_in_passes",
        "fixed split, in forward passes": "fixed_in_passes",
    }
    yield Comparison(
        work=f"evaluation, two ranks against one: {problems} uneven problems, {slots} at a time on a rank",
        figure="speedup",
        unit="x one rank",
        contenders=[
            Contender(name, command, peer=name != "ours", ranks=2, is_persistent=True, figure=figure)
            for name, figure in splits.items()
        ],
        gate=no_gate,  # the contender compares the answers of all three by itself
        limit=1.9,
        notes="one core each; all times are of the same launch, its start not counted. In forward passes: those of one rank "
        "against the busier of two, which is the split alone, without what two cores cost each other.",
    )


def same_answers(outputs: Mapping[str, Output]) -> None:
    """Every contender gives the same text, of as many tokens where it tells their number, for every problem."""
    (first, reference), *others = outputs.items()
    for name, output in others:
        pairs = zip(reference["answers"], output["answers"], strict=True)
        for number, (one, other) in enumerate(pairs):
            if one[0] != other[0] or (None not in (one[1], other[1]) and one[1] != other[1]):
                raise Unequal(f"problem {number}: {first} {one!r}, {name} {other!r}")


def _speed(work: str, contenders: list[Contender], goal: float, notes: str) -> Comparison:
    return Comparison(
        work, "problems_per_second", "problems/s", contenders, same_answers, goal=goal, notes=notes
    )


def _ours(problems: int, *more: str) -> Contender:
    return Contender("ours", python(HERE / "ours.py", *_how(problems), *more), peer=False, is_persistent=True)


def _peer(way: str, problems: int, *more: str) -> Contender:
    return Contender(way, python(HERE / "peers.py", way, *_how(problems), *more), is_persistent=True)


def _how(problems: int) -> tuple[str, ...]:
    return "--slots", str(SLOTS), "--problems", str(problems)
