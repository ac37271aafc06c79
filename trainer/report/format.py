"""Format numbers and names for the figures and the HTML page of a report."""

import math


def count(value: float | None) -> str:
    """Return a number with at most three digits, e.g. "1.23k" for 1234; "–" for None, NaN or infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{float(f'{value / unit:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction in percent, e.g. "81.3 %" for 0.8134; "–" for NaN or infinity."""
    if not math.isfinite(fraction):
        return "–"
    # The sum with 0.0 turns -0.0 into 0.0.
    return f"{round(100 * fraction, digits) + 0.0:.{digits}f} %".replace("-", "−")


def interval(low: float, high: float, digits: int = 1) -> str:
    """Return an interval of fractions in percent, e.g. "[76.2, 85.1]" for 0.762 and 0.851."""
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def p_value(p: float | None) -> str:
    """Return a p-value as text, e.g. "0.031" for 0.0312; "< 0.0001" if `p` is below 0.0001, "–" if `p` is None."""
    if p is None:
        return "–"
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.1g}" if p < 0.001 else f"{p:.2g}"


def seconds(value: float | None) -> str:
    """Return a duration as text, e.g. "1 min 15 s" for 75; "–" for None, NaN or infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def stop_text(reason: str) -> str:
    """Return a stop reason of trainer/evaluation/programs.py in plain words."""
    return {
        "max_steps": "cut at the limit on sub-questions",
        "ended_early": "ended before the format was complete",
        "max_new_tokens": "cut at the limit on tokens",
        "context": "cut at the model's context length",
    }.get(reason, reason)


def shorten(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters: a longer `text` is cut in the middle, because names differ at both ends."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-((limit - 1) // 2) :]}"


def replace_unprintable(text: str) -> str:
    """Return the text with U+FFFD for characters that are not printable, e.g. line ends and lone surrogates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
