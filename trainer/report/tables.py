"""The rows of results.csv, results.json and the page: plain values, nothing rounded."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.report.comparisons import Comparison
from trainer.report.evaluations import RULES, Evaluation
from trainer.report.headline import Headline
from trainer.report.results import Run
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
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_json(
    title: str,
    headlines: Sequence[Headline],
    runs: Sequence[Run],
    panels: Sequence[Panel],
    comparisons: Sequence[Comparison],
) -> str:
    record = {
        "format": FORMAT,
        "title": title,
        "headlines": [str(headline) for headline in headlines],
        "runs": run_rows(runs),
        "summary": summary_rows(panels),
        "by_num_steps": num_steps_rows(panels),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "unfinished": [
            {"study": r.study, "run": r.name, "missing": r.unfinished} for r in runs if r.unfinished
        ],
    }
    return json.dumps(_without_nan(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    quartiles = run.metrics.speed_quartiles
    row: dict[str, Any] = {
        "study": run.study,
        "run": run.name,
        "train_data": run.data,
        "method": run.method,
        "model": run.model_name,
        "parameters": run.num_parameters,
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
