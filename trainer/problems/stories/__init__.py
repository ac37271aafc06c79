"""Generated multi-step word problems, so that a study runs without a download.

The same arguments give the same problems on every platform and Python version, because the generator is seeded with a
string and uses only `Random.random`.

The split of a story depends only on `canonical(question)`, in which `@` replaces names and pronouns. Therefore, stories
that differ only in their people are in the same split, for all seeds and options.
"""

import hashlib
import random
import re
from collections.abc import Iterator

from trainer.errors import UserError
from trainer.problems.problem import Problem
from trainer.problems.stories.generator import Retry, Story
from trainer.problems.stories.templates import PEOPLE

SPLITS = ("train", "validation", "test")
MAX_STEPS = 10

_KEY = b"stories, format 2"
_TENTHS = {0: "test", 1: "validation"}
_NAMES = "|".join(person.name for person in PEOPLE)
_PERSON = re.compile(rf"\b(?:{_NAMES}|[Ss]?[Hh]e)\b")
_ATTEMPTS = 10_000


def canonical(question: str) -> str:
    """Return the question with every name and personal pronoun replaced by `@`."""
    return _PERSON.sub("@", question)


def split_of(question: str) -> str:
    """Return the split of a story: a tenth of all stories is in `test`, a tenth in `validation`, the rest in `train`."""
    return _TENTHS.get(_digest(question) % 10, "train")


def generate_problems(
    split: str, *, seed: int = 0, num_problems: int = 10_000, min_steps: int = 2, max_steps: int = 4
) -> Iterator[Problem]:
    """Yield `num_problems` different stories of one split; the number of steps is uniform in min_steps..max_steps.

    A larger `num_problems` continues the same sequence. Two stories are considered equal if only the names and pronouns of
    their people differ. Raises UserError for invalid arguments, or if there are not enough different stories.
    """
    if split not in SPLITS:
        raise UserError(f"stories have no split {split!r}; choose one of {', '.join(SPLITS)}")
    if num_problems < 0:
        raise UserError(f"num_problems is {num_problems}; it must not be negative")
    if not 1 <= min_steps <= max_steps <= MAX_STEPS:
        limits = f"1 <= min_steps <= max_steps <= {MAX_STEPS}"
        raise UserError(f"stories need {limits}, got {min_steps} and {max_steps}")
    rng = random.Random(f"stories {split} {seed}")
    seen: set[int] = set()
    for _ in range(num_problems):
        num_steps = min_steps + int(rng.random() * (max_steps - min_steps + 1))
        for _ in range(_ATTEMPTS):
            try:
                story = Story(rng, num_steps)
            except Retry:
                continue
            question = story.question
            digest = _digest(question)
            if _TENTHS.get(digest % 10, "train") == split and digest not in seen:
                break
        else:
            raise UserError(
                f"stories: found only {len(seen)} different {split} stories of {min_steps} to {max_steps} steps; "
                f"give a num_problems below {num_problems}, or a larger max_steps"
            )
        seen.add(digest)
        answer = story.steps[-1].solution.partition(">>")[2].split()[0]
        yield Problem(id=f"stories-{digest:016x}", question=question, answer=answer, steps=tuple(story.steps))


def _digest(question: str) -> int:
    """Return a 64-bit keyed hash of the canonical question."""
    text = canonical(question).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=_KEY).digest(), "big")
