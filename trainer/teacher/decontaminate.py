"""Find problems that match test questions.

Two questions match if their normalised texts are equal, or if they share an n-gram of 13 words (as for GPT-3: Brown et
al. 2020, arXiv:2005.14165, appendix C). A question with fewer words must occur as a whole in the other one.
Normalised: lower case, Unicode NFKC, no punctuation, whole numbers (`1,080` is 1080, `0.5` is 0.5).

A data set that varies its own texts loses many problems: SVAMP's test problems share their stories with training
problems. `ngram` 0 matches equal questions only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_WORD = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[^\W_]+")


def words(question: str) -> tuple[str, ...]:
    """Return the words of the normalised question."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return tuple(word.replace(",", "") for word in _WORD.findall(text))


class HeldOutQuestions:
    """Test questions, indexed for matching."""

    def __init__(self, questions: Iterable[tuple[str, str]], ngram: int = 13) -> None:
        """`questions`: pairs of a test problem's name and its question."""
        self._ngram = ngram
        self._questions = [(name, words(question)) for name, question in questions]
        self._whole: dict[tuple[str, ...], str] = {}
        self._short: dict[int, dict[tuple[str, ...], str]] = {}  # num words -> questions below `ngram` words
        for name, text in self._questions:
            self._whole.setdefault(text, name)
            if len(text) < ngram:
                self._short.setdefault(len(text), {}).setdefault(text, name)
        # n -> n-grams of the questions, filled on demand
        self._ngrams: dict[int, dict[tuple[str, ...], str]] = {}

    def match(self, question: str) -> str | None:
        """Return the name of a test problem that the question matches, or None."""
        text = words(question)
        if not text:
            return None
        if text in self._whole:
            return self._whole[text]
        if not self._ngram:
            return None
        size = min(self._ngram, len(text))
        for num_words, names in ((size, self._ngrams_of(size)), *self._short.items()):
            for ngram in _ngrams(text, num_words):
                if ngram in names:
                    return names[ngram]
        return None

    def _ngrams_of(self, size: int) -> dict[tuple[str, ...], str]:
        if size not in self._ngrams:
            self._ngrams[size] = {}
            for name, text in self._questions:
                for ngram in _ngrams(text, size):
                    self._ngrams[size].setdefault(ngram, name)
        return self._ngrams[size]


def _ngrams(text: tuple[str, ...], size: int) -> Iterable[tuple[str, ...]]:
    return (text[begin : begin + size] for begin in range(len(text) - size + 1)) if size else ()
