"""Read the final answer out of a generated text, and compare it with the gold answer.

Two named rules are reported side by side, as lm-evaluation-harness does for GSM8K:

- `strict`: what stands on the line after the last `####`. Measures answer and form.
- `flexible`: the same if it is an answer of the gold's kind, else the last number (or yes/no) anywhere in the
  text. So an answer that is right under `strict` is right under `flexible`. lm-evaluation-harness takes the
  last number without this preference; the two differ only for texts that go on after `#### answer`.

Numbers are compared as exact fractions, never as floats or strings, so `18`, `18.`, `18.00`, `$18`, `+18`,
`36/2` and `18 dollars` are one number (their parsers miss some: lm-evaluation-harness issue 2707) and `0.33`
is not `1/3`. Three decisions: a percent sign is a unit, `18%` is 18 and not 0.18; up to four words may follow
a number as its unit, but not words that scale it (`18 million` is not 18); a comma must group digits as
thousands do (`1,5` is no number). Everything else is compared as text: Unicode-normalised, case-folded, on
one line, without quotes or a final period.

Time is linear in the text whatever a student writes, and a number of over 200 characters is no answer.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from fractions import Fraction

from trainer.problems.problem import DELIMITER, one_line

RULES = ("strict", "flexible")
ANSWER_TYPES = ("number", "yes_no", "text")

MAX_NUMBER_CHARACTERS = 200
MAX_UNIT_WORDS = 4

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(rf"([-+−–]?)\s?[$€£¥]?\s?([-−]?)({_DIGITS})(?:\s?/\s?([0-9]+))?(?![0-9])(.*)", re.DOTALL)
_UNIT_WORD = re.compile(r"[%°¢$€£¥]?(?:[^\W\d_]|[-/.'’²³])*")
_SCALES = re.compile(r"(?:dozen|hundred|thousand|million|billion|trillion)s?|k|mn|bn", re.IGNORECASE)
# A minus after a letter, a digit or a bracket is a subtraction or a range: the last number of "5-3" is 3.
_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]])[-−–])?[$€£¥]?(?:(?<=[$€£¥])[-−])?"
    r"(?:[0-9][0-9,]*(?:\.[0-9]+)*|(?<!\w)\.[0-9]+)(?:/[0-9]+)?"
)
_YES_NO = re.compile(r"(yes|no|true|false)\s*(?:[,.;:!].*)?", re.DOTALL | re.IGNORECASE)
_YES_NO_IN_TEXT = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_EDGES = " \t\r\n.,;:!?\"'“”‘’`*"


def extract_answer(text: str, rule: str = "strict", kind: str | None = None) -> str | None:
    """The final answer of a generated text as it stands there (`$1,000`), or None when the rule finds none.

    rule: one of RULES. kind: one of KINDS, the kind of answer that the question asks for, `kind(gold)`; only
    the flexible rule looks at it, and of the gold it knows nothing else. Without it, a number goes before a
    yes or no. Raises ValueError for an unknown rule or kind.
    """
    if rule not in RULES or kind not in (None, *ANSWER_TYPES):
        raise ValueError(
            f"unknown rule {rule!r} or kind {kind!r}; rules are {RULES}, kinds are {ANSWER_TYPES}"
        )
    stated = _after_delimiter(text)
    if rule == "strict" or kind == "text":
        return stated if stated or rule == "strict" else _last_line(text)
    if stated and (
        (kind != "yes_no" and parse_number(stated) is not None)
        or (kind != "number" and parse_yes_no(stated) is not None)
    ):
        return stated
    if kind == "number":
        return _last_number(text)
    if kind == "yes_no":
        return _last_yes_no(text)
    return _last_number(text) or _last_yes_no(text) or stated


def answers_match(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer is the gold one. The gold says how to compare: `kind(gold)`. None is never
    right."""
    if answer is None:
        return False
    if (gold_number := _bare_number(gold)) is not None:
        return parse_number(answer) == gold_number
    if (gold_yes := _bare_yes_no(gold)) is not None:
        return parse_yes_no(answer) == gold_yes
    return _without_markup(answer) == _without_markup(gold)


def answer_type(gold: str) -> str:
    """What sort of answer a gold answer is: `number` (no words beside it), `yes_no` or `text`."""
    if _bare_number(gold) is not None:
        return "number"
    return "text" if _bare_yes_no(gold) is None else "yes_no"


def parse_number(text: str) -> Fraction | None:
    """The exact value of an answer that is one number, with currency sign, percent sign or unit words; else
    None."""
    parsed = _number_and_unit(text)
    if parsed is None:
        return None
    value, unit = parsed
    words = unit.split()
    if len(words) > MAX_UNIT_WORDS or any(_SCALES.fullmatch(word.strip(_EDGES)) for word in words):
        return None
    return value if all(_UNIT_WORD.fullmatch(word) for word in words) else None


def strip_thousands(answer: str) -> str:
    """A gold answer as it is stored and learned: `1080` for the number `1,080`; anything else as it is."""
    return answer.replace(",", "") if answer_type(answer) == "number" else answer


def parse_yes_no(text: str) -> bool | None:
    """Whether an answer begins with yes/true or no/false, alone or before punctuation ("No, it sinks."); else
    None."""
    match = _YES_NO.fullmatch(text.lstrip(_EDGES).rstrip())
    return match[1].casefold() in ("yes", "true") if match else None


@functools.lru_cache(maxsize=1024)  # an answer is asked for its kind and then for its value
def _number_and_unit(text: str) -> tuple[Fraction, str] | None:
    text = text.strip(_EDGES.replace(".", "")).rstrip(_EDGES)  # a leading period may be a decimal point
    if len(text) > MAX_NUMBER_CHARACTERS or not (match := _NUMBER.fullmatch(text)):
        return None
    sign, inner_sign, digits, denominator, unit = match.groups()
    if (sign and inner_sign) or (denominator and int(denominator) == 0):
        return None
    value = Fraction(digits.replace(",", "").rstrip("."))
    if denominator:
        value /= int(denominator)
    return (-value if sign in ("-", "−", "–") or inner_sign else value), unit


def _bare_number(gold: str) -> Fraction | None:
    parsed = _number_and_unit(gold)
    return parsed[0] if parsed and parsed[1].strip() in ("", "%") else None


def _bare_yes_no(gold: str) -> bool | None:
    return {"yes": True, "true": True, "no": False, "false": False}.get(gold.strip(_EDGES).casefold())


def _after_delimiter(text: str) -> str | None:
    _, mark, rest = text.rpartition(DELIMITER)
    line = rest.partition("\n")[0].strip() if mark else ""
    return line or None


def _last_line(text: str) -> str | None:
    return text.strip().rpartition("\n")[2].strip() or None


def _last_number(text: str) -> str | None:
    numbers = _IN_TEXT.findall(text)
    if not numbers:
        return None
    last = numbers[-1].rstrip(",")
    for candidate in (last, last.rpartition(",")[2], re.findall("[0-9]+", last)[-1]):
        if parse_number(candidate) is not None:  # "3,4,5" is a list, its last number is 5
            return candidate
    return None


def _last_yes_no(text: str) -> str | None:
    words = _YES_NO_IN_TEXT.findall(text)
    return words[-1] if words else None


def _without_markup(text: str) -> str:
    return one_line(unicodedata.normalize("NFKC", text)).strip(_EDGES).casefold()
