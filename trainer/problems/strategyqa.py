"""Reader of StrategyQA (Geva et al. 2021, arXiv:2101.02235): yes/no questions with implicit reasoning steps.

The published files are `train.json` (2061 problems) and `dev.json` (229 problems). Each file is one JSON array. The
official test set has no answers. The steps of a problem are the sub-questions in `decomposition`, without solutions.
References to earlier answers (`#1`, `#2`) are not replaced. `facts` become `Problem.facts`. `term`, `description` and
`evidence` are ignored. Hub copies without `decomposition` give problems without steps.
"""

from typing import Any

from trainer.problems.problem import Problem, RecordError, Step, one_line
from trainer.problems.records import json_type, optional_texts, required_text


def problem_from_record(record: dict[str, Any], id: str) -> Problem:
    """Return the problem of a record. `id` is used if the record has no `qid`. Raises RecordError for an invalid record."""
    if record.get("qid") is not None:
        id = required_text(record, "qid", "bad_id")
    answer = record.get("answer")
    if answer is None:
        raise RecordError("no_answer", "no 'answer': the official test set has none")
    if not isinstance(answer, bool):
        raise RecordError("wrong_type", f"'answer' is {json_type(answer)}, expected true or false")
    has_one_fact = isinstance(record.get("facts"), str)
    facts = [record["facts"]] if has_one_fact else optional_texts(record, "facts")
    return Problem(
        id=id,
        question=one_line(required_text(record, "question", "no_question")),
        answer="yes" if answer else "no",
        steps=tuple(Step(question=one_line(text)) for text in optional_texts(record, "decomposition")),
        facts=tuple(map(one_line, facts)),
    )
