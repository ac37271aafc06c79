"""Compare the planner's memory and time with real trainings on two ranks: python benchmarks/plan_accuracy.py [--write]

Every case runs tools/train.py for three steps and takes the peak resident set that rank 0 logs. Errors exclude the memory
of a process with a tiny model at the same ZeRO stage. glibc keeps freed blocks of up to 32 MB in its heap;
MALLOC_MMAP_THRESHOLD_ makes it return them, and `default malloc` cases measure the difference. Time is calibrated on
every other case and predicted for the rest; on a busy machine it is noise.

--write replaces trainer/planning/measured.json, the source of the errors that tools/plan.py prints.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import machine  # noqa: E402
from tests.distributed import run_well  # noqa: E402

RANKS, STEPS = 2, 3
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEASURED = REPOSITORY / "trainer" / "planning" / "measured.json"


@dataclass(frozen=True)
class Case:
    model: str
    stage: int
    micro_batch: int = 1
    pack_length: int = 512
    checkpointing: bool = False
    accumulation: int = 1
    bf16: bool = False
    default_malloc: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.model, f"ZeRO {self.stage}", f"{self.micro_batch} x {self.pack_length} tokens"]
        parts += ["recomputed"] * self.checkpointing + ["bf16"] * self.bf16
        parts += [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        return ", ".join(parts + ["default malloc"] * self.default_malloc)


CASES = [
    Case("gpt2 6x384", 1),
    Case("gpt2 6x384", 0),
    Case("gpt2 6x384", 2),
    Case("gpt2 6x384", 3),
    Case("gpt2 6x384", 1, checkpointing=True),
    Case("gpt2 6x384", 1, micro_batch=2),
    Case("gpt2 6x384", 1, accumulation=2),
    Case("gpt2 6x384", 2, pack_length=1024),
    Case("gpt2 6x384", 1, bf16=True),
    Case("llama 8x512", 1),
    Case("llama 8x512", 2, checkpointing=True),
    Case("llama 8x512", 3),
    Case("gpt2 12x768", 1),
    Case("gpt2 12x768", 3),
    Case("gpt2 6x384", 1, default_malloc=True),
    Case("gpt2 6x384", 2, default_malloc=True),
    Case("llama 8x512", 1, default_malloc=True),
    Case("llama 8x512", 3, default_malloc=True),
]


def configs(folder: Path) -> dict[str, Path]:
    from transformers import GPT2Config, LlamaConfig

    shapes = {
        "tiny": GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=2048),
        "gpt2 6x384": GPT2Config(n_layer=6, n_embd=384, n_head=6),
        "gpt2 12x768": GPT2Config(),
        "llama 8x512": LlamaConfig(
            num_hidden_layers=8, hidden_size=512, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=1408, vocab_size=32000, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    for name, config in shapes.items():
        config.save_pretrained(folder / name.replace(" ", "-"))
    return {name: folder / name.replace(" ", "-") for name in shapes}


def settings(case: Case, config: Path, shards: Path) -> dict[str, Any]:
    return {
        "train_shards": str(shards),
        "config_name": str(config),
        "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{case.stage}.json"),
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "pack_length": case.pack_length,
        "gradient_checkpointing": case.checkpointing,
        "bf16": case.bf16,
        "max_steps": STEPS,
        "save_steps": 1000,
    }


def train(values: dict[str, Any], environment: dict[str, str]) -> tuple[int, float]:
    """Train; return the peak resident set of rank 0 in bytes and the seconds of a step. Outputs are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in values.items()]
        output = Path(folder) / "run"
        run_well(["tools/train.py", *flags, f"--output_dir={output}"], RANKS, timeout=3600, **environment)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "memory_bytes" in line]
    return max(line["memory_bytes"] for line in steps), statistics.median(s["seconds"] for s in steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {MEASURED.relative_to(REPOSITORY)}")
    parser.add_argument("--cases", type=int, default=len(CASES), help="number of cases to run")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from trainer.settings import PrepareSettings
        from trainer.shards.prepare import prepare

        shards = folder / "shards"
        prepare(
            PrepareSettings(
                tokenizer_name="stories", num_problems=400, output_dir=str(shards), num_processes=1
            )
        )
        result = measure(CASES[: flags.cases], configs(folder), shards)
    show(result)
    if flags.write:
        MEASURED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(
    cases: list[Case],
    folders: dict[str, Path],
    shards: Path,
    run: Callable[[dict[str, Any], dict[str, str]], tuple[int, float]] = train,
) -> dict[str, Any]:
    """Plan and run every case; return the content of trainer/planning/measured.json."""
    from trainer.planning import plan
    from trainer.settings import PlanSettings

    tiny: dict[tuple[int, bool], int] = {}
    memory, kept, timed, loads = [], [], [], []
    for case in cases:
        environment = {} if case.default_malloc else HAND_BACK
        key = (case.stage, case.default_malloc)
        if key not in tiny:
            values = settings(Case("tiny", case.stage), folders["tiny"], shards)
            planned = plan.make_plan(PlanSettings(**values, gpu="cpu", gpus_per_node=RANKS), process_bytes=0)
            tiny[key] = run(values, environment)[0] - planned.memory.device_bytes
        values = settings(case, folders[case.model], shards)
        planned = plan.make_plan(
            PlanSettings(**values, gpu="cpu", gpus_per_node=RANKS), process_bytes=0, ignore_glibc_heap=True
        )
        peak, took = run(values, environment)
        loads.append(os.getloadavg()[0])
        wanted, found = planned.memory.device_bytes, peak - tiny[key]
        row = {
            "case": case.name,
            "predicted_bytes": wanted,
            "measured_bytes": found,
            "error": wanted / found - 1,
        }
        print(json.dumps(row), f"{took:.2f} s", dict(planned.memory.device), planned.memory.phase, flush=True)
        if case.default_malloc:
            kept.append({**row, "transient_bytes": planned.memory.transient_bytes})
        else:
            memory.append(row)
            if not case.bf16:
                timed.append((case, planned, took))
    rate, seconds = time_errors(timed)
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores {machine.processor()}, {RANKS} ranks",
        "load_average": statistics.median(loads),
        "process_bytes": {str(stage): size for (stage, default), size in tiny.items() if not default},
        "kept_by_glibc": kept_by_glibc(kept),
        "cpu_flops_per_rank": rate,
        "memory": memory,
        "default_malloc": kept,
        "time": seconds,
    }


