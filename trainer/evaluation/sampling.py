"""The next token: greedy, or sampled with noise that belongs to the problem.

The noise is a pure function of (seed, problem id, position), so what is sampled does not depend on the batch, on
the number of ranks or on the order in which problems are taken.
"""

from __future__ import annotations

import hashlib

import torch

from trainer.errors import UserError

_MASK = (1 << 64) - 1


def sampling_seed(seed: int, problem_id: str, part: str = "") -> int:
    """64 bits that stand for a problem under a seed, and for one of several models that work at it."""
    name = f"{seed}\0{problem_id}" + (f"\0{part}" if part else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def uniform_noise(key: int, position: int) -> float:
    """Number `position` of the stream `key`, in [0, 1): SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), by counter."""
    state = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def greedy(logits: torch.Tensor) -> list[int]:
    """Most probable token of each row; logits [rows, vocabulary]. Raises UserError for NaN or infinite logits."""
    largest, tokens = logits.max(dim=-1)
    chosen: list[int] = tokens.where(largest.isfinite(), -1).tolist()  # all in one copy from the device
    if -1 in chosen:
        raise not_finite()
    return chosen


def sampled(logits: torch.Tensor, temperature: float, top_p: float, uniforms: list[float]) -> list[int]:
    """One token of each row of logits [rows, vocabulary] by inversion of the distribution at uniforms[row].

    With top_p < 1 only the smallest set of most probable tokens that reaches top_p is left (nucleus sampling:
    Holtzman et al., ICLR 2020). Raises UserError for NaN or infinite logits.
    """
    scaled = (
        logits.double() / temperature
    )  # double: rounding in the sums must not move a boundary between tokens
    if not scaled.amax(dim=-1).isfinite().all():
        raise not_finite()
    probabilities = torch.softmax(scaled, dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    place = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding could put the threshold at the very end: stay on the last token that has any probability.
    place = torch.minimum(place, torch.searchsorted(cumulative, total))
    return (place if order is None else order.gather(-1, place))[:, 0].tolist()


def not_finite() -> UserError:
    """For a row whose largest logit is not finite: it is NaN if any of the row is."""
    return UserError(
        "the model's logits are not finite: its weights hold NaN or infinity; use another checkpoint"
    )
