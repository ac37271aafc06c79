"""What results.json and the user are told about an evaluation besides its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.decoding import FEW_SHOT, PLANNER
from trainer.evaluation.job import EvaluationJob, num_problems_without_gold
from trainer.evaluation.model_reference import ModelReference
from trainer.runtime import distributed


def job_fields(task: EvaluationJob, sizes: Mapping[str, int], digests: Mapping[str, str]) -> dict[str, Any]:
    """Who is evaluated on what, with parameters and digests by part; "" or None where a model of unknown making does
    not say. A student in several parts counts once in `total_parameters`."""
    main = task.models[task.answering_role]
    models = (_model_name(student) for part, student in task.models.items() if part != PLANNER)
    mode = task.decoding.mode
    facts = {
        "data": task.shards.facts["data"],
        "split": task.shards.facts["split"],
        "model_name": task.model_label or " + ".join(dict.fromkeys(models)),
        "method": mode if task.is_pair or mode == FEW_SHOT else main.facts.get("method", ""),
        "train_seed": main.facts.get("seed"),
        "train_data": main.facts.get("data", ""),
        "step": main.facts.get("step"),
        "finished": main.facts.get("finished"),
        "num_parameters": sizes[task.answering_role],
        "total_parameters": sum(sizes[part] for part in task.first_roles.values()),
        "warnings": warnings(task),
    }
    if not task.is_pair:
        return facts
    return facts | {
        part: {
            "name": student.name,
            "model_name": _model_name(student),
            "method": student.method,
            "num_parameters": sizes[part],
            "export_digest": digests[part],
        }
        for part, student in task.models.items()
    }


def warnings(task: EvaluationJob) -> list[str]:
    """What a reader of the results has to know; it is told and recorded."""
    found = []
    main = task.models[task.answering_role]
    learned = main.facts.get("train_on_calculator_results") is not False
    if task.decoding.mode != "answer_only" and not task.decoding.calculator and not learned:
        found.append(
            f"the {task.answering_role} has no calculator and did not learn the calculator's results (train_on_calculator_results)"
        )
    for part in task.first_roles.values():
        facts = task.models[part].facts
        if facts.get("finished") is False:
            found.append(f"the {part}'s training stopped at step {facts.get('step')}, before its end")
        for fact in ("data", "seed"):
            if facts.get(fact) != main.facts.get(fact):
                found.append(
                    f"the {part} was trained with {fact} {facts.get(fact)}, "
                    f"the {task.answering_role} with {fact} {main.facts.get(fact)}"
                )
    if lacking := num_problems_without_gold(task):
        found.append(f"{lacking} of {task.num_problems} problems have no gold {task.shown} to show")
    return found


def job_text(task: EvaluationJob) -> str:
    decoding = task.decoding
    how = f"temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
    calculator = "with calculator" if decoding.calculator else "without calculator"
    slots = f"{distributed.environment().world_size} x {decoding.batch_size} slots"
    return (
        f"{' and '.join(task.first_roles)} on {task.shards.path}: {decoding.mode}, {how}, {calculator}, "
        f"{task.num_problems} problems, {slots}"
    )


def _model_name(student: ModelReference) -> str:
    return str(student.facts.get("model_name", Path(student.name).name))
