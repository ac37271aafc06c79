"""The loss in place is torch's cross-entropy, value and gradient, in fp32 and bf16, and refuses a second use."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainer.training.cross_entropy import summed_cross_entropy

VOCABULARY = 200_001  # two rows at a time: the last block is shorter


def _hidden_weight_labels(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, VOCABULARY - 1, 5, 17, 3])
    return hidden, weight, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_value_and_gradient_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = _hidden_weight_labels(dtype)
    expected = cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    (3 * expected).backward()
    expected_gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    found = summed_cross_entropy(hidden @ weight.t(), labels)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip((hidden.grad, weight.grad), expected_gradients, strict=True):
        assert reference is not None and gradient is not None
        assert torch.linalg.norm(gradient - reference) <= tolerance * torch.linalg.norm(reference)


def test_without_gradient_the_logits_stay() -> None:
    hidden, weight, labels = _hidden_weight_labels(torch.float32)
    with torch.no_grad():
        logits = hidden @ weight.t()
        before = logits.clone()
        summed_cross_entropy(logits, labels)
    assert torch.equal(logits, before)


def test_using_the_logits_again_is_an_error() -> None:
    hidden, weight, labels = _hidden_weight_labels(torch.float32)
    logits = torch.tanh(hidden @ weight.t())  # tanh needs its output for its gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed_cross_entropy(logits, labels).backward()
