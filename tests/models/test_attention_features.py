"""Packed and slot attention against the model's own forward pass, for attention that is not plainly causal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer.models import packed_attention
from trainer.models.default_attention import UnsupportedAttention, set_attention
from trainer.models.kv_cache import KVCache, prepare_prefill
from trainer.models.slot_attention import last_token_logits, use_slot_attention
from trainer.training.batches import MicroBatch
from trainer.training.loss import collate, summed_token_loss

VOCABULARY = 200
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
SHARED = {
    "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("mistral", {"sliding_window": 8}),
    "window in some layers": ("gemma3_text", GEMMA),
    "chunks": ("llama4_text", {"head_dim": 16, "attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 4}),
    "soft caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "sinks": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "values of another size": ("deepseek_v3", LATENT),
    "attention twice a layer": ("diffllama", {}),
    "shared keys and values": ("gemma4_text", SHARED),
    "layers that drop keyword arguments": ("stablelm", {}),
    "ALiBi (BLOOM)": ("bloom", {"n_head": 4, "n_layer": 2}),
    "ALiBi (MPT)": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "ALiBi (Falcon)": ("falcon", {"alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "one key for all queries": ("falcon", {"alibi": False, "multi_query": True, "new_decoder_architecture": False}),
}  # fmt: skip


def build_model(name: str, attention: str | None = None) -> PreTrainedModel:
    model_type, settings = FEATURES[name]
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def texts() -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(1, VOCABULARY, n) for n in (29, 5, 18)]


@pytest.mark.parametrize("name", FEATURES)
def test_loss_and_gradient_of_a_pack_are_those_of_the_plain_model(name: str) -> None:
    plain, packed = build_model(name), build_model(name)
    set_attention(packed, packed_attention.register())
    total = 0.0
    for text in texts():
        tokens = torch.from_numpy(text)
        logits = plain(input_ids=tokens[None], use_cache=False).logits[0]
        loss = cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    batch = MicroBatch(0, [], [(text, np.ones(len(text), bool)) for text in texts()])
    loss = summed_token_loss(packed, collate(batch, True, CPU))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    parameters = zip(plain.parameters(), packed.parameters(), strict=True)
    pairs = [(want.grad, got.grad) for want, got in parameters if want.grad is not None]
    norm = float(sum(want.square().sum() for want, _ in pairs)) ** 0.5
    assert float(sum((got - want).square().sum() for want, got in pairs)) ** 0.5 < 1e-5 * norm


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_logits_in_slots_are_those_of_the_plain_model(name: str) -> None:
    model, cache = build_model(name), KVCache(4, 40)
    # Slot 1 is parked. A pass reads one token, a whole prompt or several tokens of a slot.
    slots, given = [0, 2, 3], [list(map(int, text)) for text in texts()]
    cuts = [(0, 7, 8, 20, 29), (0, 2, 3, 4, 5), (0, 12, 15, 16, 18)]
    for step in range(4):
        new = [text[cut[step] : cut[step + 1]] for text, cut in zip(given, cuts, strict=True)]
        with use_slot_attention(model):
            batch = prepare_prefill(cache, slots, [cut[step] for cut in cuts], new, torch.float32, CPU)
            logits = last_token_logits(model, batch)
        for row, text, cut in zip(logits, given, cuts, strict=True):
            want = model(input_ids=torch.tensor([text[: cut[step + 1]]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, want, atol=2e-4 * float(want.std()), rtol=0)


def test_layers_that_pass_another_mask_raise_an_error() -> None:
    query = torch.zeros(1, 2, 8, 4)
    with pytest.raises(UnsupportedAttention, match="do not pass the attention mask on"):
        packed_attention.attend(torch.nn.Module(), query, query, query, torch.zeros(1, 1, 8, 8))
