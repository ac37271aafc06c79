"""Tokenise problems in several processes, results in the order of the problems."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

from trainer.models.tokenizer import load_tokenizer
from trainer.problems.problem import Problem
from trainer.shards.segments import prefix_tokens, tokenise
from trainer.shards.write import Segments

_CHUNK = 256  # problems a process tokenises at a time
_WORTH_PROCESSES = 16  # chunks; with fewer, starting processes takes longer than the work
_worker: _Tokeniser


class _Tokeniser:
    def __init__(self, tokenizer: Any, with_facts: bool):
        self._tokenizer = tokenizer
        self._prefix = prefix_tokens(tokenizer)
        self._with_facts = with_facts

    def __call__(self, problems: list[Problem]) -> list[tuple[Problem, Segments]]:
        return [(problem, [(int(s.role), s.tokens) for s in self._tokenise(problem)]) for problem in problems]

    def _tokenise(self, problem: Problem) -> list[Any]:
        return tokenise(problem, self._tokenizer, self._prefix, self._with_facts)


def tokenise_all(
    problems: Iterator[Problem], tokenizer: Any, tokenizer_name: str, with_facts: bool, num_processes: int
) -> Iterator[tuple[Problem, Segments]]:
    """Each problem with its segments, in order, whatever `num_processes` (0: one per usable core)."""
    num_processes = num_processes or len(os.sched_getaffinity(0))
    chunks = _chunks(problems)
    ahead = list(itertools.islice(chunks, _WORTH_PROCESSES))
    chunks = itertools.chain(ahead, chunks)
    if num_processes == 1 or len(ahead) < _WORTH_PROCESSES:
        yield from itertools.chain.from_iterable(map(_Tokeniser(tokenizer, with_facts), chunks))
        return
    # "spawn": a fork of a process that has started threads may hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes, _start, (tokenizer_name, with_facts)) as pool:
        yield from itertools.chain.from_iterable(pool.imap(_work, chunks))


def _chunks(problems: Iterator[Problem]) -> Iterator[list[Problem]]:
    while chunk := list(itertools.islice(problems, _CHUNK)):
        yield chunk


def _start(tokenizer_name: str, with_facts: bool) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = _Tokeniser(load_tokenizer(tokenizer_name), with_facts)


def _work(problems: list[Problem]) -> list[tuple[Problem, Segments]]:
    return _worker(problems)
