"""Estimate of the bytes a run writes to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.planning.workload import Workload


@dataclass(frozen=True)
class DiskEstimate:
    checkpoint_bytes: int
    num_checkpoints: int  # those kept, and the one being written
    export_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.export_bytes


def estimate_disk(workload: Workload, resolved: dict[str, Any], save_total_limit: int) -> DiskEstimate:
    """Return the bytes of all ranks together, without the kilobytes of names and shapes.

    Stage 0 writes weights and AdamW's two fp32 moments; stages 1 and 2 weights, fp32 masters and moments; stage 3
    masters and moments.
    """
    stage = int(resolved["zero_optimization"].get("stage", 0))
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    per_parameter = {0: element_bytes + 8, 1: element_bytes + 12, 2: element_bytes + 12, 3: 12}[stage]
    export = element_bytes * workload.num_parameters
    return DiskEstimate(per_parameter * workload.num_parameters, save_total_limit + 1, export)
