from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trainer.models.tokenizer import load_tokenizer
from trainer.settings import PrepareSettings
from trainer.shards.methods import VIEWS
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.storage import atomic_dir


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Ten short stories as test shards."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shards") / "stories-test"
    settings = PrepareSettings(
        data="stories", split="test", tokenizer_name="stories", output_dir=str(folder), num_problems=10,
        min_steps=1, max_steps=2, num_processes=1,
    )  # fmt: skip
    return prepare(settings)


@pytest.fixture(scope="session")
def export(export_for: Callable[[str], Path]) -> Path:
    """runs/mine/<run>/export of a socratic model that has memorised the ten stories, but not their calculator results:
    as in training, these carried no loss."""
    return export_for("socratic")


@pytest.fixture(scope="session")
def export_for(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports of one study whose models have memorised the targets of their method; each is trained on first use.

    `make(method, hybrid)`: a hybrid has a convolution layer and an attention layer, and cannot be decoded in slots.
    """
    study = tmp_path_factory.mktemp("runs") / "mine"

    def make(method: str, hybrid: bool = False) -> Path:
        run = study / f"stories.{method}.{'hybrid' if hybrid else 'tiny'}.s0"
        if not run.is_dir():
            model = _memorise(shards, method, hybrid)
            facts = {
                "method": method, "data": "stories", "model_name": "tiny", "seed": 0, "step": 77, "finished": True,
                "num_parameters": model.num_parameters(), "train_on_calculator_results": False,
                "tokenizer_fingerprint": shards.facts["tokenizer_fingerprint"],
            }  # fmt: skip
            with atomic_dir.atomic_directory(run / "export", "export", facts) as staging:
                model.save_pretrained(staging)
                load_tokenizer(shards.tokenizer_path).save_pretrained(staging)
        return run / "export"

    return make


def remade(export: Path, folder: Path, **facts: Any) -> Path:
    """Return a copy of an export with other facts in its manifest."""
    old = atomic_dir.read_manifest(export)["facts"]
    with atomic_dir.atomic_directory(folder / "export", "export", {**old, **facts}) as staging:
        shutil.copytree(
            export, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(atomic_dir.MANIFEST)
        )
    return folder / "export"


def _memorise(shards: Shards, method: str, hybrid: bool) -> PreTrainedModel:
    """Train a small model; its size depends on the method, so that a mix-up of models changes the results."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": shards.facts["vocabulary_size"], "hidden_size": 64, "intermediate_size": 128 + 8 * len(method),
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
    if hybrid:
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"], pad_token_id=0))
    examples = [shards.example(index, VIEWS[method]) for index in range(len(shards))]
    longest = max(len(tokens) for tokens, _ in examples)
    inputs = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), -100)
    for row, (tokens, mask) in enumerate(examples):
        inputs[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(tokens).where(
            torch.from_numpy(mask), torch.tensor(-100)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(400):
        loss = cross_entropy(model(inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if loss.item() < 0.01:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def mpiexec(arguments: list[str], num_ranks: int, **environment: str) -> tuple[int, str]:
    """Run `python *arguments` under mpiexec; return exit status and output. Raises TimeoutExpired after two minutes."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launchers}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mpiexec")), "-n", str(num_ranks), sys.executable, *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout
