"""Tests of the table of GPUs: peaks against cores and clocks, names in torch, and an unknown GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.planning import accelerators, command, plan
from trainer.settings import PlanSettings
from trainer.training import gpu_table
from trainer.training.throughput import peak_flops

# name: tensor cores, fused multiply-adds of bf16 (V100: fp16) in one clock of a core, GHz; fp32 lanes, GHz
CORES = {
    "b200": (592, 1024, 1.86, 18_944, 1.98),
    "h100": (528, 512, 1.83, 16_896, 1.98),
    "h100-pcie": (456, 512, 1.62, 14_592, 1.755),
    "a100-80gb": (432, 256, 1.41, 6_912, 1.41),
    "l40s": (568, 128, 2.52, 18_176, 2.52),
    "l4": (240, 128, 2.04, 7_680, 2.04),
    "a10": (288, 128, 1.695, 9_216, 1.695),
    "a6000": (336, 128, 1.80, 10_752, 1.80),
    "rtx-5090": (680, 64, 2.407, 21_760, 2.407),
    "rtx-4090": (512, 64, 2.52, 16_384, 2.52),
    "v100": (640, 64, 1.53, 5_120, 1.53),
    "mi300x": (1216, 256, 2.1, 38_912, 2.1),
}


def gpu(name: str) -> gpu_table.Gpu:
    found = gpu_table.gpu_by_name(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CORES)
def test_peaks_follow_from_cores_and_clocks(name: str) -> None:
    """A rate with sparsity would be off by a factor of two; boost clocks differ by a few percent."""
    tensor_cores, products, tensor_ghz, lanes, ghz = CORES[name]
    assert gpu(name).fp16_flops == pytest.approx(2 * tensor_cores * products * tensor_ghz * 1e9, rel=0.04)
    assert gpu(name).fp32_flops == pytest.approx(2 * lanes * ghz * 1e9, rel=0.04)


def test_every_row_is_plausible() -> None:
    assert len(set(gpu_table.names())) == len(gpu_table.GPUS) == 22
    device_names = [name for row in gpu_table.GPUS for name in row.device_names]
    assert len(set(device_names)) == len(device_names)
    for row in gpu_table.GPUS:
        assert 14e12 <= row.fp32_flops <= row.fp16_flops <= 2250e12, row.name
        assert 16 * 2**30 <= row.memory_bytes <= 288 * 10**9 * 1.01, row.name
        assert 300e9 <= row.memory_bandwidth <= 8e12, row.name
        assert 16e9 <= row.link_bandwidth <= 900e9, row.name
        assert row.source.startswith("https://") or row.name == "h20"


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_that_torch_reports(device_name: str, name: str) -> None:
    found = gpu_table.gpu_by_device_name(device_name)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA A10G",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    ],
)
def test_a_similar_name_is_another_gpu(device_name: str) -> None:
    assert gpu_table.gpu_by_device_name(device_name) is None


def test_short_names() -> None:
    assert [gpu(name).name for name in ("A100", "4090", "rtx_5090", "v100_32gb", "RTX-A6000")] == [
        *("a100-80gb", "rtx-4090", "rtx-5090", "v100", "a6000")
    ]


def fake_gpu(monkeypatch: pytest.MonkeyPatch, device_name: str, memory_bytes: int = 0) -> None:
    """Make torch report a GPU."""
    properties = SimpleNamespace(total_memory=memory_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device_name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


@pytest.mark.parametrize(
    ("device_name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("Tesla V100-SXM2-32GB", 15.7e12, 15.7e12),  # no bf16 units: computed in fp32
        ("NVIDIA Titan of tomorrow", None, None),
    ],
)
def test_utilisation_is_of_the_peak_of_the_dtype(
    monkeypatch: pytest.MonkeyPatch, device_name: str, bf16: float | None, fp32: float | None
) -> None:
    fake_gpu(monkeypatch, device_name)
    assert (peak_flops("bf16"), peak_flops("fp32")) == (bf16, fp32)
    assert gpu("v100").peak_flops("fp16") == 125e12


def test_the_planner_reads_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    v100 = accelerators.find_accelerator("v100", 1)
    assert (v100.bf16_flops, v100.fp32_flops, v100.memory_bytes) == (15.7e12, 15.7e12, 32 * 2**30)
    fake_gpu(monkeypatch, "NVIDIA H100 NVL")
    found = accelerators.find_accelerator("auto", 1)
    assert found == accelerators.find_accelerator("h100-nvl", 1)
    assert (found.bf16_flops, found.memory_bandwidth, found.link_bandwidth) == (835e12, 3.9e12, 64e9)


def test_an_unknown_gpu_is_planned_with_its_memory_and_without_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        fake_gpu(patched, "NVIDIA Titan of tomorrow", 7 * 10**9)
        found = accelerators.find_accelerator("auto", 1)
    assert (found.name, found.memory_bytes, found.is_speed_known) == (
        "NVIDIA Titan of tomorrow",
        7 * 10**9,
        False,
    )
    monkeypatch.setattr(accelerators, "_detect", lambda gpus_per_node: found)
    values: dict[str, Any] = {
        "config_name": "gpt2",
        "config_overrides": "n_layer=4",
        "max_steps": 4,
        "bf16": True,
    }
    made = plan.make_plan(PlanSettings(**values, gpu="auto"))
    assert made.fits and made.seconds == 0
    assert any("its speed is unknown" in note for note in made.notes)
    times = command.as_dict(made)["time"]
    assert times["seconds_per_step"] is None and times["accelerator_hours"] is None
    assert "Infinity" not in json.dumps(command.as_dict(made))
    command.print_plan(made, None)
    assert (
        "time: rate unknown: NVIDIA Titan of tomorrow is not in the table of GPUs" in capsys.readouterr().out
    )
    too_large = plan.make_plan(
        PlanSettings(**{**values, "config_overrides": "n_layer=48,n_embd=1536"}, gpu="auto")
    )
    assert any("has 7.0 GB" in refusal for refusal in too_large.refusals)
