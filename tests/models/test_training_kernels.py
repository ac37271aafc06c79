"""The faster kernels give the model's own numbers, and its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from trainer.models import training_kernels


def _logits_and_gradient(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logits = model(torch.arange(24).reshape(2, 12), use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat(gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_same_numbers(tied: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=101, n_layer=2, n_embd=32, n_head=2, tie_word_embeddings=tied,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = list(model.state_dict())
    logits, gradient = _logits_and_gradient(model)
    training_kernels.use(model)
    assert not any(type(module).__name__ == "NewGELUActivation" for module in model.modules())
    found_logits, found_gradient = _logits_and_gradient(model)
    assert torch.allclose(found_logits, logits, rtol=1e-5, atol=1e-6)
    assert torch.linalg.norm(found_gradient - gradient) < 1e-5 * torch.linalg.norm(gradient)
    assert list(model.state_dict()) == names
