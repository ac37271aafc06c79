"""Map the tensors that `save_pretrained` writes to strided views of the model's tensors.

transformers 5 renames and fuses weights when it loads them (`experts.0.gate_proj.weight`, ... -> `experts.gate_up_proj`).
`save_pretrained` reverts these conversions. This module lets transformers revert them once on the meta device, while a
dispatch mode records the origin of each element. Split, stack, concatenate, transpose and permute only rearrange elements.
Any other operation raises NotARearrangementError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.runtime import library_internals

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotARearrangementError(Exception):
    """A saved tensor is not a mere rearrangement of the model's tensors, or a tensor of the model is not saved."""


@dataclass(frozen=True)
class Concatenation:
    """Contiguous concatenation of views along dimension `dim`."""

    views: tuple[StridedView, ...]
    dim: int


@dataclass(frozen=True)
class StridedView:
    """View of `source`, as `torch.as_strided` makes it. `source`: the name of a tensor of the model, or a concatenation."""

    source: str | Concatenation
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def first_name(self) -> str:
        """Name of the model's tensor from which the source's first element comes."""
        return self.source if isinstance(self.source, str) else self.source.views[0].first_name

    @property
    def names(self) -> set[str]:
        """Names of all tensors of the model that the view reads."""
        if isinstance(self.source, str):
            return {self.source}
        return set().union(*(view.names for view in self.source.views))

    def to_json(self) -> list[Any]:
        """Return the view as nested lists, for a JSON file."""
        source: Any = self.source
        if isinstance(source, Concatenation):
            source = [source.dim, [view.to_json() for view in source.views]]
        return [source, list(self.shape), list(self.strides), self.offset]

    @classmethod
    def from_json(cls, content: list[Any]) -> StridedView:
        """Return the view from the result of `to_json`. Raises KeyError, TypeError or ValueError for other content."""
        source, shape, strides, offset = content
        if not isinstance(source, str):
            dim, views = source
            source = Concatenation(tuple(map(cls.from_json, views)), dim)
        return cls(source, tuple(shape), tuple(strides), offset)


def saved_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return {name: tensor} for all tensors that `save_pretrained` would write. Tied weights occur once.

    If `model._weight_conversions` is set, the names are the names in the loaded files. Else the model class defines the names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, deduplicated_state_dict(model))


def deduplicated_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict of `model` without tied aliases and other tensors that `save_pretrained` leaves out."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    omitted = library_internals.keys_not_saved(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in omitted}
    return remove_tied_weights_from_state_dict(state, model)


def trace_saved_tensors(model: PreTrainedModel) -> dict[str, StridedView]:
    """Return {name in the file: view of `model`'s tensors} for all tensors that `save_pretrained` changes or renames.

    Raises NotARearrangementError if transformers does more than rearrange and rename tensors, or omits a tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = deduplicated_state_dict(model)
    tracker = _StorageTracker()
    stand_ins = {name: tracker.meta_tensor(name, tensor) for name, tensor in state.items()}
    with tracker:
        saved = revert_weight_conversion(model, dict(stand_ins))
    views = {name: tracker.view(tensor) for name, tensor in saved.items()}
    unchanged = {name: tracker.view(tensor) for name, tensor in stand_ins.items()}
    moved = {name: view for name, view in views.items() if view != unchanged.get(name)}
    lost = set(state) - set().union(*(view.names for view in views.values()))
    if lost:
        raise NotARearrangementError(f"transformers does not write {sorted(lost)[0]}")
    return moved


class _StorageTracker(TorchDispatchMode):
    """Dispatch mode that records the content of each storage: a tensor of the model, or a concatenation of views."""

    def __init__(self) -> None:
        super().__init__()
        self._contents: dict[int, str | Concatenation] = {}
        # References that keep the storages alive: the address of a freed storage could be reused.
        self._storages: list[Any] = []

    def meta_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous meta tensor that is recorded as the model's tensor `name`."""
        stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self._record(stand_in, name)
        return stand_in

    def view(self, tensor: torch.Tensor) -> StridedView:
        """Return `tensor` as a view of the model's tensors. Raises NotARearrangementError if this is impossible."""
        source = self._contents.get(library_internals.storage_id(tensor))
        if source is None:
            raise NotARearrangementError(
                "transformers writes a tensor that is not made from the model's tensors"
            )
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        return _canonicalize(StridedView(source, shape, strides, int(tensor.storage_offset())))

    def _record(self, tensor: torch.Tensor, content: str | Concatenation) -> None:
        self._storages.append(tensor.untyped_storage())
        self._contents[library_internals.storage_id(tensor)] = content

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and library_internals.storage_id(tensor) not in self._contents:
                self._record(tensor, self._content_of_output(func, tensor, args))
        return result

    def _content_of_output(self, func: Any, output: torch.Tensor, args: Any) -> Concatenation:
        """Return the content of a new tensor. Raises NotARearrangementError if `func` does not merely copy elements."""
        name = func.overloadpacket.__name__
        if name == "clone" and output.is_contiguous():
            return Concatenation((self.view(args[0]),), 0)
        if name in ("cat", "stack") and output.is_contiguous():
            dim = args[1] if len(args) > 1 else 0
            tensors = [tensor.unsqueeze(dim) for tensor in args[0]] if name == "stack" else list(args[0])
            if all(tensor.dtype == output.dtype for tensor in tensors):
                return Concatenation(tuple(map(self.view, tensors)), dim % output.dim())
        raise NotARearrangementError(f"transformers applies {name}")


def _canonicalize(view: StridedView) -> StridedView:
    """Return the normal form of `view`. (Different sources and strides can describe the same view.)

    In normal form, the source is a tensor of the model if possible. A dimension of size 1 has the stride of a contiguous tensor.
    """
    if isinstance(view.source, Concatenation) and len(view.source.views) == 1:
        direct = _compose_views(view.source.views[0], view)
        if direct is not None:
            return direct
    sizes = zip(view.shape, view.strides, _contiguous_strides(view.shape), strict=True)
    strides = tuple(contiguous if size == 1 else stride for size, stride, contiguous in sizes)
    return StridedView(view.source, view.shape, strides, view.offset)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _compose_views(copied: StridedView, view: StridedView) -> StridedView | None:
    """Convert `view`, a view of a contiguous copy of `copied`, to a view of `copied.source`. Return None if impossible."""
    shape, strides = coalesce_dimensions(copied.shape, copied.strides)
    steps = _contiguous_strides(shape)  # strides of the copy
    last, offset, rest = [], copied.offset, view.offset
    for step, stride in zip(steps, strides, strict=True):
        index, rest = divmod(rest, step)
        last.append(index)
        offset += index * stride
    source_strides = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            source_strides.append(0)
            continue
        for dim, step in enumerate(steps):
            factor, remainder = divmod(stride, step)
            if remainder == 0 and last[dim] + (size - 1) * factor < shape[dim]:
                last[dim] += (size - 1) * factor
                source_strides.append(factor * strides[dim])
                break
        else:
            return None
    return _canonicalize(StridedView(copied.source, view.shape, tuple(source_strides), offset))


def coalesce_dimensions(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides without dimensions of size 1; adjacent dimensions that one stride can address are merged."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == size * stride:
            sizes[-1], steps[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            steps.append(stride)
    return tuple(sizes), tuple(steps)
