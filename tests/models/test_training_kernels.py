"""The faster kernels give the logits and gradients of transformers' own."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from trainer.models import training_kernels
from trainer.training.cross_entropy import summed_cross_entropy


def _logits_and_gradient(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logits = model(torch.arange(24).reshape(2, 12), use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat(gradients)


@pytest.mark.parametrize("on_accelerator", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_same_numbers(tied: bool, on_accelerator: bool) -> None:
    """The kernels for an accelerator run on a CPU too."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=101, n_layer=2, n_embd=32, n_head=2, tie_word_embeddings=tied,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = list(model.state_dict())
    logits, gradient = _logits_and_gradient(model)
    training_kernels.patch_kernels(model, on_accelerator)
    activations = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    assert len(activations) == 2 and all("forward" in vars(activation) for activation in activations)
    found_logits, found_gradient = _logits_and_gradient(model)
    assert torch.allclose(found_logits, logits, rtol=1e-5, atol=1e-6)
    assert torch.linalg.norm(found_gradient - gradient) < 1e-5 * torch.linalg.norm(gradient)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("in_place", [True, False])
def test_the_aligned_head_gives_equal_loss_and_gradients(in_place: bool) -> None:
    """Also if the loss writes its gradient over the logits."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(101, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 100, 3, 50, 99, 1, 2])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    logits = training_kernels._AlignedProjection.apply(hidden, weight)
    assert logits.shape == (7, 101) and logits.stride() == (128, 1)
    if in_place:
        loss = summed_cross_entropy(logits, labels)
    else:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    found = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.shape == reference.shape
        assert torch.linalg.norm(gradient - reference) < 1e-6 * torch.linalg.norm(reference)


def test_rms_norm_of_torch_equals_transformers() -> None:
    """torch's formula, used on an accelerator, equals that of every replaced class."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 32)
    for name in training_kernels._RMS_NORMS:
        family = importlib.import_module(f"transformers.models.{name.removesuffix('RMSNorm').lower()}")
        kind = getattr(
            importlib.import_module(f"{family.__name__}.modeling_{family.__name__.rsplit('.')[-1]}"), name
        )
        norm = kind(32, eps=1e-3)
        torch.nn.init.uniform_(norm.weight)
        found = torch.nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
        assert torch.allclose(found, norm(hidden), rtol=1e-5, atol=1e-6), name
