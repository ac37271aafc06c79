"""A DeepSpeed 0.19 checkpoint -> all that AdamW goes on from, as byte ranges: masters, moments, and the step.

Where the moments lie follows from where the masters lie (layout.py), since DeepSpeed hands its flat fp32 tensors to a
plain optimizer: its state number k belongs to the k-th flat tensor. Only in stage 0 does the optimizer see the model's
own parameters, whose names its state does not keep: the trainer saves them beside it, as `optimizer_parameters`.
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
from trainer.zero.tensor_references import CheckpointTensors, TensorReference
from trainer.zero.torch_files import TorchFile

MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = "optimizer_parameters"  # in the model states: names of the optimizer's parameters in its order


@dataclass(frozen=True)
class OptimizerState:
    """`weights` has fp32 masters of trained parameters, else the parameter or buffer itself; `step` is AdamW's own."""

    weights: CheckpointTensors
    moments: dict[
        str, dict[str, TensorReference]
    ]  # "exp_avg", "exp_avg_sq" -> name of a trained parameter -> tensor
    step: int

    def moment(self, which: str, name: str) -> TensorReference | None:
        """The moment of a parameter, under its own name or the one it is tied to."""
        found = self.moments[which]
        return found.get(name) or found.get(self.weights.aliases.get(name, ""))


def read_optimizer_state(directory: Path, zero_stage: int, world_size: int, dtype: str) -> OptimizerState:
    """Describe the checkpoint in `directory`; reads metadata and samples. Raises UserError as `layout.open_files`."""
    files = layout.open_files(directory, zero_stage, world_size, dtype)
    weights = layout.weights(files)
    moments = {which: _moments(files, which) for which in MOMENTS}
    return OptimizerState(weights, moments, _step(files))


def _moments(files: CheckpointFiles, which: str) -> dict[str, TensorReference]:
    if files.zero_stage:
        return layout.trained_weights(files, lambda file, k: _entry(file, k, which))
    (file,) = files.model
    found = {}
    for k, name in enumerate(layout.require(file, file.content, NAMES)):
        tensor = _entry(file, k, which)
        found[name] = TensorReference(tuple(tensor.shape), (file.byte_range(tensor),))
    return found


def _states(file: TorchFile) -> Any:
    """The plain optimizer's states by number: in stages 1 and 2, with `elastic_checkpoint`, a list."""
    holder = file.content.get("optimizer_state_dict", file.content)
    for key in ("base_optimizer_state", "optimizer_state_dict", "optimizer"):
        if key in holder:
            found = holder[key]
            return dict(enumerate(found)) if isinstance(found, list) else layout.require(file, found, "state")
    raise UserError(f"{file.path} holds no state of an optimizer; weights alone cannot be resumed")


def _entry(file: TorchFile, k: int, key: str) -> Any:
    entry = _states(file).get(k, {})
    if key not in entry:
        raise UserError(
            f"{file.path} has no {key!r} of the optimizer's tensor {k}; was its state offloaded to NVMe, or in part "
            "(offload_optimizer.ratio), or is it not AdamW's?"
        )
    return entry[key]


def _step(files: CheckpointFiles) -> int:
    """How many updates AdamW has made. Raises UserError if its parameters do not agree."""
    file = (files.optimizer or files.model)[0]
    found = set()
    with ChecksumReader(checksums=False) as reader:
        for k in _states(file):
            step = _entry(file, k, "step")
            if isinstance(step, torch.Tensor):
                step = reader.tensor(file.byte_range(step), 0, 1).item()
            found.add(int(step))
    if len(found) != 1:
        raise UserError(f"{file.path}: AdamW's step differs between parameters: {sorted(found)}")
    return found.pop()
