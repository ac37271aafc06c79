"""Tokenise problems on several cores, results in the order of the problems.

Threads: the tokenizer itself is compiled and lets go of Python's lock while it works, so that other processes, which
would import transformers first (4 CPU seconds each), have nothing to offer. A call takes many problems: its overhead
is that of encoding a problem.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trainer.problems.problem import Problem
from trainer.shards.segments import Segment, bos_tokens, tokenise_checked

_CHUNK_PROBLEMS = 32  # problems a thread tokenises at a time
_MAX_PENDING_CHUNKS = (
    16  # chunks a thread that may lie finished: the memory this takes does not grow with the data
)


def tokenise_all(
    problems: Iterator[Problem], tokenizer: Any, with_facts: bool, num_threads: int
) -> Iterator[tuple[Problem, list[Segment], str]]:
    """Yield each problem, its segments, and "" or how its tokens change its text; in order, whatever `num_threads`
    (0: one per usable core)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads here are the parallelism
    num_threads = num_threads or len(os.sched_getaffinity(0))
    prefix = bos_tokens(tokenizer)
    tokenise_checked(
        [], tokenizer, prefix
    )  # sets the tokenizer up, which threads must not do at the same time

    def work(chunk: list[Problem]) -> list[tuple[Problem, list[Segment], str]]:
        found = tokenise_checked(chunk, tokenizer, prefix, with_facts)
        return [(problem, *checked) for problem, checked in zip(chunk, found, strict=True)]

    waiting: deque[Future[list[tuple[Problem, list[Segment], str]]]] = deque()
    with _rare_garbage_collection(), ThreadPoolExecutor(num_threads) as pool:
        for chunk in _chunks(problems):
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > _MAX_PENDING_CHUNKS * num_threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


@contextlib.contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what was there before: all of transformers, which the many new lists would
    have it search again and again (a tenth of the time, measured)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _chunks(problems: Iterator[Problem]) -> Iterator[list[Problem]]:
    while chunk := list(itertools.islice(problems, _CHUNK_PROBLEMS)):
        yield chunk
