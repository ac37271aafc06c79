"""Flags and output of the contenders of this suite."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.evaluation import material
from benchmarks.processes import turns

Answer = Callable[[int, int], dict[int, tuple[str, int | None]]]


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the flags of a contender, and limit torch to one thread."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=material.NUM_PROBLEMS)
    parser.add_argument("--slots", type=int, default=16, help="problems on their way at the same time")
    parser.add_argument("--pair", action="store_true", help="a decomposer and a solver in turn")
    parser.add_argument("--without_calculator", action="store_true")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher, and not needed")
    torch.set_num_threads(1)
    return parser.parse_args()


def measured(answer: Answer, problems: int) -> None:
    """Print speed and answers of `answer(number of problems, max_new_tokens)` every round, after a short warm-up.

    `answer` returns by problem number the text and the number of generated tokens, end token and calculator's tokens
    included, or None if unknown.
    """
    answer(2, 4)
    for _ in turns():
        start, processor = time.perf_counter(), time.process_time()
        answers = answer(problems, material.MAX_NEW_TOKENS)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        tokens = sum(count or 0 for _, count in answers.values())
        result = {
            "problems_per_second": problems / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "processor_seconds": processor,
            "tokens": tokens,
            "answers": [answers[index] for index in range(problems)],
        }
        print(json.dumps(result), flush=True)
