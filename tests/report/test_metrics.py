from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.report.drawing import bin_curve, dodge_labels, select_spaced, smooth
from trainer.report.load import training_columns
from trainer.report.run_files import read_metrics


def _write(path: Path, *lines: dict | str) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def _step(step: int, loss: float, **more: float) -> dict:
    return {
        "step": step,
        "loss": loss,
        "learned_tokens": 10,
        "tokens_per_second": 100.0 * step,
        "seconds": 0.5,
    } | more


def test_the_last_line_of_a_step_counts_and_a_cut_line_is_counted(tmp_path: Path) -> None:
    first = [
        _step(1, 4.0),
        _step(2, 3.0),
        {"step": 2, "evaluation": {"loss": 3.3}},
        _step(3, 2.5),
        '{"step": 4, "lo',
    ]
    second = [
        _step(2, 3.5),
        {"step": 2, "evaluation": {"loss": 3.4}},
        _step(3, 2.0),
        '{"step": 4, "loss": 1.',
    ]
    metrics, counts = read_metrics(_write(tmp_path / "metrics.jsonl", *first, *second))
    steps, validation = metrics[~metrics["is_validation"]], metrics[metrics["is_validation"]]
    assert steps["step"].tolist() == [1, 2, 3] and steps["loss"].tolist() == [4.0, 3.5, 2.0]
    assert validation[["step", "loss"]].values.tolist() == [[2, 3.4]]
    assert counts == {"broken_metrics_lines": 2, "undone_steps": 2}
    totals = training_columns(metrics)
    assert totals["learned_tokens"] == 30 and totals["training_seconds"] == 1.5
    assert totals["tokens_per_second"] == 200.0 and np.isnan(totals["late_loss_fall"]), "too few steps"


def test_a_resume_undoes_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    steps = [_step(step, 5.0 - step) for step in (1, 2, 3, 4)]
    metrics, counts = read_metrics(_write(tmp_path / "metrics.jsonl", *steps, _step(3, 1.5)))
    assert metrics["loss"].tolist() == [4.0, 3.0, 1.5] and counts["undone_steps"] == 2
    assert training_columns(metrics)["training_steps"] == 3


def test_the_fall_of_the_loss_in_the_last_tenth(tmp_path: Path) -> None:
    steps = [_step(step, 4.0 if step <= 80 else 2.0 if step <= 90 else 1.5) for step in range(1, 101)]
    metrics, _ = read_metrics(_write(tmp_path / "metrics.jsonl", *steps))
    assert training_columns(metrics)["late_loss_fall"] == pytest.approx(0.25)


def test_missing_numbers(tmp_path: Path) -> None:
    lines = [_step(1, float("nan")), {"step": 2, "loss": None}, _step(3, 1.0), "", '{"no": "step"}', "[1]"]
    metrics, counts = read_metrics(_write(tmp_path / "metrics.jsonl", *lines))
    totals = training_columns(metrics)
    assert totals["non_finite_losses"] == 2 and totals["final_loss"] == 1.0
    assert counts["broken_metrics_lines"] == 2
    empty = training_columns(read_metrics(tmp_path / "missing.jsonl")[0])
    assert empty["training_steps"] == 0
    assert np.isnan(empty["final_loss"]) and np.isnan(empty["tokens_per_second"])


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: 3 of 3 lines"):
        read_metrics(_write(tmp_path / "metrics.jsonl", "step 1", "step 2", "step 3"))


def test_binning_keeps_the_extremes() -> None:
    x, y = np.arange(10_000.0), np.sin(np.arange(10_000.0))
    y[1234], y[8765] = 9.0, -9.0
    short_x, short_y = bin_curve(x, y, 100)
    assert (
        len(short_x) <= 200
        and short_y.max() == 9.0
        and short_y.min() == -9.0
        and np.all(np.diff(short_x) > 0)
    )
    assert bin_curve(x[:150], y[:150], 100)[0] is not None and len(bin_curve(x[:150], y[:150], 100)[0]) == 150


def test_smooth_is_the_mean_of_its_window() -> None:
    y = np.array([5.0, 1.0, 3.0, 8.0, 4.0, 6.0])
    assert smooth(y, 3) == pytest.approx([5.0, 3.0, 4.0, 5.0, 6.0, 5.0])
    assert smooth(y[:1], 5).tolist() == [5.0]


def test_labels_do_not_collide_and_keep_their_order() -> None:
    placed = dodge_labels([0.5, 0.51, 0.9, 0.5], 0.1)
    assert np.diff(np.sort(placed)).min() >= 0.1 - 1e-12
    assert placed[2] == 0.9 and placed[0] < placed[3] < placed[1]
    assert np.mean([placed[0], placed[1], placed[3]]) == pytest.approx(np.mean([0.5, 0.51, 0.5]))
    assert select_spaced([0.0, 0.05, 1.0], 0.1) == [1, 2]
