"""Shards, models and checkpoints of the GPU benchmarks, made once under build/benchmarks/gpu with the trainer's own code.

Data: GSM8K with GPT-2's tokenizer, if `gpu.sh wheels` has brought its shards, else generated stories.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.gpu import cases
from benchmarks.harness import REPOSITORY
from trainer.settings import ConvertSettings, PrepareSettings, TrainSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir


def shards(tiny: bool) -> Shards:
    """Return the shards of the training benchmarks."""
    brought = cases.BROUGHT / "shards" / "gsm8k-train"
    if not tiny and atomic_dir.is_complete(brought):
        return Shards.open(brought)
    return stories("train", 200 if tiny else 20_000, tiny)


def stories(split: str, count: int, tiny: bool) -> Shards:
    from trainer.shards.prepare import prepare

    steps = {"min_steps": 1, "max_steps": 3} if tiny else {"min_steps": 2, "max_steps": 8}
    target = cases.folder(tiny) / f"stories-{split}-{count}"
    settings = PrepareSettings(
        tokenizer_name="stories", output_dir=str(target), split=split, num_problems=count, **steps,
        num_processes=1 if tiny else 0,
    )  # fmt: skip
    return prepare(settings)


def model(shape: str, tiny: bool) -> Path:
    """Return a folder with random bf16 weights, which all contenders load."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.models import load

    target = cases.folder(tiny) / "models" / shape
    if not atomic_dir.is_complete(target):
        torch.manual_seed(0)
        with torch.device(load.local_device()):
            made = AutoModelForCausalLM.from_config(cases.config(shape, tiny), dtype=torch.bfloat16)
        with atomic_dir.atomic_directory(target, "model", {}) as staging:
            made.save_pretrained(staging)
        del made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return target


def student(tiny: bool) -> Path:
    """Return the export of a trained student that writes solutions of uneven lengths."""
    from trainer.export.convert import convert
    from trainer.training.loop import train

    run = cases.folder(tiny) / "student"
    if not atomic_dir.is_complete(run / "export"):
        learned = stories("train", 200 if tiny else 20_000, tiny)
        cuda = not tiny
        settings = TrainSettings(
            train_shards=str(learned.path), output_dir=str(run), method="socratic",
            config_name="stories-0.2m" if tiny else "stories-30m", train_on_calculator_results=True,
            deepspeed=str(REPOSITORY / "ds_configs" / "zero1.json"), bf16=cuda, learning_rate=1e-3,
            per_device_train_batch_size=8 if cuda else 2, pack_length=1024 if cuda else 512, warmup_ratio=0.1,
            num_train_epochs=1.0, max_steps=0 if cuda else 20, adam_beta2=0.98,
        )  # fmt: skip
        train(settings)
        convert(ConvertSettings(str(run), dtype="fp32"))
    return run / "export"


def checkpoint(stage: int, tiny: bool) -> Path:
    """Return a checkpoint of a Llama of the 7B shape, with as many layers as the disk holds beside the exports."""
    from trainer.training.loop import train

    run = cases.folder(tiny) / f"checkpoint-zero{stage}"
    found = run / "checkpoints" / "step-000001"
    if not atomic_dir.is_complete(found):
        for other in (
            run,
            *cases.folder(tiny).glob("checkpoint-zero*"),
            cases.folder(tiny) / "models" / "llama-2-7b",
        ):
            shutil.rmtree(other, ignore_errors=True)  # large, and made again on demand
        config = cases.config("llama-2-7b", tiny, num_hidden_layers=2 if tiny else layers_that_fit())
        config.save_pretrained(run / "config")
        train(
            TrainSettings(
                train_shards=str(shards(tiny).path), output_dir=str(run), config_name=str(run / "config"), bf16=True,
                deepspeed=str(REPOSITORY / "ds_configs" / f"zero{stage}.json"), max_steps=1, save_steps=1,
                pack_length=1024,
            )
        )  # fmt: skip
    return found


def layers_that_fit() -> int:
    """Return the number of layers that fit: 14 bytes of checkpoint and 2 x 4 of exports per parameter, a fifth spare."""
    free = shutil.disk_usage(REPOSITORY).free * 0.8
    embeddings, a_layer = 2 * cases.VOCABULARY * 4096, 4 * 4096**2 + 3 * 4096 * 11008
    layers = int((free / 22 - embeddings) / a_layer)
    if layers < 1:
        sys.exit(f"{REPOSITORY} has {free / 1e9:.0f} GB to spare, not enough for one layer of a 7B model")
    return min(32, layers)
