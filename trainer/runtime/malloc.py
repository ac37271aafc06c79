"""glibc malloc settings for training on a CPU, and memory limits of the machine and the control group.

By default, glibc calls mmap for every tensor above 32 MB and munmap when the tensor is freed. The kernel clears the pages
each time, which takes a sixth of a step of a small GPT-2 (measured). `tune_glibc_malloc` keeps freed pages in one heap
for all threads. (With one heap per thread, gloo's threads would still map pages when they gather the weights after each
step. This took 3 to 4 % of a step on two ranks.)

Tensors whose size differs between steps (logits at the target positions) fragment the heap: the memory of a model with a
vocabulary of 262,144 tokens grew from 8.5 to 17 GB in 20 steps. `HeapLimit` returns the free pages to the kernel.
"""

import contextlib
import ctypes
import math
import os
from pathlib import Path

# limit = 1.2 * (resident bytes after the first steps) + 256 MiB
_MAX_GROWTH, _MAX_GROWTH_BYTES = 1.2, 256 << 20
_NUM_FIRST_STEPS = 2  # the process grows during the first step, which allocates the optimizer's state
_CGROUP = Path("/sys/fs/cgroup")
_CONTROL_GROUP_FILES = [
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),  # cgroup version 2
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),  # cgroup version 1
]
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # constants of malloc.h


def tune_glibc_malloc() -> None:
    """Keep freed memory in one heap. Must be called before other threads start.

    Does nothing if there is a GPU, if the C library is not glibc, or if an environment variable MALLOC_* is set.
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
    """Return all free pages of the heap, even those between used pages, to the kernel. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> float:
    """Return the available bytes of the machine or of the control group (`control_group_bytes`), whichever are fewer."""
    import psutil

    limit, used = control_group_bytes()
    return min(float(psutil.virtual_memory().available), limit - used)


def control_group_bytes() -> tuple[float, float]:
    """Return (memory limit, used memory) of the control group at /sys/fs/cgroup; (inf, 0.0) if there is no limit.

    In a container, this group is the container's own group.
    """
    for limit, used in _CONTROL_GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # the file is missing or contains the text "max"
            return float(limit.read_text(encoding="ascii")), float(used.read_text(encoding="ascii"))
    return math.inf, 0.0


class HeapLimit:
    """Callable that trims the heap if the process has grown too much since its first steps. Must be called after each step.

    The step after a trim must map the pages again, so it loses the time that `tune_glibc_malloc` saves in a step.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._num_calls = 0
        self._limit_bytes = 0.0

    def __call__(self) -> bool:
        """Trim the heap if the memory of the process exceeds the limit. Return whether the heap was trimmed."""
        self._num_calls += 1
        resident_bytes = self._process.memory_info().rss
        if self._num_calls <= _NUM_FIRST_STEPS:
            self._limit_bytes = _MAX_GROWTH * resident_bytes + _MAX_GROWTH_BYTES
        if resident_bytes <= self._limit_bytes:
            return False
        trim_heap()
        return True
