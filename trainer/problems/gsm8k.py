"""Reader of GSM8K (Cobbe et al. 2021, arXiv:2110.14168): 7473 training and 1319 test word problems of grade school.

The `answer` of a record has one line per step and a last line `#### 72`. A step's line is a solution in the plain files
and `sub-question ** solution` in the Socratic ones. Blank lines, and Socratic lines without a solution, are skipped, so
that a problem has the same solutions in both files (tested).

Splits: `train`, `test`, and `train_socratic`, `test_socratic` with the same problems and ids. `gsm8k-test-000012` is row
12 of the test split, counted from 0, as in lm-evaluation-harness.
"""

from __future__ import annotations

from typing import Any

from trainer.problems import answers
from trainer.problems.problem import DELIMITER, Problem, RecordError, Step, one_line
from trainer.problems.records import required_text

SOCRATIC = "_socratic"
_MARK = " ** "


def problem_from_record(record: dict[str, Any], id: str) -> Problem:
    """Return the problem of one record of a plain or Socratic file. Raises RecordError."""
    question = required_text(record, "question", "no_question")
    solution, delimiter, answer = required_text(record, "answer", "no_answer").rpartition(DELIMITER)
    if not delimiter:
        raise RecordError("no_delimiter", f"the solution has no {DELIMITER!r} before its answer")
    answer = one_line(answer)
    if not answer:
        raise RecordError("no_answer", f"nothing follows {DELIMITER!r}")
    if answers.answer_type(answer) != "number":
        raise RecordError("bad_answer", f"{answer[:80]!r} is not a number")
    return Problem(id, question, answers.strip_thousands(answer), steps=_steps(solution))


def _steps(solution: str) -> tuple[Step, ...]:
    lines = [f"{line.strip()} " for line in solution.split("\n") if line.strip()]
    num_marked = sum(_MARK in line for line in lines)
    if num_marked == 0:
        return tuple(Step(solution=one_line(line)) for line in lines)
    if num_marked < len(lines):
        raise RecordError(
            "bad_step", f"only {num_marked} of {len(lines)} lines are 'sub-question ** solution'"
        )
    halves = [line.split(_MARK, 1) for line in lines]
    return tuple(Step(one_line(question), one_line(text)) for question, text in halves if text.strip())
