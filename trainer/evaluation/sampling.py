"""Choose the next tokens from logits, greedily or by sampling.

The random numbers are a function of seed, problem id, role and position alone. Samples therefore do not depend on the
batch, the number of ranks or the order of the problems.
"""

import hashlib

import torch

from trainer.errors import UserError

_MASK = (1 << 64) - 1


def sampling_seed(seed: int, problem_id: str, role: str = "") -> int:
    """Return a 64-bit seed for one problem and one role; `role` is "" for a single model and for the solver of a pair."""
    name = f"{seed}\0{problem_id}" + (f"\0{role}" if role else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def uniform_random(seed: int, position: int) -> float:
    """Return number `position` in [0, 1) of the random sequence of `seed`, by SplitMix64 (Steele et al., OOPSLA 2014)."""
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def greedy(logits: torch.Tensor) -> list[int]:
    """Return the most probable token of each row of logits [rows, vocabulary].

    Raises UserError if the largest logit of a row is NaN or infinite.
    """
    largest, tokens = logits.max(dim=-1)
    chosen: list[int] = tokens.where(largest.isfinite(), -1).tolist()  # one device transfer; -1: not finite
    if -1 in chosen:
        raise non_finite_logits_error()
    return chosen


def sampled(logits: torch.Tensor, temperature: float, top_p: float, uniforms: list[float]) -> list[int]:
    """Return one sampled token per row of logits [rows, vocabulary]. `uniforms`: a random number in [0, 1) per row.

    top_p < 1 keeps only the smallest set of most probable tokens whose total probability reaches top_p (nucleus sampling:
    Holtzman et al., ICLR 2020). Raises UserError if the largest logit of a row is NaN or infinite.
    """
    # Use double precision: in single precision, rounding errors of the cumulative sums could change the chosen token.
    scaled = logits.double() / temperature
    if not scaled.amax(dim=-1).isfinite().all():
        raise non_finite_logits_error()
    probabilities = torch.softmax(scaled, dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    column = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding can make the threshold equal to the total: then take the last token with a probability above 0.
    column = torch.minimum(column, torch.searchsorted(cumulative, total))
    return (column if order is None else order.gather(-1, column))[:, 0].tolist()


def non_finite_logits_error() -> UserError:
    """Return the error for logits whose maximum is NaN or infinite."""
    return UserError(
        "the model's logits are not finite: its weights hold NaN or infinity; use another checkpoint"
    )
