"""Prompts for the teacher: a template file, filled with one problem and solved exemplars.

Few-shot exemplars are from the user's file, or drawn from a data set that has steps.

Templates are Jinja2 in a sandbox, with these names:

| name | |
| --- | --- |
| `question` | the problem |
| `kind` | type of its answer: `number`, `yes_no` or `text` |
| `facts` | list of texts; empty without `with_facts` |
| `exemplars` | list of `question`, `solution` (lines and `#### answer`), `answer` and `facts`; empty without exemplars |
| `answer` | the gold answer; defined only with `gold_hint`, which labels the results |

An undefined name is an error.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.errors import UserError
from trainer.problems import answers
from trainer.problems.problem import DELIMITER, Problem
from trainer.problems.sources import DATA, read_exemplars, read_problems
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, filter_sample
from trainer.teacher.settings import AnnotateSettings

BUILT_IN_PROMPTS = Path(__file__).parent / "prompts"
_NUM_STORIES = 500  # to draw exemplars from
_NEXT_PROBLEM = "\nProblem:"  # start of another problem in the built-in prompts


class PromptBuilder:
    """Template of prompts. `source` and `digest`: of the template's text."""

    def __init__(
        self, file: Path, style: str, exemplars: Sequence[Problem], gold_hint: bool, with_facts: bool
    ) -> None:
        """Raises UserError if the file cannot be read or is not a template."""
        try:
            self.source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt file {file}: {error}") from None
        self.digest = hashlib.sha256(self.source.encode()).hexdigest()
        self.exemplars = tuple(exemplars)
        self._file, self._style = file, style
        self._gold_hint, self._with_facts = gold_hint, with_facts
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        try:
            self._template = environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{file}, line {error.lineno}: {error.message}; see trainer/teacher/prompts"
            ) from None

    def build(self, problem: Problem) -> str:
        """Return the prompt of one problem. Raises UserError if the template uses an undefined name."""
        kind = answers.answer_type(problem.answer)
        values: dict[str, Any] = {
            "question": problem.question,
            "kind": kind,
            "facts": list(problem.facts) if self._with_facts else [],
            "exemplars": [self._exemplar_values(exemplar) for exemplar in self._exemplars_for(problem, kind)],
        }
        if self._gold_hint:
            values["answer"] = problem.answer
        try:
            return self._template.render(values).strip("\n")
        except UndefinedError as error:
            remedy = (
                "give --gold_hint to show the gold answer" if "'answer'" in str(error) else "see its names"
            )
            raise UserError(f"{self._file}: {error.message}; {remedy} (trainer/teacher/prompts.py)") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self._file}: cannot be filled with problem {problem.id}: {error}") from None

    def _exemplars_for(self, problem: Problem, kind: str) -> list[Problem]:
        """Return the exemplars with the same kind of answer, without the problem itself."""
        same_kind = [exemplar for exemplar in self.exemplars if answers.answer_type(exemplar.answer) == kind]
        if self.exemplars and not same_kind:
            raise UserError(
                f"problem {problem.id} asks for a {kind} but no exemplar answers with one; "
                "choose exemplars of the same kind of problem"
            )
        return [exemplar for exemplar in same_kind if exemplar.question != problem.question]

    def _exemplar_values(self, exemplar: Problem) -> dict[str, Any]:
        return {
            "question": exemplar.question,
            "solution": solution_text(exemplar, self._style),
            "answer": exemplar.answer,
            "facts": list(exemplar.facts) if self._with_facts else [],
        }


def solution_text(problem: Problem, style: str) -> str:
    """Return a solved problem in the format required of the teacher: lines, then `#### answer`."""
    lines = []
    for step in problem.steps:
        lines += [step.question, step.solution] if style == "socratic" else [step.solution]
    return "\n".join([*lines, f"{DELIMITER} {problem.answer}"])


def stop_texts(settings: AnnotateSettings) -> list[str]:
    """Return the stop strings: the setting, or for completions of a built-in prompt the start of another problem.

    Chat models need none, and not all accept `stop`.
    """
    is_completion = bool(settings.model_name_or_path) or settings.api == "completions"
    return settings.stop or ([_NEXT_PROBLEM] if is_completion and not settings.prompt else [])


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
