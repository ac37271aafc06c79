"""Reader of StrategyQA (Geva et al. 2021, arXiv:2101.02235): yes/no questions with implicit reasoning steps.

The published files are `train.json` (2061 problems) and `dev.json` (229), one JSON array each; the official test set has
no answers. `decomposition` gives sub-questions without solutions, with unresolved references `#1`, `#2` to earlier
answers. `facts` become `Problem.facts`; `term`, `description` and `evidence` are ignored. Copies on the Hub without
`decomposition` give problems without steps.
"""

from __future__ import annotations

from typing import Any

from trainer.problems.problem import Problem, RecordError, Step, one_line
from trainer.problems.records import json_type, optional_texts, required_text


def problem_from_record(record: dict[str, Any], id: str) -> Problem:
    """Return the problem of one element of `train.json`; `id` is used if it has no `qid`. Raises RecordError."""
    if record.get("qid") is not None:
        id = required_text(record, "qid", "bad_id")
    answer = record.get("answer")
    if answer is None:
        raise RecordError("no_answer", "no 'answer': the official test set has none")
    if not isinstance(answer, bool):
        raise RecordError("wrong_type", f"'answer' is {json_type(answer)}, expected true or false")
    facts = record.get("facts")
    return Problem(
        id=id,
        question=one_line(required_text(record, "question", "no_question")),
        answer="yes" if answer else "no",
        steps=tuple(Step(question=one_line(text)) for text in optional_texts(record, "decomposition")),
        facts=tuple(
            one_line(text)
            for text in ([facts] if isinstance(facts, str) else optional_texts(record, "facts"))
        ),
    )
