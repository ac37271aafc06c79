from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from trainer.errors import UserError
from trainer.evaluation.sampling import greedy, sampled, sampling_seed, uniform_random

LOGITS = torch.log(torch.tensor([0.5, 0.05, 0.3, 0.15]))


def test_noise_is_uniform_and_independent() -> None:
    seeds = [sampling_seed(seed, f"id {i}") for seed in range(2) for i in range(50)]
    noise = np.array([[uniform_random(one, position) for position in range(200)] for one in seeds])
    assert noise.min() >= 0 and noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:50].ravel(), noise[50:].ravel())[0, 1]) < 0.03


def test_noise_is_pinned() -> None:
    """Another stream would change every sampled result. The numbers are those published for SplitMix64 and this seed."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform_random(1234567, position) for position in range(4)] == [
        (n >> 11) / 2**53 for n in published
    ]
    assert sampling_seed(0, "gsm8k-test-1") == 4546245424551676520


def test_samples_follow_the_distribution() -> None:
    draws = 4000
    numbers = [uniform_random(sampling_seed(0, "x"), position) for position in range(draws)]
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.05, 0.3, 0.15]),
        (0.5, 1.0, [0.25, 0.0025, 0.09, 0.0225]),
        (1.0, 0.9, [0.5, 0.0, 0.3, 0.15]),
        (1.0, 0.5, [1.0, 0.0, 0.0, 0.0]),
    ):
        counts = Counter(sampled(LOGITS.expand(draws, -1), temperature, top_p, numbers))
        probabilities = np.array(expected) / sum(expected)
        observed = np.array([counts[token] for token in range(4)])
        assert (observed[probabilities == 0] == 0).all()
        present = probabilities > 0
        if present.sum() > 1:
            assert stats.chisquare(observed[present], draws * probabilities[present]).pvalue > 0.001


def test_extreme_random_numbers_select_possible_tokens() -> None:
    """Tokens of probability 0 are never sampled, not even with the smallest or the largest random number."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for top_p in (1.0, 0.99):
        assert sampled(logits, 1.0, top_p, [0.0]) == [1]
        assert sampled(logits, 1.0, top_p, [1.0 - 2**-53]) == [2]


def test_greedy_takes_the_largest_and_rejects_nan() -> None:
    assert greedy(torch.stack([LOGITS, -LOGITS])) == [0, 1]
    with pytest.raises(UserError, match="not finite"):
        greedy(torch.tensor([[0.0, torch.nan, 1.0]]))
