"""Tokenise problems in several threads, results in the order of the problems.

Threads suffice, since the compiled tokenizer releases the GIL; each further process would first import transformers
(4 CPU seconds). A call takes many problems, since its overhead is that of encoding a problem.
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

_CHUNK_PROBLEMS = 32  # problems that a thread tokenises at a time
_MAX_PENDING_CHUNKS = 16  # per thread; bounds the memory


def tokenise_all(
    problems: Iterator[Problem], tokenizer: Any, with_facts: bool, num_threads: int
) -> Iterator[tuple[Problem, list[Segment], str]]:
    """Yield each problem, its segments, and how its tokens change its text ("": not), in order.

    num_threads: 0 for one per usable core.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads here are the parallelism
    num_threads = num_threads or len(os.sched_getaffinity(0))
    prefix = bos_tokens(tokenizer)
    tokenise_checked([], tokenizer, prefix)  # initialises the tokenizer, which is not thread-safe

    def tokenise_chunk(chunk: list[Problem]) -> list[tuple[Problem, list[Segment], str]]:
        found = tokenise_checked(chunk, tokenizer, prefix, with_facts)
        return [(problem, *checked) for problem, checked in zip(chunk, found, strict=True)]

    pending: deque[Future[list[tuple[Problem, list[Segment], str]]]] = deque()
    with _existing_objects_frozen(), ThreadPoolExecutor(num_threads) as pool:
        for chunk in _chunks(problems):
            pending.append(pool.submit(tokenise_chunk, chunk))
            if len(pending) > _MAX_PENDING_CHUNKS * num_threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


@contextlib.contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """Context manager in which garbage collection skips all existing objects: scanning transformers took 10 % of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _chunks(problems: Iterator[Problem]) -> Iterator[list[Problem]]:
    while chunk := list(itertools.islice(problems, _CHUNK_PROBLEMS)):
        yield chunk
