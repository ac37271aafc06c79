"""Description of an evaluation in results.json and in the log: models, data, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.decoding import FEW_SHOT, PLANNER
from trainer.evaluation.job import EvaluationJob, num_problems_without_gold
from trainer.evaluation.model_reference import ModelReference
from trainer.runtime import distributed


def job_fields(job: EvaluationJob, sizes: Mapping[str, int], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of results.json about models and data; "" or None where the model's manifest lacks a fact.

    sizes, digests: parameters and content digests by role. `total_parameters` counts each distinct model once.
    """
    main = job.models[job.answering_role]
    models = (_model_name(model) for role, model in job.models.items() if role != PLANNER)
    mode = job.decoding.mode
    facts = {
        "data": job.shards.facts["data"],
        "split": job.shards.facts["split"],
        "model_name": job.model_label or " + ".join(dict.fromkeys(models)),
        "method": mode if job.is_pair or mode == FEW_SHOT else main.facts.get("method", ""),
        "train_seed": main.facts.get("seed"),
        "train_data": main.facts.get("data", ""),
        "step": main.facts.get("step"),
        "finished": main.facts.get("finished"),
        "num_parameters": sizes[job.answering_role],
        "total_parameters": sum(sizes[role] for role in job.first_roles.values()),
        "warnings": warnings(job),
    }
    if not job.is_pair:
        return facts
    return facts | {
        role: {
            "name": model.name,
            "model_name": _model_name(model),
            "method": model.method,
            "num_parameters": sizes[role],
            "export_digest": digests[role],
        }
        for role, model in job.models.items()
    }


def warnings(job: EvaluationJob) -> list[str]:
    """Return the warnings to log and to record in results.json."""
    found = []
    main = job.models[job.answering_role]
    learned = main.facts.get("train_on_calculator_results") is not False
    if job.decoding.mode != "answer_only" and not job.decoding.calculator and not learned:
        found.append(
            f"the {job.answering_role} has no calculator and did not learn the calculator's results (train_on_calculator_results)"
        )
    for role in job.first_roles.values():
        facts = job.models[role].facts
        if facts.get("finished") is False:
            found.append(f"the {role}'s training stopped at step {facts.get('step')}, before its end")
        for fact in ("data", "seed"):
            if facts.get(fact) != main.facts.get(fact):
                found.append(
                    f"the {role} was trained with {fact} {facts.get(fact)}, "
                    f"the {job.answering_role} with {fact} {main.facts.get(fact)}"
                )
    if lacking := num_problems_without_gold(job):
        found.append(f"{lacking} of {job.num_problems} problems have no gold {job.gold_text} to show")
    return found


def job_text(job: EvaluationJob) -> str:
    decoding = job.decoding
    sampling = f"temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
    calculator = "with calculator" if decoding.calculator else "without calculator"
    slots = f"{distributed.environment().world_size} x {decoding.batch_size} slots"
    return (
        f"{' and '.join(job.first_roles)} on {job.shards.path}: {decoding.mode}, {sampling}, {calculator}, "
        f"{job.num_problems} problems, {slots}"
    )


def _model_name(model: ModelReference) -> str:
    return str(model.facts.get("model_name", Path(model.name).name))
