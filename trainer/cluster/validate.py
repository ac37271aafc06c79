"""Check jobs against the partitions of the cluster before they are submitted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.cluster import slurm
from trainer.cluster.config import TIME, ClusterConfig, parse_seconds
from trainer.cluster.jobs import SlurmJob
from trainer.errors import UserError
from trainer.storage.configuration import did_you_mean


def validate(batches: Sequence[SlurmJob], config: ClusterConfig, where: str) -> None:
    """Check the configuration against sinfo; the other settings (accounts, constraints) only sbatch can check.

    Raises UserError with `where` (the cluster.env) and the key.
    """
    slurm.check_installed()
    partitions = slurm.partitions()
    for batch in batches:
        on_accelerator = batch.needs_accelerator
        key = "PARTITION" if on_accelerator or not config.cpu_partition else "CPU_PARTITION"
        names = getattr(config, key.lower()) or slurm.default_partition()
        if not names:
            raise UserError(
                f"{where}: {key} is missing and this cluster has no default; choose one of {', '.join(partitions)}"
            )
        limits = {"train": "TIME_LIMIT", "evaluate": "EVALUATE_TIME_LIMIT"}
        limit_key = limits.get(batch.kind, "CPU_TIME_LIMIT")
        requested = getattr(config, limit_key.lower())
        for name in names.split(","):
            if name not in partitions:
                raise UserError(
                    f"{where}: {key}={name}: there is no such partition{did_you_mean(name, partitions)}; "
                    f"this cluster has {', '.join(partitions)}"
                )
            state, limit = partitions[name]["state"], partitions[name]["limit"]
            if state != "up":
                raise UserError(f"{where}: {key}={name}: the partition is {state}")
            is_limited = TIME.fullmatch(limit)  # else infinite
            if is_limited and parse_seconds(requested) > parse_seconds(limit):
                raise UserError(
                    f"{where}: {limit_key}={requested}: the partition {name} allows at most {limit}"
                )
            if on_accelerator and config.gpus_per_node:
                _validate_gpus(name, partitions[name]["gres"], config, where)


def unchecked_settings(config: ClusterConfig) -> list[str]:
    """Return KEY=value of the settings that only sbatch can check."""
    keys = ("account", "qos", "constraint", "reservation", "memory_per_node", "cpu_memory")
    return [f"{key.upper()}={getattr(config, key)}" for key in keys if getattr(config, key)]


def _validate_gpus(partition: str, gres: str, config: ClusterConfig, where: str) -> None:
    """Raise UserError if no node of `gres`, e.g. "gpu:a100:4(S:0-1),gpu:h100:8", has the GPUs of the configuration."""
    gpus = [(kind or "", int(count)) for kind, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", gres)]
    if not gpus:
        raise UserError(
            f"{where}: GPUS_PER_NODE={config.gpus_per_node}: the partition {partition} has no accelerators"
        )
    types = sorted({kind for kind, _ in gpus if kind})
    if config.gpu_type and config.gpu_type not in types:
        raise UserError(
            f"{where}: GPU_TYPE={config.gpu_type}: the partition {partition} has no such type"
            f"{did_you_mean(config.gpu_type, types)}; it has {', '.join(types) or 'accelerators without a type'}"
        )
    max_gpus = max(count for kind, count in gpus if not config.gpu_type or kind == config.gpu_type)
    if config.gpus_per_node > max_gpus:
        raise UserError(
            f"{where}: GPUS_PER_NODE={config.gpus_per_node}: a node of {partition} has {max_gpus} at most"
        )
