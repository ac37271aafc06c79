"""The training loop: step, log, evaluate, save; stop when asked."""

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
from trainer.training.layouts import forward_passes, passes_of_step
from trainer.training.loss import summed_token_loss
from trainer.training.metrics_log import MetricsLog
from trainer.training.setup import TrainState, setup_training
from trainer.training.watchdog import Watchdog, run_guard

# Called on every rank; returns what is logged, or None if it ended early because a stop was requested.
Evaluation = Callable[[TrainState, StopRequest], dict[str, Any] | None]


def train(
    settings: TrainSettings, evaluate: Evaluation | None = None, stop: StopRequest | None = None
) -> bool:
    """Train until the plan's last step, from the newest valid checkpoint if there is one.

    `evaluate` is called every `eval_steps` steps. Returns whether the run is finished; False if it was asked to stop,
    after saving a checkpoint. Raises UserError on every rank.
    """
    stop = stop or StopRequest()
    stop.install_signal_handlers()
    world = distributed.initialize(settings.timeout_seconds)
    # Nodes may have copies of the shards in other places; that they are the same shards is seen to later.
    same = {key: value for key, value in to_dict(settings).items() if not key.endswith("_shards")}
    distributed.assert_same_on_all_ranks("settings", same)
    run = RunDirectory(Path(settings.output_dir))
    with run_guard(run, settings) as watchdog:
        try:
            return _train(settings, world, run, evaluate, stop, watchdog)
        except Exception as error:
            if not (stop.is_requested and distributed.is_communication_failure(error)):
                raise
            terminal.info(
                f"{run.path}: stopped as asked ({stop.reason}) while others ended; what was saved stands"
            )
            return False


def _train(
    settings: TrainSettings,
    world: DistributedEnvironment,
    run: RunDirectory,
    evaluate: Evaluation | None,
    stop: StopRequest,
    watchdog: Watchdog,
) -> bool:
    student = setup_training(settings, world, run, stop)
    if student is None:
        terminal.info(f"{run.path}: already finished")
        return True
    log_run_header(student)
    startup.freeze_gc()
    log = MetricsLog(run, settings, student.facts)
    plan, step = student.batch_plan, student.first_step
    watchdog.report_step(step)
    stop.defer_signals()
    distributed.barrier()  # from here on nobody ends alone
    limit_heap = HeapLimit()
    with terminal.progress("train", plan.total_steps, step) as bar:
        stopping = not validate_if_due(student, step, evaluate, log, stop)  # a restart may have cut it short
        while step < plan.total_steps and not stopping:
            metrics, stopping = optimizer_step(student, step, stop)
            step += 1
            watchdog.report_step(step)
            stop.record_duration(step=metrics["seconds"])
            limit_heap()
            log.write({"step": step, "total_steps": plan.total_steps, **metrics})
            bar.update(step, f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s")
            stopping = stopping or not validate_if_due(student, step, evaluate, log, stop)
            if stopping or step == plan.total_steps or every(step, settings.save_steps):
                watchdog.check_lock()
                save(student, step, stop)
                stopping = (
                    stopping or stop.should_stop_on_any_rank()
                )  # a signal may have come while it was written
    reason = stop.reason or "another rank was told"
    stop.ignore_signals()
    finished = step == plan.total_steps
    log.close(finished)
    state = "finished" if finished else f"stopped as asked ({reason}), start it again to go on"
    terminal.info(f"{run.path}: {state} at step {step}/{plan.total_steps}")
    distributed.barrier()  # who ends first must not have the others killed while they still close their files
    return finished


def every(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def validate_if_due(
    student: TrainState, step: int, evaluate: Evaluation | None, log: MetricsLog, stop: StopRequest
) -> bool:
    """Collective. Log the periodic evaluation of this step unless it is logged; False if a stop cut it short."""
    if evaluate is None or not every(step, student.settings.eval_steps):
        return True
    if distributed.broadcast_object(step in log.evaluated_steps):
        return True
    result = evaluate(student, stop)
    if result is not None:
        log.write({"step": step, "evaluation": result})
    return result is not None


def optimizer_step(student: TrainState, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
    """One step of the optimizer, counted from 0: every micro-batch forward and backward, one update. Collective.

    Returns what is logged, and whether any rank was asked to stop.
    """
    start = time.perf_counter()
    engine, plan, data, world = student.engine, student.batch_plan, student.data, student.world
    first, end = plan.packs(step)
    learned_tokens = data.num_target_tokens(first, end)
    learning_rate = student.learning_rates.learning_rate(step)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate

    loss_sum = torch.zeros((), dtype=torch.float64, device=student.device)
    problems: list[int] = []
    num_passes = passes_of_step(data, plan, step, student.layout.rows)
    for micro, packs in enumerate(plan.micro_batches(step, world.rank)):
        batch = data.micro_batch(packs, end)
        problems += batch.problems
        seed_dropout(student.settings.seed, batch.first_pack)
        passes = forward_passes(batch, student.layout, student.device, num_passes[micro])
        for number, rows in enumerate(passes):
            is_last = (micro + 1, number + 1) == (plan.accumulation_steps, len(passes))
            engine.set_gradient_accumulation_boundary(is_last)  # a layout may need several passes
            losses = summed_token_loss(engine, rows)
            engine.backward(losses * (world.world_size / learned_tokens), scale_wrt_gas=False)
            loss_sum += losses.detach()
            if not is_last:
                engine.step()  # counts the pass; the optimizer moves at the last one

    loss, asked_to_stop = all_reduce_loss_and_stop(loss_sum, stop.is_requested, world.world_size)
    check_finite(student, step, loss, float(loss_sum), problems)
    grad_norm, skipped = global_grad_norm(engine), engine.skipped_steps
    if grad_norm is None or math.isfinite(grad_norm):
        engine.step()
        grad_norm = engine.get_global_grad_norm() if grad_norm is None else grad_norm
    if not math.isfinite(grad_norm) or engine.skipped_steps != skipped:
        ids = problem_ids(student, problems)
        raise UserError(
            f"step {step + 1}: the gradient is not finite (the loss is {loss / learned_tokens}); {ids}"
        )
    seconds = time.perf_counter() - start
    tokens = data.num_tokens(first, end)
    metrics = {
        "epoch": end / data.packs_per_epoch,
        "loss": loss / learned_tokens,
        "learned_tokens": learned_tokens,
        "tokens": tokens,
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": model_flops_utilization(student, tokens / seconds, learned_tokens / tokens),
        "memory_bytes": throughput.peak_memory_bytes(),
        "packs_consumed": end,
    }
    return metrics, asked_to_stop


def seed_dropout(seed: int, first_pack: int) -> None:
    """Dropout follows from where we are in the data: the same after a resume, and on any number of ranks."""
    torch.manual_seed((seed << 40) + first_pack)


def all_reduce_loss_and_stop(
    loss_sum: torch.Tensor, stop_requested: bool, world_size: int
) -> tuple[float, bool]:
    """The step's loss over all ranks, and whether any rank was asked to stop: one small collective for both."""
    both = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop_requested))])
    if world_size > 1:
        dist.all_reduce(both)
    loss, stops = both.tolist()
    return loss, stops > 0


