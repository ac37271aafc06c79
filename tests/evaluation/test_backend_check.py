"""The backend check rejects models with an injected fault, and accepts correct ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tests.models.small_configs import small
from trainer.errors import UserError
from trainer.evaluation.backend_check import CheckTexts, check_texts, plain_logits
from trainer.evaluation.backends.choice import BackendChoice, choose_backend
from trainer.evaluation.backends.transformers import default_attention
from trainer.models import default_attention as attention_of_ours

CAPACITY = 64


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with larger random weights, so that attention is concentrated on few tokens."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model.eval()


def prompts() -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(2, 500) for _ in range(length)] for length in (6, 25, 40)]


def texts() -> CheckTexts:
    return check_texts(prompts(), CAPACITY)


def chosen(model: PreTrainedModel, requested: str = "auto") -> BackendChoice:
    return choose_backend(model, texts(), "the model", requested)


class LastPositionShifted(LlamaForCausalLM):
    """Shifts the position of the newest token by one if positions are given, like a cache shifted by one."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **others: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids.clone()
            position_ids[..., -1] += 1
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


class SeesThePreviousToken(LlamaForCausalLM):
    """Adds the embedding of the previous token without a state: across slots, and lost with a cache."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + before, **others)


class SeesItsNeighbours(LlamaForCausalLM):
    """Adds the mean over the rows of a batch."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + embedded.mean(0, keepdim=True), **others)


class IgnoresMasks(LlamaForCausalLM):
    """Processes padding as text, as recurrent layers do."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **others: Any) -> Any:
        return super().forward(input_ids=input_ids, **others)


class NeverTheSame(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + torch.randn_like(embedded), **others)


class WrongIn16Bits(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **others: Any) -> Any:
        if position_ids is not None and self.dtype == torch.bfloat16:
            position_ids = position_ids * 2
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


def test_texts_have_refills_forced_tokens_and_the_longest_answer() -> None:
    all_texts = texts()
    first, second, refill = all_texts.slots
    assert len(first.tokens) == CAPACITY and first.prompt[:40] == prompts()[2]
    assert second.prompt == prompts()[0] and refill.prompt == prompts()[1]
    assert len(second.forced) < len(first.forced) and max(map(len, refill.forced)) > 1
    *batch, long_text, beside = all_texts.own_cache
    assert len(long_text.prompt) > len(beside.prompt) > len(long_text.prompt) - 5
    ends = [len(text.forced) for text in batch]
    assert len(batch) == 4 and ends[0] == min(ends) and len(set(ends)) == 4  # the first row ends first
    prefixed = check_texts([[7, 8, 9, *prompt] for prompt in prompts()], CAPACITY, [7, 8, 9])
    assert all(text.prompt[:3] == [7, 8, 9] for text in (*prefixed.slots, *prefixed.own_cache))
    for capacity in range(5, 20):  # a context that is nearly full, and an answer of one token
        small_ones = check_texts([[7, 8, 9, *prompt] for prompt in prompts()], capacity, [7, 8, 9])
        for text in (*small_ones.slots, *small_ones.own_cache):
            assert 4 <= len(text.prompt) <= len(text.tokens) <= capacity
    with pytest.raises(UserError, match="room for 4 tokens"):
        check_texts([[7, 8, 9, 1]], 4, [7, 8, 9])


def test_correct_model_is_decoded_in_slots() -> None:
    choice = chosen(sharpened(LlamaForCausalLM(config())))
    assert choice.name == "slots" and choice.reason == "" and choice.dtype == "fp32"
    assert 0 < choice.difference < 1e-5 and choice.tolerance == 1e-4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fault", "uses_cache", "uses_batch"),
    [
        (LastPositionShifted, False, True),
        (SeesThePreviousToken, False, True),
        (SeesItsNeighbours, True, False),
    ],
)
def test_injected_fault_is_detected(
    fault: Callable[..., LlamaForCausalLM], uses_cache: bool, uses_batch: bool
) -> None:
    """The slot backend is rejected; the cache is used as far as it is correct."""
    model = sharpened(fault(config()))
    if fault is not SeesItsNeighbours:  # a row of slots is one row
        with pytest.raises(UserError, match=r"the model cannot be decoded in slots: its logits differ.*auto"):
            chosen(model, "slots")
        choice = chosen(model)
        assert choice.name == "transformers" and "in slots its logits differ" in choice.reason
    choice = chosen(model, "transformers")
    assert choice.reason == "" and choice.difference < 1e-4  # type: ignore[operator]
    assert (choice.cache_use.cache, choice.cache_use.batch) == (uses_cache, uses_batch)


class KeepsTheFirstRows(LlamaForCausalLM):
    """Has a cache that keeps its first rows instead of the selected ones."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        outputs = super().forward(*arguments, **others)
        cache = outputs.past_key_values
        if cache is not None:
            for layer in cache.layers:
                layer.batch_select_indices = functools.partial(self._keep, layer)
        return outputs

    @staticmethod
    def _keep(layer: Any, indices: torch.Tensor) -> None:
        layer.keys, layer.values = layer.keys[: len(indices)], layer.values[: len(indices)]


