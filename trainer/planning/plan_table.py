"""Output of a plan: a table with bars, and JSON."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.planning import recommend
from trainer.planning.memory import CONTEXT, FRAGMENTATION, LOADING, PROCESS
from trainer.planning.plan import RunPlan, read_measurements
from trainer.planning.recommend import Recommendation
from trainer.planning.zero_memory import COMPONENTS
from trainer.runtime.terminal import duration_text, size_text

_BAR = 30
_ORDER = (*COMPONENTS, FRAGMENTATION, LOADING, CONTEXT, PROCESS)


def print_plan(plan: RunPlan, recommended: Recommendation | None) -> None:
    """Print the plan and the recommendation, about one screen."""
    console = make_console()
    workload, machine, settings = plan.workload, plan.hardware, plan.settings
    console.print(
        f"[bold]{workload.model_name}[/]: {workload.num_parameters:,} parameters, {'bf16' if settings.bf16 else 'fp32'}, "
        f"ZeRO {plan.stage}, {machine.nodes} machine(s) x {machine.per_node} {machine.accelerator.name}"
    )
    console.print(
        f"micro-batch of {settings.per_device_train_batch_size} pack(s): {sum(workload.lengths):,} tokens, "
        f"{workload.num_target_tokens:,} learned; {workload.tokens_per_step:,.0f} tokens a step"
    )
    unit = "process" if machine.accelerator.is_cpu else "GPU"
    title = f"memory of a {unit}, worst in {plan.memory.phase}"
    console.print(_memory_table(title, plan.memory.device, machine.accelerator.memory_bytes))
    if plan.memory.host:
        title = f"host memory of a machine ({machine.per_node} ranks)"
        per_machine = Counter({name: value * machine.per_node for name, value in plan.memory.host.items()})
        console.print(_memory_table(title, per_machine, machine.host_bytes))
    disk = plan.disk
    console.print(
        f"disk: {size_text(disk.total_bytes)} = {disk.num_checkpoints} x {size_text(disk.checkpoint_bytes)} checkpoints "
        f"(one of them being written) + {size_text(disk.export_bytes)} export"
        + (f"; {size_text(machine.disk_bytes)} are free" if machine.disk_bytes else "")
    )
    _time(console, plan)
    lines = [f"note: {note}" for note in plan.notes] + error_lines()
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
        lines.append(recommend.train_command(recommended.plan.settings, machine))
    for line in lines:
        console.print(line)


def make_console() -> Console:
    """Return a console as wide as the terminal, or of 160 columns for a file or a pipe."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console


def as_dict(plan: RunPlan, recommended: Recommendation | None = None) -> dict[str, Any]:
    """Return the plan as JSON-compatible values: bytes, seconds, refusals."""
    step, machine, is_known = plan.step, plan.hardware, plan.is_speed_known
    result: dict[str, Any] = {
        "model": plan.workload.model_name,
        "num_parameters": plan.workload.num_parameters,
        "zero_stage": plan.stage,
        "dtype": "bf16" if plan.settings.bf16 else "fp32",
        "accelerator": machine.accelerator.name,
        "nodes": machine.nodes,
        "per_node": machine.per_node,
        "memory": {
            "phase": plan.memory.phase,
            "device_bytes": plan.memory.device_bytes,
            "device_limit_bytes": machine.accelerator.memory_bytes,
            "device": dict(plan.memory.device),
            "host_bytes_per_machine": plan.memory.host_bytes * machine.per_node,
            "host_limit_bytes": machine.host_bytes,
            "host_per_rank": dict(plan.memory.host),
        },
        "disk": {
            "total_bytes": plan.disk.total_bytes,
            "checkpoint_bytes": plan.disk.checkpoint_bytes,
            "num_checkpoints": plan.disk.num_checkpoints,
            "export_bytes": plan.disk.export_bytes,
            "free_bytes": machine.disk_bytes,
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
            "command": recommend.train_command(recommended.plan.settings, machine),
        }
    return result


def measured_errors() -> dict[str, Any]:
    """Return the largest and mean relative error of the planner against real runs, with date and hardware."""
    found = read_measurements()
    result = {name: found[name] for name in ("date", "hardware", "load_average")}
    for kind, error in (("memory", "error"), ("default_malloc", "error_with_allowance"), ("time", "error")):
        errors = [abs(case[error]) for case in found[kind] if case.get("held_out", True)]
        if errors:
            result[kind] = {"cases": len(errors), "mean": sum(errors) / len(errors), "largest": max(errors)}
    return result


def error_lines() -> list[str]:
    """Return `measured_errors` as text. Memory is that of CPU processes, without that of a process without a model."""
    errors = measured_errors()
    descriptions = (
        ("memory", "memory, where malloc returns freed memory (MALLOC_MMAP_THRESHOLD_=65536)"),
        ("default_malloc", "memory of a CPU process, with default malloc"),
        ("time", f"time, under a load of {errors['load_average']:.0f}"),
    )
    return [
        f"error against measurement, {text}: {errors[kind]['mean']:.0%} in the mean, {errors[kind]['largest']:.0%} "
        f"at most ({errors[kind]['cases']} runs, {errors['hardware']}, {errors['date']})"
        for kind, text in descriptions
        if kind in errors
    ]


def _memory_table(title: str, parts: Counter[str], limit: int) -> Table:
    total = sum(parts.values())
    scale = max(total, limit) or 1
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column()
    for name in sorted(parts, key=_ORDER.index):
        if parts[name]:
            table.add_row(name, size_text(parts[name]), "█" * max(1, round(_BAR * parts[name] / scale)))
    color = "red" if limit and total > limit else "green"
    of_limit = f" of {size_text(limit)} ({total / limit:.0%})" if limit else " (limit not known)"
    table.add_row("[bold]total[/]", f"[bold]{size_text(total)}[/]", f"[{color}]{of_limit.strip()}[/]")
    return table


def _time(console: Console, plan: RunPlan) -> None:
    step = plan.step
    if not plan.is_speed_known:
        return console.print(f"time: rate {step.rate.source}")
    joined = "overlapping" if step.is_overlapped else "+"
    text = (
        f"time: {step.seconds:.3g} s a step ({step.compute_seconds:.3g} s arithmetic {joined} "
        f"{step.communication_seconds:.3g} s communication, {step.update_seconds:.3g} s update)"
    )
    if plan.workload.total_steps:
        text += (
            f"; {plan.workload.total_steps:,} steps: {duration_text(plan.seconds)}, "
            f"{plan.accelerator_hours:.3g} accelerator-hours"
        )
    else:
        text += "; how many steps is not known: give train_shards, max_steps or num_problems"
    console.print(text + (" [yellow](extrapolated)[/]" if step.is_extrapolated else ""))
    console.print(f"  rate: {step.rate.source}")
