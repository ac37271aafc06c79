"""What every data set is turned into, and what happens to a record that cannot be.

Texts are kept so that an example can be written line by line: a sub-question, a solution and an answer are
one line each, and the answer delimiter `####` occurs in none of them. Whoever makes a Problem says so with
`one_line`; nothing is mended in silence here, a text that breaks the rule raises.
"""

from __future__ import annotations

from dataclasses import dataclass

DELIMITER = "####"
MAX_ID_CHARACTERS = 200
MAX_REJECTED_TEXT = 200

REJECTION_REASONS = {
    "not_utf8": "the bytes are not UTF-8, or a text holds half of a surrogate pair",
    "not_json": "the record is not JSON",
    "not_an_object": "the record is JSON, but not an object",
    "too_long": "the record is longer than any problem, or its example than max_length tokens",
    "changed_by_tokenizer": "the tokens of the problem do not give its text back",
    "nul_character": "a text holds the character NUL",
    "unknown_key": "the record has a key that the format does not know",
    "wrong_type": "a value has another type than the format says",
    "no_question": "the question is missing or blank",
    "no_answer": "the answer is missing or blank",
    "no_delimiter": "the solution does not end with '#### answer'",
    "bad_answer": "the answer is of the wrong kind or not one line",
    "bad_step": "a step is blank, not one line, or holds the answer delimiter",
    "bad_fact": "a fact is blank or not one line",
    "bad_id": "the id is blank, too long, not one line, or not one of the data set's",
    "repeated_id": "an earlier record has the same id",
    "answer_mismatch": "the record contradicts itself: its equation does not give its answer",
}


class RecordError(ValueError):
    """One record is not a problem. `reason` is a key of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REJECTION_REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Step:
    """One step of the reasoning; either text may be "" when the data has none, but not both.

    question: the sub-question, one line. solution: one line, calculator annotations `<<3*4=12>>` inside.
    Raises RecordError (a ValueError) with the reason.
    """

    question: str = ""
    solution: str = ""

    def __post_init__(self) -> None:
        if not self.question and not self.solution:
            raise RecordError("bad_step", "neither a sub-question nor a solution")
        for name, text in (("sub-question", self.question), ("solution", self.solution)):
            _check_characters(f"the {name}", text)
            if text != one_line(text):
                raise RecordError(
                    "bad_step", f"the {name} is not one line of single-spaced text: {text[:80]!r}"
                )
            if DELIMITER in text:
                raise RecordError("bad_step", f"the {name} holds the delimiter {DELIMITER}: {text[:80]!r}")


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer and the answer.

    id: unique within a data set. question: may have several lines; no blanks around it. answer: one line; a
    number is written without thousands separators. steps: in order, () when the data has none. facts:
    one-line statements that help (StrategyQA), not part of the question. Raises RecordError (a ValueError)
    with the reason.
    """

    id: str
    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    facts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_characters("the id", self.id)
        if not self.id or self.id != one_line(self.id) or len(self.id) > MAX_ID_CHARACTERS:
            raise RecordError("bad_id", f"{self.id[:80]!r} is blank, not one line or too long")
        _check_characters("the question", self.question)
        if not self.question:
            raise RecordError("no_question", "the question is blank")
        if self.question != self.question.strip():
            raise RecordError("no_question", "the question has blanks around it; strip it")
        _check_characters("the answer", self.answer)
        if not self.answer:
            raise RecordError("no_answer", "the answer is blank")
        if self.answer != one_line(self.answer) or DELIMITER in self.answer:
            raise RecordError("bad_answer", f"not one line without {DELIMITER}: {self.answer[:80]!r}")
        for fact in self.facts:
            _check_characters("a fact", fact)
            if not fact or fact != one_line(fact):
                raise RecordError("bad_fact", f"blank, or not one line: {fact[:80]!r}")


@dataclass(frozen=True)
class RejectedRecord:
    """A record that was left out, so that nothing is left out in silence.

    source: file or hub name. line: the record's first line in it, from 1 (a hub data set: its row, from 1).
    reason: a key of REASONS. detail: what was found. text: the raw record, cut off after 200 characters.
    """

    source: str
    line: int
    reason: str
    detail: str
    text: str

    def __post_init__(self) -> None:
        assert self.reason in REJECTION_REASONS, self.reason
        object.__setattr__(self, "text", self.text[:MAX_REJECTED_TEXT])


def one_line(text: str) -> str:
    """The text on one line: every run of white space (line breaks included) becomes one space, none around
    it."""
    return " ".join(text.split())


def _check_characters(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise RecordError("wrong_type", f"{what} is not text but {type(text).__name__}")
    if "\0" in text:
        raise RecordError("nul_character", f"{what} holds NUL at character {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, "\ud83d"; no file can hold it
        raise RecordError(
            "not_utf8", f"{what} holds half a surrogate pair at character {error.start}"
        ) from None
