"""Find problems that match test questions.

Two questions match if their normalised texts are equal, or if they share an n-gram of 13 words (as for GPT-3: Brown et
al. 2020, arXiv:2005.14165, appendix C). A question of fewer than 13 words matches another question that contains its
word sequence. Normalised texts are in lower case and Unicode NFKC, without punctuation. A number is one word: `0.5`
stays 0.5, and `1,080` becomes 1080.

In a data set with variants of the same texts, many questions match. For example, SVAMP's training and test problems share
stories. With `ngram` 0, two questions match only if their normalised texts are equal.
"""

import re
import unicodedata
from collections.abc import Iterable

_WORD = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[^\W_]+")


def words(question: str) -> tuple[str, ...]:
    """Return the words of the normalised question."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return tuple(word.replace(",", "") for word in _WORD.findall(text))


class HeldOutQuestions:
    """Index of test questions, given as (name, question). `ngram`: number of words per n-gram; 0: compare whole texts."""

    def __init__(self, questions: Iterable[tuple[str, str]], ngram: int = 13) -> None:
        self._ngram = ngram
        self._questions = [(name, words(question)) for name, question in questions]
        self._whole: dict[tuple[str, ...], str] = {}
        # Number of words -> question -> name, for questions of fewer than `ngram` words.
        self._short: dict[int, dict[tuple[str, ...], str]] = {}
        for name, text in self._questions:
            self._whole.setdefault(text, name)
            if len(text) < ngram:
                self._short.setdefault(len(text), {}).setdefault(text, name)
        self._ngrams: dict[int, dict[tuple[str, ...], str]] = {}  # n -> n-gram -> name, computed on demand

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
