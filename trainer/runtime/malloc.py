"""On a CPU, keep freed memory in the process.

glibc asks the kernel for every tensor above 32 MB and hands it back when it is freed; the kernel then clears the same
pages again and again: a sixth of a step of a small GPT-2 (measured). Kept in the heap they are ready for the next step.
A thread that asks for so much gets it from the kernel all the same, unless all threads share one heap: gloo's gather all
weights after every step (3 to 4 % of it on two ranks).

Tensors whose size changes from step to step (logits at the learned positions) leave holes that the next ones do not fit
into, so the process grows: from 8.5 to 17 GB in 20 steps of a student with 262,144 tokens. `HeapLimit` gives the holes
back to the kernel when they have become many.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_GROWTH = 1.2  # of the process over its size after the first steps
_GROWTH_BYTES = 256 << 20
_FIRST_STEPS = 2  # the optimizer's state is there after one
_CONTROL_GROUP_FILES = [
    (Path("/sys/fs/cgroup", limit), Path("/sys/fs/cgroup", used))
    for limit, used in (
        ("memory.max", "memory.current"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
    )
]
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def tune_glibc_malloc() -> None:
    """Before there are other threads. Nothing on an accelerator, without glibc, or if MALLOC_* in the environment decide."""
    import torch

    if torch.cuda.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give the free pages of the heap back to the kernel, those in the middle of it too; nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> float:
    """Return the memory that the machine, or this process's control group, has left."""
    import psutil

    limit, used = control_group_bytes()
    return min(float(psutil.virtual_memory().available), limit - used)


def control_group_bytes() -> tuple[float, float]:
    """Return the memory limit of this process's control group and what it uses: infinity and 0 without a limit."""
    for limit, used in _CONTROL_GROUP_FILES:
        try:
            return float(limit.read_text(encoding="ascii")), float(used.read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return math.inf, 0.0


class HeapLimit:
    """Called after each step: hands free memory back to the kernel when the process has grown much since its first steps.

    The pages come back with the next step, cleared anew: that costs one step what `keep_freed_memory` saves in each.
    """

    def __init__(self) -> None:
        self._num_calls = 0
        self._limit_bytes = 0.0

    def __call__(self) -> bool:
        """Return whether memory was handed back."""
        self._num_calls += 1
        if self._num_calls < _FIRST_STEPS:
            return False
        resident = _resident_bytes()
        if self._num_calls == _FIRST_STEPS:
            self._limit_bytes = _GROWTH * resident + _GROWTH_BYTES
        if resident <= self._limit_bytes:
            return False
        trim_heap()
        return True


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return 0
