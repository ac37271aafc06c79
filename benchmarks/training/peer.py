"""Hugging Face's Trainer or TRL's SFTTrainer on DeepSpeed: peer.py SHAPE STEPS WAY ...

Ways: padded, grouped (Trainer); packed, padding_free (SFTTrainer). First one step on four problems without dropout,
for the proof; then STEPS steps, timed from the first batch to the last update. Of several ways, the fastest is the
figure. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
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

from benchmarks.training import material
from trainer.shards.methods import method
from trainer.shards.read import Shards

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
Rows = list[dict[str, Any]]


def main() -> None:
    shape, steps, ways = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    disable_progress_bars()
    # As in the trainer: DeepSpeed would compile a collective of inference that no training uses, and wait for ever if
    # an earlier compilation was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    few, all_problems = material.shards("train", material.PROOF_PROBLEMS), material.shards("train")
    proof_rows = material.rows(few, list(range(len(few))))
    found = {}
    for way in ways:
        packs = -(-material.proof_packs(few) // RANKS)
        proof = train(
            way, material.model(shape, dropout=False), proof_rows, 1, material.PROOF_PACK_LENGTH, packs
        )
        rows = material.rows(all_problems, choose(way, all_problems, steps))
        found[way] = {
            **train(way, material.model(shape, dropout=True), rows, steps, material.PACK_LENGTH),
            "proof": proof,
        }
    best = max(ways, key=lambda way: found[way]["tokens_per_second"])
    proofs = {key: [found[way]["proof"][key] for way in ways] for key in material.PROOF}
    if RANK == 0:
        result = {**found[best], "ways": {way: found[way]["tokens_per_second"] for way in ways}, **proofs}
        print(json.dumps(result), flush=True)


def train(
    way: str, model_folder: Path, rows: Rows, steps: int, pack_length: int, packs: int = 1
) -> dict[str, Any]:
    """Collective. Train `steps` steps on the rows (of `packs` packs a rank); loss and gradient norm: of the first one."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(material.data_folder() / "gpt2-tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "deepspeed": material.ds_config("zero1.json"),
            "max_steps": steps,
            "per_device_train_batch_size": packs if way == "packed" else batch_size(rows, steps),
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,  # TRL's default is bf16
        }
        made = make(way, model, tokenizer, Dataset.from_list(rows), pack_length, common)
        watch = Watch()
        made.add_callback(watch)
        made.train()
    counts = torch.tensor([made.real_tokens, made.learned_tokens])
    if RANKS > 1:
        torch.distributed.all_reduce(counts)
    real, learned = counts.tolist()
    first = made.state.log_history[0]
    return {
        "tokens_per_second": real / watch.seconds,
        "tokens": real,
        "cpu_seconds": watch.cpu_seconds,
        "learned_tokens": learned,
        "loss": first["loss"],
        "grad_norm": float(first["grad_norm"]),
    }


def batch_size(rows: Rows, steps: int) -> int:
    """Examples of a rank in a step, so that all steps take all rows."""
    return -(-len(rows) // (steps * RANKS))


def make(
    way: str, model: Any, tokenizer: Any, data: Dataset, pack_length: int, common: dict[str, Any]
) -> Any:
    """The library's own trainer and collator."""
    if way in ("padded", "grouped"):
        order = {"grouped": "sequential"}.get(way, "random")  # `grouped` rows lie in the sampler's order
        arguments = TrainingArguments(train_sampling_strategy=order, gradient_checkpointing=False, **common)
        collator = DataCollatorForSeq2Seq(tokenizer)
        return counting(Trainer)(model=model, args=arguments, train_dataset=data, data_collator=collator)
    from trl import SFTConfig, SFTTrainer

    layout = {"packing": True, "packing_strategy": "bfd", "max_length": pack_length}
    if way == "padding_free":
        layout = {"padding_free": True, "max_length": None}
    arguments = SFTConfig(gradient_checkpointing=False, **layout, **common)
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


class Watch(TrainerCallback):
    """Seconds from the first batch to the last update."""

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        self.cpu_seconds = time.process_time() - self.cpu_start


def choose(way: str, shards: Shards, steps: int) -> list[int]:
    """The problems to train on. On average a step has a pack's tokens, however it is laid out."""
    if way in ("packed", "padding_free"):
        return material.problems(shards, steps * RANKS)
    usable = material.usable(shards)
    lengths = shards.lengths(method(material.METHOD))[usable]
    size = round(material.PACK_LENGTH / lengths.mean())
    random = torch.Generator().manual_seed(0)
    if way == "padded":
        return usable[torch.randperm(len(usable), generator=random)[: size * steps * RANKS]].tolist()
    return usable[grouped(lengths.tolist(), size, steps, random)].tolist()


def grouped(lengths: list[int], size: int, steps: int, random: torch.Generator) -> list[int]:
    """Batches of `size` as Trainer's LengthGroupedSampler makes them of the whole training set, `steps` of them a rank.

    It sorts what it has drawn for 50 batches. Of these some are taken from the longest to the shortest at even
    distances, so that few steps are a fair sample; the batches of one step are neighbours, as they would be.
    """
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=random))
    starts = [int((step + 0.5) / steps * (50 // RANKS)) * size * RANKS for step in range(steps)]
    return [order[index] for start in starts for index in range(start, start + size * RANKS)]


if __name__ == "__main__":
    main()
