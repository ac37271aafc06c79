"""Extract the final answer from a generated text, and compare it with the gold answer.

Two rules are reported side by side, as in lm-evaluation-harness for GSM8K:

- `strict`: the rest of the line after the last `####`. Measures answer and format.
- `flexible`: the `strict` answer if it has the type of the gold answer, else the last number, yes/no or line, depending on
  that type. An answer that is right under `strict` is right under `flexible`. lm-evaluation-harness always takes the last
  number, so its answer can differ from ours if a text continues after `#### answer`.

Numbers are compared as exact fractions: `18`, `18.`, `18.00`, `$18`, `+18`, `36/2` and `18 dollars` are equal, and `0.33` is
not `1/3`. (lm-evaluation-harness misses some of these forms, see its issue 2707.) A percent sign is a unit: `18%` is 18,
not 0.18. In a generated answer, a unit of up to four words may follow a number, but not a scale such as million: `18
million` is not 18. A comma must group digits (`1,5` is not a number). A yes/no answer may also be `true` or `false`. All
other answers are compared as text: Unicode-normalised, case-folded, on one line, without quotes and punctuation at the ends.

An extraction takes time linear in the length of the text. A text of over 200 characters is not a number.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from trainer.problems.problem import DELIMITER, one_line

ANSWER_RULES = ("strict", "flexible")
ANSWER_TYPES = ("number", "yes_no", "text")

MAX_NUMBER_CHARACTERS = 200
MAX_UNIT_WORDS = 4

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(rf"([-+−–]?)\s?[$€£¥]?\s?([-−]?)({_DIGITS})(?:\s?/\s?([0-9]+))?(?![0-9])(.*)", re.DOTALL)
_UNIT_WORD = re.compile(r"[%°¢$€£¥]?(?:[^\W\d_]|[-/.'’²³])*")
_SCALES = re.compile(r"(?:dozen|hundred|thousand|million|billion|trillion)s?|k|mn|bn", re.IGNORECASE)
# A minus after a letter, digit or bracket is a subtraction or a range, not a sign: the last number of "5-3" is 3.
_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]])[-−–])?[$€£¥]?(?:(?<=[$€£¥])[-−])?"
    r"(?:[0-9][0-9,]*(?:\.[0-9]+)*|(?<!\w)\.[0-9]+)(?:/[0-9]+)?"
)
_YES_NO = re.compile(r"(yes|no|true|false)\s*(?:[,.;:!].*)?", re.DOTALL | re.IGNORECASE)
_YES_NO_IN_TEXT = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_EDGES = " \t\r\n.,;:!?\"'“”‘’`*"


def extract_answer(text: str, rule: str = "strict", gold_type: str | None = None) -> str | None:
    """Return the final answer of a generated text, unparsed (`$1,000`); None if the rule finds no answer.

    rule: one of ANSWER_RULES. gold_type: `answer_type(gold)`, for the flexible rule only; without a type, the flexible rule
    prefers numbers to yes/no. Raises ValueError for an unknown rule or type.
    """
    if rule not in ANSWER_RULES or gold_type not in (None, *ANSWER_TYPES):
        known = f"rules are {ANSWER_RULES}, types are {ANSWER_TYPES}"
        raise ValueError(f"unknown rule {rule!r} or type {gold_type!r}; {known}")
    _, delimiter, rest = text.rpartition(DELIMITER)
    stated = (rest.partition("\n")[0].strip() or None) if delimiter else None
    if rule == "strict" or gold_type == "text":
        last_line = text.strip().rpartition("\n")[2].strip()
        return stated if stated or rule == "strict" else last_line or None
    if stated and (
        (gold_type != "yes_no" and parse_number(stated) is not None)
        or (gold_type != "number" and parse_yes_no(stated) is not None)
    ):
        return stated
    if gold_type == "number":
        return _last_number(text)
    words = _YES_NO_IN_TEXT.findall(text)
    last_yes_no = words[-1] if words else None
    if gold_type == "yes_no":
        return last_yes_no
    return _last_number(text) or last_yes_no or stated


def answers_match(answer: str | None, gold: str) -> bool:
    """Return whether an extracted answer equals the gold answer by the rules of the gold answer's type."""
    if answer is None:
        return False
    if (gold_number := _bare_number(gold)) is not None:
        return parse_number(answer) == gold_number
    if (gold_yes := _bare_yes_no(gold)) is not None:
        return parse_yes_no(answer) == gold_yes
    return _normalised(answer) == _normalised(gold)


def answer_type(gold: str) -> str:
    """Return the type of a gold answer, one of ANSWER_TYPES. A number with unit words is `text`."""
    if _bare_number(gold) is not None:
        return "number"
    return "text" if _bare_yes_no(gold) is None else "yes_no"


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a number with optional currency sign, percent sign or unit; None for other texts."""
    parsed = _number_and_unit(text)
    if parsed is None:
        return None
    value, unit = parsed
    words = unit.split()
    if len(words) > MAX_UNIT_WORDS or any(_SCALES.fullmatch(word.strip(_EDGES)) for word in words):
        return None
    return value if all(_UNIT_WORD.fullmatch(word) for word in words) else None


def strip_thousands(answer: str) -> str:
    """Return a number without its thousands separators (`1,080` -> `1080`). Return other answers unchanged."""
    return answer.replace(",", "") if answer_type(answer) == "number" else answer


def parse_yes_no(text: str) -> bool | None:
    """Return True for yes/true, False for no/false, and None for other texts. Punctuation and text may follow ("No, never")."""
    match = _YES_NO.fullmatch(text.lstrip(_EDGES).rstrip())
    return match[1].casefold() in ("yes", "true") if match else None


@functools.lru_cache(maxsize=1024)  # called twice per answer: for its type and for its value
def _number_and_unit(text: str) -> tuple[Fraction, str] | None:
    text = text.strip(_EDGES.replace(".", "")).rstrip(_EDGES)  # keep a leading decimal point
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


def _last_number(text: str) -> str | None:
    if not (numbers := _IN_TEXT.findall(text)):
        return None
    last = numbers[-1].rstrip(",")
    for candidate in (last, last.rpartition(",")[2], re.findall("[0-9]+", last)[-1]):
        if parse_number(candidate) is not None:  # "3,4,5" is not a number, so the next candidate is "5"
            return candidate
    return None


def _normalised(text: str) -> str:
    return one_line(unicodedata.normalize("NFKC", text)).strip(_EDGES).casefold()
