"""Data and models of the training suite: GSM8K's training problems as chains of thought, GPT-2's tokenizer, two shapes.

Made once under build/benchmarks/training with the trainer's own tools. Peers get the tokens and the labels of the very
examples in our packs, so that all train on equal tokens and masks.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import MATERIALS, REPOSITORY
from trainer.settings import PrepareSettings
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.training.batches import PackedDataset

FOLDER = MATERIALS / "training"
METHOD = "cot"
PACK_LENGTHS = {"6x384": 1024, "12x768": 512}  # tokens of a rank in a step
SHAPES = {
    "6x384": {"n_layer": 6, "n_embd": 384, "n_head": 6},
    "12x768": {"n_layer": 12, "n_embd": 768, "n_head": 12},
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # GPT-2's default of 0.1 is timed; the proof has none
IGNORED = -100
PROOF_PROBLEMS, PROOF_PACK_LENGTH = 4, 256  # two packs: each of two ranks has a part
PROOF = ("loss", "grad_norm", "learned_tokens")


def data_folder() -> Path:
    """The published data sets: the variable SHARED_DATA, or ../shared/data. Raises FileNotFoundError."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
    if not (folder / "gsm8k").is_dir():
        raise FileNotFoundError(f"no gsm8k/ in {folder}; set SHARED_DATA (see tests/README.md)")
    return folder


def shards(split: str, max_problems: int = 0) -> Shards:
    """Shards of a split of GSM8K with GPT-2's tokenizer; made if they are not there."""
    from trainer.shards.prepare import prepare

    folder = data_folder()
    return prepare(
        PrepareSettings(
            data="gsm8k",
            data_path=str(folder / "gsm8k"),
            split=split,
            tokenizer_name=str(folder / "gpt2-tokenizer"),
            output_dir=str(FOLDER / f"gsm8k-{split}-{max_problems or 'all'}"),
            max_problems=max_problems,
            num_processes=1,
        )
    )


def prepare() -> None:
    """Make everything before the first contender is timed."""
    for split, count in (("train", 0), ("train", PROOF_PROBLEMS), ("test_socratic", 0)):
        shards(split, count)
    for shape in SHAPES:
        model(shape, dropout=False)


def model(shape: str, dropout: bool) -> Path:
    """A folder with random weights and a tokenizer. Without dropout: the same file of weights, another config."""
    from trainer.models import load

    path = FOLDER / (f"gpt2-{shape}" if dropout else f"gpt2-{shape}-without-dropout")
    if (path / "finished").exists():
        return path
    config = load.load_config(str(data_folder() / "gpt2-tokenizer"))
    for key, value in {**SHAPES[shape], **dict.fromkeys(() if dropout else DROPOUTS, 0.0)}.items():
        setattr(config, key, value)
    if dropout:
        load.write_random_weights(config, 0, path)
    else:
        config.save_pretrained(path)
        with contextlib.suppress(FileExistsError):
            os.link(model(shape, dropout=True) / "model.safetensors", path / "model.safetensors")
    (path / "finished").touch()
    return path


def proof_packs(found: Shards) -> int:
    """Packs of the proof."""
    return PackedDataset(found, METHOD, view_of(METHOD), PROOF_PACK_LENGTH, seed=0).packs_per_epoch


def problems(found: Shards, num_packs: int, pack_length: int) -> list[int]:
    """The problems in the first packs of our first epoch."""
    data = PackedDataset(found, METHOD, view_of(METHOD), pack_length, seed=0)
    return [int(problem) for index in range(num_packs) for problem in data.pack(index)]


def usable(found: Shards, pack_length: int) -> np.ndarray:
    """Problems that can be trained on: those that fit into a pack."""
    lengths = found.lengths(view_of(METHOD))
    return np.flatnonzero((lengths > 0) & (lengths <= pack_length))


def rows(found: Shards, problems: list[int]) -> list[dict[str, Any]]:
    """input_ids and labels (-100 where nothing is learned), as Hugging Face's trainers take them."""
    examples = [found.example(problem, view_of(METHOD)) for problem in problems]
    return [
        {"input_ids": tokens.tolist(), "labels": np.where(learned, tokens, IGNORED).tolist()}
        for tokens, learned in examples
    ]


def ds_config(name: str) -> dict[str, Any]:
    """A file of ds_configs/ for Hugging Face's trainers, with the optimizer that the trainer itself would take.

    Left alone they take DeepSpeed's own CPU AdamW: as quick here (569 tokens/s), but compiled at the start.
    """
    config = json.loads((REPOSITORY / "ds_configs" / name).read_text(encoding="utf-8"))
    config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    return config