def time_errors(timed: list[tuple[Case, Any, float]]) -> tuple[float, list[dict[str, Any]]]:
    """Return the FLOP/s of a rank (median over every other case) and the errors of all cases with this rate."""
    from trainer.planning import time

    flops = [planned.step.compute_seconds * planned.step.rate.flops / took for _, planned, took in timed]
    rate = time.Rate(statistics.median(flops[::2]), "every other case of this benchmark")
    rows = []
    for number, (case, planned, took) in enumerate(timed):
        predicted = time.estimate_step_time(
            planned.workload, planned.deepspeed_config, planned.hardware, case.checkpointing, rate
        ).seconds
        row = {"case": case.name, "predicted_seconds": predicted, "measured_seconds": took}
        rows.append({**row, "error": predicted / took - 1, "held_out": number % 2 == 1})
    return rate.flops, rows


def kept_by_glibc(rows: list[dict[str, Any]]) -> float:
    """Return the fraction of freed activations that malloc keeps, the median over the cases.

    Adds to every row the error with this allowance.
    """
    if not rows:
        return 0.0
    fraction = statistics.median(
        (r["measured_bytes"] - r["predicted_bytes"]) / r["transient_bytes"] for r in rows
    )
    for row in rows:
        allowed = row["predicted_bytes"] + fraction * row["transient_bytes"]
        row["error_with_allowance"] = allowed / row["measured_bytes"] - 1
    return fraction


def show(result: dict[str, Any]) -> None:
    for kind, unit, scale in (("memory", "MB", 1e-6), ("time", "s", 1.0)):
        name = "bytes" if kind == "memory" else "seconds"
        print(f"\n{kind} ({unit}), {result['hardware']}, {result['date']}")
        for row in result[kind]:
            predicted, found = row[f"predicted_{name}"] * scale, row[f"measured_{name}"] * scale
            print(f"  {row['case']:<55} {predicted:9.1f} {found:9.1f} {row['error']:+7.1%}")
    print(f"\nkept by glibc's heap: {result['kept_by_glibc']:.0%} of activations; with that allowance:")
    for row in result["default_malloc"]:
        print(f"  {row['case']:<55} {row['error_with_allowance']:+7.1%}")


if __name__ == "__main__":
    main()
