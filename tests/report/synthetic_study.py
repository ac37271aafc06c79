"""Write the files of a study through RunDirectory, with numbers from a seeded generator."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.report.synthetic_answers import answer, possible_mistakes, problems
from trainer.evaluation.score import wilson_interval
from trainer.problems import answers
from trainer.report.methods import PAIR_METHODS
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory, StudyDirectory

SIZES = {"stories-2m": 2_013_952, "stories-13m": 13_107_200}
METHODS = ("answer_only", "cot", "socratic")
NUM_PROBLEMS = 300
EVALUATED_ONLY = ("iterative_ahead", "iterative_interleaved", "gold_subquestions", "few_shot")
_SKILL = {"answer_only": -2.4, "cot": 0.7, "socratic": 1.2}
_SKILL |= {"iterative_ahead": 0.9, "iterative_interleaved": 1.3, "gold_subquestions": 2.0, "few_shot": -1.2}
_LAST_LOSS = {"answer_only": 1.9, "cot": 0.42, "socratic": 0.31, "decomposer": 0.22, "solver": 0.5}
_LEARNED = {"answer_only": 100, "cot": 812, "socratic": 1400, "decomposer": 650, "solver": 800}
SCALING_SIZES = {"12k": 12_320, "35k": 34_848, "100k": 101_376, "0.25m": 250_752, "0.6m": 602_112}
_LEVELS = (-5.5, -2.3, -0.6, 0.9, 2.6)


def make_study(folder: Path, sizes=SIZES, methods=METHODS, seeds=(0, 1), **evaluation: Any) -> StudyDirectory:
    """Write sizes x methods x seeds; every run is trained, exported and evaluated once."""
    for size in range(len(sizes)):
        for method in methods:
            for seed in seeds[:1] if method == "few_shot" else seeds:  # a base model has no training seed
                model = (list(sizes)[size], list(sizes.values())[size])
                make = make_evaluation_run if method in EVALUATED_ONLY else make_run
                run = make(folder, method, *model, seed)
                write_evaluation(
                    run, method, list(sizes)[size], list(sizes.values())[size], seed, size, **evaluation
                )
    return StudyDirectory(folder)


def make_scaling_study(folder: Path, num_problems: int = 400, model_of_seeds: str = "100k") -> StudyDirectory:
    """Write 5 sizes x 4 methods on problems of 1 to 4 steps. `model_of_seeds` has 3 seeds, the other sizes have one."""
    for level, (model, size) in zip(_LEVELS, SCALING_SIZES.items(), strict=True):
        for method in (*METHODS, "decomposer", "solver", "iterative_ahead"):
            for seed in range(3 if model == model_of_seeds else 1):
                if method == "iterative_ahead":
                    run = make_evaluation_run(folder, method, model, size, seed)
                else:
                    num_steps = {"answer_only": 90, "decomposer": 150}.get(method, 240)
                    run = make_run(folder, method, model, size, seed, num_steps)
                if method not in ("decomposer", "solver"):
                    luck = level + 0.25 * (seed - 1) * (seed != 0)
                    about: dict[str, Any] = {"num_problems": num_problems, "steps": (1, 4)}
                    write_evaluation(run, method, model, size, seed, luck, **about)
    return StudyDirectory(folder)


def make_run(
    study: Path,
    method: str,
    model: str,
    size: int,
    seed: int,
    num_steps: int = 240,
    stop: int = 0,
    name: str = "",
) -> RunDirectory:
    """Write settings, environment, metrics, and an export unless the run stops early."""
    run = StudyDirectory(study).run(name or f"stories.{method}.{model}.s{seed}")
    run.path.mkdir(parents=True)
    run.settings.write_text(
        f"method: {method}\nseed: {seed}\nmax_steps: {num_steps}\nmodel_label: {model}\nlearning_rate: 0.0005\n"
        "deepspeed: ds_configs/zero1.json\npacking: true\n"
    )
    run.environment.write_text(
        json.dumps(
            {
                "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
                "world_size": 2,
                "launcher": "env",
                "processor": "AMD EPYC 7763",
                "num_resumes": int(stop > 0),
            }
        )
    )
    with open(run.metrics, "w") as file:
        for record in metrics(method, size, seed, num_steps)[: stop or None]:
            file.write(json.dumps(record) + "\n")
    if not stop:
        facts = {
            "finished": True,
            "step": num_steps,
            "method": method,
            "data": "stories",
            "model_name": model,
        }
        facts |= {"seed": seed, "num_parameters": size}
        with atomic_dir.atomic_directory(run.export, "export", facts) as staging:
            (staging / "config.json").write_text("{}")
    return run


def make_evaluation_run(study: Path, method: str, model: str, size: int, seed: int) -> RunDirectory:
    """Write a run that only evaluates models of other runs: it has the settings of its evaluation alone."""
    run = StudyDirectory(study).run(f"stories.{method}.{model}.s{seed}")
    run.path.mkdir(parents=True)
    run.settings.write_text(
        "decomposer: runs/y/export\nsolver: runs/x/export\nshards: shards/stories-test\nseed: 0\nmax_steps: 16\n"
    )
    return run


def metrics(method: str, size: int, seed: int, num_steps: int) -> list[dict[str, Any]]:
    """Return the lines of the training loop: one per step, and a validation loss every 60 steps."""
    random = np.random.default_rng([seed, size, len(method)])
    records: list[dict[str, Any]] = []
    last = _LAST_LOSS[method] * (2e6 / size) ** 0.15
    for step in range(1, num_steps + 1):
        loss = last + (8.5 - last) * math.exp(-step / (num_steps / 9)) + random.normal(0, 0.09) * last**0.5
        seconds = 0.31 * (size / 2e6) ** 0.7 * random.lognormal(0, 0.08)
        records.append(
            {
                "step": step,
                "epoch": step / 60,
                "loss": max(loss, 0.05),
                "learned_tokens": _LEARNED[method],
                "tokens": 4096,
                "learning_rate": 5e-4,
                "grad_norm": 0.9,
                "seconds": seconds,
                "tokens_per_second": 4096 / seconds,
                "mfu": None,
                "memory_bytes": 123_000_000,
                "packs_consumed": 8 * step,
            }
        )
        if step % 60 == 0:
            records.append({"step": step, "evaluation": {"loss": loss * 1.08}})
    return records


def write_evaluation(
    run: RunDirectory,
    method: str,
    model: str,
    size: int,
    seed: int,
    level: float,
    data: str = "stories",
    split: str = "test",
    calculator: bool = True,
    num_problems: int = NUM_PROBLEMS,
    gold_steps: bool = True,
    steps: tuple[int, int] = (2, 5),
    **changes: Any,
) -> Path:
    """Write predictions.jsonl and results.json that agree; `changes` then replace values of results.json.

    Without `gold_steps` the predictions are those of an older version. `steps`: fewest and most steps of a problem.
    """
    evaluation = run.evaluation(f"{data}-{split}-{method}" + ("" if calculator else "-no-calculator"))
    evaluation.path.mkdir(parents=True)
    predictions = _predictions(method, seed, level - (0 if calculator else 1.3), num_problems, steps)
    if not gold_steps:
        for line in predictions:
            del line["gold_steps"]
    evaluation.predictions.write_text("".join(json.dumps(line) + "\n" for line in predictions))
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in predictions:
        groups[line["num_steps"]].append(line)
    results = {
        "format": 1,
        "data": data,
        "split": split,
        "mode": method,
        "calculator": calculator,
        "temperature": 0.0,
        "seed": 0,
        "max_new_tokens": 256,
        "num_problems": num_problems,
        "model_name": model,
        "method": method,
        "train_seed": seed,
        "num_parameters": size,
        "total_parameters": size,
        "train_data": "stories",
        "calculator_results_given": 2 * num_problems if calculator else 0,
        "accuracy": scores(predictions),
        "by_num_steps": {str(num): scores(lines) for num, lines in sorted(groups.items())},
        "unfinished": sum(not line["finished"] for line in predictions),
        "generated_tokens": sum(line["generated_tokens"] for line in predictions),
        "seconds": 12.3 + seed,
        "world_size": 2,
        "shards_fingerprint": "f" * 64,
        "export_digest": "e" * 64,
    }
    if method in PAIR_METHODS:
        asks = "decomposer_interleaved" if method == "iterative_interleaved" else "decomposer"
        for role, trained_as in (("decomposer", asks), ("solver", "solver")):
            results[role] = {"name": f"runs/{role}", "model_name": model, "method": trained_as}
            results[role] |= {"num_parameters": size, "export_digest": role[0] * 64}
        results["total_parameters"] = 2 * size
    if method == "few_shot":
        results["train_seed"] = None
    evaluation.results.write_text(json.dumps(results | changes))
    return evaluation.path


def _predictions(
    method: str, seed: int, level: float, num_problems: int, steps: tuple[int, int]
) -> list[dict[str, Any]]:
    difficulty = np.random.default_rng(7).normal(
        0, 1, num_problems
    )  # of the problems, the same in all evaluations
    random = np.random.default_rng([seed, len(method), int(10 * level) + 100])
    lines = []
    for index, problem in enumerate(problems(num_problems, *steps)):
        num_steps = len(problem.steps)
        logit = _SKILL[method] + 1.1 * level - 0.55 * (num_steps - 2) - 1.3 * difficulty[index]
        strict = bool(random.random() < 1 / (1 + math.exp(-logit)))
        flexible = strict or bool(random.random() < 0.03)
        mistakes = possible_mistakes(method)
        mistake = "" if strict else mistakes[int(random.integers(len(mistakes)))]
        text = answer(problem, method, mistake, int(random.integers(num_steps)))
        lines.append(
            {
                "id": problem.id,
                "question": problem.question,
                "gold": problem.answer,
                "num_steps": num_steps,
                "gold_steps": [asdict(step) for step in problem.steps],
                "text": text,
                "strict": answers.extract_answer(text, "strict"),
                "flexible": problem.answer if flexible else "0",
                "correct_strict": strict,
                "correct_flexible": flexible,
                "generated_tokens": 4 if method == "answer_only" else 20 * num_steps,
                "finished": mistake != "no_answer",
            }
            | ({"stopped": "ended_early" if mistake == "no_answer" else ""} if method in PAIR_METHODS else {})
        )
    return lines


def scores(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the accuracy object of results.json."""
    result = {}
    for rule in ("strict", "flexible"):
        correct, n = sum(line[f"correct_{rule}"] for line in lines), len(lines)
        low, high = wilson_interval(correct, n)
        result[rule] = {
            "correct": correct,
            "n": n,
            "accuracy": round(correct / n, 3),
            "low": low,
            "high": high,
        }
    return result
