"""Format numbers and names for figures and the page."""

import math


def count(value: float | None) -> str:
    """Return a number with at most three digits: 1234 as "1.23k", 124439808 as "124M". None and infinity give "–"."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{float(f'{value / unit:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def percent(fraction: float, digits: int = 1) -> str:
    """Return 0.8134 as "81.3 %"."""
    return f"{100 * fraction:.{digits}f} %" if math.isfinite(fraction) else "–"


def interval(low: float, high: float, digits: int = 1) -> str:
    """Return two fractions as "[76.2, 85.1]", in percent."""
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def p_value(p: float | None) -> str:
    """Return 0.0312 as "0.031". Values below 0.0001 give "< 0.0001", and None gives "–"."""
    if p is None:
        return "–"
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.1g}" if p < 0.001 else f"{p:.2g}"


def seconds(value: float | None) -> str:
    """Return 75 as "1 min 15 s"."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(text: str, limit: int) -> str:
    """Return the text with at most `limit` characters. Cut the middle, because names differ mostly at their start and end."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-((limit - 1) // 2) :]}"


def replace_unprintable(text: str) -> str:
    """Return the text with U+FFFD for characters that are not printable, e.g. line ends and lone surrogates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
