"""AdamW's state in a DeepSpeed 0.19 checkpoint: the step, and the byte ranges of master weights and moments.

In stages 1 to 3, DeepSpeed passes its flat fp32 tensors to AdamW. AdamW's state k belongs to the k-th flat tensor, so the
moments have the same layout as the master weights (layout.py). In stage 0, AdamW has the model's own parameters, but the
saved state has no parameter names. Therefore, the trainer saves the names under `optimizer_parameters`.
"""

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
PARAMETER_NAMES = "optimizer_parameters"  # key of the parameter names in AdamW's order, in the model states


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state after `step` updates. `weights`: buffers, frozen parameters and fp32 masters of trained parameters."""

    weights: CheckpointTensors
    moments: dict[str, dict[str, TensorReference]]  # key of MOMENTS -> parameter name -> tensor
    step: int

    def moment(self, key: str, name: str) -> TensorReference | None:
        """Return moment `key` of the parameter `name`, or None if the parameter is not trained.

        If `name` is an alias of a tied parameter, return the moment of the stored parameter.
        """
        moments = self.moments[key]
        return moments.get(name) or moments.get(self.weights.aliases.get(name, ""))


def read_optimizer_state(directory: Path, zero_stage: int, world_size: int, dtype: str) -> OptimizerState:
    """Return references to weights and moments, and the step. Raises UserError if a file is damaged or lacks data."""
    files = layout.open_files(directory, zero_stage, world_size, dtype)
    weights = layout.locate_weights(files)
    return OptimizerState(weights, {key: _moments(files, key) for key in MOMENTS}, _step(files))


def _moments(files: CheckpointFiles, key: str) -> dict[str, TensorReference]:
    if files.zero_stage:
        return layout.split_flat_tensors(files, lambda file, index: _entry(file, index, key))
    (file,) = files.model
    names = layout.required_value(file, file.content, PARAMETER_NAMES)
    return {
        name: layout.single_range_reference(file, _entry(file, index, key))
        for index, name in enumerate(names)
    }


def _states(file: TorchFile) -> Any:
    """Return {index of a tensor in the optimizer: state of the tensor} of the optimizer that DeepSpeed wraps."""
    content = file.content.get("optimizer_state_dict", file.content)
    for key in ("base_optimizer_state", "optimizer_state_dict", "optimizer"):
        if key in content:
            inner = content[key]
            if isinstance(inner, list):  # `elastic_checkpoint` is on (stages 1, 2)
                return dict(enumerate(inner))
            return layout.required_value(file, inner, "state")
    raise UserError(f"{file.path} has no optimizer state; a run cannot be resumed from weights alone")


def _entry(file: TorchFile, index: int, key: str) -> Any:
    state = _states(file).get(index, {})
    if key not in state:
        raise UserError(
            f"{file.path} has no {key!r} for the optimizer's tensor {index}; either the optimizer is not AdamW, or its "
            "state was offloaded to NVMe, or only a part was offloaded (offload_optimizer.ratio)"
        )
    return state[key]


def _step(files: CheckpointFiles) -> int:
    """Return AdamW's number of updates from the first file. Raises UserError if the number differs between tensors."""
    file = (files.optimizer or files.model)[0]
    steps = set()
    with ChecksumReader(checksums=False) as reader:
        for index in _states(file):
            step = _entry(file, index, "step")
            if isinstance(step, torch.Tensor):
                step = reader.tensor(file.byte_range(step), 0, 1).item()
            steps.add(int(step))
    if len(steps) != 1:
        raise UserError(f"{file.path}: AdamW's step differs between parameters: {sorted(steps)}")
    return steps.pop()
