"""The training loop: optimizer steps, metrics, validation, checkpoints and stop requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import UserError
from trainer.runtime import distributed, startup, terminal
from trainer.runtime.distributed import DistributedEnvironment
from trainer.runtime.malloc import HeapLimit
from trainer.runtime.stop_request import StopRequest
from trainer.settings import TrainSettings
from trainer.storage.configuration import to_dict
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, throughput
from trainer.training.layout_selection import report_layout
from trainer.training.layouts import passes_of_step, split_into_batches
from trainer.training.loss import summed_token_loss
from trainer.training.metrics_log import MetricsLog
from trainer.training.setup import TrainState, setup_training
from trainer.training.watchdog import Watchdog, run_guard

# Collective. Returns the values to log, or None if a stop request interrupted it.
ValidationCallback = Callable[[TrainState, StopRequest], dict[str, Any] | None]


def train(
    settings: TrainSettings, evaluate: ValidationCallback | None = None, stop: StopRequest | None = None
) -> bool:
    """Train until the last step of the plan, from the newest valid checkpoint if there is one. Collective.

    `evaluate` is called every `eval_steps` steps. Returns True if the run is finished, False if it saved a checkpoint
    and stopped on request. Raises UserError on every rank.
    """
    stop = stop or StopRequest()
    stop.install_signal_handlers()
    environment = distributed.initialize(settings.timeout_seconds)
    # Paths of the shards may differ between nodes; `setup_training` compares their content.
    same = {key: value for key, value in to_dict(settings).items() if not key.endswith("_shards")}
    distributed.assert_same_on_all_ranks("settings", same)
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
        terminal.info(f"{run.path}: already finished")
        return True
    log_run_header(state)
    startup.freeze_gc()
    log = MetricsLog(run, settings, state.facts)
    plan, step = state.batch_plan, state.first_step
    watchdog.report_step(step)
    stop.defer_signals()
    distributed.barrier()  # from here on, stopping is a collective decision
    limit_heap = HeapLimit()
    with terminal.progress_bar("train", plan.total_steps, step) as bar:
        # An interrupted validation of the first step is repeated.
        stopping = not validate_if_due(state, step, evaluate, log, stop)
        while step < plan.total_steps and not stopping:
            metrics, stopping = optimizer_step(state, step, stop)
            step += 1
            watchdog.report_step(step)
            stop.record_duration(step=metrics["seconds"])
            limit_heap()
            log.write({"step": step, "total_steps": plan.total_steps, **metrics})
            bar.update(step, f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s")
            stopping = stopping or not validate_if_due(state, step, evaluate, log, stop)
            if stopping or step == plan.total_steps or every(step, settings.save_steps):
                watchdog.check_lock()
                save(state, step, stop)
                stopping = stopping or stop.should_stop_on_any_rank()  # saving takes long
    reason = stop.reason or "another rank was asked to stop"
    stop.ignore_signals()
    finished = step == plan.total_steps
    log.close(finished)
    progress = f"step {step}/{plan.total_steps}"
    if finished:
        terminal.info(f"{run.path}: finished at {progress}")
    else:
        terminal.info(f"{run.path}: stopped as asked ({reason}) at {progress}, start it again to resume")
    distributed.barrier()  # the launcher kills the other ranks when one exits: all must have closed their files
    return finished


def every(step: int, interval: int) -> bool:
    """Return whether something done every `interval` steps (0: never) is due after `step` steps."""
    return interval > 0 and step > 0 and step % interval == 0


def validate_if_due(
    state: TrainState, step: int, evaluate: ValidationCallback | None, log: MetricsLog, stop: StopRequest
) -> bool:
    """Collective. Run and log the validation of this step if it is due and not logged yet.

    Returns False if a stop request interrupted it.
    """
    if evaluate is None or not every(step, state.settings.eval_steps):
        return True
    if distributed.broadcast_object(step in log.evaluated_steps):
        return True
    result = evaluate(state, stop)
    if result is not None:
        log.write({"step": step, "evaluation": result})
    return result is not None


def optimizer_step(state: TrainState, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
    """Do optimizer step `step` (counted from 0): forward and backward of every micro-batch, one update. Collective.

    Returns the metrics to log, and whether any rank was asked to stop.
    """
    start = time.perf_counter()
    engine, plan, data, environment = state.engine, state.batch_plan, state.data, state.environment
    first, end = plan.packs(step)
    num_targets = data.num_target_tokens(first, end)
    learning_rate = learning_rate_of_step(state.settings, step, plan.total_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate

    loss_sum = torch.zeros((), dtype=torch.float64, device=state.device)
    problem_indices: list[int] = []
    num_passes = passes_of_step(data, plan, step, state.layout.arrangement)
    for micro, packs in enumerate(plan.micro_batches(step, environment.rank)):
        batch = data.micro_batch(packs, end)
        problem_indices += batch.problem_indices
        seed_dropout(state.settings.seed, batch.first_pack)
        passes = split_into_batches(batch, state.layout, state.device, num_passes[micro])
        for number, rows in enumerate(passes):
            is_last = (micro + 1, number + 1) == (plan.accumulation_steps, len(passes))
            engine.set_gradient_accumulation_boundary(is_last)  # a layout may need several passes
            losses = summed_token_loss(engine, rows)
            engine.backward(losses * (environment.world_size / num_targets), scale_wrt_gas=False)
            loss_sum += losses.detach()
            if not is_last:
                engine.step()  # only counts the pass

    loss, asked_to_stop = all_reduce_loss_and_stop(loss_sum, stop.is_requested, environment.world_size)
    check_finite(state, step, loss, float(loss_sum), problem_indices)
    grad_norm, skipped = global_grad_norm(engine), engine.skipped_steps
    if grad_norm is None or math.isfinite(grad_norm):
        engine.step()
        grad_norm = engine.get_global_grad_norm() if grad_norm is None else grad_norm
    if not math.isfinite(grad_norm) or engine.skipped_steps != skipped:
        ids = problem_ids(state, problem_indices)
        raise UserError(
            f"step {step + 1}: the gradient is not finite (the loss is {loss / num_targets}); {ids}"
        )
    seconds = time.perf_counter() - start
    num_tokens = data.num_tokens(first, end)
    metrics = {
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
    return metrics, asked_to_stop


def learning_rate_of_step(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0. It needs no state, so a checkpoint holds no scheduler.

    Linear warm-up to the peak, then constant, linear to 0, or half a cosine to 0 (transformers' definitions).
    """
    peak, kind = settings.learning_rate, settings.lr_scheduler_type
    warmup_steps = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def seed_dropout(seed: int, first_pack: int) -> None:
    """Seed dropout from the position in the data, so that it is the same after a resume and on any number of ranks."""
    torch.manual_seed((seed << 40) + first_pack)


