"""Solved problems to show to the teacher: the user's own, or drawn from a data set that has steps."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.errors import UserError
from trainer.problems.exemplars import read_exemplars
from trainer.problems.problem import Problem, RejectedRecord
from trainer.problems.sources import DATA, read_problems
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, filter_sample
from trainer.teacher.prompts import solution_text
from trainer.teacher.settings import AnnotateSettings

_POOL = 500  # stories to draw from


def choose_exemplars(settings: AnnotateSettings, held_out: HeldOutQuestions) -> list[Problem]:
    """The exemplars of a run, [] without any. A function of the settings and of the data.

    From a file: all of it, in order. From gold: `exemplars_from_gold` problems with complete steps that match no test
    question, drawn with the seed. Raises UserError for a record that is not a complete solved problem, for an
    exemplar that is a test question, and if there are too few.
    """
    if settings.exemplars:
        return list(_from_file(settings, held_out))
    if not settings.exemplars_from_gold:
        return []
    data, path, split = parse_source(settings.exemplars_data, "exemplars_data")
    options = dataset_options(data, settings.seed)
    if data == "stories":
        options["num_problems"] = _POOL
    problems = _problems(read_problems(data, split, path or None, **options))
    rules = FilterConfig(settings.style)
    pool = [p for p in problems if not _fault(p, rules) and held_out.match(p.question) is None]
    if len(pool) < settings.exemplars_from_gold:
        what = "sub-questions and solutions" if settings.style == "socratic" else "solutions"
        raise UserError(
            f"exemplars_data {settings.exemplars_data}: {len(pool)} problems have good {what} and are no test question, "
            f"{settings.exemplars_from_gold} were asked for"
        )
    return random.Random(f"exemplars {settings.seed}").sample(pool, settings.exemplars_from_gold)


def parse_source(text: str, name: str) -> tuple[str, str, str]:
    """`gsm8k:data/gsm8k:test` -> its three parts; the path may hold colons. Raises UserError."""
    data, colon, rest = text.partition(":")
    path, second_colon, split = rest.rpartition(":")
    if not colon or not second_colon or not split or data not in DATA:
        raise UserError(f"{name} is {text!r}; write DATA:PATH:SPLIT with DATA one of {', '.join(DATA)}")
    return data, path, split


def dataset_options(data: str, seed: int) -> dict[str, Any]:
    """What a data set takes of the seed: the same svamp seed for training, test and exemplars."""
    return {"seed": seed} if data in ("svamp", "stories") else {}


def _from_file(settings: AnnotateSettings, held_out: HeldOutQuestions) -> Iterator[Problem]:
    path = settings.exemplars
    for record in read_exemplars(path):
        if fault := _fault(record, FilterConfig(settings.style)):
            raise UserError(f"{path}: exemplar {record.id} {fault}; mend it, or take another one")
        if match := held_out.match(record.question):
            raise UserError(f"{path}: exemplar {record.id} is the test question {match}; take another one")
        yield record


def _fault(problem: Problem, rules: FilterConfig) -> str:
    """Why a problem cannot show how to write a solution, or "": the teacher must not learn what we would reject."""
    if not problem.steps:
        return "has no steps"
    if not all(step.solution for step in problem.steps):
        return "has a step without solution"
    if rules.style == "socratic" and not all(step.question for step in problem.steps):
        return "has a step without sub-question"
    verdict = filter_sample(solution_text(problem, rules.style), "stop", problem, rules)
    return "" if verdict.is_kept else f"would be rejected itself ({verdict.reason}: {verdict.detail})"


def _problems(records: Iterable[Problem | RejectedRecord]) -> Iterator[Problem]:
    return (record for record in records if isinstance(record, Problem))
