"""Print the peak resident memory of a real forward and backward pass per architecture, next to the trace (JSON)."""

from __future__ import annotations

import gc
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models import packed_attention, training_kernels
from trainer.planning.activations import make_packed_batch, trace_activations
from trainer.training.loss import summed_token_loss

LENGTHS, LEARNED = [96] * 5 + [32], 200
COMMON = {
    "num_hidden_layers": 3, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024, "vocab_size": 6000,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_embd": 384, "n_head": 6, "vocab_size": 6000},
    "gpt_neox": COMMON,
    "llama": {**COMMON, "num_key_value_heads": 2},
    "qwen2": {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**COMMON, "num_key_value_heads": 2, "head_dim": 64},
    "mistral": {**COMMON, "num_key_value_heads": 2, "sliding_window": None},
}


def resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def peak(config: Any, checkpointing: bool) -> int:
    """Return the peak bytes added by the third pass (the first passes fill caches of kernels)."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packed_attention.register()).train()
    training_kernels.patch_kernels(model, on_accelerator=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    batch = make_packed_batch(LENGTHS, LEARNED)
    for _ in range(3):
        gc.collect()
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # reset VmHWM
        summed_token_loss(model, batch).backward()
        found = resident("VmHWM") - before
    return found


def main() -> None:
    torch.set_num_threads(1)
    result = {}
    for kind, shape in SHAPES.items():
        config = AutoConfig.for_model(kind, **shape)
        config.use_cache = False
        for checkpointing in (False, True) if kind in ("gpt2", "llama") else (False,):
            planned = trace_activations(
                config, LENGTHS, LEARNED, torch.float32, checkpointing, cuda=False
            ).peak_bytes
            result[f"{kind} {checkpointing}"] = [planned, peak(config, checkpointing)]
    print("RESULT " + json.dumps(result))


main()
