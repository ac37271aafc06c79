"""Decode steps as CUDA graphs.

The host limits the speed of a small model's decode step. With 30M parameters and 256 slots on an H200, a step without a
graph takes 9.7 ms, and its kernels take 2 ms of this time. A graph always runs the same kernels on the same addresses. So
every shape needs its own graph, and one tensor holds the tokens and positions of all slots. Steps are padded to a few shapes.

A graph processes one token in each of the first `num_slots` slots. A slot without a token in this step gets a dummy
token at the position after its sequence's end, and the dummy's logits are dropped. When the sequence continues, its next
token overwrites the dummy's cache entry before any attention reads the entry.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
from transformers import PreTrainedModel

from trainer.models.kv_cache import KVCache, prepare_decode
from trainer.models.slot_attention import last_token_logits
from trainer.runtime import library_internals, terminal

_LENGTH_MULTIPLE = 128
_SMALLEST_BLOCK = 8  # a step over fewer slots is not faster
# Number of uses after which a shape is captured. A capture costs about as much as four steps without a graph. A shape that
# fits into a larger graph already runs as that graph. Its own graph only shortens the kernels, so it needs more uses.
_MIN_USES_WITHOUT_GRAPH = 2
_MIN_USES_WITH_LARGER_GRAPH = 32

_cannot_capture: set[type[PreTrainedModel]] = set()  # classes of models whose capture failed

Launch = Callable[[], object]


class GraphShape(NamedTuple):
    """Shape of a graph over the first `num_slots` slots. Each slot attends to at most `max_seqlen` positions."""

    num_slots: int
    max_seqlen: int

    def covers(self, other: Self) -> bool:
        return self.num_slots >= other.num_slots and self.max_seqlen >= other.max_seqlen


def shape_for(num_occupied: int, num_slots: int, max_seqlen: int, capacity: int) -> GraphShape:
    """Return the shape of a step over the first `num_occupied` slots.

    `num_slots` is halved while the result has room for these slots. `max_seqlen` is rounded up, but not above `capacity`.
    """
    while num_slots // 2 >= max(num_occupied, _SMALLEST_BLOCK):
        num_slots //= 2
    return GraphShape(num_slots, min(-(-max_seqlen // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, capacity))


class CudaGraphRunner:
    """Runner of one model's decode steps over the first `num_slots` slots of `cache`. The runner owns the CUDA graphs."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, num_slots: int) -> None:
        self._model, self._cache, self._num_slots = model, cache, num_slots
        self._numbers = torch.zeros(2, num_slots, dtype=torch.int64, device=model.device)
        self._logits: torch.Tensor | None = None  # [slots, vocabulary]; all graphs write here
        self._graphs: dict[GraphShape, Launch] = {}
        self._uses: Counter[GraphShape] = Counter()
        self._capture: Callable[[Launch], Launch] | None = None

    @property
    def is_usable(self) -> bool:
        return type(self._model) not in _cannot_capture

    def step(self, tokens: Sequence[int], positions: Sequence[int], max_seqlen: int) -> torch.Tensor:
        """Process `tokens[i]` at `positions[i]` in slot i; return logits [at least len(tokens), vocabulary].

        max_seqlen: maximum length, after this step, of the sequences that get a token. The next step overwrites the logits.
        """
        padding = [0] * (self._num_slots - len(tokens))
        # A sequence that fills its slot has ended, so a dummy token may overwrite its last key.
        clamped = [min(position, self._cache.capacity - 1) for position in positions]
        self._numbers.copy_(torch.tensor([[*tokens, *padding], [*clamped, *padding]]))
        shape = shape_for(len(tokens), self._num_slots, max_seqlen, self._cache.capacity)
        self._uses[shape] += 1
        graph = self._smallest_graph_for(shape)
        min_uses = _MIN_USES_WITHOUT_GRAPH if graph is None else _MIN_USES_WITH_LARGER_GRAPH
        if graph != shape and self.is_usable and self._uses[shape] >= min_uses:
            self._try_to_capture(shape)
            graph = self._smallest_graph_for(shape)
        if graph is None:  # this pass is also the warm-up for a later capture
            logits = self._forward(shape)
            if self._logits is None:
                self._logits = logits.new_empty(self._num_slots, logits.shape[1])
            return logits
        assert self._logits is not None
        self._graphs[graph]()
        return self._logits[: graph.num_slots]

    def _smallest_graph_for(self, shape: GraphShape) -> GraphShape | None:
        return min((captured for captured in self._graphs if captured.covers(shape)), default=None)

    def _try_to_capture(self, shape: GraphShape) -> None:
        try:
            self._capture = self._capture or make_capture()
            self._graphs[shape] = self._capture(partial(self._write_logits, shape))
        except RuntimeError as error:
            _cannot_capture.add(type(self._model))
            name, reason = type(self._model).__name__, str(error.__context__ or error).partition("\n")[0]
            terminal.warning(f"{name} decodes without CUDA graphs, more slowly: {reason}")

    def _write_logits(self, shape: GraphShape) -> None:
        assert self._logits is not None
        self._logits[: shape.num_slots].copy_(self._forward(shape))

    def _forward(self, shape: GraphShape) -> torch.Tensor:
        numbers = self._numbers[:, : shape.num_slots]
        batch = prepare_decode(self._cache, numbers, shape.max_seqlen, self._model.dtype)
        return last_token_logits(self._model, batch)


def make_capture() -> Callable[[Launch], Launch]:
    """Return a function that captures the kernels of its argument in a CUDA graph and returns a function that replays them.

    All captured graphs share a memory pool, so no two may run at the same time. A failed capture raises RuntimeError.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Launch) -> Launch:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads, such as NCCL's watchdog, may use the device during the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
        except RuntimeError:
            # After a failed capture, the capture's stream is still current and the memory pool still in capture mode.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):  # raised if the pool is not in capture mode
                library_internals.end_allocating_to_pool(torch.cuda.current_device(), pool)
            raise
        return graph.replay

    return capture
