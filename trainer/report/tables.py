"""The rows of results.csv, results.json and the page: plain values, nothing rounded."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.report.analysis import Analyses
from trainer.report.causes import CAUSES, RIGHT
from trainer.report.comparison_table import comparison_rows
from trainer.report.comparisons import CalculatorComparison
from trainer.report.content import Content
from trainer.report.evaluations import RULES, Evaluation
from trainer.report.results import Run
from trainer.report.statistics import wilson_interval
from trainer.report.summary import Panel, estimate

FORMAT = 1


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each evaluation, and one with empty evaluation columns for a run without any."""
    rows = []
    for run in runs:
        rows += [_row(run, evaluation) for evaluation in run.evaluations or (None,)]
    return rows


def summary_rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """A row for each panel, model and method: strict accuracy over its seeds."""
    rows = []
    for panel in panels:
        for cell in panel.cells:
            names = {"problems": panel.title, "model": cell.model_name, "parameters": cell.num_parameters}
            names["total_parameters"] = cell.total_parameters
            per_seed = {"accuracies": [score.accuracy for score in cell.scores()]}
            rows.append(names | {"method": cell.method} | asdict(cell.estimate) | per_seed)
    return rows


def num_steps_rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """A row for each panel, model, method and number of steps: strict accuracy over its seeds."""
    rows = []
    for panel in panels:
        for cell in panel.cells:
            names = {"problems": panel.title, "model": cell.model_name, "parameters": cell.num_parameters}
            for num in cell.nums_of_steps:
                if scores := cell.scores(num_steps=num):
                    rows.append(names | {"method": cell.method, "num_steps": num} | asdict(estimate(scores)))
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same columns; "" without any."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def cause_rows(panels: Sequence[Panel], analyses: Analyses) -> list[dict[str, Any]]:
    """A row for each evaluation with gold steps: how many answers were right, and how many wrong of each cause."""
    rows = []
    for panel in panels:
        for e in panel.evaluations:
            causes = analyses[e.directory.path].causes
            if causes is not None:
                counts = {name: causes[name] for name in (RIGHT, *CAUSES)}
                rows.append(_student(panel, e) | counts | {"n": sum(counts.values())})
    return rows


def quality_rows(panels: Sequence[Panel], analyses: Analyses) -> list[dict[str, Any]]:
    """A row for each evaluation whose student wrote sub-questions: their quality, with a Wilson interval for #Q."""
    rows = []
    for panel in panels:
        for e in panel.evaluations:
            quality = analyses[e.directory.path].quality
            if quality is not None:
                low, high = wilson_interval(quality.right_number, quality.n)
                share = {"right_number_share": quality.right_number / quality.n, "low": low, "high": high}
                asking = [member.model_name for member in e.members if member.role == "decomposer"]
                names = _student(panel, e) | {"asking_model": asking[0] if asking else e.model_name}
                rows.append(names | asdict(quality) | share)
    return rows


def calculator_rows(comparisons: Sequence[CalculatorComparison]) -> list[dict[str, Any]]:
    rows = []
    for comparison in comparisons:
        row = asdict(comparison)
        for name in ("on", "off"):
            score = getattr(comparison, name)
            low, high = score.interval
            row[name] = {
                "correct": score.correct,
                "n": score.n,
                "accuracy": score.accuracy,
                "low": low,
                "high": high,
            }
        rows.append(row)
    return rows


def to_json(content: Content) -> str:
    runs, panels = content.runs, content.panels
    record = {
        "format": FORMAT,
        "title": content.title,
        "headlines": [str(headline) for headline in content.headlines],
        "runs": run_rows(runs),
        "summary": summary_rows(panels),
        "comparison_table": comparison_rows(content.tables),
        "by_num_steps": num_steps_rows(panels),
        "comparisons": [asdict(comparison) for comparison in content.comparisons],
        "calculator": calculator_rows(content.calculators),
        "causes": cause_rows(panels, content.analyses),
        "subquestions": quality_rows(panels, content.analyses),
        "certainty": [asdict(certainty) for certainty in content.certainties],
        "fits": [asdict(fit) for fit in content.fits],
        "unfinished": [
            {"study": r.study, "run": r.name, "missing": r.unfinished} for r in runs if r.unfinished
        ],
    }
    return json.dumps(_without_nan(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _student(panel: Panel, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "problems": panel.title,
        "model": evaluation.model_name,
        "parameters": evaluation.num_parameters,
        "total_parameters": evaluation.total_parameters,
        "method": evaluation.method,
        "seed": evaluation.train_seed,
    }


def _row(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    quartiles = run.metrics.speed_quartiles
    row: dict[str, Any] = {
        "study": run.study,
        "run": run.name,
        "train_data": run.data,
        "method": run.method,
        "model": run.model_name,
        "parameters": run.num_parameters,
        "total_parameters": evaluation.total_parameters if evaluation else run.num_parameters,
        "seed": run.seed,
    }
    for name in ("problems", "data", "split", "mode", "calculator", "temperature", "stopped_at"):
        row[name] = getattr(evaluation, name, None)
    for rule in RULES:
        score = evaluation.accuracy[rule] if evaluation else None
        row[f"{rule}_correct"] = score.correct if score else None
        row[f"{rule}_accuracy"] = score.accuracy if score else None
        row[f"{rule}_low"], row[f"{rule}_high"] = score.interval if score else (None, None)
    row["n"] = evaluation.accuracy["strict"].n if evaluation else None
    row["unfinished_generations"] = evaluation.unfinished if evaluation else None
    row["generated_tokens"] = evaluation.generated_tokens if evaluation else None
    row["calculator_results_given"] = evaluation.calculator_results_given if evaluation else None
    row["evaluation_seconds"] = evaluation.seconds if evaluation else None
    return row | {
        "training_steps": run.metrics.last_step,
        "learned_tokens": run.metrics.total_learned_tokens,
        "final_loss": run.metrics.final_loss,
        "tokens_per_second": quartiles[1] if quartiles else None,
        "training_seconds": run.metrics.total_seconds,
        "broken_metrics_lines": run.metrics.broken_lines,
        "non_finite_losses": run.metrics.non_finite_losses,
        "missing": run.unfinished,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
