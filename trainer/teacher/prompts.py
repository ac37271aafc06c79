"""Prompts for the teacher: a template file, filled with one problem and solved exemplars.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.errors import UserError
from trainer.problems import answers
from trainer.problems.problem import DELIMITER, Problem
from trainer.teacher.settings import AnnotateSettings

BUILT_IN_PROMPTS = Path(__file__).parent / "prompts"
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
