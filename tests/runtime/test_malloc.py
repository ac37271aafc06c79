"""Memory that is freed in pieces of changing size does not make a process grow without end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.planning.accelerators import host_memory_bytes
from trainer.runtime import malloc

# Holes between small blocks that stay. All blocks exist at the same time: whether later ones fit into the holes of earlier
# ones depends on where the heap happens to lie.
GROW = """
import sys
import torch
from trainer.runtime import malloc
from trainer.runtime.malloc import HeapLimit, _resident_bytes
malloc.tune_glibc_malloc()
limit, trimmed, sizes = HeapLimit(), 0, []
blocks, kept = [], []
for step in range(4):
    if step == 2:
        for _ in range(16):
            blocks.append(torch.ones(16 << 20))
            kept.append(torch.ones(1 << 18))
        blocks.clear()
    trimmed += limit() if sys.argv[1] == "limited" else 0
    sizes.append(_resident_bytes() >> 20)
print(trimmed, sizes[1], max(sizes[2:]), sizes[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_holes_are_handed_back() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}

    def run(which: str) -> list[int]:
        command = [sys.executable, "-c", GROW, which]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        return [int(word) for word in done.stdout.split()]

    times, _, _, last = run("limited")
    _, _, _, unlimited = run("unlimited")
    assert times > 0
    assert last < unlimited - 100


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
