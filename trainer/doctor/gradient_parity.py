"""Does the installed DeepSpeed give the gradients of plain PyTorch? A tiny tied-weight model, every ZeRO stage.

Gradient parity between stages was silently broken in several DeepSpeed releases. Each rank computes two micro-batches
in a DeepSpeed engine; each rank also computes everybody's micro-batches without DeepSpeed, in fp32 master weights with
torch's AdamW. Gradients, and the loss after one step, must agree.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.runtime import distributed, startup

_MICRO_BATCHES = 2
_TOKENS = 24
_VOCABULARY = 61
_LEARNING_RATE = 3e-3
# Largest distance of two gradients (norm of the difference over norm), and of the two losses after the step (part).
_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 3e-3)}
# bf16 at stage 0 is known to be wrong in DeepSpeed 0.19.8; training refuses it (training/ds_config.py).
_KNOWN_WRONG = {(0, torch.bfloat16)}


@dataclass(frozen=True)
class ParityCase:
    stage: int
    dtype: torch.dtype
    checkpointing: bool

    @property
    def name(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"ZeRO {self.stage} {dtype}" + (", recomputed" if self.checkpointing else "")


def cases() -> list[ParityCase]:
    """fp32 in stages 0 to 3, bf16 in 1 to 3 (and 0, which is known to be wrong), both with and without recomputation."""
    every = [
        ParityCase(stage, dtype, checkpointing)
        for dtype in (torch.float32, torch.bfloat16)
        for stage in range(4)
        for checkpointing in (False, True)
    ]
    return [
        case
        for case in every
        if not (case.stage == 0 and case.dtype == torch.bfloat16 and case.checkpointing)
    ]


def check_gradients() -> list[CheckResult]:
    """Collective, after `distributed.initialize`; the same findings on every rank."""
    return [_check(case) for case in cases()]


def _check(case: ParityCase) -> CheckResult:
    known = (case.stage, case.dtype) in _KNOWN_WRONG
    remedy = "do not train with this DeepSpeed: pip install the version of constraints.txt"
    try:
        gradient, loss = _compare(case)
        error = None
    except Exception as failure:  # a broken installation fails in every way there is; say which
        gradient = loss = math.inf
        error = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    told = [text for text in distributed.gather_objects(error) if text]
    if told:
        return CheckResult("parity", case.name, WARN if known else FAIL, told[0], remedy)
    worst = max(distributed.gather_objects((gradient, loss)))
    most_gradient, most_loss = _TOLERANCE[case.dtype]
    detail = f"gradient off by {worst[0]:.1e}, loss after a step by {worst[1]:.1e}"
    if worst[0] <= most_gradient and worst[1] <= most_loss:
        return CheckResult("parity", case.name, OK, detail)
    if known:
        return CheckResult(
            "parity", case.name, OK, f"{detail}: known in DeepSpeed 0.19.8, training refuses it"
        )
    return CheckResult(
        "parity", case.name, FAIL, f"{detail}; allowed: {most_gradient:.0e} and {most_loss:.0e}", remedy
    )


def _compare(case: ParityCase) -> tuple[float, float]:
    """(distance of the gradients, of the losses after the step), both in parts."""
    world = distributed.environment()
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    first = _model()
    batches = [
        [_tokens(rank, micro).to(device) for micro in range(_MICRO_BATCHES)]
        for rank in range(world.world_size)
    ]
    wanted, wanted_loss = _plain(copy.deepcopy(first).to(device), batches, case.dtype)
    engine = _engine(copy.deepcopy(first), case, world.world_size)
    found, found_loss = _with_engine(engine, batches, world.rank)
    difference = math.sqrt(sum(float((found[name] - wanted[name]).double().pow(2).sum()) for name in wanted))
    norm = math.sqrt(sum(float(value.double().pow(2).sum()) for value in wanted.values()))
    return difference / norm, abs(found_loss - wanted_loss) / wanted_loss


def _model() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCABULARY, n_layer=2, n_embd=32, n_head=2, n_positions=_TOKENS, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def _tokens(rank: int, micro: int) -> torch.Tensor:
    """[1, tokens] int64; ranks have different numbers of tokens, as in training."""
    random = torch.Generator().manual_seed(rank * _MICRO_BATCHES + micro)
    return torch.randint(_VOCABULARY, (1, _TOKENS - 3 * ((rank + micro) % 4)), generator=random)


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses."""
    logits = model(input_ids=tokens).logits[0, :-1].float()
    return cross_entropy(logits, tokens[0, 1:], reduction="sum")


def _plain(
    model: torch.nn.Module, batches: list[list[torch.Tensor]], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients by name (fp32) and the loss after one step, without DeepSpeed."""
    masters = {name: parameter.detach().clone().float() for name, parameter in model.named_parameters()}
    model.to(dtype)
    everything = [tokens for rank in batches for tokens in rank]
    total = sum(tokens.shape[1] - 1 for tokens in everything)
    gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
    for tokens in everything:
        model.zero_grad()
        (_loss(model, tokens) / total).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] += parameter.grad.float()
    for name, master in masters.items():
        master.grad = gradients[name].clone()
    torch.optim.AdamW(masters.values(), lr=_LEARNING_RATE, weight_decay=0.0).step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name])
        after = sum(float(_loss(model, tokens)) for tokens in everything) / total
    return gradients, after


def _engine(model: Any, case: ParityCase, world_size: int) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled here
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zero: dict[str, Any] = {
        "stage": case.stage,
        "reduce_bucket_size": 10_000,
        "allgather_bucket_size": 10_000,
    }
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 100
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": _MICRO_BATCHES,
        "train_batch_size": _MICRO_BATCHES * world_size,
        "bf16": {"enabled": case.dtype == torch.bfloat16},
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": _LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True, "fused": True},
        },
        "steps_per_print": 1 << 30,
    }
    with startup.torch_compile_disabled():
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.train()
    return engine


def _with_engine(
    engine: Any, batches: list[list[torch.Tensor]], rank: int
) -> tuple[dict[str, torch.Tensor], float]:
    """The same numbers as `_plain`, with the loss of a step as training computes it."""
    from deepspeed.utils import safe_get_full_grad

    total = sum(tokens.shape[1] - 1 for each in batches for tokens in each)
    gradients: dict[str, torch.Tensor] = {}
    for micro, tokens in enumerate(batches[rank]):
        engine.backward(_loss(engine, tokens) * (len(batches) / total), scale_wrt_gas=False)
        if micro + 1 == len(batches[rank]):
            for name, parameter in engine.module.named_parameters():
                found = safe_get_full_grad(parameter)
                if found is None:
                    raise RuntimeError(f"DeepSpeed has no gradient for {name}")
                gradients[name] = found.detach().float().clone()
        engine.step()
    with torch.no_grad():
        own = sum(float(_loss(engine, tokens)) for tokens in batches[rank])
    after = sum(distributed.gather_objects(own)) / total
    engine.destroy()
    return gradients, after
