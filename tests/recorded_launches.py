"""Stand-in for CUDA graphs on a CPU: operations are recorded with the tensors they read and write, and replayed.

As on a GPU, Python values (a length, a position) are frozen at recording, and a pass that copies a number to the host
cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.evaluation.backends import slots
from trainer.models import cuda_graphs


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else it is a view
                    old.copy_(new)


def _make_capture() -> Callable[[cuda_graphs.Launch], cuda_graphs.Launch]:
    """Replace `cuda_graphs.make_capture`."""

    def capture(function: cuda_graphs.Launch) -> cuda_graphs.Launch:
        with _Recorder() as recorder:
            function()
        return recorder.replay

    return capture


def decode_by_graphs(monkeypatch: pytest.MonkeyPatch, few_tokens: int = 4) -> list[cuda_graphs.GraphShape]:
    """Make backends on the CPU decode as on a GPU, in small shapes; return the list that collects the replayed shapes."""
    monkeypatch.setattr(slots, "uses_cuda_graphs", lambda device: True)
    monkeypatch.setattr(slots, "MAX_PENDING_FOR_DECODE", few_tokens)
    monkeypatch.setattr(slots, "PREFILL_ONE_IN", 3)
    monkeypatch.setattr(cuda_graphs, "make_capture", _make_capture)
    monkeypatch.setattr(cuda_graphs, "_cannot_capture", set())
    monkeypatch.setattr(cuda_graphs, "_LENGTH_MULTIPLE", 24)
    monkeypatch.setattr(cuda_graphs, "_SMALLEST_BLOCK", 2)
    monkeypatch.setattr(cuda_graphs, "_MIN_USES_WITH_LARGER_GRAPH", 6)
    replayed: list[cuda_graphs.GraphShape] = []
    choose = cuda_graphs.CudaGraphRunner._smallest_graph_for

    def recorded(
        self: cuda_graphs.CudaGraphRunner, shape: cuda_graphs.GraphShape
    ) -> cuda_graphs.GraphShape | None:
        used = choose(self, shape)
        if used is not None:
            replayed.append(used)
        return used

    monkeypatch.setattr(cuda_graphs.CudaGraphRunner, "_smallest_graph_for", recorded)
    return replayed