def all_reduce_loss_and_stop(
    loss_sum: torch.Tensor, stop_requested: bool, world_size: int
) -> tuple[float, bool]:
    """Return the step's loss over all ranks, and whether any rank was asked to stop, in one small collective."""
    both = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop_requested))])
    if world_size > 1:
        dist.all_reduce(both)
    loss, stops = both.tolist()
    return loss, stops > 0


def check_finite(
    state: TrainState, step: int, loss: float, own_loss: float, problem_indices: list[int]
) -> None:
    """Raise UserError if the loss over all ranks is NaN or Inf, before the step (DeepSpeed would skip it silently).

    The message names the rank and its problems. Collective if the loss is not finite.
    """
    if math.isfinite(loss):
        return
    error = None
    if not math.isfinite(own_loss):
        ids = problem_ids(state, problem_indices)
        error = f"step {step + 1}: the loss on rank {state.environment.rank} is {own_loss}; {ids}"
    distributed.raise_on_all_ranks(error)
    raise UserError(f"step {step + 1}: the loss is {loss}, although it is finite on every rank")


def problem_ids(state: TrainState, indices: list[int]) -> str:
    return "problems of this rank: " + ", ".join(state.shards.problem(index).id for index in indices[:20])


def global_grad_norm(engine: Any) -> float | None:
    """Return the gradient norm before clipping at ZeRO stage 0, where DeepSpeed does not store it, else None."""
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
    """Save the checkpoint of `step` steps and remove old ones. Collective."""
    start = time.perf_counter()
    _, packs_consumed = state.batch_plan.packs(step - 1)
    progress = {
        "step": step,
        "packs_consumed": packs_consumed,
        "finished": step == state.batch_plan.total_steps,
    }
    checkpoint.save(state.engine, state.run, step, {**state.facts, **progress}, state.run.model)
    checkpoint.prune(state.run, state.settings.save_total_limit)
    stop.record_duration(save=time.perf_counter() - start)


def log_run_header(state: TrainState) -> None:
    """Log model, method, ranks, data and layout of the run."""
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
            f"not trained on: {data.num_without_steps} problems without the steps {facts['method']} needs, "
            f"{data.num_too_long} longer than a pack"
        )
    report_layout(state.layout_choice)