def check_finite(student: TrainState, step: int, loss: float, own_loss: float, problems: list[int]) -> None:
    """A NaN or Inf never reaches the weights: the run ends and says where, its last checkpoint untouched.

    (DeepSpeed would skip the step in silence.) Collective if the loss is not finite.
    """
    if math.isfinite(loss):
        return
    where = None
    if not math.isfinite(own_loss):
        ids = problem_ids(student, problems)
        where = f"step {step + 1}: the loss on rank {student.world.rank} is {own_loss}; {ids}"
    distributed.raise_on_all_ranks(where)
    raise UserError(f"step {step + 1}: the loss is {loss}, although it is finite on every rank")


def problem_ids(student: TrainState, problems: list[int]) -> str:
    return "problems of this rank: " + ", ".join(student.shards.problem(index).id for index in problems[:20])


def global_grad_norm(engine: Any) -> float | None:
    """Gradient norm before clipping where DeepSpeed does not keep it (ZeRO 0 in fp32), else None."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def model_flops_utilization(
    student: TrainState, tokens_per_second: float, learned_part: float
) -> float | None:
    peak = throughput.peak_flops()
    if peak is None:
        return None
    mean_length = student.data.tokens_per_epoch / student.data.num_examples
    flops = throughput.flops_per_token(
        student.facts["num_parameters"], student.config, mean_length, learned_part
    )
    return tokens_per_second * flops / (peak * student.world.world_size)


def save(student: TrainState, step: int, stop: StopRequest) -> None:
    """Checkpoint after `step` steps. Collective."""
    start = time.perf_counter()
    _, packs_consumed = student.batch_plan.packs(step - 1)
    progress = {
        "step": step,
        "packs_consumed": packs_consumed,
        "finished": step == student.batch_plan.total_steps,
    }
    checkpoint.save(student.engine, student.run, step, {**student.facts, **progress}, student.run.model)
    checkpoint.prune(student.run, student.settings.save_total_limit)
    stop.record_duration(save=time.perf_counter() - start)


def log_run_header(student: TrainState) -> None:
    """Log what the run is about to do."""
    facts, plan, data = student.facts, student.batch_plan, student.data
    terminal.info(
        f"{student.run.path}: {facts['model_name']} ({facts['num_parameters']:,} parameters, {facts['dtype']}), "
        f"method {facts['method']}, ZeRO {facts['zero_stage']}, {student.world.world_size} rank(s)"
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
    student.layout_selection.report(student.layout_choice)
