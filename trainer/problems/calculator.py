"""Calculator for the results of `<<48/2=24>>` annotations (Cobbe et al. 2021, arXiv:2110.14168).

A recursive-descent parser evaluates an expression with fractions, without eval or floats. The length of an expression and
the depth of its nesting are limited. Accepted: numbers (`12`, `1,000`, `.5`, `18.`), `+ - * /` (also × ÷ −), parentheses
and signs. Not accepted: percent signs (calculators disagree on `100+20%`), currency, powers, `//`, words, division by zero.

A result is an integer or a decimal without trailing zeros (`0.5`, not `.5`). It is rounded half away from zero to 6 decimals.
GSM8K's training set has 23 716 annotated results. The calculator gives 23 714 of these results in value (the annotations of
the other two use `//`), and 23 047 (97.18 %) also character by character. The remaining 667 results have trailing zeros
(`144.00`, 589 results) or no zero before the point (`.5`, 78 results). A calculator that writes `.5` would match these 78
results, but would no longer match 32 results that have the zero. No result needs more than 3 decimals.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

MAX_CHARACTERS = 200  # of an expression; this limits numbers to 200 digits. GSM8K's longest expression has 30
MAX_DEPTH = 20
MAX_DECIMALS = 6
MAX_MAGNITUDE = 10**15  # limits the number of tokens of a result that is inserted into a generated text

_TOKEN = re.compile(r"\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+|[-+*/()])\s*")
_SIGNS = str.maketrans("×÷−", "*/-")
_ANNOTATION = re.compile(rf"<<([^<>=\n]{{1,{MAX_CHARACTERS}}})=([^<>=\n]{{1,{MAX_CHARACTERS}}})>>")

_Number = int | Fraction  # int is used if possible, because int is faster than Fraction


class _NotArithmetic(Exception):
    pass


@functools.lru_cache(maxsize=4096)  # the same expressions are evaluated repeatedly
def evaluate(expression: str) -> str | None:
    """Return the result as canonical decimal text (`12`, `-3`, `0.5`, `0.333333`), or None.

    The result is None if the expression is not accepted, if the value's magnitude is 10**15 or more, or if a nonzero value
    would be rounded to 0.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        tokens = _tokens(expression.translate(_SIGNS))
        value, end = _sum(tokens, 0, 0)
    except (_NotArithmetic, ZeroDivisionError):
        return None
    return _decimal_text(value) if end == len(tokens) else None


def split_annotations(text: str) -> Iterator[tuple[str, bool]]:
    """Split a solution into consecutive pieces (text, is_result).

    `is_result`: True if the piece is the result of an annotation and the `>>` after it. The calculator inserts such a piece
    during generation. A wrong result stays in the surrounding piece. "48/2 = <<48/2=24>>24 clips" gives
    ("48/2 = <<48/2=", False), ("24>>", True), ("24 clips", False).
    """
    begin = 0
    for match in _ANNOTATION.finditer(text):
        if evaluate(match[1]) == match[2]:
            yield text[begin : match.start(2)], False
            yield text[match.start(2) : match.end()], True
            begin = match.end()
    if begin < len(text):
        yield text[begin:], False


def annotated_expressions(text: str) -> list[str]:
    """Return the accepted expressions of a text's annotations in order, e.g. ["48/2"], even if the results are wrong."""
    expressions = (match[1].strip() for match in _ANNOTATION.finditer(text))
    return [expression for expression in expressions if evaluate(expression) is not None]


def operators(expression: str) -> str:
    """Return the binary operators of an accepted expression in order: "(-3+4)*2" -> "+*"."""
    tokens = _tokens(expression.translate(_SIGNS))
    pairs = itertools.pairwise(tokens)
    return "".join(token for before, token in pairs if token in "+-*/" and before not in "+-*/(")


def open_expression(text: str) -> str | None:
    """Return the expression, e.g. "48/2", if a text ends in an unfinished annotation, e.g. "… <<48/2="; otherwise None.

    Only the end of the text is read, so that a call after every generated token is cheap.
    """
    if not text.endswith("="):
        return None
    _, mark, expression = text[-(MAX_CHARACTERS + 3) : -1].rpartition("<<")
    return expression if mark and expression and not set(expression) & set("<>=\n") else None


@functools.lru_cache(maxsize=4096)
def _tokens(expression: str) -> tuple[str, ...]:
    tokens: list[str] = []
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if not match:
            raise _NotArithmetic
        tokens.append(match[1])
        position = match.end()
    return tuple(tokens)


def _sum(tokens: tuple[str, ...], at: int, depth: int) -> tuple[_Number, int]:
    """Parse sum := product (("+" | "-") product)*. `_sum`, `_product`, `_operand` return (value, index of the next token)."""
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in ("+", "-"):
        right, after = _product(tokens, at + 1, depth)
        value, at = (value + right if tokens[at] == "+" else value - right), after
    return value, at


def _product(tokens: tuple[str, ...], at: int, depth: int) -> tuple[_Number, int]:
    """Parse product := operand (("*" | "/") operand)*."""
    value, at = _operand(tokens, at, depth)
    while at < len(tokens) and tokens[at] in ("*", "/"):
        right, after = _operand(tokens, at + 1, depth)
        value, at = (value * right if tokens[at] == "*" else Fraction(value) / right), after
    return value, at


def _operand(tokens: tuple[str, ...], at: int, depth: int) -> tuple[_Number, int]:
    """Parse operand := ("-" | "+") operand | "(" sum ")" | number."""
    if at == len(tokens) or depth > MAX_DEPTH:
        raise _NotArithmetic
    token = tokens[at]
    if token in ("-", "+"):
        value, at = _operand(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), at
    if token == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if at == len(tokens) or tokens[at] != ")":
            raise _NotArithmetic
        return value, at + 1
    if token[0] not in "0123456789.":
        raise _NotArithmetic
    number = token.replace(",", "").rstrip(".")
    return (int(number) if number.isdigit() else Fraction(number)), at + 1


def _decimal_text(value: _Number) -> str | None:
    scaled = abs(value) * 10**MAX_DECIMALS
    rounded = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)  # half away from zero
    if (rounded == 0 and value != 0) or rounded >= MAX_MAGNITUDE * 10**MAX_DECIMALS:
        return None
    whole, decimals = divmod(rounded, 10**MAX_DECIMALS)
    fraction = f"{decimals:0{MAX_DECIMALS}d}".rstrip("0")
    return ("-" if value < 0 else "") + str(whole) + ("." + fraction if fraction else "")
