"""Reader of SVAMP (Patel et al. 2021, NAACL): 1000 word problems with one or two operations, in the file `SVAMP.json`.

A problem has one step, its equation with a calculator annotation: `( 76.0 - 25.0 )` becomes `76 - 25 = <<76-25=51>>51`.
The question is `Body` and `Question` joined by a space, as in zero-shot CoT (Kojima et al. 2022). In 358 problems `Body`
does not end with a full stop, and the reader does not add one.

There is no official split. `split_of` divides the ids `chal-1` ... `chal-1000` into 700 for training and 300 for testing by
a hash of seed and id. The split depends neither on the order nor on the completeness of the file or Hub copy. Training
and test problems must be read with the same seed.

The record `chal-680` is rejected, because its answer is 1, but its text and its equation give 5. With seed 0, this record is
in the test split, so 299 test problems are left.
"""

import functools
import hashlib
import re
from typing import Any

from trainer.problems import answers, calculator
from trainer.problems.problem import Problem, RecordError, Step, one_line
from trainer.problems.records import answer_text, required_text

SPLITS = ("train", "test", "all")
NUM_PROBLEMS = 1000
NUM_TEST = 300


def problem_from_record(record: dict[str, Any], id: str = "") -> Problem:
    """Convert an element of SVAMP.json or a row of a Hub copy to a problem. Raises RecordError for an invalid record.

    The argument `id` is ignored, because every valid record has an `ID`.
    """
    id = required_text(record, "ID", "bad_id")
    split_of(id)  # raises for an invalid id
    body = required_text(record, "Body", "no_question")
    question = required_text(record, "Question", "no_question")
    answer = _without_zeros(answer_text(record, "Answer"))
    expression = _expression(required_text(record, "Equation", "bad_step"))
    result = calculator.evaluate(expression)
    if result is None:
        raise RecordError("bad_step", f"the equation is not arithmetic: {record['Equation']!r}")
    if not answers.answers_match(answer, result):
        detail = f"the equation {expression} gives {result}, the answer is {answer}"
        raise RecordError("answer_mismatch", detail)
    spaced = re.sub(r"\s*([-+*/])\s*", r" \1 ", expression)
    step = Step(solution=f"{spaced} = <<{expression}={result}>>{result}")
    return Problem(id, f"{one_line(body)} {one_line(question)}", result, steps=(step,))


def split_of(id: str, seed: int = 0) -> str:
    """Return the split of an id, `train` or `test`. Raises RecordError for an id that is not in the data set."""
    if not re.fullmatch(r"chal-[1-9][0-9]{0,3}", id) or int(id[5:]) > NUM_PROBLEMS:
        raise RecordError("bad_id", f"{id[:80]!r} is not one of chal-1 ... chal-{NUM_PROBLEMS}")
    return "test" if id in _test_ids(seed) else "train"


def in_split(record: dict[str, Any], split: str, seed: int = 0) -> bool:
    """Return whether a record is in `split`. Return True for an invalid id, so that the reader rejects the record."""
    try:
        return split == "all" or split == split_of(required_text(record, "ID", "bad_id"), seed)
    except RecordError:
        return True


@functools.cache
def _test_ids(seed: int) -> frozenset[str]:
    ids = [f"chal-{number}" for number in range(1, NUM_PROBLEMS + 1)]
    ids.sort(key=lambda id: hashlib.sha256(f"svamp {seed} {id}".encode()).digest())
    return frozenset(ids[:NUM_TEST])


def _expression(equation: str) -> str:
    """Return an equation without spaces, outer parentheses and final zeros of decimals: `((4.0 - 2.0) + 3.0)` -> `(4-2)+3`."""
    expression = re.sub(r"[0-9]+\.[0-9]+", lambda match: _without_zeros(match[0]), "".join(equation.split()))
    # "(1)+(2)" stays as it is, because "1)+(2" cannot be evaluated.
    while re.fullmatch(r"\(.*\)", expression) and calculator.evaluate(expression[1:-1]) is not None:
        expression = expression[1:-1]
    return expression


def _without_zeros(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number
