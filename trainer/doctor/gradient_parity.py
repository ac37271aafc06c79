"""Compare DeepSpeed's gradients with plain PyTorch's gradients at every ZeRO stage, on a tiny model with tied weights.

Several DeepSpeed releases computed wrong gradients at some stages without an error. Each rank computes its two
micro-batches in a DeepSpeed engine. Each rank also computes the micro-batches of all ranks without DeepSpeed, with fp32
master weights and torch's AdamW. The gradients of a step and the losses after the step must agree.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.doctor.check_result import FAIL, WARN, CheckResult, ok_if
from trainer.errors import first_line
from trainer.runtime import distributed, startup

_MICRO_BATCHES = 2
_TOKENS = 24
_VOCABULARY = 61
_LEARNING_RATE = 3e-3
# dtype -> (maximum relative difference of the gradients, maximum relative difference of the losses after a step)
_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 3e-3)}
# DeepSpeed 0.19.8 fails this check in bf16 at stage 0. Training refuses this combination (training/ds_config.py).
_KNOWN_WRONG = {(0, torch.bfloat16)}


class ParityCase(NamedTuple):
    stage: int
    dtype: torch.dtype
    checkpointing: bool

    @property
    def name(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"ZeRO {self.stage} {dtype}" + (", recomputed" if self.checkpointing else "")


def cases() -> list[ParityCase]:
    """Return the cases: each dtype and ZeRO stage without and (except `_KNOWN_WRONG`) with activation checkpointing."""
    return [
        ParityCase(stage, dtype, checkpointing)
        for dtype in (torch.float32, torch.bfloat16)
        for stage in range(4)
        for checkpointing in (False, True)
        if not (checkpointing and (stage, dtype) in _KNOWN_WRONG)
    ]


def check_gradients() -> list[CheckResult]:
    """Collective. Return one result per case, equal on all ranks. Must be called after `distributed.initialize`."""
    return [_check(case) for case in cases()]


def _check(case: ParityCase) -> CheckResult:
    is_known_wrong = (case.stage, case.dtype) in _KNOWN_WRONG
    remedy = "do not train with this DeepSpeed: pip install the version of constraints.txt"
    differences, error = (math.inf, math.inf), ""
    try:
        differences = _compare(case)
    except Exception as failure:  # a broken installation may raise anything
        error = f"{type(failure).__name__}: {first_line(failure)}"
    if errors := list(filter(None, distributed.gather_objects(error))):
        return CheckResult("parity", case.name, WARN if is_known_wrong else FAIL, errors[0], remedy)
    gradient, loss = map(max, zip(*distributed.gather_objects(differences), strict=True))
    max_gradient, max_loss = _TOLERANCE[case.dtype]
    detail = f"gradient off by {gradient:.1e}, loss after a step by {loss:.1e}"
    is_correct = gradient <= max_gradient and loss <= max_loss
    if not is_correct:
        allowed = f"; allowed: {max_gradient:.0e} and {max_loss:.0e}"
        detail += ": known in DeepSpeed 0.19.8, training refuses it" if is_known_wrong else allowed
    return ok_if(is_correct or is_known_wrong, "parity", case.name, detail, remedy, FAIL)


def _compare(case: ParityCase) -> tuple[float, float]:
    """Train a step with and without DeepSpeed. Return the relative differences of (gradients, losses after the step)."""
    environment = distributed.environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = [
        [_tokens(rank, micro).to(device) for micro in range(_MICRO_BATCHES)]
        for rank in range(environment.world_size)
    ]
    expected, expected_loss = _run_torch(_make_model().to(device), batches, case.dtype)
    engine = _make_engine(_make_model(), case, environment.world_size)
    gradients, loss = _run_deepspeed(engine, batches, environment.rank)
    difference, norm = (
        math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors))
        for tensors in ([gradients[name] - expected[name] for name in expected], expected.values())
    )
    return difference / norm, abs(loss - expected_loss) / expected_loss


def _make_model() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCABULARY, n_layer=2, n_embd=32, n_head=2, n_positions=_TOKENS, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def _tokens(rank: int, micro: int) -> torch.Tensor:
    """Return random tokens [1, length] int64. As in training, ranks have different numbers of tokens."""
    random = torch.Generator().manual_seed(rank * _MICRO_BATCHES + micro)
    return torch.randint(_VOCABULARY, (1, _TOKENS - 3 * ((rank + micro) % 4)), generator=random)


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits[0, :-1].float()
    return cross_entropy(logits, tokens[0, 1:], reduction="sum")


def _run_torch(
    model: torch.nn.Module, batches: list[list[Tensor]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Train one step in plain PyTorch. Return the gradients (fp32, by name) and the mean token loss after the step."""
    masters = {name: parameter.detach().clone().float() for name, parameter in model.named_parameters()}
    model.to(dtype)
    all_tokens = [tokens for rank_batches in batches for tokens in rank_batches]
    total = sum(tokens.shape[1] - 1 for tokens in all_tokens)
    gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
    for tokens in all_tokens:
        model.zero_grad()
        (_loss(model, tokens) / total).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] += parameter.grad.float()
    for name, master in masters.items():
        master.grad = gradients[name].clone()
    torch.optim.AdamW(masters.values(), lr=_LEARNING_RATE, weight_decay=0.0).step()
    model.load_state_dict(masters, strict=False)  # `masters` has only one of a tied weight's names
    with torch.no_grad():
        return gradients, sum(float(_loss(model, tokens)) for tokens in all_tokens) / total


def _make_engine(model: Any, case: ParityCase, world_size: int) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # prevents compilation of this extension
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zero = {"stage": case.stage, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 100
    adam = {"lr": _LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True, "fused": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": _MICRO_BATCHES,
        "train_batch_size": _MICRO_BATCHES * world_size,
        "bf16": {"enabled": case.dtype == torch.bfloat16},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 1 << 30,
    }
    with startup.torch_compile_disabled():
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.train()
    return engine


def _run_deepspeed(engine: Any, batches: list[list[Tensor]], rank: int) -> tuple[dict[str, Tensor], float]:
    """Train one step with DeepSpeed, with the loss scaling of a training run. Return the same values as `_run_torch`."""
    from deepspeed.utils import safe_get_full_grad

    total = sum(tokens.shape[1] - 1 for rank_batches in batches for tokens in rank_batches)
    gradients: dict[str, Tensor] = {}
    for micro, tokens in enumerate(batches[rank]):
        engine.backward(_loss(engine, tokens) * (len(batches) / total), scale_wrt_gas=False)
        if micro + 1 == len(batches[rank]):
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                if gradient is None:
                    raise RuntimeError(f"DeepSpeed has no gradient for {name}")
                gradients[name] = gradient.detach().float().clone()
        engine.step()
    with torch.no_grad():
        rank_loss = sum(float(_loss(engine, tokens)) for tokens in batches[rank])
    loss = sum(distributed.gather_objects(rank_loss)) / total
    engine.destroy()
    return gradients, loss
