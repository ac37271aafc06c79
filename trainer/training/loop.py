"""The training loop: optimizer steps, metrics, validation, checkpoints and stop requests."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import UserError
from trainer.models import load
from trainer.runtime import distributed, startup, terminal
from trainer.runtime.distributed import DistributedEnvironment
from trainer.runtime.malloc import HeapLimit
from trainer.runtime.stop_request import INTERRUPT, StopRequest
from trainer.settings import TrainSettings
from trainer.storage.manifest import CheckpointFacts, StepMetrics, ValidationResult
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, throughput
from trainer.training.layout_selection import report_layout
from trainer.training.layouts import passes_of_step, split_into_batches
from trainer.training.loss import summed_token_loss
from trainer.training.metrics_log import MetricsLog, result_text
from trainer.training.setup import TrainState, setup_training
from trainer.training.watchdog import Watchdog, run_guard

# Collective function that returns the values to log, or None if a stop request interrupted the validation.
ValidationCallback = Callable[[TrainState, StopRequest], ValidationResult | None]


def train(
    settings: TrainSettings, evaluate: ValidationCallback | None = None, stop: StopRequest | None = None
) -> bool:
    """Collective. Train until the last step of the batch plan, or until a stop request.

    If the settings select a checkpoint, training resumes from this checkpoint. `evaluate` is called every `eval_steps`
    steps. Returns True if the run is finished, and False if a stop request (signal, time limit, end of the launcher) has
    ended the training. Errors such as a loss that is not finite raise UserError on every rank.
    """
    stop = stop or StopRequest()
    stop.install_signal_handlers()
    environment = distributed.initialize(settings.timeout_seconds)
    # Paths of the shards may differ between nodes; `setup_training` compares the content of the shards.
    common_settings = {key: value for key, value in asdict(settings).items() if not key.endswith("_shards")}
    distributed.assert_same_on_all_ranks("settings", common_settings)
    run = RunDirectory(Path(settings.output_dir))
    with run_guard(run, settings) as watchdog:
        try:
            return _train(settings, environment, run, evaluate, stop, watchdog)
        except Exception as error:
            if not (stop.is_requested and distributed.is_communication_failure(error)):
                raise
            terminal.info(
                f"{run.path}: stopped as asked ({stop.reason}) while other ranks ended; saved checkpoints are intact"
            )
            return False


def _train(
    settings: TrainSettings,
    environment: DistributedEnvironment,
    run: RunDirectory,
    evaluate: ValidationCallback | None,
    stop: StopRequest,
    watchdog: Watchdog,
) -> bool:
    state = setup_training(settings, environment, run, stop)
    if state is None:
        if distributed.is_main_process():
            terminal.info(f"{run.path}: already finished: {result_text(run.metrics)}")
        return True
    log_run_header(state)
    startup.freeze_gc()
    log = MetricsLog(run, settings, state.facts, stop.started)
    plan, step = state.batch_plan, state.first_step
    watchdog.report_step(step)
    stop.defer_signals()
    distributed.barrier()  # now every rank defers signals, so a stop request ends all ranks after the same step
    limit_heap = HeapLimit()
    with terminal.progress_bar("train", plan.total_steps, step) as bar:
        # If a stop request interrupted the validation of the last saved step, run this validation again.
        stopping = not validate_if_due(state, step, evaluate, log, stop)
        while step < plan.total_steps and not stopping:
            metrics, stopping = optimizer_step(state, step, stop)
            step += 1
            watchdog.report_step(step)
            stop.record_duration(step=metrics["seconds"])
            limit_heap()
            log.write_step(metrics)
            bar.update(step, f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s")
            stopping = stopping or not validate_if_due(state, step, evaluate, log, stop)
            if stopping or step == plan.total_steps or every(step, settings.save_steps):
                watchdog.check_lock()
                save(state, step, stop)
                stopping = stopping or stop.should_stop_on_any_rank()  # a request may arrive during the save
    reason = stop.reason or "another rank was asked to stop"
    stop.ignore_signals()
    finished = step == plan.total_steps
    log.close(finished)
    if distributed.is_main_process():
        _print_outcome(
            run, f"step {step}/{plan.total_steps}", step, log.run_seconds(), "" if finished else reason
        )
    distributed.barrier()  # the launcher kills all ranks when one rank exits, so all ranks must have closed their files
    return finished


def _print_outcome(run: RunDirectory, position: str, step: int, run_seconds: float, stop_reason: str) -> None:
    if not stop_reason:
        result = result_text(run.metrics, run_seconds)
        terminal.info(f"{run.path}: finished at {position}: {result}; {run.checkpoint(step)}")
        return
    outcome = "interrupted" if stop_reason == INTERRUPT else f"stopped as asked ({stop_reason})"
    remedy = f"checkpoint of step {step} saved; run the same command to resume"
    terminal.info(f"{run.path}: {outcome} at {position}; {remedy}")


def every(step: int, interval: int) -> bool:
    """Return whether `step` is a positive multiple of `interval`; False if `interval` is 0."""
    return interval > 0 and step > 0 and step % interval == 0


def validate_if_due(
    state: TrainState, step: int, evaluate: ValidationCallback | None, log: MetricsLog, stop: StopRequest
) -> bool:
    """Collective. Run and log the validation after `step` steps if it is due and not yet logged.

    Returns False if a stop request interrupted the validation, else True.
    """
    if evaluate is None or not every(step, state.settings.eval_steps):
        return True
    if distributed.broadcast_object(step in log.evaluated_steps):
        return True
    result = evaluate(state, stop)
    if result is not None:
        log.write({"step": step, "evaluation": result})
    return result is not None


def optimizer_step(state: TrainState, step: int, stop: StopRequest) -> tuple[StepMetrics, bool]:
    """Collective. Run the forward and backward passes of every micro-batch, then one optimizer update.

    `step` is counted from 0. Returns the metrics to log, and whether any rank was asked to stop.
    """
    start = time.perf_counter()
    engine, plan, data, environment = state.engine, state.batch_plan, state.data, state.environment
    first, end = plan.pack_range(step)
    num_targets = data.num_target_tokens(first, end)
    learning_rate = learning_rate_of_step(state.settings, step, plan.total_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate

    loss_sum = torch.zeros((), dtype=torch.float64, device=load.local_device())
    problem_indices: list[int] = []
    num_passes = passes_of_step(data, plan, step, state.layout_choice.layout.arrangement)
    for micro, packs in enumerate(plan.micro_batches(step, environment.rank)):
        batch = data.micro_batch(packs, end)
        problem_indices += batch.problem_indices
        seed_dropout(state.settings.seed, batch.first_pack)
        passes = split_into_batches(batch, state.layout_choice.layout, load.local_device(), num_passes[micro])
        for number, rows in enumerate(passes):
            is_last = (micro + 1, number + 1) == (plan.accumulation_steps, len(passes))
            engine.set_gradient_accumulation_boundary(is_last)  # the default is a fixed number of passes
            losses = summed_token_loss(engine, rows)
            engine.backward(losses * (environment.world_size / num_targets), scale_wrt_gas=False)
            loss_sum += losses.detach()
            if not is_last:
                engine.step()  # before the last pass, this call only increments counters

    loss, is_stopping = all_reduce_loss_and_stop(loss_sum, stop.is_requested, environment.world_size)
    check_finite(state, step, loss, float(loss_sum), problem_indices)
    grad_norm, skipped = global_grad_norm(engine), engine.skipped_steps
    if grad_norm is None or math.isfinite(grad_norm):
        engine.step()
        grad_norm = engine.get_global_grad_norm() if grad_norm is None else grad_norm
    if not math.isfinite(grad_norm) or engine.skipped_steps != skipped:
        ids = problem_ids(state, problem_indices)
        mean_loss = loss / num_targets
        raise UserError(f"step {step + 1}: the gradient is not finite (the loss is {mean_loss}); {ids}")
    seconds, num_tokens = time.perf_counter() - start, data.num_tokens(first, end)
    metrics: StepMetrics = {
        "step": step + 1,
        "total_steps": plan.total_steps,
        "epoch": end / data.packs_per_epoch,
        "loss": loss / num_targets,
        "learned_tokens": num_targets,
        "tokens": num_tokens,
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm),
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "mfu": model_flops_utilization(state, num_tokens / seconds, num_targets / num_tokens),
        "memory_bytes": throughput.peak_memory_bytes(),
        "packs_consumed": end,
    }
    return metrics, is_stopping


def learning_rate_of_step(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of a step. `step` is counted from 0.

    During the warm-up steps, the rate rises linearly from 0 to `settings.learning_rate`. Then it is constant, or it falls
    to 0, either linearly or as half a cosine wave.
    """
    warmup_steps = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup_steps:
        return settings.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}
    return settings.learning_rate * max(0.0, factors[settings.lr_scheduler_type])


