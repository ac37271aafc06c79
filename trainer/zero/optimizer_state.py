"""AdamW's state in a DeepSpeed 0.19 checkpoint as byte ranges: masters, moments, and the step.

DeepSpeed passes its flat fp32 tensors to a plain optimizer, whose state k belongs to the k-th flat tensor; so the moments
are located like the masters (layout.py). In stage 0 the optimizer has the model's own parameters, but its state has no
names: the trainer saves them under `optimizer_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.zero import layout
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.layout import CheckpointFiles
from trainer.zero.torch_files import CheckpointTensors, TensorReference, TorchFile

MOMENTS = ("exp_avg", "exp_avg_sq")
PARAMETER_NAMES = "optimizer_parameters"  # key in the model states: the optimizer's parameter names, in order


@dataclass(frozen=True)
class OptimizerState:
    """fp32 masters of trained parameters and other tensors in `weights`; `step`: AdamW's number of updates."""

    weights: CheckpointTensors
    moments: dict[str, dict[str, TensorReference]]  # key of MOMENTS -> parameter name -> tensor
    step: int

    def moment(self, key: str, name: str) -> TensorReference | None:
        """Return a moment of a parameter, under its own name or the one it is tied to, else None."""
        found = self.moments[key]
        return found.get(name) or found.get(self.weights.aliases.get(name, ""))


def read_optimizer_state(directory: Path, zero_stage: int, world_size: int, dtype: str) -> OptimizerState:
    """Return weights, moments and step; reads metadata and samples. Raises UserError, see `layout.open_files`."""
    files = layout.open_files(directory, zero_stage, world_size, dtype)
    weights = layout.locate_weights(files)
    moments = {key: _moments(files, key) for key in MOMENTS}
    return OptimizerState(weights, moments, _step(files))


def _moments(files: CheckpointFiles, key: str) -> dict[str, TensorReference]:
    if files.zero_stage:
        return layout.split_flat_tensors(files, lambda file, index: _entry(file, index, key))
    (file,) = files.model
    names = layout.require(file, file.content, PARAMETER_NAMES)
    return {name: layout.whole(file, _entry(file, index, key)) for index, name in enumerate(names)}


def _states(file: TorchFile) -> Any:
    """Return the plain optimizer's states by index."""
    content = file.content.get("optimizer_state_dict", file.content)
    for key in ("base_optimizer_state", "optimizer_state_dict", "optimizer"):
        if key in content:
            found = content[key]  # a list in stages 1 and 2 with `elastic_checkpoint`
            return dict(enumerate(found)) if isinstance(found, list) else layout.require(file, found, "state")
    raise UserError(f"{file.path} has no optimizer state; a run cannot be resumed from weights alone")


def _entry(file: TorchFile, index: int, key: str) -> Any:
    state = _states(file).get(index, {})
    if key not in state:
        raise UserError(
            f"{file.path} has no {key!r} of the optimizer's tensor {index}; was its state offloaded to NVMe, or in part "
            "(offload_optimizer.ratio), or is it not AdamW's?"
        )
    return state[key]


def _step(files: CheckpointFiles) -> int:
    """Return AdamW's number of updates. Raises UserError if it differs between parameters."""
    file = (files.optimizer or files.model)[0]
    found = set()
    with ChecksumReader(checksums=False) as reader:
        for index in _states(file):
            step = _entry(file, index, "step")
            if isinstance(step, torch.Tensor):
                step = reader.tensor(file.byte_range(step), 0, 1).item()
            found.add(int(step))
    if len(found) != 1:
        raise UserError(f"{file.path}: AdamW's step differs between parameters: {sorted(found)}")
    return found.pop()
