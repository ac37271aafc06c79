"""Bytes a run leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.planning.workload import Workload


@dataclass(frozen=True)
class DiskEstimate:
    checkpoint_bytes: int
    num_checkpoints: int  # at the worst moment: those kept, and the one being written
    export_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.export_bytes


def estimate_disk(workload: Workload, resolved: dict[str, Any], save_total_limit: int) -> DiskEstimate:
    """What ZeRO writes, for all ranks together.

    Stage 0: the weights and AdamW's two moments (fp32). Stages 1 and 2: the weights, and masters and moments divided
    among ranks. Stage 3: masters and moments; the weights follow from them. Under each, kilobytes of names and shapes.
    """
    stage = int(resolved["zero_optimization"].get("stage", 0))
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    per_parameter = {0: element_bytes + 8, 1: element_bytes + 12, 2: element_bytes + 12, 3: 12}[stage]
    export = element_bytes * workload.num_parameters
    return DiskEstimate(per_parameter * workload.num_parameters, save_total_limit + 1, export)