class MixesManyRows(LlamaForCausalLM):
    """Mixes the rows of batches with more than two rows."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        if len(embedded) > 2:
            embedded = embedded + 0.3 * embedded.roll(1, 0)
        return super().forward(inputs_embeds=embedded, **others)


def test_cache_that_keeps_the_wrong_rows_is_detected() -> None:
    choice = chosen(sharpened(KeepsTheFirstRows(config())), "transformers")
    assert choice.cache_use.batch and not choice.cache_use.select


def test_leak_between_many_rows_is_detected() -> None:
    choice = chosen(sharpened(MixesManyRows(config())), "transformers")
    assert not choice.cache_use.batch


def test_nothing_depends_on_a_padding_mask() -> None:
    choice = chosen(sharpened(IgnoresMasks(config())), "transformers")
    assert choice.cache_use.batch and choice.cache_use.cache


def test_dropped_sinks_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharpened(AutoModelForCausalLM.from_config(small("gpt_oss"), dtype=torch.float32))
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.data.fill_(2.0)
    assert chosen(model).name == "slots"
    monkeypatch.setattr(attention_of_ours, "uses_sdpa", lambda model: True)  # plain SDPA ignores sinks
    choice = chosen(model)
    assert choice.name == "transformers" and "in slots" in choice.reason
    with pytest.raises(UserError, match="cannot be decoded in slots"):
        chosen(model, "slots")


def test_model_without_a_correct_backend_is_rejected() -> None:
    with pytest.raises(
        UserError, match=r"the model \(NeverTheSame\) cannot be evaluated: .*choose another model"
    ):
        chosen(sharpened(NeverTheSame(config())))
    broken = sharpened(LlamaForCausalLM(config()))
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    for requested in ("auto", "slots", "transformers"):
        with pytest.raises(UserError, match="weights hold NaN"):
            chosen(broken, requested)


def test_mixture_of_experts_is_not_rejected_for_rounding() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(
            small("mixtral", hidden_size=256, intermediate_size=512, num_local_experts=16, head_dim=64)
        )
        assert chosen(model.eval(), "slots").name == "slots"


def test_bf16_is_compared_in_fp32_and_in_bf16() -> None:
    model = sharpened(LlamaForCausalLM(config())).to(torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    choice = chosen(model)
    assert (choice.name, choice.dtype) == ("slots", "fp32") and choice.difference < 1e-4  # type: ignore[operator]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.bfloat16
    faulty = sharpened(WrongIn16Bits(config())).to(torch.bfloat16)
    with pytest.raises(UserError, match="cannot be decoded in slots"):
        chosen(faulty, "slots")


def test_model_is_restored() -> None:
    model = sharpened(LlamaForCausalLM(config())).train()
    model.set_attn_implementation("eager")
    chosen(model)
    assert model.training and model.config._attn_implementation == "eager"
    model.set_attn_implementation("slots")
    with default_attention(model):
        assert model.config._attn_implementation == "sdpa" and not model.training
    assert model.training and model.config._attn_implementation == "slots"


def test_plain_logits_do_not_depend_on_later_tokens() -> None:
    model = sharpened(LlamaForCausalLM(config()))
    text = texts().slots[0]
    found = plain_logits(model, text)
    for row, at in zip(found, text.choices, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text.tokens[: at + 1]])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