def seed_dropout(seed: int, first_pack: int) -> None:
    """Seed dropout from the position in the data, so that resuming does not change the dropout.

    torch.manual_seed is not used, because without CUDA it takes 1 ms and keeps a stack trace of every call.
    """
    number = (seed << 40) + first_pack
    torch.default_generator.manual_seed(number)
    if load.local_device().type == "cuda":
        torch.cuda.manual_seed(number)


def all_reduce_loss_and_stop(
    loss_sum: torch.Tensor, stop_requested: bool, world_size: int
) -> tuple[float, bool]:
    """Collective. Return the sum of `loss_sum` over all ranks, and whether any rank was asked to stop."""
    both = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop_requested))])
    if world_size > 1:
        dist.all_reduce(both)
    loss, stops = both.tolist()
    return loss, stops > 0


def check_finite(
    state: TrainState, step: int, loss: float, rank_loss: float, problem_indices: list[int]
) -> None:
    """Collective. Raise UserError if `loss`, the sum over all ranks, is NaN or Inf.

    `rank_loss` and `problem_indices`: loss and problems of the calling rank. The message shows both for a rank whose loss is
    not finite. The check comes before the optimizer update, so that NaN does not get into the weights.
    """
    if math.isfinite(loss):
        return
    ids = problem_ids(state, problem_indices)
    error = f"step {step + 1}: the loss on rank {state.environment.rank} is {rank_loss}; {ids}"
    distributed.raise_on_all_ranks(None if math.isfinite(rank_loss) else error)
    raise UserError(f"step {step + 1}: the loss is {loss}, although the loss of every rank is finite")


