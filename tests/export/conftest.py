"""Checkpoints of real DeepSpeed processes, written once for all tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.storage import atomic_dir

WORKER = Path(__file__).with_name("make_checkpoints.py")
REPOSITORY = WORKER.parent.parent.parent
TIMEOUT_SECONDS = 900


def _case(world_size: int, model: str, stage: int, dtype: str, name: str = "", **more: Any) -> dict[str, Any]:
    suffix = f"-{name}" if name else ""
    return {
        "name": f"{model}-zero{stage}-{dtype}-{world_size}ranks{suffix}",
        "world_size": world_size, "model": model, "stage": stage, "dtype": dtype, **more,
    }  # fmt: skip


_FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 in bf16: another optimizer class
_SMALL_SUB_GROUPS = {"zero_optimization": {"sub_group_size": 500}}
_ALIGNED = {"zero_optimization": {"parameter_alignment": True}}
_ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}

CASES = [
    *(_case(2, "gpt2", stage, "fp32") for stage in range(4)),
    *(_case(2, model, stage, "bf16") for stage in (1, 2, 3) for model in ("gpt2", "qwen2")),
    _case(2, "qwen2", 3, "fp32"),
    *(_case(1, "gpt2", stage, "fp32") for stage in range(4)),
    _case(1, "gpt2", 1, "bf16"),
    _case(1, "gpt2", 3, "bf16"),
    *(_case(2, "gpt2", stage, "bf16", "frozen", frozen=True, groups=True) for stage in (1, 2, 3)),
    _case(2, "gpt2", 0, "fp32", "frozen", frozen=True, groups=True),
    _case(2, "gpt2", 1, "fp32", "frozen", frozen=True),
    _case(2, "gpt2", 3, "fp32", "frozen", frozen=True, groups=True, ds_config=_SMALL_SUB_GROUPS),
    _case(2, "gpt2", 1, "bf16", "accumulation", groups=True, ds_config=_FP32_ACCUMULATION),
    _case(2, "qwen2", 2, "fp32", "robin", groups=True, ds_config=_ROUND_ROBIN),
    _case(2, "qwen2", 1, "bf16", "aligned", groups=True, frozen=True, ds_config=_ALIGNED),
    _case(2, "gpt2", 1, "fp32", "buffers", buffer=True),
    _case(2, "gpt2", 3, "bf16", "buffers", buffer=True),
    # Families whose files have other names than their classes; ernie4_5_moe keeps its routers in fp32.
    *(_case(2, "ernie4_5_moe", stage, "bf16", family=True) for stage in (1, 2, 3)),
    _case(2, "ernie4_5_moe", 0, "fp32", family=True),
    _case(2, "mixtral", 2, "fp32", family=True),
    _case(2, "mixtral", 3, "fp32", family=True),
]
CONVERTIBLE = [case["name"] for case in CASES if not case.get("buffer") and not case.get("family")]
FAMILIES = [case["name"] for case in CASES if case.get("family")]
BY_NAME = {case["name"]: case for case in CASES}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one run directory per case: `<name>/checkpoints/step-000002`, `<name>/masters.safetensors`."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for world_size in (1, 2):
        cases = folder / f"cases-{world_size}.json"
        cases.write_text(json.dumps([case for case in CASES if case["world_size"] == world_size]))
        _train(folder, cases, world_size)
    return folder


def _train(folder: Path, cases: Path, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with open(log, "w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), str(folder), str(cases)],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=REPOSITORY,
                )
            )
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def checkpoint_copy(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function that copies a checkpoint into a run directory of its own and returns the checkpoint directory."""

    def copy(name: str) -> Path:
        run = tmp_path / "run"
        shutil.copytree(
            checkpoints / name / "checkpoints" / "step-000002", run / "checkpoints" / "step-000002"
        )
        return run / "checkpoints" / "step-000002"

    return copy


def rewrite_manifest(checkpoint: Path, **facts: Any) -> None:
    """Write a manifest that matches a modified checkpoint."""
    old = atomic_dir.read_manifest(checkpoint)
    (checkpoint / atomic_dir.MANIFEST).unlink()
    staging = checkpoint.rename(checkpoint.with_name("staging"))
    atomic_dir.publish(
        staging, checkpoint, "checkpoint", old["facts"] | facts, atomic_dir.digest_files(staging)
    )
