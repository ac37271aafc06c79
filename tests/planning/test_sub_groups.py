"""Tests of the optimizer step's memory: ZeRO-3 converts the gradients of one sub-group at a time to fp32."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.planning.zero_memory import GRADIENTS, ZeroMemoryConfig, _optimizer_step_memory

MILLION = 10**6


def step_bytes(stage: int, zero: dict[str, Any], world_size: int = 1) -> int:
    deepspeed_config = {"zero_optimization": {"stage": stage, **zero}, "gradient_accumulation_steps": 1}
    config = ZeroMemoryConfig.from_ds_config(
        deepspeed_config, [10 * MILLION] * 100, 2, world_size, on_accelerator=True
    )
    return _optimizer_step_memory(config)[GRADIENTS]


@pytest.mark.parametrize(
    ("zero", "elements"), [({}, 1000), ({"sub_group_size": 100 * MILLION}, 110), ({"sub_group_size": 1}, 10)]
)
def test_stage_3_converts_one_sub_group_at_a_time(zero: dict[str, Any], elements: int) -> None:
    """bf16: the flat gradient and its fp32 copy, of a sub-group that ends with a whole parameter."""
    assert step_bytes(3, zero) == pytest.approx(6 * elements * MILLION, abs=8)


def test_stages_1_and_2_convert_everything() -> None:
    assert step_bytes(1, {"sub_group_size": 1}) == 8 * 1000 * MILLION


def test_a_partition_may_be_smaller_than_a_sub_group() -> None:
    assert step_bytes(3, {"sub_group_size": 900 * MILLION}, world_size=4) == 6 * 250 * MILLION
