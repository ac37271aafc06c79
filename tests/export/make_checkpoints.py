"""One rank of a real DeepSpeed training: write small checkpoints and their expected weights.

Run by tests/export/conftest.py once per world size, as plain processes with RANK, WORLD_SIZE and MASTER_* set:
`make_checkpoints.py OUTPUT_DIR CASES_JSON`. For each case it trains two steps, saves `OUTPUT_DIR/<name>/checkpoints/
step-000002` as training does, and `OUTPUT_DIR/<name>/masters.safetensors` with every parameter as
`safe_get_full_fp32_param` gathers it in the training processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Qwen2Config

from tests.models.families import family_of
from trainer.models import architecture
from trainer.runtime import startup
from trainer.storage import atomic_dir

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes

STEPS = 2
VOCABULARY = 97  # odd sizes, so that every kind of padding occurs


def model_of(case: dict[str, Any]) -> PreTrainedModel:
    if case.get("family"):
        return family_of(case["model"]).build().train()
    if case["model"] == "gpt2":
        config: Any = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    else:
        config = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=12, intermediate_size=23, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "ln_f" in name or "norm" in name:  # not all ones: a mix-up of two norms must be detected
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        if case.get("frozen") and ("wpe" in name or ".1." in name):
            parameter.requires_grad_(False)
    if case.get("buffer"):
        model.register_buffer("calibration", torch.arange(5) * 7)
        model.register_buffer("scale", torch.linspace(0, 1, 3, dtype=torch.float32))
    return model


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": case["stage"]},
        "bf16": {"enabled": case["dtype"] == "bf16"},
    }
    for key, value in case.get("ds_config", {}).items():
        config[key] = {**config.get(key, {}), **value}
    return config


def groups_of(model: PreTrainedModel, case: dict[str, Any]) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not case.get("groups"):
        return trained
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def gather_masters(engine: Any) -> dict[str, torch.Tensor]:
    """Return every full parameter: the fp32 master, else the model's tensor (collective)."""
    masters = {}
    for name, parameter in engine.module.named_parameters():
        full = None
        # With round-robin gradients DeepSpeed returns wrong values.
        if parameter.requires_grad and not engine.zero_round_robin_gradients():
            full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if full is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                full = parameter.detach().clone()
        masters[name] = full.detach().cpu().clone()
    masters.update({name: buffer.detach().cpu() for name, buffer in engine.module.named_buffers()
                    if name in engine.module.state_dict()})  # fmt: skip
    return masters


def make(case: dict[str, Any], output: Path, rank: int, world_size: int) -> None:
    model = model_of(case)
    config = model.config
    with startup.torch_compile_disabled():
        engine, *_ = deepspeed.initialize(
            model=model,
            config=config_of(case),
            model_parameters=groups_of(model, case),
            dist_init_required=False,
        )
    torch.manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, VOCABULARY, (2, 16))
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    masters = gather_masters(engine)
    final = output / case["name"] / "checkpoints" / f"step-{STEPS:06d}"
    staging = final.parent / "staging"
    engine.save_checkpoint(str(staging.parent), tag=staging.name, save_latest=False)
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in masters.items()},
                  output / case["name"] / "masters.safetensors")  # fmt: skip
        config.save_pretrained(staging / "model")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(staging / "model")
        if case["model"] != "gpt2":  # as training does; without it the export builds the model class
            architecture.record_architecture(staging / "model")
        (staging / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}\n')
        facts = {
            "step": STEPS, "packs_consumed": STEPS, "world_size": world_size, "zero_stage": case["stage"],
            "dtype": case["dtype"], "method": "socratic", "data": "stories", "model_name": case["model"], "seed": 0,
            "num_parameters": sum(tensor.numel() for tensor in masters.values()), "finished": True,
        }  # fmt: skip
        atomic_dir.publish(staging, final, "checkpoint", facts, atomic_dir.digest_files(staging))
    torch.distributed.barrier()
    engine.destroy()


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for case in cases:
        make(case, output, rank, world_size)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
