"""Columns of the report's frames, with dtypes and units.

Text columns have dtype object, with None for missing values: Arrow strings cannot store the lone surrogates that
predictions may contain.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

# A row per run and evaluation; a run without evaluations has one row with empty evaluation columns.
RUNS = {
    "study": "object",
    "run": "object",
    "run_path": "object",  # Path
    "train_data": "object",
    "run_method": "object",  # of the run; `method` is the evaluation's
    "model": "object",
    "parameters": "Int64",  # of a pair, the solver's
    "seed": "Int64",  # of training
    "max_steps": "Int64",
    "is_trained": "bool",  # False: the run only evaluates models of other runs or a base model
    "settings": "object",  # dict of settings.yaml
    "environment": "object",  # dict of environment.json
    "settings_digest": "object",  # SHA-256, "" without a file
    "missing": "object",  # the first stage that is not done, in words, else ""
    "training_steps": "int64",
    "learned_tokens": "int64",
    "final_loss": "float64",  # nats per learned token, mean of the last steps
    "tokens_per_second": "float64",  # median over the steps
    "tokens_per_second_q1": "float64",
    "tokens_per_second_q3": "float64",
    "training_seconds": "float64",
    "broken_metrics_lines": "int64",  # incomplete because the process was killed
    "undone_steps": "int64",  # after the checkpoint from which a killed run resumed
    "non_finite_losses": "int64",
    # Of the evaluation; its number in Study.evaluations is called `evaluation` in other frames:
    "evaluation_name": "object",  # of the directory
    "results_path": "object",  # Path
    "predictions_path": "object",  # Path
    "panel": "object",  # title of the evaluations that are comparable with this one
    "panel_rank": "Int64",
    "is_plain": "object",  # bool: finished model trained on this data, data as published, greedy, with calculator
    "problems": "object",
    "data": "object",
    "split": "object",
    "mode": "object",  # prompt format of the evaluation
    "calculator": "object",  # bool
    "temperature": "float64",
    "sampling_seed": "Int64",
    "method": "object",  # of training; of a pair, the mode and the guidance of its decomposer
    "train_seed": "Int64",  # of the evaluated model; missing for a base model
    "total_parameters": "Int64",  # of all models that answer together
    "stopped_at": "Int64",  # step, if training was not finished
    "n": "Int64",  # problems
    "strict_correct": "Int64",
    "flexible_correct": "Int64",
    "strict_accuracy": "float64",  # fractions; low and high: 95 % Wilson interval
    "strict_low": "float64",
    "strict_high": "float64",
    "flexible_accuracy": "float64",
    "flexible_low": "float64",
    "flexible_high": "float64",
    "by_num_steps": "object",  # {steps of the gold solution: (strict correct, n)}
    "unfinished_generations": "Int64",  # cut at max_new_tokens
    "generated_tokens": "Int64",
    "calculator_results_given": "Int64",
    "evaluation_seconds": "float64",
    "members": "object",  # list of dict: role, model_name, method of the models of a pair
    "backends": "object",  # list of dict: role, name, difference, reason
    "warnings": "object",  # list of text
}

# A row per valid line of metrics.jsonl that no resume undid, by step.
METRICS = {
    "step": "int64",
    "is_validation": "bool",
    "loss": "float64",  # nats per learned token of the whole step; NaN where the log has no number
    "learned_tokens": "float64",
    "tokens_per_second": "float64",
    "seconds": "float64",
}

# A row per prediction of one evaluation, in the order of the file.
PREDICTIONS = {
    "id": "object",
    "question": "object",
    "gold": "object",
    "gold_steps": "object",  # tuple of StepText; None in files of older versions
    "text": "object",
    "has_answer": "bool",  # the strict rule extracted one
    "correct": "bool",  # strict
    "generated_tokens": "int64",
    "finished": "bool",
    "stopped": "object",  # reason for which a pair was cut, else ""
}

# Added to PREDICTIONS by error_types.py, which drops the texts of predictions that the page does not show.
ANALYSED = {
    "evaluation": "int64",  # number of the row in Study.evaluations
    "problem": "object",  # bytes, digest of question and gold answer
    "is_shown": "bool",  # as an example on the page
    "solution": "object",  # solution_steps.Solution
    "error_type": "object",  # "right" or one of ERROR_TYPES; None without gold steps
    "wrong_step": "Int64",  # index of the first step that is not right
}


def frame(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return a frame with exactly these columns and dtypes; values that a row lacks are missing."""
    return pd.DataFrame(rows, columns=list(columns), dtype=object).astype(columns)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dicts of plain Python values, None where a value is missing."""
    plain = table.astype(object)
    return plain.where(table.notna(), None).to_dict("records")  # type: ignore[return-value]
