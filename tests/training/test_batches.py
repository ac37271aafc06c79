"""Packs: every example once an epoch, the same on every machine, dense."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.training.batches import BatchPlan, PackedDataset, best_fit_decreasing


def _data(shards: Shards, seed: int = 0, pack_length: int = 512) -> PackedDataset:
    return PackedDataset(shards, "socratic", view_of("socratic"), pack_length, seed)


def test_every_example_exactly_once_an_epoch_and_packs_fit(stories: Shards) -> None:
    data = _data(stories)
    lengths = stories.lengths(view_of("socratic"))
    for epoch in range(3):
        packs = [data.pack(epoch * data.packs_per_epoch + index) for index in range(data.packs_per_epoch)]
        assert sorted(np.concatenate(packs).tolist()) == list(range(len(stories)))
        assert all(lengths[pack].sum() <= 512 for pack in packs)


def test_order_follows_from_seed_and_epoch_alone(stories: Shards) -> None:
    first, again, other = _data(stories, 7), _data(stories, 7), _data(stories, 8)
    ahead = first.packs_per_epoch * 3 + 2  # read out of order: there is no state
    expected = [first.pack(index).tolist() for index in range(ahead + 1)]
    assert again.pack(ahead).tolist() == expected[ahead]
    assert again.pack(1).tolist() == expected[1]
    assert [other.pack(index).tolist() for index in range(5)] != expected[:5]
    per_epoch = first.packs_per_epoch
    assert expected[:per_epoch] != expected[per_epoch : 2 * per_epoch]


def test_packing_is_dense() -> None:
    lengths = np.random.default_rng(0).integers(50, 430, 5000)
    bins = best_fit_decreasing(lengths, np.arange(5000), 1024)
    assert lengths.sum() / (len(bins) * 1024) > 0.98


def test_number_of_bins_does_not_depend_on_the_order() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 500)
    assert len({len(best_fit_decreasing(lengths, random.permutation(500), 128)) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("size", "accumulation", "world_size"), [(1, 1, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4)]
)
def test_ranks_and_micro_batches_share_the_packs_of_a_step(
    size: int, accumulation: int, world_size: int
) -> None:
    plan = BatchPlan.make(size, accumulation, world_size, packs_per_epoch=10, epochs=1, max_steps=0)
    seen = []
    for step in range(plan.total_steps):
        taken = [
            p
            for rank in range(world_size)
            for packs in plan.micro_batches(step, rank)
            for p in packs
            if p < plan.total_packs
        ]
        first, end = plan.pack_range(step)
        assert sorted(taken) == list(range(first, end))
        seen += taken
    assert sorted(seen) == list(range(10))


def test_fractions_of_an_epoch_and_max_steps() -> None:
    assert BatchPlan.make(1, 1, 2, packs_per_epoch=10, epochs=0.5, max_steps=0).total_packs == 5
    assert BatchPlan.make(1, 1, 2, packs_per_epoch=10, epochs=3, max_steps=7).total_packs == 14


def test_nothing_to_train_on_is_an_error(stories: Shards) -> None:
    with pytest.raises(UserError, match="longer than pack_length 16"):
        _data(stories, pack_length=16)
