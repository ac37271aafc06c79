"""Run parts of the GPU benchmarks: python -m benchmarks.gpu.run PART ... [--tiny] [--seconds 540] [--rounds 2] [--again]

Each measured row is written to disk; the same command continues with the missing rows. A row that would not finish in
time is not started, and the exit status is 75. Speed is measured only on a device that has passed `parity`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, facts
from benchmarks.harness import Comparison, ContenderFailed, Output, Unequal, measure
from benchmarks.processes import preload

PARTS = ("parity", "decode", "train", "memory", "evaluate", "convert")
MORE_TO_DO = 75  # sysexits.h: try again
PATIENCE = 5.0  # maximum time of a peer in multiples of ours, start and loading included
ONE_ROUND = ("parity", "memory", "convert")  # figures that hardly vary, or that take minutes
LIBRARIES = [  # loaded once for all contenders; those of TRL where this Python has it
    "torch", "numpy", "datasets", "safetensors.torch", "transformers", "deepspeed", "accelerate",
    "transformers.trainer", "trl.trainer.sft_trainer", "trainer.training.loop", "trainer.evaluation.pipeline",
    "trainer.export.convert", "trainer.planning.plan", "trainer.shards.prepare",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all, also on a CPU")
    parser.add_argument("--seconds", type=float, default=540, help="be done within about this time")
    parser.add_argument("--rounds", type=int, default=2, help="of every comparison of speed (default 2)")
    parser.add_argument("--only", default="", help="rows whose work contains this text")
    parser.add_argument("--again", action="store_true", help="forget the rows of these parts")
    chosen = parser.parse_args()
    # torch must query NVML for GPUs: a process with a CUDA context cannot be forked.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    preload(*LIBRARIES)
    end = time.monotonic() + chosen.seconds
    statuses = []
    for part in chosen.parts:
        if chosen.again:
            for path in rows_folder(chosen.tiny).glob(f"{part}-*.json"):
                path.unlink()
        if part != "parity" and not has_passed_parity(chosen.tiny):
            sys.exit("numbers before speed: run the part parity on this device first")
        statuses.append(measure_part(part, chosen, end))
    return max(statuses)


def measure_part(part: str, chosen: Any, end: float) -> int:
    """Measure the missing rows; return 1 if one failed, MORE_TO_DO if the time was too short, else 0."""
    failures, took = 0, 0.0
    for comparison in comparisons(part, chosen.tiny):
        row = row_path(part, comparison, chosen.tiny)
        if row.exists() or chosen.only not in comparison.work:
            continue
        begun = time.monotonic()
        left = end - begun
        if took > left:  # the next is like the last
            print(f"not begun, {left:.0f} s are left: {comparison.work}")
            return MORE_TO_DO
        failures += not measured(part, comparison, chosen, row, left)
        took = time.monotonic() - begun
    return 1 if failures else 0


def measured(part: str, comparison: Comparison, chosen: Any, row: Path, left: float) -> bool:
    """Measure and write one row within `left` seconds; return False if ours failed or the contenders disagree.

    The failure of a peer is recorded in the row.
    """
    print(f"{part}: {comparison.work}", flush=True)
    rounds = 1 if chosen.tiny or part in ONE_ROUND else chosen.rounds
    deadline = time.monotonic() + left

    def not_in_time(failure: ContenderFailed) -> Output:
        print(f"    {failure}".partition("\n")[0], flush=True)
        figure = cases.FAILED_SPEED if comparison.higher_is_better else 1 / cases.FAILED_SPEED
        return {comparison.figure: figure, "failed": str(failure).partition(": ")[2].partition("\n")[0]}

    def gate(outputs: Mapping[str, Output]) -> None:
        comparison.gate({name: output for name, output in outputs.items() if "failed" not in output})

    try:
        result = measure(
            replace(comparison, gate=gate),
            rounds,
            lambda line: print(line, flush=True),
            deadline,
            PATIENCE,
            not_in_time,
        )
    except (ContenderFailed, Unequal) as error:
        print(f"NOT MEASURED: {comparison.work}: {error}", file=sys.stderr, flush=True)
        return False
    row.parent.mkdir(parents=True, exist_ok=True)
    content = {"part": part, "device": facts.device(), **result.to_dict()}
    partial = row.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(row)
    for name, value in content["medians"].items():
        print(f"    {name}: {value:,.4g} {comparison.unit}", flush=True)
    return True


def comparisons(part: str, tiny: bool) -> Iterator[Comparison]:
    yield from importlib.import_module(f"benchmarks.gpu.{part}").comparisons(tiny)


def has_passed_parity(tiny: bool) -> bool:
    """Return whether all checks of `parity` have passed on this device."""
    paths = [row_path("parity", comparison, tiny) for comparison in comparisons("parity", tiny)]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return len(found) == len(paths) and all(row["device"] == facts.device() for row in found)


def rows_folder(tiny: bool) -> Path:
    return cases.folder(tiny) / "rows"


def row_path(part: str, comparison: Comparison, tiny: bool) -> Path:
    digest = hashlib.sha256(comparison.work.encode()).hexdigest()[:10]
    return rows_folder(tiny) / f"{part}-{digest}.json"


if __name__ == "__main__":
    sys.exit(main())
