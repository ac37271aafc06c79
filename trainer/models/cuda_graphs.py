"""Decode steps as CUDA graphs: the launches of a forward pass, recorded once and sent again as one.

A decode step of a small model waits for the host: on an H200 the kernels of 30M parameters and 256 slots took 2 ms of
the 9.7 ms that Python and 150 launches took. A graph does the same work on the same addresses every time, so a step has
one of a few shapes, and everything that changes lies in one tensor: the token and the position of every slot.

A slot of the block that does not take part computes too. It reads some token at the position behind its end: what that
leaves in the cache is overwritten by the sequence's next token before anybody sees it, and its logits are dropped.
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
from trainer.runtime import terminal

_LENGTH_MULTIPLE = 128
_SMALLEST_BLOCK = 8  # with fewer slots a step takes as long
# A capture costs about as much as four steps without a graph. With a larger graph at hand a step of a smaller shape can
# only gain some of the kernels' time, so it has to come often.
_USES_WITHOUT_ANY = 2
_USES_WITH_A_LARGER = 32

_cannot_capture: set[type[PreTrainedModel]] = set()  # their forward pass asks the device for numbers

Launch = Callable[[], object]


class GraphShape(NamedTuple):
    """What a graph is made for: the slots 0..block-1, each of which sees up to `longest` positions."""

    block: int
    longest: int

    def holds(self, other: GraphShape) -> bool:
        return self.block >= other.block and self.longest >= other.longest


def shape_for(num_occupied: int, num_slots: int, longest: int, capacity: int) -> GraphShape:
    """The shape of a step over the first `num_occupied` slots: all slots or a half, a quarter, ... of them."""
    block = num_slots
    while block // 2 >= max(num_occupied, _SMALLEST_BLOCK):
        block //= 2
    return GraphShape(block, min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, capacity))


class CudaGraphRunner:
    """Passes in which every slot reads one token. They and their memory are gone with this object."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, num_slots: int) -> None:
        """`num_slots`: how many of the cache's take part, the first ones."""
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

    @property
    def captured(self) -> list[GraphShape]:
        return list(self._graphs)

    def step(self, tokens: Sequence[int], positions: Sequence[int], longest: int) -> torch.Tensor:
        """Slot i reads `tokens[i]` at `positions[i]`; those that take part see at most `longest` positions.

        Returns logits [at least the slots given, vocabulary]; the next step writes over them.
        """
        spare = [0] * (self._num_slots - len(tokens))
        # A sequence that fills its slot is read no further: its last key may be overwritten.
        places = [min(position, self._cache.capacity - 1) for position in positions]
        self._numbers.copy_(torch.tensor([[*tokens, *spare], [*places, *spare]]))
        shape = shape_for(len(tokens), self._num_slots, longest, self._cache.capacity)
        self._uses[shape] += 1
        if self._is_worth_capturing(shape):
            self._try_to_capture(shape)
        used = self._smallest_that_holds(shape)
        if used is None:  # which is also the pass that a capture must not be the first of
            logits = self._forward(shape)
            if self._logits is None:
                self._logits = logits.new_empty(self._num_slots, logits.shape[1])
            return logits
        assert self._logits is not None
        self._graphs[used]()
        return self._logits[: used.block]

    def _smallest_that_holds(self, shape: GraphShape) -> GraphShape | None:
        return min((other for other in self._graphs if other.holds(shape)), default=None)

    def _is_worth_capturing(self, shape: GraphShape) -> bool:
        if shape in self._graphs or not self.is_usable:
            return False
        needed = _USES_WITHOUT_ANY if self._smallest_that_holds(shape) is None else _USES_WITH_A_LARGER
        return self._uses[shape] >= needed

    def _try_to_capture(self, shape: GraphShape) -> None:
        try:
            self._capture = self._capture or make_capture()
            self._graphs[shape] = self._capture(partial(self._write_logits, shape))
        except RuntimeError as error:
            _cannot_capture.add(type(self._model))
            why = str(error.__context__ or error).partition("\n")[0]
            terminal.warning(f"{type(self._model).__name__} decodes without CUDA graphs, more slowly: {why}")

    def _write_logits(self, shape: GraphShape) -> None:
        assert self._logits is not None
        self._logits[: shape.block].copy_(self._forward(shape))

    def _forward(self, shape: GraphShape) -> torch.Tensor:
        numbers = self._numbers[:, : shape.block]
        return last_token_logits(
            self._model, prepare_decode(self._cache, numbers, shape.longest, self._model.dtype)
        )


def make_capture() -> Callable[[Launch], Launch]:
    """`capture(work)` records what work launches, without doing it, and returns what launches it again.

    All that one capturer records shares memory, as no two of them run at the same time. Raises RuntimeError.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Launch) -> Launch:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads, such as NCCL's watchdog, may meanwhile ask the device what they like.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            # torch leaves a failed capture's stream in place, and its memory as if it still went on.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):  # it had ended
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        return graph.replay

    return capture
