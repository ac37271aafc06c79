"""Prompts for the teacher: a template file, filled with one problem and solved exemplars.

Exemplars are read from the user's file or drawn from a data set with steps. Templates are rendered by Jinja2 in a sandbox.
A template may use these variables; an undefined variable is an error:

| variable | value |
| --- | --- |
| `question` | the problem |
| `kind` | type of the answer: `number`, `yes_no` or `text` |
| `facts` | list of the problem's facts as texts; empty if the setting `with_facts` is false |
| `exemplars` | list of objects with `question`, `solution` (lines and `#### answer`), `answer` and `facts`; may be empty |
| `answer` | the gold answer; defined only if the setting `gold_hint` is true |
"""

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
from trainer.problems.sources import read_exemplars, read_problems
from trainer.settings import DATA
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, filter_sample
from trainer.teacher.settings import AnnotateSettings

BUILT_IN_PROMPTS = Path(__file__).parent / "prompts"
_NUM_STORIES = 500  # number of problems to generate as the pool of exemplars, if the data set is `stories`
_NEXT_PROBLEM = "\nProblem:"  # start of the next problem, in the format of the built-in prompts


class PromptBuilder:
    """Builder of prompts from a template file. `source`: text of the template. `digest`: SHA-256 of this text.

    Raises UserError if the file cannot be read or is not a template.
    """

    def __init__(
        self, file: Path, style: str, exemplars: Sequence[Problem], gold_hint: bool, with_facts: bool
    ) -> None:
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
            place = f"{file}, line {error.lineno}"
            raise UserError(f"{place}: {error.message}; see trainer/teacher/prompts") from None

    def build(self, problem: Problem) -> str:
        """Return the prompt of one problem. Raises UserError if the template or the exemplars do not suit the problem."""
        answer_type = answers.answer_type(problem.answer)
        values: dict[str, Any] = {
            "question": problem.question,
            "kind": answer_type,
            "facts": list(problem.facts) if self._with_facts else [],
            "exemplars": self._exemplars_for(problem, answer_type),
        }
        if self._gold_hint:
            values["answer"] = problem.answer
        try:
            return self._template.render(values).strip("\n")
        except UndefinedError as error:
            is_answer = "'answer'" in str(error)
            remedy = "give --gold_hint to show the gold answer" if is_answer else "see the defined names"
            raise UserError(f"{self._file}: {error.message}; {remedy} (trainer/teacher/prompts.py)") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self._file}: cannot be filled with problem {problem.id}: {error}") from None

    def _exemplars_for(self, problem: Problem, answer_type: str) -> list[dict[str, Any]]:
        """Return template values of the exemplars with this type of answer, except exemplars with the problem's question."""
        same_type = [e for e in self.exemplars if answers.answer_type(e.answer) == answer_type]
        if self.exemplars and not same_type:
            raise UserError(
                f"problem {problem.id} asks for a {answer_type} but no exemplar answers with one; "
                "choose exemplars of the same kind of problem"
            )
        return [
            {
                "question": exemplar.question,
                "solution": solution_text(exemplar, self._style),
                "answer": exemplar.answer,
                "facts": list(exemplar.facts) if self._with_facts else [],
            }
            for exemplar in same_type
            if exemplar.question != problem.question
        ]


def solution_text(problem: Problem, style: str) -> str:
    """Return the problem's solution in the format that the teacher must write: lines, then `#### answer`."""
    lines = []
    for step in problem.steps:
        lines += [step.question, step.solution] if style == "socratic" else [step.solution]
    return "\n".join([*lines, f"{DELIMITER} {problem.answer}"])


def stop_texts(settings: AnnotateSettings) -> list[str]:
    """Return the stop strings of requests: the setting `stop`, or the default if this setting is empty.

    The default stop string for completions of a built-in prompt is the start of the next problem. Other prompts and chats
    have no default. Chat models end their messages themselves, and not all endpoints accept stop strings.
    """
    is_completion = bool(settings.model_name_or_path) or settings.api == "completions"
    return settings.stop or ([_NEXT_PROBLEM] if is_completion and not settings.prompt else [])


def choose_exemplars(settings: AnnotateSettings, held_out: HeldOutQuestions) -> list[Problem]:
    """Return the exemplars of a run. They depend only on settings and data.

    Setting `exemplars`: all problems of this file, in order. Setting `exemplars_from_gold`: this many problems, drawn at
    random from `exemplars_data`. An exemplar must have steps that pass the filter, and must match no held-out question.
    Raises UserError if a problem of the file violates these conditions, or if too few problems of `exemplars_data` meet them.
    """
    config = FilterConfig(settings.style)
    if settings.exemplars:
        path = settings.exemplars
        exemplars = read_exemplars(path)
        for exemplar in exemplars:
            if defect := _defect(exemplar, config):
                raise UserError(f"{path}: exemplar {exemplar.id} {defect}; correct or replace it")
            if match := held_out.match(exemplar.question):
                raise UserError(f"{path}: exemplar {exemplar.id} is the test question {match}; replace it")
        return exemplars
    if not settings.exemplars_from_gold:
        return []
    data, path, split = parse_source(settings.exemplars_data, "exemplars_data")
    options = dataset_options(data, settings.seed)
    if data == "stories":
        options["num_problems"] = _NUM_STORIES
    records = read_problems(data, split, path or None, **options)
    pool = [
        record
        for record in records
        if isinstance(record, Problem) and not _defect(record, config) and not held_out.match(record.question)
    ]
    if len(pool) < settings.exemplars_from_gold:
        parts = "sub-questions and solutions" if settings.style == "socratic" else "solutions"
        raise UserError(
            f"exemplars_data {settings.exemplars_data}: {len(pool)} problems have good {parts} and are no test question; "
            f"exemplars_from_gold is {settings.exemplars_from_gold}"
        )
    return random.Random(f"exemplars {settings.seed}").sample(pool, settings.exemplars_from_gold)


def parse_source(text: str, name: str) -> tuple[str, str, str]:
    """Split a text DATA:PATH:SPLIT, e.g. `gsm8k:data/gsm8k:test`, into (data, path, split). The path may contain colons.

    `name`: the setting's name, for the message. Raises UserError for another format or an unknown data set.
    """
    data, colon, rest = text.partition(":")
    path, second_colon, split = rest.rpartition(":")
    if not colon or not second_colon or not split or data not in DATA:
        raise UserError(f"{name} is {text!r}; write DATA:PATH:SPLIT with DATA one of {', '.join(DATA)}")
    return data, path, split


def dataset_options(data: str, seed: int) -> dict[str, Any]:
    """Return the options of `read_problems`. The seed determines the split of svamp, so all reads must use the same seed."""
    return {"seed": seed} if data in ("svamp", "stories") else {}


def _defect(problem: Problem, config: FilterConfig) -> str:
    """Return the reason why a problem cannot be an exemplar, or "" if its steps are complete and pass the filter."""
    if not problem.steps:
        return "has no steps"
    if not all(step.solution for step in problem.steps):
        return "has a step without solution"
    if config.style == "socratic" and not all(step.question for step in problem.steps):
        return "has a step without sub-question"
    result = filter_sample(solution_text(problem, config.style), "stop", problem, config)
    return "" if result.is_kept else f"would be rejected itself ({result.reason}: {result.detail})"
