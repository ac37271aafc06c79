"""A study of pairs with the real tools, from training to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import REPOSITORY
from tests.study.test_study_run import Command
from trainer.study import processes


@pytest.mark.slow
def test_a_study_of_pairs_with_the_real_tools(tmp_path: Path, values: dict[str, Any]) -> None:
    values["num_ranks"] = 1
    values["data"] = {"stories": {"train": {"num_problems": 40}, "test": {"num_problems": 6}}}
    values["methods"] = ["iterative_interleaved", "gold_subquestions"]
    values["train"] |= {"pack_length": 512, "learning_rate": 1e-3}
    values["evaluate"] = {"max_new_tokens": 24, "batch_size": 6}
    command = Command(tmp_path, REPOSITORY / "tools", values)
    try:
        status, output = command("run")
    finally:
        processes.end_processes(command.study, 0.0)
    assert status == 0, output
    assert output.startswith("study tiny: 4 runs, 9 stages, 0 done\n")

    for method in ("iterative_interleaved", "gold_subquestions"):
        run = command.study.run(f"stories.{method}.small.s0")
        evaluation = run.evaluation(f"stories-test-{method}")
        results = json.loads(evaluation.results.read_text())
        assert (results["mode"], results["model_name"]) == (method, "small")
        lines = [json.loads(line) for line in evaluation.predictions.read_text().splitlines()]
        assert len(lines) == 6 and all(line["text"] for line in lines)
        assert {line["stopped"] for line in lines} <= {"", "max_steps", "max_new_tokens", "context"}
        assert run.settings.is_file()
    assert not command.study.run("stories.solver.small.s0").evaluation_names()
    page = (command.study.report / "index.html").read_text(encoding="utf-8")
    assert "gold_subquestions" in page and "iterative_interleaved" in page
    assert "9 stages, 9 done" in command("run")[1]
