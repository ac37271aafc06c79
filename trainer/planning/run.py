"""Plan one training, or every run of a study, and print the plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trainer.errors import UserError
from trainer.planning import plan, plan_table
from trainer.planning.plan import RunPlan
from trainer.planning.recommend import recommend
from trainer.runtime import distributed
from trainer.runtime.terminal import duration_text, size_text
from trainer.settings import PlanSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.study.study_file import RunSpec, Study


def plan_training(settings: PlanSettings) -> bool:
    """Print the plan of one training, without warnings of libraries; return whether it fits. Raises UserError."""
    logging.disable(logging.WARNING)
    run_plan = plan.make_plan(settings)
    recommended = recommend(run_plan)
    if settings.json:
        print(json.dumps(plan_table.as_dict(run_plan, recommended), indent=1))
    else:
        plan_table.print_plan(run_plan, recommended)
    return run_plan.fits


def dry_run(settings: TrainSettings) -> bool:
    """Print the plan of `train --dry_run` for this machine and its ranks (rank 0); return whether it fits."""
    environment = distributed.environment()
    if environment.rank != 0:
        return True
    per_node = environment.local_world_size
    nodes = max(1, environment.world_size // per_node)
    return plan_training(PlanSettings(**vars(settings), nodes=nodes, gpus_per_node=per_node))


def plan_study(settings: PlanSettings, study: Study) -> bool:
    """Print one line per run and the totals; return whether all runs fit. Missing shards are estimated."""
    logging.disable(logging.WARNING)
    plans: list[tuple[RunSpec, RunPlan]] = []
    for run in study.runs:
        if run.train is None:  # evaluation only
            continue
        try:
            plans.append((run, plan.make_plan(_settings_of_run(settings, run.train, study))))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
    fits = all(run_plan.fits for _, run_plan in plans)
    totals = {
        "seconds": sum(run_plan.seconds for _, run_plan in plans),
        "accelerator_hours": sum(run_plan.accelerator_hours for _, run_plan in plans),
        "disk_bytes": sum(run_plan.disk.total_bytes for _, run_plan in plans),
        "unknown": sum(not run_plan.seconds for _, run_plan in plans),
    }
    if settings.json:
        runs = {run.name: plan_table.as_dict(run_plan) for run, run_plan in plans}
        result = {"study": study.name, "runs": runs, "totals": totals, "fits": fits}
        print(json.dumps(result, indent=1))
    else:
        _print_study(study, plans, totals)
    return fits


def _settings_of_run(settings: PlanSettings, train: TrainSettings, study: Study) -> PlanSettings:
    """Return the settings of the run's training on the requested hardware."""
    values = dict(vars(train))
    plan_only = {name: getattr(settings, name) for name in PlanSettings.__annotations__ if name != "study"}
    if not atomic_dir.is_complete(Path(train.train_shards)):
        prepare = next(shards for shards in study.shards if shards.output_dir == train.train_shards)
        values["train_shards"] = ""
        plan_only["num_problems"] = settings.num_problems or (
            prepare.num_problems if prepare.data == "stories" else prepare.max_problems
        )
    return PlanSettings(**{**values, **plan_only})


def _print_study(study: Study, plans: Sequence[tuple[RunSpec, RunPlan]], totals: dict[str, Any]) -> None:
    console = plan_table.make_console()
    machine = plans[0][1].hardware
    hardware = f"{machine.nodes} x {machine.per_node} {machine.accelerator.name}"
    table = Table(title=f"{study.name}: {len(plans)} runs on {hardware}", title_justify="left")
    table.add_column("run")
    for heading in ("parameters", "ZeRO", "memory", "of limit", "disk", "steps", "time", "accelerator-hours"):
        table.add_column(heading, justify="right")
    for run, run_plan in plans:
        used = run_plan.memory.device_bytes / machine.accelerator.memory_bytes
        table.add_row(
            run.name,
            f"{run_plan.workload.num_parameters:,}",
            str(run_plan.stage),
            size_text(run_plan.memory.device_bytes),
            f"[{'green' if run_plan.fits else 'red'}]{used:.0%}[/]",
            size_text(run_plan.disk.total_bytes),
            f"{run_plan.workload.total_steps:,}" if run_plan.workload.total_steps else "?",
            duration_text(run_plan.seconds) if run_plan.seconds else "?",
            f"{run_plan.accelerator_hours:.3g}" if run_plan.seconds else "?",
        )
    table.add_section()
    table.add_row(
        "total, training only", "", "", "", "", size_text(totals["disk_bytes"]), "",
        duration_text(totals["seconds"]), f"{totals['accelerator_hours']:.3g}",
    )  # fmt: skip
    console.print(table)
    for note in dict.fromkeys(note for _, run_plan in plans for note in run_plan.notes):
        console.print(f"note: {note}")
    console.print(f"  rate: {plans[0][1].step.rate.source}")
    for line in plan_table.error_lines():
        console.print(line)
    for run, run_plan in plans:
        for refusal in run_plan.refusals:
            console.print(f"[bold red]cannot run[/] {run.name}: {refusal}")
    if totals["unknown"]:
        console.print(
            f"note: {totals['unknown']} run(s) are not in the totals: their number of steps or the speed of the GPU is not known"
        )
