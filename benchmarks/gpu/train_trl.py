"""TRL's SFTTrainer with packing on DeepSpeed: python -m benchmarks.gpu.train_trl MICRO SHAPE STAGE PACKS ACCUM ... [--tiny]

The same folder of weights, examples, tokens in a step, ds_config and precision; MICRO packed rows flattened into one for
a forward pass, and as many passes as the step needs. With flash-attn it is used; without, masks tell examples apart.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from typing import Any

import deepspeed
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu import cases, materials
from benchmarks.harness import REPOSITORY
from trainer.runtime.process_group import free_port
from trainer.shards.methods import view_of
from trainer.training.batches import PackedDataset

IGNORED = -100


def main() -> None:
    micro, case = int(sys.argv[1]), cases.parse(sys.argv[2:])
    disable_progress_bars()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled on a CPU
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    try:
        found = train(case, micro)
    except torch.OutOfMemoryError:
        found = {"tokens_per_second": cases.FAILED_SPEED, "failed": "out of memory"}
    print(json.dumps({**found, "attention": attention()}), flush=True)


def attention() -> str:
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def train(case: cases.Case, micro: int) -> dict[str, Any]:
    found = materials.shards(case.tiny)
    model = AutoModelForCausalLM.from_pretrained(
        materials.model(case.shape, case.tiny), dtype=torch.bfloat16, attn_implementation=attention()
    )
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer_path)
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            deepspeed=ds_config(case.stage),
            packing=True,
            packing_strategy="bfd",
            max_length=case.pack_length,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=case.packs * case.accumulation // micro,
            gradient_checkpointing=case.checkpointing,
            max_steps=cases.WARM_UP + cases.TIMED,
            learning_rate=1e-5,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        made = Counting(
            model=model, args=arguments, train_dataset=rows(case, found), processing_class=tokenizer
        )
        watch = Watch(made)
        made.add_callback(watch)
        made.train()
    counts = torch.stack(watch.counts)[:, 0].tolist()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return {
        "tokens_per_second": (counts[-1] - counts[cases.WARM_UP - 1])
        / (watch.ends[-1] - watch.ends[cases.WARM_UP - 1]),
        "loss": sum(losses) / len(losses),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def ds_config(stage: int) -> dict[str, Any]:
    """Return our ds_config with the optimizer of our trainer: DeepSpeed's default is compiled at the start."""
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
    config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    return config


def rows(case: cases.Case, found: Any) -> Dataset:
    """Return the examples of our first packs, with label -100 for tokens that are no targets."""
    view = view_of(cases.METHOD)
    data = PackedDataset(found, cases.METHOD, view, case.pack_length, seed=0)
    packs = (cases.WARM_UP + cases.TIMED) * case.packs * case.accumulation
    examples = [found.example(int(i), view) for pack in range(packs) for i in data.pack(pack)]
    return Dataset.from_list(
        [
            {"input_ids": tokens.tolist(), "labels": np.where(learned, tokens, IGNORED).tolist()}
            for tokens, learned in examples
        ]
    )


class Counting(SFTTrainer):
    """Trainer that counts real and learned tokens on the device, without a synchronisation."""

    counts: Any = None

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        learned = (inputs["labels"] != IGNORED).sum()
        mask = inputs.get("attention_mask")
        real = torch.full_like(learned, inputs["input_ids"].numel()) if mask is None else mask.sum()
        both = torch.stack([real, learned])
        self.counts = both if self.counts is None else self.counts + both
        return super().training_step(model, inputs, *arguments, **keywords)


class Watch(TrainerCallback):
    """Callback that records the end of each step on the device and the counts so far."""

    def __init__(self, trainer: Counting) -> None:
        self.trainer, self.ends, self.counts = trainer, [], []

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.counts.append(self.trainer.counts)


if __name__ == "__main__":
    main()
