"""Reader of GSM8K (Cobbe et al. 2021, arXiv:2110.14168): 7473 training and 1319 test problems, grade-school math.

The `answer` of a record has one line per step and a last line such as `#### 72`. A step is `solution` in the plain files, and
`sub-question ** solution` in the Socratic files. Blank lines and Socratic lines without a solution are skipped, so that a
problem has the same solutions in both files.

The splits are `train` and `test`. `train_socratic` and `test_socratic` have the same problems and ids. The problem with the id
`gsm8k-test-000012` is row 12 of the test split, counted from 0, as in lm-evaluation-harness.
"""

from typing import Any

from trainer.problems import answers
from trainer.problems.problem import DELIMITER, Problem, RecordError, Step, one_line
from trainer.problems.records import required_text

SOCRATIC = "_socratic"
_MARK = " ** "


def problem_from_record(record: dict[str, Any], id: str) -> Problem:
    """Convert a record of a plain or Socratic file to a problem. Raises RecordError if the record is invalid."""
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


def hub_split(split: str) -> tuple[str, str]:
    """Return the (configuration, split) on the Hub for the name of a local split."""
    return "socratic" if split.endswith(SOCRATIC) else "main", split.removesuffix(SOCRATIC)


def _steps(solution: str) -> tuple[Step, ...]:
    lines = [f"{line.strip()} " for line in solution.split("\n") if line.strip()]
    num_marked = sum(_MARK in line for line in lines)
    if num_marked == 0:
        return tuple(Step(solution=one_line(line)) for line in lines)
    if num_marked < len(lines):
        detail = f"only {num_marked} of {len(lines)} lines are 'sub-question ** solution'"
        raise RecordError("bad_step", detail)
    halves = [line.split(_MARK, 1) for line in lines]
    return tuple(Step(one_line(question), one_line(text)) for question, text in halves if text.strip())
