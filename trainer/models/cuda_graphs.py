"""Decode steps as CUDA graphs.

A decode step of a small model is bound by the host: on an H200 the kernels of 30M parameters and 256 slots took 2 ms of
the 9.7 ms that Python and 150 launches took. A graph repeats the same kernels on the same addresses, so a step has one
of a few shapes, and all that changes is in one tensor: the token and the position of every slot.

Idle slots of a graph compute too: a dummy token at the position after the sequence's end. The sequence's next token
overwrites that cache entry before it is read, and the logits are dropped.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from trainer.models.kv_cache import KVCache, prepare_decode
from trainer.models.slot_attention import last_token_logits
from trainer.runtime import library_internals, terminal

_LENGTH_MULTIPLE = 128
_SMALLEST_BLOCK = 8  # with fewer slots a step takes as long
# Uses of a shape before it is captured. A capture costs about as much as four steps without a graph; where a larger graph
# exists, a smaller one saves only some of the kernels' time.
_MIN_USES_WITHOUT_GRAPH = 2
_MIN_USES_WITH_LARGER_GRAPH = 32

_cannot_capture: set[type[PreTrainedModel]] = set()  # classes whose forward pass copies numbers to the host

Launch = Callable[[], object]


class GraphShape(NamedTuple):
    """Shape of a graph: slots 0..block-1, each of which attends to at most `max_seqlen` positions."""

    num_slots: int
    max_seqlen: int

    def covers(self, other: GraphShape) -> bool:
        return self.num_slots >= other.num_slots and self.max_seqlen >= other.max_seqlen


def shape_for(num_occupied: int, num_slots: int, max_seqlen: int, capacity: int) -> GraphShape:
    """Return the shape for the first `num_occupied` slots: a block of all slots or of a half, a quarter, ... of them."""
    block = num_slots
    while block // 2 >= max(num_occupied, _SMALLEST_BLOCK):
        block //= 2
    return GraphShape(block, min(-(-max_seqlen // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, capacity))


class CudaGraphRunner:
    """Decode steps of one model over the first `num_slots` slots of `cache`; owns the graphs and their memory."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, num_slots: int) -> None:
        self._model = model
        self._cache = cache
        self._num_slots = num_slots
        self._numbers = torch.zeros(2, num_slots, dtype=torch.int64, device=model.device)
        self._logits: torch.Tensor | None = None  # [slots, vocabulary], of all graphs
        self._graphs: dict[GraphShape, Launch] = {}
        self._uses: Counter[GraphShape] = Counter()
        self._capture: Callable[[Launch], Launch] | None = None

    @property
    def is_usable(self) -> bool:
        return type(self._model) not in _cannot_capture

    def step(self, tokens: Sequence[int], positions: Sequence[int], max_seqlen: int) -> torch.Tensor:
        """Feed `tokens[i]` at `positions[i]` to slot i; return logits [at least len(tokens), vocabulary].

        Active sequences have at most `max_seqlen` tokens. The next step overwrites the logits.
        """
        spare = [0] * (self._num_slots - len(tokens))
        # A sequence that fills its slot is finished: its last key may be overwritten.
        clamped = [min(position, self._cache.capacity - 1) for position in positions]
        self._numbers.copy_(torch.tensor([[*tokens, *spare], [*clamped, *spare]]))
        shape = shape_for(len(tokens), self._num_slots, max_seqlen, self._cache.capacity)
        self._uses[shape] += 1
        if shape not in self._graphs and self.is_usable:
            has_larger = self._smallest_that_covers(shape) is not None
            min_uses = _MIN_USES_WITH_LARGER_GRAPH if has_larger else _MIN_USES_WITHOUT_GRAPH
            if self._uses[shape] >= min_uses:
                self._try_to_capture(shape)
        used = self._smallest_that_covers(shape)
        if used is None:  # this pass is also the warm-up that a capture needs
            logits = self._forward(shape)
            if self._logits is None:
                self._logits = logits.new_empty(self._num_slots, logits.shape[1])
            return logits
        assert self._logits is not None
        self._graphs[used]()
        return self._logits[: used.num_slots]

    def _smallest_that_covers(self, shape: GraphShape) -> GraphShape | None:
        return min((other for other in self._graphs if other.covers(shape)), default=None)

    def _try_to_capture(self, shape: GraphShape) -> None:
        try:
            self._capture = self._capture or make_capture()
            self._graphs[shape] = self._capture(partial(self._write_logits, shape))
        except RuntimeError as error:
            _cannot_capture.add(type(self._model))
            reason = str(error.__context__ or error).partition("\n")[0]
            terminal.warning(
                f"{type(self._model).__name__} decodes without CUDA graphs, more slowly: {reason}"
            )

    def _write_logits(self, shape: GraphShape) -> None:
        assert self._logits is not None
        self._logits[: shape.num_slots].copy_(self._forward(shape))

    def _forward(self, shape: GraphShape) -> torch.Tensor:
        numbers = self._numbers[:, : shape.num_slots]
        return last_token_logits(
            self._model, prepare_decode(self._cache, numbers, shape.max_seqlen, self._model.dtype)
        )


def make_capture() -> Callable[[Launch], Launch]:
    """Return `capture(function)`, which records the kernels that `function` launches and returns a function that replays them.

    All graphs of one `capture` share a memory pool: no two may run at the same time. `capture` raises RuntimeError.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Launch) -> Launch:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads, such as NCCL's watchdog, may use the device during a capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
        except RuntimeError:
            # After a failed capture torch leaves its stream current and its memory pool in capture mode.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):  # if the pool's capture mode has ended
                library_internals.end_allocating_to_pool(torch.cuda.current_device(), pool)
            raise
        return graph.replay

    return capture
