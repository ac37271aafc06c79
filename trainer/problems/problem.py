"""Define Problem, the common format of all data sets, and RejectedRecord, for records that are not valid problems.

The text of an example has one line for each sub-question and each solution, and the last line `#### answer`. So every
sub-question, solution and answer must be one line without the answer delimiter `####`. The readers of the data sets
normalise these texts with `one_line`. For a text that still breaks the rules, the constructors raise RecordError.
"""

from dataclasses import dataclass

DELIMITER = "####"
MAX_ID_CHARACTERS = 200
MAX_REJECTED_TEXT = 200

REJECTION_REASONS = {
    "not_utf8": "the bytes are not UTF-8, or a text contains half of a surrogate pair",
    "not_json": "the record is not JSON",
    "not_an_object": "the record is JSON, but not an object",
    "too_long": "the record is longer than 1 MiB, or its example is longer than max_length tokens",
    "changed_by_tokenizer": "the tokens of the problem do not decode to its text",
    "nul_character": "a text contains the character NUL",
    "unknown_key": "the record has an unknown key",
    "wrong_type": "a value has the wrong type",
    "no_question": "the question is missing or blank",
    "no_answer": "the answer is missing or blank",
    "no_delimiter": "the solution does not end with '#### answer'",
    "bad_answer": "the answer is of the wrong type or not one line",
    "bad_step": "a step is blank, not one line, or contains the answer delimiter",
    "bad_fact": "a fact is blank or not one line",
    "bad_id": "the id is blank, too long, not one line, or not one of the data set's",
    "repeated_id": "an earlier record has the same id",
    "answer_mismatch": "the record contradicts itself: its equation does not give its answer",
}


class RecordError(ValueError):
    """A record is not a valid problem. `reason` is a key of REJECTION_REASONS, `detail` describes the fault."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REJECTION_REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Step:
    """Reasoning step: a one-line sub-question, and a one-line solution with calculator annotations `<<3*4=12>>`.

    Either text may be "", but not both. Raises RecordError for an invalid text.
    """

    question: str = ""
    solution: str = ""

    def __post_init__(self) -> None:
        if not self.question and not self.solution:
            raise RecordError("bad_step", "neither a sub-question nor a solution")
        for name, text in (("sub-question", self.question), ("solution", self.solution)):
            _check_characters(f"the {name}", text)
            if text != one_line(text):
                raise RecordError("bad_step", f"the {name} is not one single-spaced line: {text[:80]!r}")
            if DELIMITER in text:
                raise RecordError("bad_step", f"the {name} contains the delimiter {DELIMITER}: {text[:80]!r}")


@dataclass(frozen=True)
class Problem:
    """Question, answer and reasoning steps.

    id: unique within a data set. question: one or several lines, stripped. answer: one line; a number has no thousands
    separators. steps: in order, () if the data has none. facts: one-line statements (StrategyQA) that are not part of the
    question. Raises RecordError for an invalid text.
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
            raise RecordError("no_question", "the question starts or ends with white space")
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
    """Record that is not a valid problem, for rejects.jsonl.

    source: file or Hub name. line: number, from 1, of the record's first line (in Hub data, of the record's row). reason: a
    key of REJECTION_REASONS. detail: the fault. text: the first 200 characters of the raw record.
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
    """Return the stripped text. Each run of white space (including line breaks) is replaced with one space."""
    return " ".join(text.split())


def _check_characters(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise RecordError("wrong_type", f"{name} is not text but {type(text).__name__}")
    if "\0" in text:
        raise RecordError("nul_character", f"{name} contains NUL at character {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can encode a lone surrogate ("\ud83d"); UTF-8 cannot
        detail = f"{name} contains half a surrogate pair at character {error.start}"
        raise RecordError("not_utf8", detail) from None
