"""Every "auto" becomes a number, a contradiction is named, and golden files pin the resolved configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.settings import TrainSettings
from trainer.training.ds_config import offloads_optimizer, resolve_ds_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
GOLDEN = ROOT / "tests" / "golden" / "ds_config"


def _settings(**changes: object) -> TrainSettings:
    values = {"train_shards": "s", "output_dir": "o", "config_name": "c", "gradient_accumulation_steps": 3}
    return TrainSettings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_resolved_is_the_golden_one(file: Path) -> None:
    """To accept a change, delete the golden file and run the test."""
    resolved = resolve_ds_config(
        _settings(deepspeed=str(file), bf16=file.stem != "zero0", weight_decay=0.1), world_size=2
    )
    assert "auto" not in json.dumps(resolved)
    golden = GOLDEN / file.name
    if not golden.exists():
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(json.dumps(resolved, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert resolved == json.loads(golden.read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_settings() -> None:
    config = resolve_ds_config(
        _settings(per_device_train_batch_size=2, learning_rate=7e-4, max_grad_norm=0.5), world_size=4
    )
    assert config["train_batch_size"] == 2 * 3 * 4
    assert config["optimizer"]["params"]["lr"] == 7e-4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"unknown key 'zero_optimisation' \(did you mean 'zero_optimization'\?\)",
        ),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization: unknown key 'stag'"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3 but the settings say 1.0"),
        ({"bf16": {"enabled": True}}, "enabled is True but the settings say False"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "lr is 1.0 but the settings say 5e-05"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'"),
        ({"fp16": {"enabled": True}}, "use --bf16"),
        ({"scheduler": {}}, "lr_scheduler_type"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
                }
            },
            "offload_optimizer to NVMe cannot be checkpointed",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "DeepSpeed does not save all moments",
        ),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "NaN gradients are detected.*compute_grad_norm",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: dict, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as raised:
        resolve_ds_config(_settings(deepspeed=str(file)), world_size=1)
    assert "mine.json" in str(raised.value)


def test_bf16_at_stage_0_is_refused_because_its_numbers_are_wrong() -> None:
    with pytest.raises(UserError, match="wrongly in bf16 at ZeRO stage 0"):
        resolve_ds_config(_settings(deepspeed=str(ROOT / "ds_configs/zero0.json"), bf16=True), world_size=1)
    assert resolve_ds_config(_settings(bf16=True), world_size=1)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not JSON"), (b"[]", "is not a JSON object")])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        resolve_ds_config(_settings(deepspeed=str(tmp_path / "mine.json")), world_size=1)
    with pytest.raises(UserError, match="does not exist"):
        resolve_ds_config(_settings(deepspeed=str(tmp_path / "nowhere.json")), world_size=1)


def test_null_means_no_offload() -> None:
    assert not offloads_optimizer({"zero_optimization": {"stage": 2, "offload_optimizer": None}})
