"""Map the tensors that `save_pretrained` writes to strided views of the model's tensors.

transformers 5 renames and fuses weights when it loads them (`experts.0.gate_proj.weight`, ... -> `experts.gate_up_proj`)
and reverts that in `save_pretrained`. Here transformers' own reversal runs once on the meta device, and a dispatch mode
records where each element comes from. The operations that occur (split, stack, concatenate, transpose, permute) only
move elements; any other operation raises NotAMoveError.
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
    """Raised for a saved tensor that is computed, not merely rearranged, from the model's tensors."""


@dataclass(frozen=True)
class Concatenation:
    """Views concatenated along dimension `dim`, in row-major order."""

    views: tuple[StridedView, ...]
    dim: int


@dataclass(frozen=True)
class StridedView:
    """View, as of `torch.as_strided`, of `of`: a tensor of the model (its name) or joined views."""

    source: str | Concatenation
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def first_name(self) -> str:
        """Return the name of the model's tensor that holds the first element."""
        return self.source if isinstance(self.source, str) else self.source.views[0].first_name

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors of the model that the view reads."""
        if isinstance(self.source, str):
            return {self.source}
        return set().union(*(view.names for view in self.source.views))

    def to_json(self) -> list[Any]:
        """Return the view as lists, for a JSON file."""
        of: Any = self.source
        if isinstance(self.source, Concatenation):
            of = [self.source.dim, [view.to_json() for view in self.source.views]]
        return [of, list(self.shape), list(self.strides), self.offset]

    @classmethod
    def from_json(cls, content: list[Any]) -> StridedView:
        """Return the view from the result of `to_json`. Raises KeyError, TypeError or ValueError for other content."""
        of, shape, strides, offset = content
        if not isinstance(of, str):
            dim, views = of
            of = Concatenation(tuple(cls.from_json(view) for view in views), dim)
        return cls(of, tuple(shape), tuple(strides), offset)


def saved_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` would write, by name, tied weights once.

    Names are those of the files that `from_pretrained` read; without `_weight_conversions` in the model those of the Hub.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, deduplicated_state_dict(model))


def deduplicated_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict of `model` without tied aliases and other tensors that `save_pretrained` leaves out."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    for name in library_internals.keys_not_saved(model):
        state.pop(name, None)
    return remove_tied_weights_from_state_dict(state, model)


def trace_saved_tensors(model: PreTrainedModel) -> dict[str, StridedView]:
    """Return, by its name in the files, how each saved tensor is made from the tensors of `model`.

    Tensors that are written unchanged under their own names are left out. Raises NotAMoveError if transformers does more
    than move elements.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = deduplicated_state_dict(model)
    recorder = _StorageTracker()
    stand_ins = {name: recorder.meta_tensor(name, tensor) for name, tensor in state.items()}
    with recorder:
        saved = revert_weight_conversion(model, dict(stand_ins))
    views = {name: recorder.view(tensor) for name, tensor in saved.items()}
    unchanged = {name: recorder.view(tensor) for name, tensor in stand_ins.items()}
    moved = {name: view for name, view in views.items() if view != unchanged.get(name)}
    lost = set(state) - set().union(*(view.names for view in views.values()))
    if lost:
        raise NotARearrangementError(f"transformers does not write {sorted(lost)[0]}")
    return moved


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of `shape`, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _StorageTracker(TorchDispatchMode):
    """Dispatch mode that records the content of every storage; a view shares the storage of its base."""

    def __init__(self) -> None:
        super().__init__()
        self._contents: dict[int, str | Concatenation] = {}
        self._kept: list[Any] = []  # keeps storages alive: the address of a freed one could be reused

    def meta_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous meta tensor recorded as the tensor `name` of the model."""
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self._record(made, name)
        return made

    def view(self, tensor: torch.Tensor) -> StridedView:
        """Return `tensor` as a view of the model's tensors. Raises NotAMoveError."""
        found = self._contents.get(library_internals.storage_id(tensor))
        if found is None:
            raise NotARearrangementError(
                "transformers writes a tensor that is not made from the model's tensors"
            )
        view = StridedView(found, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
        return _canonicalize(view)

    def _record(self, tensor: torch.Tensor, content: str | Concatenation) -> None:
        self._kept.append(tensor.untyped_storage())
        self._contents[library_internals.storage_id(tensor)] = content

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and library_internals.storage_id(tensor) not in self._contents:
                self._record(tensor, self._content_of_output(func, tensor, args))
        return result

    def _content_of_output(self, func: Any, made: torch.Tensor, args: Any) -> Concatenation:
        """Return the content of a new tensor. Raises NotAMoveError if `func` does not merely copy."""
        name = func.overloadpacket.__name__
        if name == "clone" and made.is_contiguous():
            return Concatenation((self.view(args[0]),), 0)
        if name in ("cat", "stack") and made.is_contiguous():
            dim = args[1] if len(args) > 1 else 0
            tensors = [tensor.unsqueeze(dim) for tensor in args[0]] if name == "stack" else list(args[0])
            if all(tensor.dtype == made.dtype for tensor in tensors):
                return Concatenation(tuple(self.view(tensor) for tensor in tensors), dim % made.dim())
        raise NotARearrangementError(f"transformers applies {name}")


def _canonicalize(view: StridedView) -> StridedView:
    """Return an equal view in normal form: of a tensor of the model itself where possible, with standard strides for size 1."""
    if isinstance(view.source, Concatenation) and len(view.source.views) == 1:
        direct = _compose_views(view.source.views[0], view)
        if direct is not None:
            return direct
    strides = list(contiguous_strides(view.shape))
    for dim, size in enumerate(view.shape):
        if size != 1:
            strides[dim] = view.strides[dim]
    return StridedView(view.source, view.shape, tuple(strides), view.offset)


def _compose_views(copied: StridedView, view: StridedView) -> StridedView | None:
    """Return `view`, of a contiguous copy of `copied`, as a view of `copied.of`; None if there is no such view."""
    shape, strides = coalesce_dimensions(copied.shape, copied.strides)
    steps = contiguous_strides(shape)  # of the copy
    last, offset, rest = [], copied.offset, view.offset
    for step, stride in zip(steps, strides, strict=True):
        index, rest = divmod(rest, step)
        last.append(index)
        offset += index * stride
    found = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            found.append(0)
            continue
        for dim, step in enumerate(steps):
            factor, remainder = divmod(stride, step)
            if remainder == 0 and last[dim] + (size - 1) * factor < shape[dim]:
                last[dim] += (size - 1) * factor
                found.append(factor * strides[dim])
                break
        else:
            return None
    return _canonicalize(StridedView(copied.source, view.shape, tuple(found), offset))


def coalesce_dimensions(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides with adjacent dimensions merged where one stride covers both."""
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
