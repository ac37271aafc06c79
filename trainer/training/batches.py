"""Assignment of examples to packs, and of packs to optimizer steps, ranks and micro-batches.

The packs of a run are a pure function of (shards, method, pack length, seed, epoch). The position in the data is one
number, the count of consumed packs: it does not depend on the number of ranks, on accumulation or on restarts.
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
    """Examples of one forward pass.

    first_pack: index of the first pack in the run, which seeds dropout. problem_indices: shard indices of the
    examples. examples: (tokens [n] int64, loss_mask [n] bool), one per example.
    """

    first_pack: int
    problem_indices: list[int]
    examples: list[tuple[np.ndarray, np.ndarray]]


class PackedDataset:
    """The endless sequence of packs of one run; pack p belongs to epoch p // packs_per_epoch."""

    def __init__(self, shards: Shards, method: str, view: View, pack_length: int, seed: int):
        self._shards = shards
        self._view = view
        self._pack_length = pack_length
        self._key = f"{shards.fingerprint}/{method}/{pack_length}/{seed}"
        self._all_lengths = shards.lengths(view)
        self._target_lengths = shards.target_lengths(view)
        self.num_without_steps = int((self._all_lengths == 0).sum())
        self.num_too_long = int((self._all_lengths > pack_length).sum())
        self._usable = np.flatnonzero((self._all_lengths > 0) & (self._all_lengths <= pack_length))
        if not len(self._usable):
            raise UserError(
                f"{shards.path}: no example for method {method}: {self.num_without_steps} lack the steps it needs, "
                f"{self.num_too_long} are longer than pack_length {pack_length}"
            )
        self._lengths = self._all_lengths[self._usable]
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self.num_examples = len(self._usable)
        self.tokens_per_epoch = int(self._lengths.sum())
        self.packs_per_epoch = len(self._packs_of_epoch(0))

    def pack(self, index: int) -> np.ndarray:
        """Return the shard indices of the examples of pack `index` of the run."""
        epoch, within = divmod(index, self.packs_per_epoch)
        return self._packs_of_epoch(epoch)[within]

    def longest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the longest example of the run: tokens [n] int64, loss_mask [n] bool."""
        return self._shards.example(int(self._usable[self._lengths.argmax()]), self._view)

    def shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the shortest example of the run, in the form of `longest`."""
        return self._shards.example(int(self._usable[self._lengths.argmin()]), self._view)

    def num_target_tokens(self, first: int, end: int) -> int:
        """Return the number of tokens that carry loss in packs first..end-1."""
        return sum(int(self._target_lengths[self.pack(index)].sum()) for index in range(first, end))

    def num_tokens(self, first: int, end: int) -> int:
        """Return the number of tokens, without padding, in packs first..end-1."""
        return sum(int(self._all_lengths[self.pack(index)].sum()) for index in range(first, end))

    def lengths(self, packs: range, end: int) -> list[int]:
        """Return the number of tokens of each example that `micro_batch` returns."""
        return [int(n) for index in packs if index < end for n in self._all_lengths[self.pack(index)]]

    def micro_batch(self, packs: range, end: int) -> MicroBatch:
        """Return the examples of some packs; packs from `end` on are empty."""
        indices = [int(problem) for index in packs if index < end for problem in self.pack(index)]
        return MicroBatch(packs.start, indices, self._shards.examples(indices, self._view))

    def _packs_of_epoch(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            digest = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()
            random = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
            # Sorted raw 64-bit draws: numpy guarantees the stream of a bit generator, not the results of `permutation`.
            order = np.argsort(random.random_raw(self.num_examples), kind="stable")
            packs = best_fit_decreasing(self._lengths, order, self._pack_length)
            shuffled = np.argsort(random.random_raw(len(packs)), kind="stable")
            self._epoch = (epoch, [self._usable[packs[index]] for index in shuffled])
        return self._epoch[1]


def best_fit_decreasing(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the items of each bin of `capacity`: longest item first, each into the fullest bin with enough space.

    `lengths` [n], each at most `capacity`; `order` [n] is a permutation that decides between equal lengths. The number
    of bins depends on the lengths alone, so every epoch has the same number of packs.
    """
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set if a bin has exactly s tokens left: finding the best fit is one shift
    for item in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_space[space - length].append(chosen)
        spaces |= 1 << (space - length)
    return bins


@dataclass(frozen=True)
class BatchPlan:
    """Distribution of packs over steps, ranks and micro-batches: a step takes `packs_per_step` consecutive packs."""

    packs_per_micro_batch: int
    accumulation_steps: int
    world_size: int
    total_steps: int
    total_packs: int  # end of the data; the last step may have fewer packs

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
        """Return the first pack of a step (counted from 0) and the first one after it."""
        first = step * self.packs_per_step
        return first, min(first + self.packs_per_step, self.total_packs)

    def micro_batches(self, step: int, rank: int) -> list[range]:
        """Return the packs of each micro-batch of a rank; in the last step some may be beyond `total_packs`."""
        first = step * self.packs_per_step
        size = self.packs_per_micro_batch
        starts = (first + (micro * self.world_size + rank) * size for micro in range(self.accumulation_steps))
        return [range(start, start + size) for start in starts]
