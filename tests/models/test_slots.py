"""Batches over slots, variable-length attention over the chunks of a pass, and shapes of CUDA graphs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.models import packed_attention, slot_attention
from trainer.models.cuda_graphs import GraphShape, shape_for
from trainer.models.kv_cache import ForwardBatch, KVCache, prepare_prefill
from trainer.models.slot_attention import last_token_logits, use_slot_attention

LAYERS = 2


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def varlen_attention_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: torch.Tensor,
    longest: int,
    key_bounds: torch.Tensor,
    longest_key: int,
) -> torch.Tensor:
    """Reference for `varlen_attention`, which torch has on GPUs only; the last query is aligned with the last key."""
    outputs = []
    for (start, stop), (first, end) in zip(
        pairwise(bounds.tolist()), pairwise(key_bounds.tolist()), strict=True
    ):
        num_queries, num_keys = stop - start, end - first
        assert 0 < num_queries <= longest and num_queries <= num_keys <= longest_key
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril_(num_keys - num_queries)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end],
                attn_mask=visible, scale=scaling, enable_gqa=True,
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2)


def run_passes(model: LlamaForCausalLM, cache: KVCache) -> list[torch.Tensor]:
    """Return the logits of passes with prompts, then chunks that continue them, beside single tokens and a parked slot."""
    passes = [
        ([0, 1, 2], [0, 0, 0], [[5, 6, 7, 8], [9] * 7, [3]]),
        ([0, 2, 3], [4, 1, 0], [[11, 12, 13], [14], [15, 16, 17, 18, 19]]),
        ([0, 1, 2, 3], [7, 7, 2, 5], [[21], [22, 23], [24] * 9, [25]]),
    ]
    logits = []
    with torch.no_grad(), use_slot_attention(model):
        for active, lengths, tokens in passes:
            batch: ForwardBatch = prepare_prefill(
                cache, active, lengths, tokens, torch.float32, torch.device("cpu")
            )
            logits.append(last_token_logits(model, batch))
    return logits


def test_one_call_for_all_chunks_equals_one_call_per_chunk(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_passes(llama, KVCache(4, 32))
    cu_seqlens = []

    def recorded(*arguments: torch.Tensor) -> torch.Tensor:
        cu_seqlens.append(arguments[4])
        return varlen_attention_on_cpu(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(slot_attention, "has_kernel", lambda query, value: True)
    monkeypatch.setattr(slot_attention, "varlen_attention", recorded)
    found = run_passes(llama, KVCache(4, 32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [lengths.tolist() for lengths in cu_seqlens] == [
        *[[0, 3, 9]] * LAYERS, *[[0, 2, 6]] * LAYERS, *[[0, 1, 9]] * LAYERS
    ]  # fmt: skip
    assert len({lengths.data_ptr() for lengths in cu_seqlens[:LAYERS]}) == 1, "shared by all layers"


def test_varlen_attention_takes_more_keys_than_queries() -> None:
    """Checks shapes and keyword arguments only: torch has no such kernel for a CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(1, 4, 10, 16), torch.empty(1, 2, 25, 16)
        bounds = torch.empty(3, dtype=torch.int32)
        out = packed_attention.varlen_attention(
            query, key, key, None, bounds, 6, torch.empty_like(bounds), 13
        )
    assert out.shape == (1, 10, 4, 16)


def test_graph_shapes_are_of_all_slots_or_a_half_or_a_quarter_of_them() -> None:
    assert [shape_for(occupied, 256, 1, 600).num_slots for occupied in (256, 129, 128, 65, 9, 8, 1)] == [
        256, 256, 128, 128, 16, 8, 8
    ]  # fmt: skip
    assert [shape_for(occupied, 100, 1, 600).num_slots for occupied in (100, 51, 50, 13, 12, 1)] == [
        100, 100, 50, 25, 12, 12
    ]  # fmt: skip
    assert [shape_for(1, 1, longest, 600) for longest in (1, 128, 129, 513, 600)] == [
        (1, 128), (1, 128), (1, 256), (1, 600), (1, 600)
    ]  # fmt: skip
    assert GraphShape(16, 256).covers(GraphShape(16, 256)) and GraphShape(16, 256).covers(GraphShape(8, 128))
    assert not GraphShape(16, 128).covers(GraphShape(8, 256)) and not GraphShape(8, 256).covers(
        GraphShape(16, 128)
    )
