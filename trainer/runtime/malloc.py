"""glibc malloc settings for training on a CPU, and memory limits of the machine and the control group.

By default glibc maps every tensor above 32 MB and unmaps it when freed, and the kernel clears the pages each time: a
sixth of a step of a small GPT-2 (measured). `tune_glibc_malloc` keeps freed pages in one heap for all threads; with a
heap per thread, gloo's threads, which gather all weights after every step, would still map (3 to 4 % of a step on two
ranks).

Tensors whose size changes from step to step (logits at the target positions) fragment the heap: a model with a vocabulary
of 262,144 tokens grew from 8.5 to 17 GB in 20 steps. `HeapLimit` returns the free pages to the kernel.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_MAX_GROWTH = 1.2  # of the resident size after the first steps
_MAX_GROWTH_BYTES = 256 << 20  # in addition
_NUM_FIRST_STEPS = 2  # the first one allocates the optimizer's state
_CONTROL_GROUP_FILES = [
    (Path("/sys/fs/cgroup", limit), Path("/sys/fs/cgroup", used))
    for limit, used in (
        ("memory.max", "memory.current"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
    )
]
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def tune_glibc_malloc() -> None:
    """Keep freed memory in one heap. Must be called before other threads start.

    Does nothing on an accelerator, without glibc, or if a variable MALLOC_* is set.
    """
    import torch

    if torch.cuda.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Return the free pages of the heap, also those inside it, to the kernel. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> float:
    """Return the available memory of the machine or of this process's control group, whichever is less."""
    import psutil

    limit, used = control_group_bytes()
    return min(float(psutil.virtual_memory().available), limit - used)


def control_group_bytes() -> tuple[float, float]:
    """Return (memory limit, used memory) of this process's control group; (inf, 0.0) without a limit."""
    for limit, used in _CONTROL_GROUP_FILES:
        try:
            return float(limit.read_text(encoding="ascii")), float(used.read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return math.inf, 0.0


class HeapLimit:
    """Trims the heap when the process has grown since its first steps. Must be called after each step.

    The next step maps the pages anew, which costs what `tune_glibc_malloc` saves in a step.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._num_calls = 0
        self._limit_bytes = 0.0

    def __call__(self) -> bool:
        """Return whether the heap was trimmed."""
        self._num_calls += 1
        if self._num_calls < _NUM_FIRST_STEPS:
            return False
        resident_bytes = self._process.memory_info().rss
        if self._num_calls == _NUM_FIRST_STEPS:
            self._limit_bytes = _MAX_GROWTH * resident_bytes + _MAX_GROWTH_BYTES
        if resident_bytes <= self._limit_bytes:
            return False
        trim_heap()
        return True
