"""Tests of matching with test questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.problems.problem import Problem
from trainer.problems.sources import read_problems
from trainer.teacher.decontaminate import HeldOutQuestions, words

LONG = (
    "Tom has 3 bags of 4 apples and he gives 1,080 of them to Ann who has 0.5 left. How many does Tom have?"
)
SHORT = "Did Aristotle use a laptop?"
HELD_OUT = HeldOutQuestions([("a", LONG), ("b", SHORT)])


def test_words() -> None:
    assert words("It's 1,080 — not 0.5, 3,4 or ½!") == (
        "it",
        "s",
        "1080",
        "not",
        "0.5",
        "3",
        "4",
        "or",
        "1",
        "2",
    )


@pytest.mark.parametrize(
    ("question", "match"),
    [
        (LONG, "a"),
        (LONG.upper().replace(".", " ;"), "a"),
        (LONG.replace("1,080", "1080"), "a"),
        ("Once upon a time, " + LONG, "a"),
        (LONG.replace("Tom has 3 bags", "Tom owns 3 bags"), "a"),  # 13 words are left in common
        (" ".join(LONG.split()[:12]) + " horses", None),  # 12 are not
        (LONG.replace("1,080", "7").replace("0.5", "2"), None),  # other numbers, never 13 words in a row
        ("Did Aristotle use a laptop", "b"),
        ("Tell me: did Aristotle use a laptop, or a slate?", "b"),
        ("Did Aristotle use a slate?", None),
        ("Aristotle use", "b"),  # all of it occurs in a test question
        ("?!", None),
    ],
)
def test_matches(question: str, match: str | None) -> None:
    assert HELD_OUT.match(question) == match


def test_whole_questions_only() -> None:
    held_out = HeldOutQuestions([("a", LONG)], ngram=0)
    assert held_out.match(LONG.lower()) == "a"
    assert held_out.match("Once upon a time, " + LONG) is None


def test_svamp_varies_its_own_stories(shared_data: Path) -> None:
    """No question is in both splits, but a fifth shares 13 words with a test question."""
    train, test = (
        [p for p in read_problems("svamp", split, str(shared_data / "svamp")) if isinstance(p, Problem)]
        for split in ("train", "test")
    )
    for ngram, expected in ((0, 0), (13, 141)):
        held_out = HeldOutQuestions([(p.id, p.question) for p in test], ngram)
        assert sum(held_out.match(p.question) is not None for p in train) == expected
    assert all(held_out.match(p.question) for p in test)
