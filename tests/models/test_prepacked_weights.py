"""Linear layers with prepacked weights give equal results, and are restored afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trainer.models import training_kernels
from trainer.models.prepacked_weights import prepacked_weights

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=32)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def num_patched(model: PreTrainedModel) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("make, linear_layers", [(gpt2, 2 * 4 + 1), (llama, 2 * 7 + 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_same_numbers_inside_and_the_same_model_afterwards(make, linear_layers, dtype, tolerance) -> None:
    model = make().to(dtype)
    before = logits(model)
    with prepacked_weights(model):
        assert num_patched(model) == linear_layers
        torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    assert num_patched(model) == 0
    assert torch.equal(logits(model), before)


def test_weights_changed_between_two_uses_are_packed_anew() -> None:
    model = gpt2()
    with prepacked_weights(model):
        before = logits(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    with prepacked_weights(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_patched_forward_is_restored() -> None:
    model = gpt2()
    training_kernels.patch_kernels(model, on_accelerator=False)
    other = model.lm_head.forward
    with prepacked_weights(model):
        assert model.lm_head.forward is not other
    assert model.lm_head.forward is other


def test_subclasses_are_not_patched_and_an_error_restores_the_model() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(rows)

    model = gpt2()
    head = Doubled(48, 101, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    expected = logits(model)
    with pytest.raises(KeyboardInterrupt), prepacked_weights(model):
        assert num_patched(model) == 2 * 4
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        raise KeyboardInterrupt
    assert num_patched(model) == 0
