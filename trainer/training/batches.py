"""Which examples are in which pack: a pure function of (shards, method, pack length, seed, epoch).

The position in the data is one number, the count of consumed packs. It does not depend on the number of ranks, on
accumulation or on how often the run was killed, and skipping ahead is arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from trainer.errors import UserError
from trainer.shards.methods import View
from trainer.shards.read import Shards


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass. The arrays of an example are views of the shards' tokens.

    examples: (tokens [n] int64, learned [n] bool), one per example. first_pack: index of the first pack in the run,
    from which dropout is seeded. problems: shard indices of the examples.
    """

    first_pack: int
    problems: list[int]
    examples: list[tuple[np.ndarray, np.ndarray]]


class PackedDataset:
    """The endless sequence of packs of one run; pack p belongs to epoch p // packs_per_epoch."""

    def __init__(self, shards: Shards, method_name: str, method: View, pack_length: int, seed: int):
        self._shards = shards
        self._method = method
        self._pack_length = pack_length
        self._key = f"{shards.fingerprint}/{method_name}/{pack_length}/{seed}"
        lengths = shards.lengths(method)
        self.num_without_steps = int((lengths == 0).sum())
        self.num_too_long = int((lengths > pack_length).sum())
        self._usable = np.flatnonzero((lengths > 0) & (lengths <= pack_length))
        if not len(self._usable):
            raise UserError(
                f"{shards.path}: no example for method {method_name}: {self.num_without_steps} lack the steps it needs, "
                f"{self.num_too_long} are longer than pack_length {pack_length}"
            )
        self._all_lengths = lengths
        self._lengths = lengths[self._usable]
        self._learned = shards.target_lengths(method)
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self.num_examples = len(self._usable)
        self.tokens_per_epoch = int(self._lengths.sum())
        self.packs_per_epoch = len(self._packs_of(0))

    def pack(self, index: int) -> np.ndarray:
        """Shard indices of the examples of the run's pack number `index`."""
        epoch, within = divmod(index, self.packs_per_epoch)
        return self._packs_of(epoch)[within]

    def longest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the longest example of the run: tokens [n] int64, learned [n] bool."""
        return self._shards.example(int(self._usable[self._lengths.argmax()]), self._method)

    def shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the shortest example of the run, as `longest`."""
        return self._shards.example(int(self._usable[self._lengths.argmin()]), self._method)

    def num_target_tokens(self, first: int, last: int) -> int:
        """Tokens that carry loss in packs first..last-1."""
        return sum(int(self._learned[self.pack(index)].sum()) for index in range(first, last))

    def num_tokens(self, first: int, last: int) -> int:
        """Tokens (without padding) in packs first..last-1."""
        return sum(int(self._all_lengths[self.pack(index)].sum()) for index in range(first, last))

    def lengths(self, packs: range, end: int) -> list[int]:
        """Return the tokens of each example of some packs, in the order of `micro_batch`."""
        return [int(n) for index in packs if index < end for n in self._all_lengths[self.pack(index)]]

    def micro_batch(self, packs: range, end: int) -> MicroBatch:
        """The examples of some packs; packs from `end` on are beyond the run's data and stay empty."""
        problems = [int(problem) for index in packs if index < end for problem in self.pack(index)]
        return MicroBatch(packs.start, problems, self._shards.examples(problems, self._method))

    def _packs_of(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._pack(epoch))
        return self._epoch[1]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        random = np.random.Philox(key=_digest(f"{self._key}/{epoch}"))
        # Raw 64-bit draws, sorted: numpy promises the stream of a bit generator, not what `permutation` makes of it.
        order = np.argsort(random.random_raw(self.num_examples), kind="stable")
        packs = best_fit_decreasing(self._lengths, order, self._pack_length)
        shuffled = np.argsort(random.random_raw(len(packs)), kind="stable")
        return [self._usable[packs[index]] for index in shuffled]


def best_fit_decreasing(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Fill bins of `capacity`: longest first, each into the fullest bin it fits; equal lengths in the given order.

    `lengths` [n] (at most `capacity`), `order` [n] a permutation. Returns the members of every bin. The number of
    bins depends on the lengths alone, so every epoch has as many packs.
    """
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit s is set if a bin has exactly s tokens left: finding the best fit is one shift
    for item in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[item])
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                occupied ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_space[space - length].append(chosen)
        occupied |= 1 << (space - length)
    return bins


@dataclass(frozen=True)
class BatchPlan:
    """How packs fall on steps, ranks and micro-batches: one optimizer step takes `packs_per_step` consecutive packs."""

    packs_per_micro_batch: int
    accumulation_steps: int
    world_size: int
    total_steps: int
    total_packs: int  # the data ends here; the last step may be short

    @classmethod
    def make(
        cls,
        packs_per_micro_batch: int,
        accumulation_steps: int,
        world_size: int,
        packs_per_epoch: int,
        epochs: float,
        max_steps: int,
    ) -> BatchPlan:
        per_step = packs_per_micro_batch * accumulation_steps * world_size
        total_packs = max_steps * per_step if max_steps else math.ceil(epochs * packs_per_epoch)
        total_steps = math.ceil(total_packs / per_step)
        return cls(packs_per_micro_batch, accumulation_steps, world_size, total_steps, total_packs)

    @property
    def packs_per_step(self) -> int:
        return self.packs_per_micro_batch * self.accumulation_steps * self.world_size

    def packs(self, step: int) -> tuple[int, int]:
        """First pack of a step (counted from 0) and the first beyond it."""
        first = step * self.packs_per_step
        return first, min(first + self.packs_per_step, self.total_packs)

    def micro_batches(self, step: int, rank: int) -> list[range]:
        """The packs of each forward pass of a rank. Some may lie beyond `total_packs` in the last step."""
        first = step * self.packs_per_step
        size = self.packs_per_micro_batch
        starts = (first + (micro * self.world_size + rank) * size for micro in range(self.accumulation_steps))
        return [range(start, start + size) for start in starts]


def _digest(text: str) -> int:
    """128 bits of key for the generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
