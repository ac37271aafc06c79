"""Measure `--help` of every tool: help.py REPETITIONS. Prints the slowest tool's median, and what it loaded."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "numpy", "matplotlib"}


def seconds(tool: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, str(tool), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def loaded(tool: Path) -> list[str]:
    """Libraries that `--help` imported and that take longer than the whole limit."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(tool), "--help"], check=True, capture_output=True, text=True
    )
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    return sorted(modules & HEAVY)


def main() -> None:
    tools = sorted(TOOLS.glob("*.py"))
    took = {tool.stem: statistics.median(seconds(tool) for _ in range(int(sys.argv[1]))) for tool in tools}
    heavy = {tool.stem: found for tool in tools if (found := loaded(tool))}
    print(json.dumps({"seconds": max(took.values()), "tools": took, "heavy": heavy}))


if __name__ == "__main__":
    main()