def problem_ids(state: TrainState, indices: list[int]) -> str:
    return "problems of this rank: " + ", ".join(state.shards.problem(index).id for index in indices[:20])


def global_grad_norm(engine: Any) -> float | None:
    """Return the gradient norm at ZeRO stage 0, else None. At other stages, `engine.step` computes the norm."""
    if engine.zero_optimization():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def model_flops_utilization(
    state: TrainState, tokens_per_second: float, target_fraction: float
) -> float | None:
    peak = throughput.peak_flops(state.facts["dtype"])
    if peak is None:
        return None
    mean_length = state.data.tokens_per_epoch / state.data.num_examples
    num_parameters = state.facts["num_parameters"]
    flops = throughput.flops_per_token(num_parameters, state.config, mean_length, target_fraction)
    return tokens_per_second * flops / (peak * state.environment.world_size)


def save(state: TrainState, step: int, stop: StopRequest) -> None:
    """Collective. Save a checkpoint after `step` steps and remove old checkpoints."""
    start = time.perf_counter()
    _, packs_consumed = state.batch_plan.pack_range(step - 1)
    facts: CheckpointFacts = {
        **state.facts,
        "step": step,
        "packs_consumed": packs_consumed,
        "finished": step == state.batch_plan.total_steps,
    }
    checkpoint.save(state.engine, state.run, facts, state.run.model)
    checkpoint.prune(state.run, state.settings.save_total_limit)
    stop.record_duration(save=time.perf_counter() - start)


def log_run_header(state: TrainState) -> None:
    facts, plan, data = state.facts, state.batch_plan, state.data
    terminal.info(
        f"{state.run.path}: {facts['model_name']} ({facts['num_parameters']:,} parameters, {facts['dtype']}), "
        f"method {facts['method']}, ZeRO {facts['zero_stage']}, {state.environment.world_size} rank(s)"
    )
    terminal.info(
        f"  {data.num_examples} examples in {data.packs_per_epoch} packs an epoch, "
        f"{plan.packs_per_step} packs a step, {plan.total_steps} steps"
    )
    if data.num_without_steps or data.num_too_long:
        terminal.warning(
            f"not trained on: {data.num_without_steps} problems without the steps that {facts['method']} needs, "
            f"{data.num_too_long} problems longer than a pack"
        )
    report_layout(state.layout_choice)
