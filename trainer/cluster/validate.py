"""What a cluster would refuse, told before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.cluster import slurm
from trainer.cluster.config import ClusterConfig, seconds_of
from trainer.cluster.jobs import SlurmJob
from trainer.errors import UserError
from trainer.storage.configuration import did_you_mean


def validate(batches: Sequence[SlurmJob], site: ClusterConfig, where: str) -> None:
    """Compare the site's facts with what sinfo tells; the rest (accounts, constraints) only sbatch knows.

    Raises UserError naming `where` (the cluster.env) and the key.
    """
    slurm.check_installed()
    known = slurm.partitions()
    for batch in batches:
        ranked = batch.holds_accelerator
        key = "PARTITION" if ranked or not site.cpu_partition else "CPU_PARTITION"
        limits = {"train": "TIME_LIMIT", "evaluate": "EVALUATE_TIME_LIMIT"}
        _validate_partition(key, known, site, limits.get(batch.kind, "CPU_TIME_LIMIT"), ranked, where)


def left_to_slurm(site: ClusterConfig) -> list[str]:
    """KEY=value of what only sbatch can judge."""
    keys = ("account", "qos", "constraint", "reservation", "memory_per_node", "cpu_memory")
    return [f"{key.upper()}={getattr(site, key)}" for key in keys if getattr(site, key)]


def _validate_partition(
    key: str, known: dict[str, dict[str, str]], site: ClusterConfig, limit_key: str, ranked: bool, where: str
) -> None:
    wanted = getattr(site, key.lower()) or slurm.default_partition()
    if not wanted:
        raise UserError(
            f"{where}: {key} is missing and this cluster has no default; choose one of {', '.join(known)}"
        )
    for name in wanted.split(","):
        if name not in known:
            raise UserError(
                f"{where}: {key}={name}: there is no such partition{did_you_mean(name, known)}; "
                f"this cluster has {', '.join(known)}"
            )
        facts = known[name]
        if facts["state"] != "up":
            raise UserError(f"{where}: {key}={name}: the partition is {facts['state']}")
        longest, asked = _longest(facts["limit"]), getattr(site, limit_key.lower())
        if longest is not None and seconds_of(asked) > longest:
            raise UserError(
                f"{where}: {limit_key}={asked}: the partition {name} allows at most {facts['limit']}"
            )
        if ranked and site.gpus_per_node:
            _validate_gpus(name, facts["gres"], site, where)


def _validate_gpus(partition: str, gres: str, site: ClusterConfig, where: str) -> None:
    """`gpu:a100:4(S:0-1),gpu:h100:8` -> a node must have so many of that type."""
    found = [(kind or "", int(count)) for kind, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", gres)]
    if not found:
        raise UserError(
            f"{where}: GPUS_PER_NODE={site.gpus_per_node}: the partition {partition} has no accelerators"
        )
    types = sorted({kind for kind, _ in found if kind})
    if site.gpu_type and site.gpu_type not in types:
        raise UserError(
            f"{where}: GPU_TYPE={site.gpu_type}: the partition {partition} has no such type"
            f"{did_you_mean(site.gpu_type, types)}; it has {', '.join(types) or 'accelerators without a type'}"
        )
    most = max(count for kind, count in found if not site.gpu_type or kind == site.gpu_type)
    if site.gpus_per_node > most:
        raise UserError(
            f"{where}: GPUS_PER_NODE={site.gpus_per_node}: a node of {partition} has {most} at most"
        )


def _longest(limit: str) -> int | None:
    """Seconds of sinfo's limit; None for one that is not a time (infinite)."""
    try:
        return seconds_of(limit)
    except AssertionError:
        return None
