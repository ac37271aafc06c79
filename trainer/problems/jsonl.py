"""Reader and writer of the user's own problems: one JSON object per line, or one JSON array of objects with the keys below.

| key | | value |
| --- | --- | --- |
| `question` | required | text, may have several lines |
| `answer` | required | one line of text, a number, or true/false (read as yes/no) |
| `steps` | optional | list of `{"question": ..., "solution": ...}`, in order; either key may be missing |
| `facts` | optional | list of texts |
| `id` | optional | text or integer, unique; default: split and position from 0, e.g. `train-000012` |
| `meta` | optional | any value, for example other columns of the data; ignored |

A solution may contain calculator annotations, `48/2 = <<48/2=24>>24`. Write a numeric answer without a unit (`18`, not
`18 dollars`), because an answer with a unit is compared as text. Line breaks in steps and facts become spaces. A record with
any other key is rejected. Otherwise, a record with the misspelt key `step` would be read without its steps.

    {"question": "Ann has 3 bags of 4 nuts. How many nuts?", "answer": 12,
     "steps": [{"question": "How many nuts are in 3 bags?", "solution": "3*4 = <<3*4=12>>12 nuts"}]}
"""

from typing import Any

from trainer.problems import answers
from trainer.problems.problem import Problem, RecordError, Step, one_line
from trainer.problems.records import answer_text, json_type, optional_texts, required_text

PROBLEM_KEYS = ("id", "question", "answer", "steps", "facts", "meta")
STEP_KEYS = ("question", "solution")


def problem_from_record(record: dict[str, Any], id: str) -> Problem:
    """Return the problem of one record. `id` is the default id. Raises RecordError for an invalid record."""
    _check_keys("the record", record, PROBLEM_KEYS)
    own_id = record.get("id")
    if own_id is not None:
        id = str(own_id) if type(own_id) is int else required_text(record, "id", "bad_id")
    steps = record.get("steps")
    if steps is not None and not isinstance(steps, list):
        raise RecordError("wrong_type", f"'steps' is {json_type(steps)}, expected a list")
    return Problem(
        id=id,
        question=required_text(record, "question", "no_question"),
        answer=answers.strip_thousands(one_line(answer_text(record, "answer"))),
        steps=tuple(_step(number, step) for number, step in enumerate(steps or (), start=1)),
        facts=tuple(one_line(text) for text in optional_texts(record, "facts")),
    )


def record_from_problem(problem: Problem, meta: Any = None) -> dict[str, Any]:
    """Return the record of a problem, with the key `meta` if `meta` is not None. Inverse of `problem_from_record`."""
    record: dict[str, Any] = {"id": problem.id, "question": problem.question, "answer": problem.answer}
    if problem.steps:
        record["steps"] = [{"question": step.question, "solution": step.solution} for step in problem.steps]
    if problem.facts:
        record["facts"] = list(problem.facts)
    return record if meta is None else {**record, "meta": meta}


def _step(number: int, step: Any) -> Step:
    if not isinstance(step, dict):
        raise RecordError("wrong_type", f"step {number} is {json_type(step)}, expected an object")
    _check_keys(f"step {number}", step, STEP_KEYS)
    values = [step.get(key) or "" for key in STEP_KEYS]
    if not all(isinstance(value, str) for value in values):
        raise RecordError("wrong_type", f"'question' and 'solution' of step {number} must be texts")
    return Step(*map(one_line, values))


def _check_keys(name: str, record: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(record) - set(known)):
        raise RecordError("unknown_key", f"{name} has {unknown[0]!r}; known are {', '.join(known)}")
