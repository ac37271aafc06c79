"""Assignment of examples to packs, and of packs to optimizer steps, ranks and micro-batches.

A pack consists of whole examples with at most `pack_length` tokens in total. The packs of an epoch depend only on shards,
method, pack length, seed and epoch. A position in the data is a number of consumed packs, so it does not depend on the
number of ranks or accumulation steps.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from trainer.errors import UserError
from trainer.shards.methods import View
from trainer.shards.read import Shards


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one micro-batch of a rank.

    first_pack: index of the micro-batch's first pack, counted from the start of the run. This index seeds dropout.
    problem_indices: indices of the examples in the shards. examples: tuples (tokens [n] int64, loss_mask [n] bool).
    """

    first_pack: int
    problem_indices: list[int]
    examples: list[tuple[np.ndarray, np.ndarray]]


class PackedDataset:
    """The endless sequence of packs of one run. Pack p belongs to epoch p // packs_per_epoch."""

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
                f"{shards.path}: no example for method {method}: {self.num_without_steps} lack its segments "
                f"({', '.join(role.name.lower() for role in sorted(view.required))}), "
                f"{self.num_too_long} are longer than pack_length {pack_length}"
            )
        self._lengths = self._all_lengths[self._usable]
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self.num_examples = len(self._usable)
        self.tokens_per_epoch = int(self._lengths.sum())
        self.packs_per_epoch = len(self._packs_of_epoch(0))

    def pack(self, index: int) -> np.ndarray:
        """Return the shard indices of the examples in a pack. `index` counts the packs of all epochs."""
        epoch, within = divmod(index, self.packs_per_epoch)
        return self._packs_of_epoch(epoch)[within]

    def shortest_and_longest(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the shortest and the longest example of the run, each as (tokens [n] int64, loss_mask [n] bool)."""
        indices = self._usable[[self._lengths.argmin(), self._lengths.argmax()]]
        return self._shards.examples(indices.tolist(), self._view)

    def num_target_tokens(self, first: int, end: int) -> int:
        """Return the number of tokens that carry loss in packs `first` to `end` - 1."""
        return sum(int(self._target_lengths[self.pack(index)].sum()) for index in range(first, end))

    def num_tokens(self, first: int, end: int) -> int:
        """Return the number of tokens, without padding, in packs `first` to `end` - 1."""
        return sum(int(self._all_lengths[self.pack(index)].sum()) for index in range(first, end))

    def lengths(self, packs: range, end: int) -> list[int]:
        """Return the length in tokens of each example that `micro_batch` returns for the same arguments."""
        return [int(n) for index in packs if index < end for n in self._all_lengths[self.pack(index)]]

    def micro_batch(self, packs: range, end: int) -> MicroBatch:
        """Return the examples of `packs`. A pack with an index of `end` or more counts as empty."""
        indices = [int(problem) for index in packs if index < end for problem in self.pack(index)]
        return MicroBatch(packs.start, indices, self._shards.examples(indices, self._view))

    def _packs_of_epoch(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            digest = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()
            random = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
            # `permutation` may differ between numpy versions; the raw draws of a bit generator never change.
            order = np.argsort(random.random_raw(self.num_examples), kind="stable")
            packs = best_fit_decreasing(self._lengths, order, self._pack_length)
            shuffled = np.argsort(random.random_raw(len(packs)), kind="stable")
            self._epoch = (epoch, [self._usable[packs[index]] for index in shuffled])
        return self._epoch[1]


def best_fit_decreasing(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins of size `capacity`, the longest item first. Return the item indices of each bin.

    Each item goes into the fullest bin that has enough space. `lengths` [n]: length of each item, at most `capacity`.
    `order` [n]: permutation of the item indices; items of equal length are placed in this order. The number of bins does
    not depend on `order`, so every epoch has the same number of packs.
    """
    bins: list[list[int]] = []
    bins_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    space_bits = 0  # bit s is set if a bin has s tokens left; the lowest set bit >= length is the best fit
    for item in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[item])
        sufficient_bits = space_bits >> length
        if sufficient_bits:
            space = length + (sufficient_bits & -sufficient_bits).bit_length() - 1
            index = bins_by_space[space].pop()
            if not bins_by_space[space]:
                space_bits ^= 1 << space
        else:
            space, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        bins_by_space[space - length].append(index)
        space_bits |= 1 << (space - length)
    return bins


@dataclass(frozen=True)
class BatchPlan:
    """Distribution of packs over steps, ranks and micro-batches. A step takes `packs_per_step` consecutive packs."""

    packs_per_micro_batch: int
    accumulation_steps: int
    world_size: int
    total_steps: int
    total_packs: int  # sum over all steps; the last step may have fewer packs than the other steps

    @classmethod
    def make(
        cls,
        packs_per_micro_batch: int,
        accumulation_steps: int,
        world_size: int,
        packs_per_epoch: int,
        epochs: float,
        max_steps: int,
    ) -> "BatchPlan":
        per_step = packs_per_micro_batch * accumulation_steps * world_size
        total_packs = max_steps * per_step if max_steps else math.ceil(epochs * packs_per_epoch)
        total_steps = math.ceil(total_packs / per_step)
        return cls(packs_per_micro_batch, accumulation_steps, world_size, total_steps, total_packs)

    @property
    def packs_per_step(self) -> int:
        return self.packs_per_micro_batch * self.accumulation_steps * self.world_size

    def pack_range(self, step: int) -> tuple[int, int]:
        """Return (first pack of a step, first pack after the step). `step` is counted from 0."""
        first = step * self.packs_per_step
        return first, min(first + self.packs_per_step, self.total_packs)

    def micro_batches(self, step: int, rank: int) -> list[range]:
        """Return the packs of each micro-batch of a rank. In the last step, indices >= `total_packs` are empty packs."""
        size = self.packs_per_micro_batch
        first = step * self.packs_per_step + rank * size
        starts = (first + micro * self.world_size * size for micro in range(self.accumulation_steps))
        return [range(start, start + size) for start in starts]
