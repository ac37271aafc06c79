"""Runs resumed with another number of ranks, ZeRO stage, micro-batch size or offload.

After loading, every fp32 master, moment, frozen parameter and buffer equals bit for bit what DeepSpeed gathered when the
checkpoint was saved. The losses and gradient norms of the resumed run equal the undisturbed run's: up to the rounding of
another order of summation, and exactly with the same ranks and stage.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_well
from tests.training.conftest import settings, train_many, trajectory
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

# --- masters and moments, bit for bit ---------------------------------------------------------------------------------

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 in bf16: another optimizer class


def _layout(
    name: str, stage: int, dtype: str = "fp32", zero: dict | None = None, **more: Any
) -> dict[str, Any]:
    """A case of change_layouts.py."""
    config = {"zero_optimization": zero or {}, **more.pop("ds_config", {})}
    return {"name": name, "model": "gpt2", "stage": stage, "dtype": dtype, "ds_config": config, **more}


LAYOUTS = {
    case["name"]: case
    for case in (
        *(_layout(f"fp32-{stage}", stage) for stage in range(4)),
        *(_layout(f"bf16-{stage}", stage, "bf16") for stage in (1, 2, 3)),
        *(_layout(f"frozen-{stage}", stage, frozen=True, groups=True) for stage in range(4)),
        *(_layout(f"buffers-{stage}", stage, buffer=True) for stage in (1, 3)),
        _layout("robin", 2, zero={"round_robin_gradients": True}, groups=True),
        _layout("elastic", 1, zero={"elastic_checkpoint": True}),
        _layout("small-groups", 3, zero={"sub_group_size": 500}),
        _layout("small-groups-bf16", 3, "bf16", zero={"sub_group_size": 500}),
        _layout("aligned", 1, "bf16", zero={"parameter_alignment": True}, groups=True),
        _layout("accumulation", 1, "bf16", ds_config=FP32_ACCUMULATION),
        _layout("offload", 3, "bf16", zero=OFFLOAD),
    )
}
FP32_BY_3 = [f"fp32-{stage}-3" for stage in range(4)]
# (ranks, layout -> checkpoints to load into it, layouts to save afterwards); "fp32-1-3": 3 ranks, layout fp32-1
LAUNCHES: list[tuple[int, dict[str, list[str]], list[str]]] = [
    (1, {}, ["fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-3"]),
    (
        3,
        {"fp32-1": ["fp32-0-1", "fp32-2-1"], "fp32-3": ["fp32-1-1", "fp32-3-1"], "bf16-1": ["bf16-3-1"]},
        [name for name in LAYOUTS if name != "frozen-2"],
    ),
    (
        2,
        {
            **{f"fp32-{stage}": FP32_BY_3 for stage in range(4)},
            "bf16-1": ["bf16-3-3"],
            "bf16-2": ["bf16-1-3", "aligned-3", "accumulation-3", "offload-3"],
            "bf16-3": ["bf16-2-3"],
            "frozen-0": ["frozen-1-3", "frozen-3-3"],
            "frozen-2": ["frozen-0-3"],
            "frozen-3": ["frozen-1-3"],
            "buffers-1": ["buffers-3-3"],
            "buffers-3": ["buffers-1-3"],
            "elastic": ["robin-3"],
            "robin": ["elastic-3"],
            "small-groups": ["fp32-2-3"],
            "aligned": ["bf16-3-3"],
            "accumulation": ["bf16-1-3"],
            "offload": ["small-groups-bf16-3"],
        },
        [],
    ),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    for number, (num_ranks, targets, saved) in enumerate(LAUNCHES):
        acts = [{**LAYOUTS[name], "act": "load", "sources": sources} for name, sources in targets.items()]
        acts += [{**LAYOUTS[name], "act": "save"} for name in saved]
        file = folder / f"acts-{number}.json"
        file.write_text(json.dumps(acts), encoding="utf-8")
        run_well(["-m", "tests.training.change_layouts", str(folder), str(file)], num_ranks, timeout=900)
    return [json.loads(line) for line in (folder / "loaded.jsonl").read_text(encoding="utf-8").splitlines()]


def test_masters_and_moments_are_bit_equal(loaded: list[dict[str, Any]]) -> None:
    expected = {
        (source, f"{name}-{num_ranks}")
        for num_ranks, targets, _ in LAUNCHES
        for name, sources in targets.items()
        for source in sources
    }
    assert {(one["from"], one["to"]) for one in loaded} == expected
    assert not {f"{one['from']} -> {one['to']}": one["wrong"] for one in loaded if one["wrong"]}
    assert all(one["compared"] > 25 for one in loaded)
    assert all(set(one["steps"]) == {3} for one in loaded)


# --- resumed runs --------------------------------------------------------------------------------------------------

STEPS, FIRST, SECOND = 6, 2, 4
# name -> (ds_config on 2 ranks, then on 1 rank, then on 2 ranks), bf16
RUNS: dict[str, tuple[tuple[str, str, str], bool]] = {
    "0-1-2": (("zero0", "zero1", "zero2"), False),
    "1-2-3": (("zero1", "zero2", "zero3"), False),
    "2-3-0": (("zero2", "zero3", "zero0"), False),
    "3-0-1": (("zero3", "zero0", "zero1"), False),
    "bf16 1-3-2": (("zero1", "zero3", "zero2"), True),
}


def _run(
    stories: Shards, config: Path, output: Path, ds_config: str, bf16: bool, **changes: Any
) -> dict[str, Any]:
    values = {
        "config_name": str(config), "config_overrides": "", "deepspeed": f"ds_configs/{ds_config}.json", "bf16": bf16,
        "max_steps": STEPS, "save_steps": 2, "save_total_limit": 9,
    }  # fmt: skip
    return settings(stories, output, **{**values, **changes})


def _from(folder: Path, name: str, step: int) -> dict[str, Any]:
    return {"resume_from_checkpoint": str(RunDirectory(folder / name).checkpoint(step))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stories: Shards, gpt2_config: Path) -> Path:
    """undisturbed/<name> on 2 ranks; one/<name>, resumed from its step 2 on 1; two/<name>, resumed from that step 4 on 2."""
    folder = tmp_path_factory.mktemp("changed")

    def make(phase: str, position: int, **changes: Any) -> list[dict[str, Any]]:
        return [
            _run(
                stories,
                gpt2_config,
                folder / phase / name,
                stages[position],
                bf16,
                **changes | resumed_from(phase, name),
            )
            for name, (stages, bf16) in RUNS.items()
        ]

    def resumed_from(phase: str, name: str) -> dict[str, Any]:
        if phase == "undisturbed":
            return {}
        if phase == "one":
            return _from(folder / "undisturbed", name, FIRST)
        return _from(folder / "one", name, SECOND)

    train_many(folder, make("undisturbed", 0, gradient_accumulation_steps=2), 2)
    regrouped = _run(
        stories, gpt2_config, folder / "regrouped", "zero2", False, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=True, **_from(folder / "undisturbed", "0-1-2", FIRST),
    )  # fmt: skip
    train_many(folder, [*make("one", 1, gradient_accumulation_steps=4), regrouped], 1)
    refused = [
        _run(
            stories, gpt2_config, folder / "refused", "zero1", False, **changes, **_from(folder / "undisturbed", "0-1-2", FIRST)
        )
        for changes in ({"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 8})
    ]  # fmt: skip
    # Resumed in its own directory, on the same ranks and stage, with a damaged newest checkpoint.
    name = "1-2-3"
    shutil.copytree(folder / "undisturbed" / name, folder / "damaged")
    _damage(RunDirectory(folder / "damaged").checkpoint(STEPS))
    damaged = {
        **_run(stories, gpt2_config, folder / "damaged", RUNS[name][0][0], False),
        "gradient_accumulation_steps": 2,
    }
    printed = train_many(
        folder, [*make("two", 2, gradient_accumulation_steps=2), *refused, damaged], 2, "--collect"
    )
    (folder / "printed.txt").write_text(printed, encoding="utf-8")
    return folder


def _damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("phase", ["one", "two"])
def test_resumed_on_other_ranks_and_stages(folder: Path, name: str, phase: str) -> None:
    first = FIRST if phase == "one" else SECOND
    expected, found = trajectory(folder / "undisturbed" / name)[first:], trajectory(folder / phase / name)
    assert [step["step"] for step in found] == list(range(first + 1, STEPS + 1))
    bf16 = RUNS[name][1]
    for one, other in zip(expected, found, strict=True):
        for key in ("packs_consumed", "learned_tokens", "tokens", "learning_rate", "epoch"):
            assert other[key] == one[key], key
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3 if bf16 else 2e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=3e-2 if bf16 else 2e-5)


def test_other_micro_batches(folder: Path) -> None:
    """Dropout is seeded per micro-batch, so the losses differ; the data does not."""
    expected, found = trajectory(folder / "undisturbed" / "0-1-2")[FIRST:], trajectory(folder / "regrouped")
    for one, other in zip(expected, found, strict=True):
        assert [other[key] for key in ("packs_consumed", "learned_tokens")] == [
            one[key] for key in ("packs_consumed", "learned_tokens")
        ]
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)


def test_a_damaged_checkpoint_is_passed_over_and_written_again(folder: Path) -> None:
    run = RunDirectory(folder / "damaged")
    printed = (folder / "printed.txt").read_text(encoding="utf-8")
    assert re.search(rf"checkpoint skipped: {re.escape(str(run.checkpoint(STEPS)))}", printed)
    atomic_dir.verify_digests(run.checkpoint(STEPS))
    expected, found = trajectory(folder / "undisturbed" / "1-2-3"), trajectory(run.path)
    assert [(step["loss"], step["grad_norm"]) for step in found] == [
        (step["loss"], step["grad_norm"]) for step in expected
    ]
    assert len(run.metrics.read_text(encoding="utf-8").splitlines()) > STEPS


def test_other_packs_of_a_step_are_refused(folder: Path) -> None:
    """The message names both numbers and valid settings."""
    printed = (folder / "printed.txt").read_text(encoding="utf-8")
    errors = [line for line in printed.splitlines() if line.startswith("run ")]
    remedy = "give --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    assert len(errors) == 2
    assert "a step took 4 packs, now it would take 6 (2 ranks x 3 micro-batches x 1 packs)" in errors[0]
    assert "now it would take 16" in errors[1]
    assert all(remedy in error for error in errors)
