"""Parsing of cluster.env and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.cluster.config import (
    CLUSTER_KEYS,
    ClusterConfig,
    parse_cluster_config,
    parse_seconds,
    read_cluster_config,
)
from trainer.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "slurm" / "cluster.env.example"


def test_values_comments_and_quotes() -> None:
    config = parse_cluster_config(
        '# a comment\n\nPARTITION=gpu\nMODULES="cuda/12.4 gcc/13"\nGPUS_PER_NODE = 4 # of a node\nACCOUNT=\n',
        "x",
    )
    assert config == ClusterConfig(partition="gpu", modules=("cuda/12.4", "gcc/13"), gpus_per_node=4)


def test_the_example_names_every_key_and_can_be_read() -> None:
    config = read_cluster_config(EXAMPLE)
    text = EXAMPLE.read_text(encoding="utf-8")
    assert [key for key in CLUSTER_KEYS if f"\n{key}=" not in text] == []
    assert config.partition


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PARTITON=gpu", r"cluster.env, line 1: unknown key 'PARTITON' \(did you mean 'PARTITION'\?\)"),
        ("PARTITION gpu", "line 1: 'PARTITION gpu' is not KEY=value"),
        ("PARTITION=gpu\nPARTITION=cpu", "line 2: PARTITION is given twice"),
        ("PARTITION=gpu; rm -rf ~", "PARTITION is 'gpu; rm -rf ~'"),
        ("ACCOUNT=$(whoami)", "ACCOUNT is"),
        ("SCRATCH=/scratch/`id`", "SCRATCH is"),
        ("MODULES=cuda/12 ;reboot", "MODULES is ';reboot'"),
        ("CONTAINER=a b.sif", "CONTAINER is 'a b.sif'"),
        ("GPUS_PER_NODE=four", "GPUS_PER_NODE is 'four'; it is a number, at least 0"),
        ("GPUS_PER_NODE=-1", "GPUS_PER_NODE is '-1'"),
        ("TASKS_PER_NODE=0", "TASKS_PER_NODE is '0'; it is a number, at least 1"),
        ("TIME_LIMIT=4h", "TIME_LIMIT is '4h'; write HH:MM:SS"),
        ("TIME_LIMIT=04:00", "TIME_LIMIT is '04:00'; write HH:MM:SS"),
        ("TIME_LIMIT=00:01:30", r"TIME_LIMIT is 00:01:30, not longer than SIGNAL_SECONDS \(120 s"),
        ("GPU_BINDING=socket", "GPU_BINDING is 'socket'; choose one of node, task"),
        ("GPU_TYPE=h100", "GPU_TYPE is 'h100' but GPUS_PER_NODE is 0"),
    ],
)
def test_what_is_wrong_is_named(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_cluster_config(line, "cluster.env")


def test_the_error_for_a_missing_file_names_the_example(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; copy slurm/cluster\.env\.example"):
        read_cluster_config(tmp_path / "cluster.env")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("00:20:00", 1200), ("04:00:00", 14400), ("1-00:00:00", 86400), ("2-03:04:05", 183845), ("30:00", 1800)],
)
def test_times(limit: str, seconds: int) -> None:
    assert parse_seconds(limit) == seconds
