"""Real runs in every layout, on one and two ranks, in ZeRO 1 to 3: the first step equals that of the plain model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.distributed import run_well
from tests.models.families import family_of
from tests.training.conftest import settings, train_many, trajectory
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training.batches import PackedDataset
from trainer.training.layouts import EQUAL_LENGTH, ONE_BY_ONE, PACKED, PADDED

PACKS = 4  # of a step
SEED = 1
FAMILIES = {
    "gemma2": PACKED,
    "gpt_oss-window": PACKED,
    "bloom": PACKED,
    "falcon": PACKED,
    "mixtral": PACKED,
    "gpt_neo-window": PADDED,
    "qwen3_5-text": PADDED,
    "doge": EQUAL_LENGTH,
}
STAGES = (1, 2, 3)
FAULTY = "llama"  # for planted faults


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, stories: Shards) -> Path:
    """A pretrained folder for each family, with the tokenizer and the vocabulary size of the shards."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = load_tokenizer(stories.tokenizer_path)
    for name in (*FAMILIES, FAULTY):
        family = family_of(name)
        wider = {**family.settings, "vocab_size": stories.facts["vocabulary_size"]}
        dataclasses.replace(family, settings=wider).save(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def _run(shards: Shards, weights: Path, output_dir: Path, stage: int, ranks: int, **changes: Any) -> dict:
    """One step of `PACKS` packs that hardly changes the weights, and a held-out loss after it."""
    return settings(
        shards,
        output_dir,
        config_name="",
        config_overrides="",
        model_name_or_path=str(weights),
        deepspeed=f"ds_configs/zero{stage}.json",
        gradient_accumulation_steps=PACKS // ranks,
        learning_rate=1e-12,
        weight_decay=0.0,
        max_steps=1,
        eval_shards=str(shards.path),
        eval_steps=1,
        eval_max_problems=20,
        seed=SEED,
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, stories: Shards, weights: Path) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    two = [
        _run(stories, weights / name, folder / f"{name}-{stage}", stage, 2)
        for name in FAMILIES
        for stage in _stages(name)
    ]
    train_many(folder, two, 2)
    one = [_run(stories, weights / name, folder / f"{name}-alone", 1, 1) for name in FAMILIES]
    train_many(folder, one, 1)
    return folder


def _stages(name: str) -> tuple[int, ...]:
    """Return the ZeRO stages in which two ranks train a family: all for a layout with several passes."""
    return STAGES if FAMILIES[name] == EQUAL_LENGTH else (3,)


@dataclasses.dataclass
class PlainResults:
    """Results of transformers, one example at a time: mean loss and gradient norm of a step, held-out loss."""

    loss: float
    gradient_norm: float
    held_out: float


def _plain(weights: Path, shards: Shards) -> PlainResults:
    model = load.load_model(weights, "fp32").eval()
    data = PackedDataset(shards, "socratic", view_of("socratic"), 512, SEED)
    examples = data.micro_batch(range(PACKS), PACKS).examples
    loss = _mean_loss(model, examples)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    held_out = PackedDataset(shards, "socratic", view_of("socratic"), 512, 0)
    num_packs = max(1, round(20 / held_out.num_examples * held_out.packs_per_epoch))
    with torch.no_grad():
        evaluated = _mean_loss(model, held_out.micro_batch(range(num_packs), num_packs).examples)
    return PlainResults(float(loss.detach()), float(norm), float(evaluated))


def _mean_loss(model: Any, examples: list) -> torch.Tensor:
    """Return the mean over all target tokens, as the trainer defines it."""
    losses = []
    for tokens, loss_mask in examples:
        row = torch.from_numpy(tokens)
        labels = torch.where(torch.from_numpy(loss_mask), row, -100)[1:]
        losses.append(cross_entropy(model(input_ids=row[None]).logits[0, :-1], labels, reduction="sum"))
    return torch.stack(losses).sum() / sum(int(loss_mask.sum()) for _, loss_mask in examples)


def _layout(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RunDirectory(run).environment.read_text(encoding="utf-8"))["layout"]
    return found


def _held_out(run: Path) -> float:
    lines = map(json.loads, RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines())
    return next(line["evaluation"]["loss"] for line in lines if "evaluation" in line)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_is_the_models_own(name: str, runs: Path, weights: Path, stories: Shards) -> None:
    expected = _plain(weights / name, stories)
    for case in (*_stages(name), "alone"):
        run = runs / f"{name}-{case}"
        (step,) = trajectory(run)
        assert step["loss"] == pytest.approx(expected.loss, rel=2e-6), case
        assert step["grad_norm"] == pytest.approx(expected.gradient_norm, rel=1e-5), case
        assert _held_out(run) == pytest.approx(expected.held_out, rel=2e-6), case


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_recorded(name: str, runs: Path) -> None:
    for case in (*_stages(name), "alone"):
        run = runs / f"{name}-{case}"
        layout = _layout(run)
        assert layout["rows"] == FAMILIES[name]
        assert layout["largest_difference"] <= layout["tolerance"]
        assert bool(layout["fallback_reason"]) == (FAMILIES[name] != PACKED)
        (step,) = RunDirectory(run).checkpoint_steps()
        assert atomic_dir.read_manifest(RunDirectory(run).checkpoint(step))["facts"]["layout"] == layout


# --- planted faults, and no memory for a copy of the model --------------------------------------------------------------


def _train_with_fault(fault: str, folder: Path, runs: list[dict], num_ranks: int, *flags: str) -> str:
    file = folder / f"{fault}.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    return run_well(
        ["-m", "tests.training.train_with_fault", fault, str(file), *flags], num_ranks, timeout=600
    )


