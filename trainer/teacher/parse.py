"""Parse a teacher's text: steps line by line, then `#### answer`.

`cot`: every line is a solution. `socratic`: sub-questions and solutions in turn, starting with a sub-question.
These decorations are recognised and removed:

- blank lines, lines of a code fence (```), and one introduction that ends with a colon ("Here is the solution:");
- a bullet (`- `, `* `) or a number (`1. `, `2) `, `Step 3: `) before a line, and `**bold**` at its beginning;
- socratic: the labels `Q:`, `Question 2:`, `Sub-question:` and `A:`, `S:`, `Answer:`, `Solution 2:`. If there
  are labels, a line without one continues the line above it; else every line is one whole text;
- socratic: sub-question and solution on one line, `sub-question ** solution`, as in GSM8K's files;
- anything after the line of the answer.

Without labels, lines must alternate, sub-questions must end with a question mark and solutions must not; otherwise a
missing line would pair every later question with the wrong solution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.problems.problem import DELIMITER, RecordError, Step, one_line

_BULLET = re.compile(r"(?:[-*•]\s+)?(?:\*\*(?P<bold>[^*]+)\*\*)?")
_NUMBER = re.compile(r"(?:step\s*)?\(?[0-9]{1,2}\s?[.):]\s+|step\s*[0-9]{1,2}\s*[:.]\s*", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:(?P<question>sub-?\s?question|question|q)|(?:solution|answer|a|s))\s?(?:[0-9]{1,2}\s?[.:)]|:)(?:\s+|$)",
    re.IGNORECASE,
)
_PAIR = " ** "


class ParseError(Exception):
    """The text is no chain of steps. `reason`: "no_answer", "no_steps", "unpaired" or "bad_step"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_steps(text: str, style: str) -> tuple[Step, ...]:
    """Return the steps before `#### answer` in a text of style "cot" or "socratic". Raises ParseError."""
    body, delimiter, answer = text.rpartition(DELIMITER)
    if not delimiter or not answer.partition("\n")[0].strip():
        raise ParseError("no_answer", f"no line '{DELIMITER} answer'")
    stripped = map(str.strip, body.split("\n"))
    lines = [line for line in stripped if line and not line.startswith("```")]
    # An introduction ends with a colon; with a digit it is a step, with a label or "?" a sub-question.
    if lines and lines[0].endswith(":") and not re.search("[0-9?]", lines[0]) and not _label(lines[0])[0]:
        del lines[0]
    if not lines:
        raise ParseError("no_steps", f"there is no text before {DELIMITER}")
    try:
        if style == "cot":
            return tuple(Step(solution=one_line(_strip_decoration(line))) for line in lines)
        return tuple(Step(question, solution) for question, solution in _pairs(lines))
    except RecordError as error:
        raise ParseError("bad_step", error.detail) from None


def _pairs(lines: Sequence[str]) -> list[tuple[str, str]]:
    if all(_PAIR in line for line in lines):
        halves = (_strip_decoration(line).split(_PAIR, 1) for line in lines)
        texts = [(kind, one_line(half)) for pair in halves for kind, half in zip("qs", pair, strict=True)]
    else:
        plain = (one_line(_strip_decoration(line)) for line in lines)
        texts = _labelled(lines) or [("q" if line.endswith("?") else "s", line) for line in plain]
    for number, (kind, text) in enumerate(texts):
        if kind != "qs"[number % 2] or not text:
            expected = "sub-question" if number % 2 == 0 else "solution"
            raise ParseError("unpaired", f"expected a {expected} as text {number + 1}, found {text[:80]!r}")
    if len(texts) % 2:
        raise ParseError("unpaired", f"the last sub-question has no solution: {texts[-1][1][:80]!r}")
    questions, solutions = texts[0::2], texts[1::2]
    return [(question, solution) for (_, question), (_, solution) in zip(questions, solutions, strict=True)]


def _labelled(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs (kind "q" or "s", text) of labelled texts; [] without any label."""
    texts: list[tuple[str, str]] = []
    labels = [_label(line) for line in lines]
    if not any(kind for kind, _ in labels):
        return []
    for kind, text in labels:
        if kind:
            texts.append((kind, text))
        elif not texts:
            raise ParseError("unpaired", f"text before the first label: {text[:80]!r}")
        else:
            texts[-1] = (texts[-1][0], one_line(f"{texts[-1][1]} {text}"))
    return texts


def _label(line: str) -> tuple[str, str]:
    """Return "q", "s" or "" for no label, and the text without its label."""
    plain = _strip_decoration(line)
    match = _LABEL.match(plain)
    if not match:
        return "", one_line(plain)
    return ("q" if match["question"] else "s"), one_line(plain[match.end() :])


def _strip_decoration(line: str) -> str:
    match = _BULLET.match(line)
    assert match  # both parts of the pattern are optional
    line = (match["bold"] or "") + line[match.end() :]
    number = _NUMBER.match(line)
    return line[number.end() :] if number else line
