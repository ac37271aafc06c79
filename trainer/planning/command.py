"""Plan one training or every run of a study, and print the plan as a table with bars or as JSON."""

import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.errors import UserError
from trainer.planning.measurements import error_lines, measured_errors
from trainer.planning.memory import CONTEXT, FRAGMENTATION, LOADING, PROCESS
from trainer.planning.plan import RunPlan, make_plan
from trainer.planning.recommend import Recommendation, recommend, train_command
from trainer.planning.zero_memory import COMPONENTS
from trainer.runtime import distributed, terminal
from trainer.runtime.terminal import duration_text, size_text
from trainer.settings import PlanSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.study.study_file import RunSpec, Study

_BAR_WIDTH = 30
_COMPONENT_ORDER = (*COMPONENTS, FRAGMENTATION, LOADING, CONTEXT, PROCESS)


def print_training_plan(settings: PlanSettings) -> bool:
    """Print the plan of one training run; return whether the run fits. Raises UserError if no plan is possible."""
    logging.disable(logging.WARNING)
    plan = make_plan(settings)
    recommended = recommend(plan)
    if settings.json:
        print(json.dumps(as_dict(plan, recommended), indent=1))
    else:
        print_plan(plan, recommended)
    return plan.fits


def dry_run(settings: TrainSettings) -> bool:
    """On rank 0, print the plan for the launched ranks and return whether the run fits. On other ranks, return True."""
    environment = distributed.environment()
    if environment.rank != 0:
        return True
    per_node = environment.local_world_size
    nodes = max(1, environment.world_size // per_node)
    return print_training_plan(PlanSettings(**vars(settings), nodes=nodes, gpus_per_node=per_node))


def print_study_plan(settings: PlanSettings, study: Study) -> bool:
    """Print the plans of a study's trainings; return whether all fit. The size of shards that do not exist is estimated."""
    logging.disable(logging.WARNING)
    plans: list[tuple[RunSpec, RunPlan]] = []
    for run in study.runs:
        if run.train is None:  # evaluation only
            continue
        try:
            plans.append((run, make_plan(_settings_of_run(settings, run.train, run.num_ranks, study))))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
    if not plans:
        raise UserError(f"{study.name} has no training to plan: all its runs only evaluate")
    fits = all(plan.fits for _, plan in plans)
    totals = {
        "seconds": sum(plan.seconds for _, plan in plans),
        "accelerator_hours": sum(plan.accelerator_hours for _, plan in plans),
        "disk_bytes": sum(plan.disk.total_bytes for _, plan in plans),
        "unknown": sum(not plan.seconds for _, plan in plans),
    }
    if settings.json:
        runs = {run.name: as_dict(plan) for run, plan in plans}
        print(json.dumps({"study": study.name, "runs": runs, "totals": totals, "fits": fits}, indent=1))
    else:
        _print_study_table(study, plans, totals)
    return fits


def _settings_of_run(
    settings: PlanSettings, train: TrainSettings, num_ranks: int, study: Study
) -> PlanSettings:
    """Return the plan settings of one run: `train`, and the settings of `settings` that only a plan has.

    If `settings` describes a single GPU, which is the default, the plan is for `num_ranks` GPUs.
    """
    values = dict(vars(train))
    plan_only = {name: getattr(settings, name) for name in PlanSettings.__annotations__ if name != "study"}
    if settings.nodes * settings.gpus_per_node == 1:
        plan_only["gpus_per_node"] = num_ranks
    if not atomic_dir.is_complete(Path(train.train_shards)):
        prepare = next(shards for shards in study.prepare_settings if shards.output_dir == train.train_shards)
        values["train_shards"] = ""
        of_shards = prepare.num_problems if prepare.data == "stories" else prepare.max_problems
        plan_only["num_problems"] = settings.num_problems or of_shards
    return PlanSettings(**{**values, **plan_only})


def print_plan(plan: RunPlan, recommended: Recommendation | None) -> None:
    """Print the plan and the recommendation, which is None if no ds_config fits."""
    console = _make_console()
    workload, hardware, settings = plan.workload, plan.hardware, plan.settings
    console.print(
        f"[bold]{workload.model_name}[/]: {workload.num_parameters:,} parameters, {'bf16' if settings.bf16 else 'fp32'}, "
        f"ZeRO {plan.stage}, {hardware.num_nodes} machine(s) x {hardware.gpus_per_node} {hardware.accelerator.name}"
    )
    console.print(
        f"micro-batch of {settings.per_device_train_batch_size} pack(s): {sum(workload.lengths):,} tokens, "
        f"{workload.num_target_tokens:,} learned; {workload.tokens_per_step:,.0f} tokens a step"
    )
    title = f"memory of a {hardware.unit}, worst in {plan.memory.phase}"
    console.print(_memory_table(title, plan.memory.device, hardware.accelerator.memory_bytes))
    if plan.memory.host:
        title = f"host memory of a machine ({hardware.gpus_per_node} ranks)"
        sizes = {name: size * hardware.gpus_per_node for name, size in plan.memory.host.items()}
        console.print(_memory_table(title, Counter(sizes), hardware.host_bytes))
    disk = plan.disk
    console.print(
        f"disk: {size_text(disk.total_bytes)} = {disk.num_checkpoints} x {size_text(disk.checkpoint_bytes)} checkpoints "
        f"(one of them being written) + {size_text(disk.export_bytes)} export"
        + (f"; {size_text(hardware.disk_bytes)} are free" if hardware.disk_bytes else "")
    )
    lines = [*_time_lines(plan), *(f"note: {note}" for note in plan.notes), *error_lines()]
    lines += [f"[bold red]cannot run[/]: {refusal}" for refusal in plan.refusals]
    if recommended is None:
        lines.append("[bold red]nothing of ds_configs/ fits[/] on this hardware with this pack_length")
    else:
        if recommended.differences:
            lines.append("[bold]recommended[/]: " + ", ".join(recommended.differences))
        lines.append(
            f"largest micro-batch that fits with it: {recommended.largest_micro_batch} pack(s); "
            f"recommended needs {size_text(recommended.plan.memory.device_bytes)}"
        )
        lines.append(train_command(recommended.plan.settings, hardware))
    console.print(*lines, sep="\n")


def as_dict(plan: RunPlan, recommended: Recommendation | None = None) -> dict[str, Any]:
    """Return the plan as JSON-compatible values. Times are None if the speed of the hardware is not known."""
    step, hardware, memory, disk = plan.step, plan.hardware, plan.memory, plan.disk
    is_known = plan.is_speed_known
    result: dict[str, Any] = {
        "model": plan.workload.model_name,
        "num_parameters": plan.workload.num_parameters,
        "zero_stage": plan.stage,
        "dtype": "bf16" if plan.settings.bf16 else "fp32",
        "accelerator": hardware.accelerator.name,
        "nodes": hardware.num_nodes,
        "per_node": hardware.gpus_per_node,
        "memory": {
            "phase": memory.phase,
            "device_bytes": memory.device_bytes,
            "device_limit_bytes": hardware.accelerator.memory_bytes,
            "device": dict(memory.device),
            "host_bytes_per_machine": memory.host_bytes * hardware.gpus_per_node,
            "host_limit_bytes": hardware.host_bytes,
            "host_per_rank": dict(memory.host),
        },
        "disk": {
            "total_bytes": disk.total_bytes,
            **dataclasses.asdict(disk),
            "free_bytes": hardware.disk_bytes,
        },
        "time": {
            "seconds_per_step": step.seconds if is_known else None,
            "compute_seconds": step.compute_seconds if is_known else None,
            "communication_seconds": step.communication_seconds if is_known else None,
            "update_seconds": step.update_seconds if is_known else None,
            "rate": step.rate.source,
            "extrapolated": step.is_extrapolated,
            "total_steps": plan.workload.total_steps,
            "seconds": plan.seconds if is_known else None,
            "accelerator_hours": plan.accelerator_hours if is_known else None,
        },
        "fits": plan.fits,
        "refusals": list(plan.refusals),
        "notes": list(plan.notes),
        "measured_error": measured_errors(),
    }
    if recommended is not None:
        result["recommended"] = {
            "changes": list(recommended.differences),
            "largest_micro_batch": recommended.largest_micro_batch,
            "device_bytes": recommended.plan.memory.device_bytes,
            "command": train_command(recommended.plan.settings, hardware),
        }
    return result


def _make_console() -> Console:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = terminal.WIDTH_WITHOUT_TERMINAL
    return console


def _memory_table(title: str, sizes: Counter[str], limit: int) -> Table:
    """Return a table of the bytes by component. `limit`: bytes that the hardware has, 0 if not known."""
    total = sizes.total()
    scale = max(total, limit) or 1
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column()
    for name in sorted(sizes, key=_COMPONENT_ORDER.index):
        if sizes[name]:
            bar = "█" * max(1, round(_BAR_WIDTH * sizes[name] / scale))
            table.add_row(name, size_text(sizes[name]), bar)
    color = "red" if limit and total > limit else "green"
    of_limit = f"of {size_text(limit)} ({total / limit:.0%})" if limit else "(limit not known)"
    table.add_row("[bold]total[/]", f"[bold]{size_text(total)}[/]", f"[{color}]{of_limit}[/]")
    return table


def _time_lines(plan: RunPlan) -> list[str]:
    step = plan.step
    if not plan.is_speed_known:
        return [f"time: rate {step.rate.source}"]
    text = (
        f"time: {step.seconds:.3g} s a step ({step.compute_seconds:.3g} s arithmetic "
        f"{'overlapping' if step.is_overlapped else '+'} "
        f"{step.communication_seconds:.3g} s communication, {step.update_seconds:.3g} s update)"
    )
    if plan.workload.total_steps:
        text += (
            f"; {plan.workload.total_steps:,} steps: {duration_text(plan.seconds)}, "
            f"{plan.accelerator_hours:.3g} accelerator-hours"
        )
    else:
        text += "; the number of steps is not known: give train_shards, max_steps or num_problems"
    extrapolated = " [yellow](extrapolated)[/]" if step.is_extrapolated else ""
    return [text + extrapolated, f"  rate: {step.rate.source}"]


def _print_study_table(
    study: Study, plans: Sequence[tuple[RunSpec, RunPlan]], totals: dict[str, Any]
) -> None:
    console = _make_console()
    hardware = plans[0][1].hardware
    machines = f"{hardware.num_nodes} x {hardware.gpus_per_node} {hardware.accelerator.name}"
    table = Table(title=f"{study.name}: {len(plans)} runs on {machines}", title_justify="left")
    table.add_column("run")
    for heading in ("parameters", "ZeRO", "memory", "of limit", "disk", "steps", "time", "accelerator-hours"):
        table.add_column(heading, justify="right")
    for run, plan in plans:
        used = plan.memory.device_bytes / hardware.accelerator.memory_bytes
        table.add_row(
            run.name,
            f"{plan.workload.num_parameters:,}",
            str(plan.stage),
            size_text(plan.memory.device_bytes),
            f"[{'green' if plan.fits else 'red'}]{used:.0%}[/]",
            size_text(plan.disk.total_bytes),
            f"{plan.workload.total_steps:,}" if plan.workload.total_steps else "?",
            duration_text(plan.seconds) if plan.seconds else "?",
            f"{plan.accelerator_hours:.3g}" if plan.seconds else "?",
        )
    table.add_section()
    table.add_row(
        "total, training only", "", "", "", "", size_text(totals["disk_bytes"]), "",
        duration_text(totals["seconds"]), f"{totals['accelerator_hours']:.3g}",
    )  # fmt: skip
    console.print(table)
    notes = dict.fromkeys(note for _, plan in plans for note in plan.notes)
    lines = [*(f"note: {note}" for note in notes), f"  rate: {plans[0][1].step.rate.source}", *error_lines()]
    lines += [
        f"[bold red]cannot run[/] {run.name}: {refusal}" for run, plan in plans for refusal in plan.refusals
    ]
    if totals["unknown"]:
        lines.append(
            f"note: {totals['unknown']} run(s) are not in the totals: their number of steps or the speed of the GPU is not known"
        )
    console.print(*lines, sep="\n")
