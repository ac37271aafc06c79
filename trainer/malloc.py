"""On a CPU, keep freed memory in the process.

glibc asks the kernel for every tensor above 32 MB and hands it back when it is freed; the kernel then clears the same
pages again and again: a sixth of a step of a small GPT-2 (measured). Kept in the heap they are ready for the next step.
A thread that asks for so much gets it from the kernel all the same, unless all threads share one heap: gloo's gather all
weights after every step (3 to 4 % of it on two ranks).
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Before there are other threads. Nothing on an accelerator, without glibc, or if MALLOC_* in the environment decide."""
    import torch

    if torch.cuda.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)
