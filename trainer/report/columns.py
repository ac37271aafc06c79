"""Columns of the report's frames, with dtypes and units.

Text columns have dtype object, because predictions may contain lone surrogates, which Arrow strings cannot store.
Missing texts are None.
"""

from typing import Any

import pandas as pd

from trainer.problems.answers import ANSWER_RULES

# One row per evaluation of a run. A run without evaluations has one row without values in the evaluation columns.
RUNS = {
    "study": "object",
    "run": "object",
    "run_path": "object",  # Path
    "train_data": "object",
    "run_method": "object",  # method of the run; the column `method` is the method of the evaluation
    "model": "object",
    "parameters": "Int64",  # number of parameters of the model; for a pair, of the solver model
    "seed": "Int64",  # training seed
    "max_steps": "Int64",
    "is_trained": "bool",  # False: the run only evaluates a base model or models of other runs
    "settings": "object",  # dict, the content of settings.yaml
    "environment": "object",  # dict, the content of environment.json
    "settings_digest": "object",  # SHA-256 of settings.yaml; "" if there is no file
    "missing": "object",  # text about the first stage that is not done; "" if all stages are done
    "training_steps": "int64",
    "learned_tokens": "int64",  # number of tokens that carry loss, summed over the steps
    "final_loss": "float64",  # nats per learned token, mean over the last load.STEPS_OF_FINAL_LOSS steps
    # Relative fall of the loss at the end: 1 - mean loss of the last tenth of the steps / mean loss of the tenth before.
    "late_loss_fall": "float64",
    "tokens_per_second": "float64",  # median over the steps
    "training_seconds": "float64",  # sum over the steps that count, without start-up
    "broken_metrics_lines": "int64",  # number of unreadable lines of metrics.jsonl, e.g. cut when the process was killed
    "undone_steps": "int64",  # number of steps that were lost when the run resumed from an earlier checkpoint
    "non_finite_losses": "int64",  # number of steps without a finite loss
    # The columns below are about the evaluation.
    "evaluation_name": "object",  # name of the evaluation's directory
    "results_path": "object",  # Path
    "predictions_path": "object",  # Path
    "panel": "object",  # title of the panel; evaluations in the same panel can be compared
    "panel_rank": "Int64",  # position of the panel in the report, from 0
    # bool: True if training finished, data and mode are those of the training, decoding is greedy, the calculator is on,
    # and the run has no other such evaluation of these problems with the same sampling seed.
    "is_plain": "object",
    "problems": "object",
    "data": "object",
    "split": "object",
    "mode": "object",  # prompt format of the evaluation
    "calculator": "object",  # bool
    "temperature": "float64",
    "sampling_seed": "Int64",
    "method": "object",  # training method; for a pair the mode, e.g. iterative_ahead+operators
    "train_seed": "Int64",  # training seed of the evaluated model; missing for a base model
    "total_parameters": "Int64",  # sum over all models of the evaluation
    "stopped_at": "Int64",  # last training step of the evaluated model; missing if its training is finished
    "n": "Int64",  # number of problems
    **{f"{rule}_correct": "Int64" for rule in ANSWER_RULES},
    # Fractions. `low` and `high` are the ends of the 95 % Wilson interval.
    **{f"{rule}_{number}": "float64" for rule in ANSWER_RULES for number in ("accuracy", "low", "high")},
    "by_num_steps": "object",  # dict: number of gold steps -> (number of correct answers, number of problems)
    "unfinished_generations": "Int64",  # number of generations that were cut at max_new_tokens
    "generated_tokens": "Int64",
    "calculator_results_given": "Int64",
    "evaluation_seconds": "float64",
    "members": "object",  # list with a dict per role of a pair; keys: role, model_name, method
    # List with a dict per role. Keys: role; name (of the backend); difference (between the backend's logits and the logits
    # of the plain forward pass); reason (why the default backend is not used, or "").
    "backends": "object",
    "warnings": "object",  # list of str
}

# One row per valid line of metrics.jsonl, ordered by step. Steps that a resume undid are left out.
METRICS = {
    "step": "int64",
    "is_validation": "bool",
    "loss": "float64",  # mean over the learned tokens of the global batch, in nats; NaN if the line has no numeric loss
    "learned_tokens": "float64",
    "tokens_per_second": "float64",
    "seconds": "float64",
}

# One row per prediction of one evaluation, in the order of predictions.jsonl.
PREDICTIONS = {
    "id": "object",
    "question": "object",
    "gold": "object",
    "gold_steps": "object",  # tuple of SolutionStep; None in files of older versions
    "text": "object",
    "has_answer": "bool",  # whether the strict rule found an answer
    "correct": "bool",  # whether the answer is right under the strict rule
    "generated_tokens": "int64",
    "finished": "bool",  # False: a length limit cut the text
    "stopped": "object",  # reason why the generation of a pair ended early; "" after a normal end or for a single model
}

# Columns that error_types.analyse adds to PREDICTIONS. To save memory, a prediction whose `is_shown` is False has None
# instead of texts and steps.
ANALYSED = {
    "evaluation": "int64",  # row number in StudyFrames.evaluations
    "problem": "object",  # SHA-256 digest (bytes) of question and gold answer
    "is_shown": "bool",  # whether the page shows the prediction as an example
    "solution": "object",  # solution_steps.Solution
    "error_type": "object",  # RIGHT or one of ERROR_TYPES; None without gold steps
    "wrong_step": "Int64",  # index of the first step that is not right; missing if there is no such step
}


def frame(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return a frame with exactly these columns and dtypes. Columns that a row does not contain get a missing value."""
    return pd.DataFrame(rows, columns=list(columns), dtype=object).astype(columns)


def to_dicts(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dicts of Python values, with None for missing values."""
    plain = table.astype(object)
    return plain.where(table.notna(), None).to_dict("records")  # type: ignore[return-value]
