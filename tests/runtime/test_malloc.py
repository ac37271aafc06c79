"""Heap trimming of a process with a fragmented heap, and memory limits of control groups."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.planning.accelerators import host_memory_bytes
from trainer.runtime import malloc

# Large blocks are freed between small ones that stay. All blocks exist at the same time, since reuse of earlier holes
# depends on the heap's addresses.
FRAGMENT_HEAP = """
import sys
import psutil
import torch
from trainer.runtime import malloc
from trainer.runtime.malloc import HeapLimit
malloc.tune_glibc_malloc()
limit, num_trims = HeapLimit(), 0
blocks, kept = [], []
for step in range(4):
    if step == 2:
        for _ in range(16):
            blocks.append(torch.ones(16 << 20))
            kept.append(torch.ones(1 << 18))
        blocks.clear()
    num_trims += limit() if sys.argv[1] == "limited" else 0
print(num_trims, psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_fragmented_heap_is_trimmed() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    folder = Path(__file__).parents[2]

    def run(mode: str) -> tuple[int, int]:
        """Return the number of trims and the final resident size in MiB."""
        command = [sys.executable, "-c", FRAGMENT_HEAP, mode]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=folder
        )
        num_trims, size = map(int, done.stdout.split())
        return num_trims, size

    num_trims, limited = run("limited")
    _, unlimited = run("unlimited")
    assert num_trims > 0
    assert limited < unlimited - 100


@pytest.mark.parametrize("version", ["2", "1", "without a limit", "none"])
def test_the_limit_of_a_control_group_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    files = [
        (tmp_path / "max", tmp_path / "current"),
        (tmp_path / "limit_in_bytes", tmp_path / "usage_in_bytes"),
    ]
    monkeypatch.setattr(malloc, "_CONTROL_GROUP_FILES", files)
    if version != "none":
        limit, used = files[version == "1"]
        limit.write_text("max\n" if version == "without a limit" else "1000000\n")
        used.write_text("400000\n")
    has_limit = version in ("1", "2")
    assert malloc.control_group_bytes() == ((1e6, 4e5) if has_limit else (math.inf, 0.0))
    assert (malloc.available_bytes() == 6e5) == has_limit
    assert (host_memory_bytes() == 10**6) == has_limit