def test_attention_that_ignores_boundaries_is_reported_and_not_used(
    tmp_path: Path, weights: Path, stories: Shards
) -> None:
    runs = [
        _run(stories, weights / FAULTY, tmp_path / "auto", 3, 2),
        _run(stories, weights / FAULTY, tmp_path / "asked", 3, 2, packing="true"),
    ]
    seen = _train_with_fault("ignore_boundaries", tmp_path, runs, 2, "--collect")
    assert _layout(tmp_path / "auto")["rows"] == PADDED
    (step,) = trajectory(tmp_path / "auto")
    assert step["loss"] == pytest.approx(_plain(weights / FAULTY, stories).loss, rel=2e-6)
    assert seen.count("not packed: its logits differ from those of the model alone") == 1
    assert "run 1: " in seen and "cannot be trained packed: its logits differ" in seen


def test_one_example_a_forward_pass(tmp_path: Path, weights: Path, stories: Shards) -> None:
    """Ranks have different numbers of examples, but under ZeRO-3 all must make the same number of forward passes."""
    runs = [_run(stories, weights / FAULTY, tmp_path / str(stage), stage, 2) for stage in STAGES]
    runs.append(_run(stories, weights / FAULTY, tmp_path / "recomputed", 3, 2, gradient_checkpointing=True))
    _train_with_fault("see_other_rows", tmp_path, runs, 2)
    first, *others = (tmp_path / name for name in (*map(str, STAGES), "recomputed"))
    (expected,) = trajectory(first)
    assert _layout(first)["rows"] == ONE_BY_ONE
    for run in others:
        assert _layout(run)["rows"] == ONE_BY_ONE
        (step,) = trajectory(run)
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert _held_out(run) == pytest.approx(_held_out(first), rel=2e-6)


def test_without_memory_for_a_copy_the_engine_itself_is_compared(
    tmp_path: Path, weights: Path, stories: Shards
) -> None:
    cases = [("gemma2", 1), ("gpt_oss-window", 3), ("doge", 3)]
    runs = [_run(stories, weights / name, tmp_path / f"{name}-{stage}", stage, 2) for name, stage in cases]
    runs.append(_run(stories, weights / "gemma2", tmp_path / "bf16", 3, 2, bf16=True))
    _train_with_fault("no_memory", tmp_path, runs, 2)
    assert _layout(tmp_path / "bf16")["compared_in"] == "bf16"
    for name, stage in cases:
        expected = _plain(weights / name, stories)
        assert _layout(tmp_path / f"{name}-{stage}")["rows"] == FAMILIES[name]
        (step,) = trajectory(tmp_path / f"{name}-{stage}")
        assert step["loss"] == pytest.approx(expected.loss, rel=2e-6)
        assert step["grad_norm"] == pytest.approx(expected.gradient_norm, rel=1e-5)


# --- a resumed run ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_layout(tmp_path: Path, weights: Path, stories: Shards) -> None:
    run = {**_run(stories, weights / "doge", tmp_path / "run", 2, 2), "max_steps": 2, "save_steps": 1}
    packed = {**_run(stories, weights / "gemma2", tmp_path / "packed", 2, 2), "max_steps": 2, "save_steps": 1}
    train_many(tmp_path, [run, packed], 2)
    for folder in ("run", "packed"):
        last = RunDirectory(tmp_path / folder).checkpoint(2)
        for file in sorted(last.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        last.rmdir()
    again = [
        {**run, "packing": "true"},
        {**packed, "packing": "false"},
        run,
        {**packed, "packing": "true"},
    ]
    seen = train_many(tmp_path, again, 2, "--collect")
    assert "run 0: " in seen and "now packing is true" in seen
    assert "run 1: " in seen and "now packing is false" in seen
    assert "run 2: " not in seen and "run 3: " not in seen
    for folder, rows in (("run", EQUAL_LENGTH), ("packed", PACKED)):
        assert len(trajectory(tmp_path / folder)) == 2
        assert _layout(tmp_path / folder)["rows"] == rows
