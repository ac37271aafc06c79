"""Plan one training, or every run of a study, and print it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trainer.errors import UserError
from trainer.planning import plan, plan_table
from trainer.planning.plan import RunPlan, size_text
from trainer.planning.recommend import recommend
from trainer.runtime import distributed
from trainer.runtime.terminal import duration
from trainer.settings import PlanSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.study.study_file import RunSpec, Study


def plan_training(settings: PlanSettings) -> bool:
    """Print the plan; returns whether it fits. Raises UserError."""
    _quiet()
    made = plan.make_plan(settings)
    recommended = recommend(made)
    if settings.json:
        print(json.dumps(plan_table.as_dict(made, recommended), indent=1))
    else:
        plan_table.print_plan(made, recommended)
    return made.fits


def dry_run(settings: TrainSettings) -> bool:
    """What tools/train.py --dry_run prints: the plan for this machine and this number of ranks (rank 0)."""
    world = distributed.environment()
    if world.rank != 0:
        return True
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainSettings)}
    nodes = max(1, world.world_size // world.local_world_size)
    return plan_training(PlanSettings(**values, nodes=nodes, gpus_per_node=world.local_world_size))


def plan_study(settings: PlanSettings, study: Study) -> bool:
    """A line a run and the totals; returns whether all runs fit. Shards that are not made yet are assumed."""
    _quiet()
    made: list[tuple[RunSpec, RunPlan]] = []
    for run in study.runs:
        if run.train is None:  # it only evaluates
            continue
        try:
            made.append((run, plan.make_plan(_of_run(settings, run.train, study))))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
    if settings.json:
        print(json.dumps(_study_dict(study, made), indent=1))
    else:
        _show_study(study, made)
    return all(one.fits for _, one in made)


def _of_run(settings: PlanSettings, train: TrainSettings, study: Study) -> PlanSettings:
    """The run's training on the asked hardware."""
    values = {field.name: getattr(train, field.name) for field in dataclasses.fields(TrainSettings)}
    own = {name: getattr(settings, name) for name in PlanSettings.__annotations__ if name != "study"}
    if not atomic_dir.is_complete(Path(train.train_shards)):
        prepared = next(one for one in study.shards if one.output_dir == train.train_shards)
        values["train_shards"] = ""
        own["num_problems"] = settings.num_problems or (
            prepared.num_problems if prepared.data == "stories" else prepared.max_problems
        )
    return PlanSettings(**{**values, **own})


def _show_study(study: Study, made: Sequence[tuple[RunSpec, RunPlan]]) -> None:
    console = plan_table.make_console()
    machine = made[0][1].hardware
    table = Table(
        title=f"{study.name}: {len(made)} runs on {machine.nodes} x {machine.per_node} {machine.accelerator.name}",
        title_justify="left",
    )
    for heading in (
        "run",
        "parameters",
        "ZeRO",
        "memory",
        "of limit",
        "disk",
        "steps",
        "time",
        "accelerator-hours",
    ):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for run, one in made:
        used = one.memory.device_bytes / machine.accelerator.memory_bytes
        table.add_row(
            run.name,
            f"{one.workload.num_parameters:,}",
            str(one.stage),
            size_text(one.memory.device_bytes),
            f"[{'green' if one.fits else 'red'}]{used:.0%}[/]",
            size_text(one.disk.total_bytes),
            f"{one.workload.total_steps:,}" if one.workload.total_steps else "?",
            duration(one.seconds) if one.seconds else "?",
            f"{one.accelerator_hours:.3g}" if one.seconds else "?",
        )
    totals = _totals(made)
    table.add_section()
    table.add_row(
        "total, training only", "", "", "", "", size_text(totals["disk_bytes"]), "",
        duration(totals["seconds"]), f"{totals['accelerator_hours']:.3g}",
    )  # fmt: skip
    console.print(table)
    for note in dict.fromkeys(note for _, one in made for note in one.notes):
        console.print(f"note: {note}")
    console.print(f"  rate: {made[0][1].step.rate.source}")
    for line in plan_table.error_lines():
        console.print(line)
    for run, one in made:
        for refusal in one.refusals:
            console.print(f"[bold red]cannot run[/] {run.name}: {refusal}")
    if totals["unknown"]:
        console.print(
            f"note: {totals['unknown']} run(s) are not in the totals: their number of steps or the speed of the GPU is not known"
        )


def _totals(made: Sequence[tuple[RunSpec, RunPlan]]) -> dict[str, Any]:
    return {
        "seconds": sum(one.seconds for _, one in made),
        "accelerator_hours": sum(one.accelerator_hours for _, one in made),
        "disk_bytes": sum(one.disk.total_bytes for _, one in made),
        "unknown": sum(not one.seconds for _, one in made),
    }


def _study_dict(study: Study, made: Sequence[tuple[RunSpec, RunPlan]]) -> dict[str, Any]:
    runs = {run.name: plan_table.as_dict(one) for run, one in made}
    return {
        "study": study.name,
        "runs": runs,
        "totals": _totals(made),
        "fits": all(one.fits for _, one in made),
    }


def _quiet() -> None:
    """Libraries have nothing to say to somebody who only asks."""
    logging.disable(logging.WARNING)
