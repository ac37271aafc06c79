"""Which problems are test questions in disguise.

Two questions match if their normalised texts are equal, or if they share a run of 13 words (as for GPT-3: Brown et al.
2020, arXiv:2005.14165, appendix C). Of a question shorter than that the whole text must occur in the other one.
Normalised: lower case, Unicode-normalised, punctuation gone, numbers kept whole (`1,080` is 1080, `0.5` is 0.5).

A data set that varies its own texts loses much: SVAMP's test problems share their stories with training problems.
`ngram` 0 matches equal questions only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_WORD = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[^\W_]+")


def words(question: str) -> tuple[str, ...]:
    """The normalised question, word by word."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return tuple(word.replace(",", "") for word in _WORD.findall(text))


class HeldOutQuestions:
    """Questions that must not be trained on."""

    def __init__(self, questions: Iterable[tuple[str, str]], ngram: int = 13) -> None:
        """questions: (name of the test problem, its question)."""
        self._ngram = ngram
        self._questions = [(name, words(question)) for name, question in questions]
        self._whole: dict[tuple[str, ...], str] = {}
        self._shorter: dict[
            int, dict[tuple[str, ...], str]
        ] = {}  # length -> whole test questions of that length
        for name, text in self._questions:
            self._whole.setdefault(text, name)
            if len(text) < ngram:
                self._shorter.setdefault(len(text), {}).setdefault(text, name)
        self._runs: dict[
            int, dict[tuple[str, ...], str]
        ] = {}  # length -> runs of test questions, made when needed

    def __len__(self) -> int:
        return len(self._questions)

    def match(self, question: str) -> str | None:
        """The name of a test problem that the question matches, or None."""
        text = words(question)
        if not text:
            return None
        if text in self._whole:
            return self._whole[text]
        if not self._ngram:
            return None
        runs = self._runs_of(min(self._ngram, len(text)))
        for run in _runs(text, min(self._ngram, len(text))):
            if run in runs:
                return runs[run]
        for length, shorter in self._shorter.items():
            for run in _runs(text, length):
                if run in shorter:
                    return shorter[run]
        return None

    def _runs_of(self, length: int) -> dict[tuple[str, ...], str]:
        if length not in self._runs:
            self._runs[length] = {}
            for name, text in self._questions:
                for run in _runs(text, length):
                    self._runs[length].setdefault(run, name)
        return self._runs[length]


def _runs(text: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (text[begin : begin + length] for begin in range(len(text) - length + 1)) if length else ()
