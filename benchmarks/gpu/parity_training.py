"""Compare trainings with and without packing, by ZeRO stage, with recomputation, in bf16, and after a resume.

The real loop trains a small Llama with grouped heads for a few steps each time, in one process. The last line on
stdout is JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, materials
from benchmarks.harness import REPOSITORY
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime import distributed
from trainer.settings import TrainSettings

STEPS = 4
# Largest relative distance of a step's loss and of its gradient norm from the first training's.
FP32, BF16 = (1e-5, 1e-3), (5e-3, 1e-1)
FIRST = "fp32, ZeRO-0, packed"
OTHERS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "fp32, ZeRO-0, padded": ({"packing": False}, FP32),
    "fp32, ZeRO-1, packed": ({"stage": 1}, FP32),
    "fp32, ZeRO-2, recomputed": ({"stage": 2, "gradient_checkpointing": True}, FP32),
    "fp32, ZeRO-3, two micro-batches": (
        {"stage": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        FP32,
    ),
    "bf16, ZeRO-1, packed": ({"stage": 1, "bf16": True}, BF16),
    "bf16, ZeRO-3, recomputed": ({"stage": 3, "bf16": True, "gradient_checkpointing": True}, BF16),
}


def main() -> None:
    tiny = "--tiny" in sys.argv
    failures: list[str] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = materials.shards(tiny)
        config = cases.config(
            "llama-2-7b",
            True,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=64,
            vocab_size=len(load_tokenizer(shards.tokenizer_path)),
        )
        config.initializer_range = 0.1  # else the loss hardly depends on attention
        config.save_pretrained(folder / "config")
        wanted = train(folder, FIRST, tiny, {})
        for other, (changes, allowed) in OTHERS.items():
            compare(other, wanted, train(folder, other, tiny, changes), allowed, failures, details)
        for stage in (1, 3):
            label = f"fp32, ZeRO-{stage}, stopped and resumed"
            compare(label, wanted, resumed(folder, label, tiny, stage), FP32, failures, details)
    print(json.dumps({"checks": len(details), "failures": failures, "details": details}), flush=True)
    distributed.shutdown()


def train(folder: Path, name: str, tiny: bool, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Train for STEPS steps; return the records of metrics.jsonl."""
    from trainer.training.loop import train as run_training

    stage = changes.pop("stage", 0)
    output = folder / name.replace(" ", "-")
    values: dict[str, Any] = {
        "train_shards": str(materials.shards(tiny).path),
        "output_dir": str(output),
        "config_name": str(folder / "config"),
        "method": cases.METHOD,
        "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{stage}.json"),
        "per_device_train_batch_size": 2,
        "pack_length": 256 if tiny else 1024,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        **changes,
    }
    run_training(TrainSettings(**values))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return list({line["step"]: line for line in lines}.values())


def resumed(folder: Path, name: str, tiny: bool, stage: int) -> list[dict[str, Any]]:
    """Train, delete the last checkpoint and the metrics, and train again to the end; return all records."""
    before = train(folder, name, tiny, {"stage": stage})
    output = folder / name.replace(" ", "-")
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:06d}")
    (output / "metrics.jsonl").unlink()
    after = train(folder, name, tiny, {"stage": stage})
    assert [line["step"] for line in after] == [3, 4], "the training must resume, not restart"
    return [*before[: STEPS // 2], *after]


def compare(
    name: str,
    wanted: list[dict[str, Any]],
    found: list[dict[str, Any]],
    allowed: tuple[float, float],
    failures: list[str],
    details: dict[str, Any],
) -> None:
    off = [
        max(abs(one[key] / other[key] - 1) for one, other in zip(found, wanted, strict=True))
        for key in ("loss", "grad_norm")
    ]
    details[name] = {"loss": off[0], "grad_norm": off[1], "allowed": allowed}
    if not (off[0] <= allowed[0] and off[1] <= allowed[1]):
        failures.append(f"{name}: loss off by {off[0]:.1e}, gradient norm by {off[1]:.1e}; allowed {allowed}")


if __name__ == "__main__":
    main()
