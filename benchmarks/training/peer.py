"""Hugging Face's Trainer or TRL's SFTTrainer on DeepSpeed: peer.py {padded,grouped,packed} SHAPE STEPS {fp32,bf16}

First one step on four problems without dropout, for the proof, and one to warm up; then STEPS steps a round, timed from
the first batch to the last update. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.processes import run_in_fork, turns
from benchmarks.training import material
from trainer.shards.methods import view_of
from trainer.shards.read import Shards

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
WARM_UP, MAX_ROUNDS = 1, 5  # of distinct problems; then they repeat
MEGABATCH = 50  # batches that LengthGroupedSampler sorts together
Rows = list[dict[str, Any]]


def main() -> None:
    way, shape, steps, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    disable_progress_bars()
    # DeepSpeed would compile an inference collective, and hang if an earlier compilation was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    proof = run_in_fork(partial(proved, way, shape, dtype))
    shards, pack_length = material.shards("train"), material.PACK_LENGTHS[shape]
    order, batch = choose(way, shards, pack_length, steps)
    rows, model = material.rows(shards, order), material.model(shape, dropout=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "bf16": dtype == "bf16", "per_device_train_batch_size": batch}
        trainer = make(way, model, rows, pack_length, {**settings, "max_steps": 1000})
        trainer.add_callback(Rounds(trainer, steps, proof))
        trainer.train()


def proved(way: str, shape: str, dtype: str) -> dict[str, float]:
    """Return the figures of one step on four problems, without dropout. Collective."""
    few = material.shards("train", material.PROOF_PROBLEMS)
    rows = material.rows(few, list(range(len(few))))
    batch = -(-(material.proof_packs(few) if way == "packed" else len(rows)) // RANKS)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "bf16": dtype == "bf16", "per_device_train_batch_size": batch}
        model = material.model(shape, dropout=False)
        trainer = make(way, model, rows, material.PROOF_PACK_LENGTH, {**settings, "max_steps": 1})
        trainer.train()
        first, learned = trainer.state.log_history[0], summed(trainer.learned_tokens)
    return {"loss": first["loss"], "grad_norm": float(first["grad_norm"]), "learned_tokens": learned}


class Rounds(TrainerCallback):
    """Callback that times `steps` steps per round and ends the training after the last round."""

    def __init__(self, trainer: Any, steps: int, proof: dict[str, Any]) -> None:
        self.trainer, self.steps, self.proof, self.turns = trainer, steps, proof, turns()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **keywords: Any) -> None:
        done = state.global_step - WARM_UP
        if done < 0 or done % self.steps:
            return
        if done:
            seconds = time.perf_counter() - self.start
            tokens = summed(self.trainer.real_tokens)
            if RANK == 0:
                figures = {"tokens_per_second": tokens / seconds, "tokens": tokens, **self.proof}
                print(json.dumps(figures), flush=True)
        if next(self.turns, self) is self:
            control.should_training_stop = True
        self.trainer.real_tokens, self.start = 0, time.perf_counter()


def summed(count: int) -> int:
    """Collective. Over all ranks."""
    total = torch.tensor(count)
    if RANKS > 1:
        torch.distributed.all_reduce(total)
    return int(total)


def make(way: str, model_folder: Path, rows: Rows, pack_length: int, settings: dict[str, Any]) -> Any:
    """The library's own trainer and collator."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(material.data_folder() / "gpt2-tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "deepspeed": material.ds_config("zero1.json"),
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **settings,
    }
    data = Dataset.from_list(rows)
    if way in ("padded", "grouped"):
        arguments = TrainingArguments(train_sampling_strategy="sequential", **settings)  # rows lie in order
        collator = DataCollatorForSeq2Seq(tokenizer)
        return counting(Trainer)(model=model, args=arguments, train_dataset=data, data_collator=collator)
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(packing=True, packing_strategy="bfd", max_length=pack_length, **settings)
    return counting(SFTTrainer)(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def counting(base: type) -> type:
    """The trainer with a count of what this rank really trained on; nothing else is changed."""

    class Counting(base):  # type: ignore[misc, valid-type]
        real_tokens = learned_tokens = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.real_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            self.learned_tokens += int((inputs["labels"] != material.IGNORED).sum())
            return super().training_step(model, inputs, *arguments, **keywords)

    return Counting


def choose(way: str, shards: Shards, pack_length: int, steps: int) -> tuple[list[int], int]:
    """The problems to train on in their order, and how many (packs, if packed) a rank takes at a time.

    On average a rank's step has a pack's tokens, however it is laid out.
    """
    all_steps = WARM_UP + MAX_ROUNDS * steps
    if way == "packed":
        return material.problems(shards, all_steps * RANKS, pack_length), 1
    usable = material.usable(shards, pack_length)
    lengths = shards.lengths(view_of(material.METHOD))[usable]
    size = round(pack_length / lengths.mean())
    random = torch.Generator().manual_seed(0)
    if way == "padded":
        chosen = torch.randperm(len(usable), generator=random)[: size * all_steps * RANKS].tolist()
    else:
        chosen = grouped(lengths.tolist(), size, steps, random)
    return usable[chosen].tolist(), size


def grouped(lengths: list[int], size: int, steps: int, random: torch.Generator) -> list[int]:
    """Batches of `size` as Trainer's LengthGroupedSampler makes them of the whole training set.

    It sorts what it has drawn for 50 batches. Of each such group the `steps` of one round are taken, from the longest to the
    shortest at even distances, so that few steps are a fair sample; the batches of one step are neighbours, as they
    would be. First the steps to warm up, of middling length.
    """
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=random))
    starts = [MEGABATCH // 2 // RANKS * RANKS] * WARM_UP
    for number in range(MAX_ROUNDS):
        within = [int((step + 0.5) / steps * (MEGABATCH // RANKS)) * RANKS for step in range(steps)]
        starts += [number * MEGABATCH + start for start in within]
    return [order[index] for start in starts for index in range(start * size, (start + RANKS) * size)]


if __name__ == "__main__":
    main()
