"""Few-shot exemplars for the teacher: from the user's file, or drawn from a data set that has steps."""

from __future__ import annotations

import random
from typing import Any

from trainer.errors import UserError
from trainer.problems.problem import Problem
from trainer.problems.sources import DATA, read_exemplars, read_problems
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, filter_sample
from trainer.teacher.prompts import solution_text
from trainer.teacher.settings import AnnotateSettings

_NUM_STORIES = 500  # to draw from


def choose_exemplars(settings: AnnotateSettings, held_out: HeldOutQuestions) -> list[Problem]:
    """Return the exemplars of a run; they depend on settings and data only.

    From a file: all of its problems, in order. From gold: `exemplars_from_gold` problems with complete steps that match
    no test question, drawn with the seed. Raises UserError for a record that is not a complete solved problem, for an
    exemplar that is a test question, and if there are too few.
    """
    config = FilterConfig(settings.style)
    if settings.exemplars:
        path = settings.exemplars
        exemplars = read_exemplars(path)
        for exemplar in exemplars:
            if defect := _defect(exemplar, config):
                raise UserError(f"{path}: exemplar {exemplar.id} {defect}; correct it, or take another one")
            if match := held_out.match(exemplar.question):
                raise UserError(
                    f"{path}: exemplar {exemplar.id} is the test question {match}; take another one"
                )
        return exemplars
    if not settings.exemplars_from_gold:
        return []
    data, path, split = parse_source(settings.exemplars_data, "exemplars_data")
    options = dataset_options(data, settings.seed)
    if data == "stories":
        options["num_problems"] = _NUM_STORIES
    records = read_problems(data, split, path or None, **options)
    problems = [record for record in records if isinstance(record, Problem)]
    pool = [p for p in problems if not _defect(p, config) and held_out.match(p.question) is None]
    if len(pool) < settings.exemplars_from_gold:
        parts = "sub-questions and solutions" if settings.style == "socratic" else "solutions"
        raise UserError(
            f"exemplars_data {settings.exemplars_data}: {len(pool)} problems have good {parts} and are no test question; "
            f"exemplars_from_gold is {settings.exemplars_from_gold}"
        )
    return random.Random(f"exemplars {settings.seed}").sample(pool, settings.exemplars_from_gold)


def parse_source(text: str, name: str) -> tuple[str, str, str]:
    """Split `gsm8k:data/gsm8k:test` into data, path and split; the path may hold colons. Raises UserError."""
    data, colon, rest = text.partition(":")
    path, second_colon, split = rest.rpartition(":")
    if not colon or not second_colon or not split or data not in DATA:
        raise UserError(f"{name} is {text!r}; write DATA:PATH:SPLIT with DATA one of {', '.join(DATA)}")
    return data, path, split


def dataset_options(data: str, seed: int) -> dict[str, Any]:
    """Return the options of `read_problems`: svamp's seed must be equal for training, test and exemplars."""
    return {"seed": seed} if data in ("svamp", "stories") else {}


def _defect(problem: Problem, config: FilterConfig) -> str:
    """Return the reason why a problem is no exemplar, or "". An exemplar must pass the filter itself."""
    if not problem.steps:
        return "has no steps"
    if not all(step.solution for step in problem.steps):
        return "has a step without solution"
    if config.style == "socratic" and not all(step.question for step in problem.steps):
        return "has a step without sub-question"
    result = filter_sample(solution_text(problem, config.style), "stop", problem, config)
    return "" if result.is_kept else f"would be rejected itself ({result.reason}: {result.detail})"
