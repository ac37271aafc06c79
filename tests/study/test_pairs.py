"""Pairs of models: the runs that they add to a study, the order of stages, and which stages are repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_status import publish_directory, write_results
from tests.study.test_study_run import Command
from trainer.errors import UserError
from trainer.settings import METHODS
from trainer.study import changes, stages, status
from trainer.study.methods import PAIRS, ROLE_METHODS
from trainer.study.study_file import RunSpec, Study

MakeStudy = Callable[[dict[str, Any]], Study]
RUNS = "runs/tiny"


@pytest.fixture
def pairs(values: dict[str, Any]) -> dict[str, Any]:
    """Return a study of two models with pairs of one size, of both sizes, and with gold sub-questions."""
    values["models"]["large"] = {"config_name": "stories-3m", "num_ranks": 1}
    values["methods"] = {
        "cot": {"models": ["small"]},
        "iterative_interleaved": {"models": ["large"], "decomposer_model": "small"},
        "iterative_ahead": None,
        "gold_subquestions": {"max_new_tokens": 99},
    }
    return values


def runs_of(study: Study) -> dict[str, RunSpec]:
    return {run.name.removeprefix("stories."): run for run in study.runs}


def test_pairs_share_the_runs_of_their_models(pairs: dict[str, Any], make_study: MakeStudy) -> None:
    runs = runs_of(make_study(pairs))
    trained = [name for name, run in runs.items() if run.train]
    assert trained == [
        *("cot.small.s0", "decomposer_interleaved.small.s0", "solver.large.s0"),
        *("decomposer.small.s0", "solver.small.s0", "decomposer.large.s0"),
    ]
    assert [name for name, run in runs.items() if not run.train] == [
        *("iterative_interleaved.small+large.s0", "iterative_ahead.small.s0", "iterative_ahead.large.s0"),
        *("gold_subquestions.small.s0", "gold_subquestions.large.s0"),
    ]
    assert [name for name, run in runs.items() if run.train and run.evaluations] == ["cot.small.s0"]
    train = runs["solver.large.s0"].train
    assert train and (train.method, train.model_label, train.config_name) == ("solver", "large", "stories-3m")

    mixed = runs["iterative_interleaved.small+large.s0"]
    assert mixed.trained_runs == ("stories.decomposer_interleaved.small.s0", "stories.solver.large.s0")
    (settings,) = mixed.evaluations
    assert settings.decomposer == f"{RUNS}/stories.decomposer_interleaved.small.s0/export"
    assert settings.solver == f"{RUNS}/stories.solver.large.s0/export"
    assert (settings.model_name_or_path, settings.planner, settings.subquestions) == ("", "", "decomposer")
    name = "evaluation/stories-test-iterative_interleaved"
    assert settings.output_dir == f"{RUNS}/stories.iterative_interleaved.small+large.s0/{name}"
    (gold,) = runs["gold_subquestions.large.s0"].evaluations
    assert (gold.decomposer, gold.subquestions, gold.max_new_tokens) == ("", "gold", 99)
    assert [run.num_ranks for run in (mixed, runs["cot.small.s0"])] == [1, 2]


def test_every_stage_comes_after_what_it_needs(pairs: dict[str, Any], make_study: MakeStudy) -> None:
    pairs["methods"]["iterative_ahead_operators"] = {}
    todo = stages.study_stages(make_study(pairs))
    labels = [stage.label for stage in todo]
    assert len(set(labels)) == len(labels)
    for number, stage in enumerate(todo):
        assert set(stage.needs) <= set(labels[:number]), stage.label
    needs = {stage.label: stage.needs for stage in todo}
    assert needs["evaluate stories.iterative_ahead_operators.small.s0 on stories-test"] == (
        *("convert stories.planner_operators.small.s0", "convert stories.decomposer_operators.small.s0"),
        *("convert stories.solver.small.s0", "prepare stories-test"),
    )
    assert needs["train stories.solver.small.s0"] == ("prepare stories-train",)
    evaluations = tuple(label for label in labels if label.startswith("evaluate "))
    assert needs["report tiny"] == evaluations


def test_role_methods_may_have_settings_and_runs_of_their_own(
    pairs: dict[str, Any], make_study: MakeStudy
) -> None:
    pairs["methods"] |= {"solver": {"learning_rate": 1e-3}, "decomposer_interleaved": {"max_steps": 7}}
    runs = runs_of(make_study(pairs))
    rates = {name: run.train.learning_rate for name, run in runs.items() if run.train}
    assert [name for name, rate in rates.items() if rate == 1e-3] == ["solver.large.s0", "solver.small.s0"]
    assert "decomposer_interleaved.large.s0" not in runs, (
        "only the small model is a decomposer, and settings alone add no run"
    )
    assert runs["decomposer_interleaved.small.s0"].train.max_steps == 7  # type: ignore[union-attr]

    pairs["methods"]["decomposer_interleaved"] = {"models": ["large"]}
    assert "decomposer_interleaved.large.s0" in runs_of(make_study(pairs))
    pairs["methods"] = ["planner_equations"]
    runs = runs_of(make_study(pairs))
    assert list(runs) == ["planner_equations.small.s0", "planner_equations.large.s0"]
    assert [stage.kind for stage in stages.run_stages(next(iter(runs.values())))] == ["train", "convert"]


def test_every_evaluation_variant_has_its_directory(pairs: dict[str, Any], make_study: MakeStudy) -> None:
    pairs["methods"]["iterative_ahead_equations"] = {"models": ["small"]}
    pairs["evaluations"] = [{}, {"calculator": False}, {"guidance_from": "gold"}]
    pairs["evaluations"] += [{"temperature": 0.7, "seed": 3}, {"mode": "answer_only"}]
    runs = runs_of(make_study(pairs))
    plain = ["", "-no_calculator", "-t0.7-s3"]
    names = [Path(settings.output_dir).name for settings in runs["cot.small.s0"].evaluations]
    assert names == [f"stories-test-cot{variant}" for variant in plain] + ["stories-test-answer_only"]
    names = [Path(settings.output_dir).name for settings in runs["iterative_ahead.small.s0"].evaluations]
    assert names == [f"stories-test-iterative_ahead{variant}" for variant in plain]
    guided = runs["iterative_ahead_equations.small.s0"].evaluations
    variants = ["", "-no_calculator", "-gold_guidance", "-t0.7-s3"]
    assert [Path(e.output_dir).name for e in guided] == [
        f"stories-test-iterative_ahead_equations{variant}" for variant in variants
    ]
    assert [bool(settings.planner) for settings in guided] == [True, True, False, True]


def test_gold_guidance_needs_no_planner(pairs: dict[str, Any], make_study: MakeStudy) -> None:
    pairs["methods"] = {"iterative_interleaved_operators": {"guidance_from": "gold"}}
    runs = runs_of(make_study(pairs))
    assert not [name for name in runs if name.startswith("planner")]
    assert "decomposer_interleaved_operators.small.s0" in runs


def test_few_shot_evaluates_the_pretrained_model(
    values: dict[str, Any], make_study: MakeStudy, tmp_path: Path
) -> None:
    (tmp_path / "shown.jsonl").write_text("{}\n")
    values["seeds"] = [3, 4]
    values["models"]["base"] = {"model_name_or_path": "org/base"}
    values["methods"] = {"few_shot": {"exemplars": "shown.jsonl", "max_new_tokens": 300, "models": ["base"]}}
    study = make_study(values)
    (run,) = study.runs
    assert (run.name, run.train, run.convert) == ("stories.few_shot.base.s3", None, None)
    (settings,) = run.evaluations
    assert (settings.model_name_or_path, settings.mode, settings.exemplars) == (
        *("org/base", "few_shot", "shown.jsonl"),
    )
    assert settings.output_dir.endswith("/evaluation/stories-test-few_shot")
    evaluate = stages.study_stages(study)[-2]
    assert evaluate.needs == ("prepare stories-test",)
    values["methods"]["few_shot"]["exemplars"] = "lost.jsonl"
    with pytest.raises(
        UserError, match=r"methods\.few_shot: exemplars: there is no file or folder lost\.jsonl"
    ):
        make_study(values)


def test_every_role_of_every_pair_can_be_trained() -> None:
    for pair in PAIRS.values():
        assert {pair.decomposer, pair.planner} <= {*ROLE_METHODS, ""}
    assert set(ROLE_METHODS) < set(METHODS)


def test_models_are_needed_until_their_last_evaluation(pairs: dict[str, Any], make_study: MakeStudy) -> None:
    pairs["methods"] = ["iterative_ahead", "gold_subquestions"]
    pairs["models"] = {"small": pairs["models"]["small"]}
    study = make_study(pairs)
    runs = {run.name: number for number, run in enumerate(study.runs)}

    def open_trainings() -> list[str]:
        found = [s.label for s in stages.study_stages(study) if s.kind in ("train", "convert")]
        return [
            label
            for label in found
            if not status.is_done(next(s for s in stages.study_stages(study) if s.label == label))
        ]

    assert len(open_trainings()) == 4
    write_results(study, runs["stories.iterative_ahead.small.s0"])
    assert open_trainings() == ["train stories.solver.small.s0", "convert stories.solver.small.s0"]
    write_results(study, runs["stories.gold_subquestions.small.s0"])
    assert open_trainings() == [], "exports may be deleted to make room"


def test_changed_settings_of_a_model_of_a_pair_are_refused(
    pairs: dict[str, Any], make_study: MakeStudy
) -> None:
    pairs["methods"] = ["gold_subquestions"]
    pairs["models"] = {"small": pairs["models"]["small"]}
    study = make_study(pairs)
    changes.save_snapshot(study)
    solver, gold = study.runs
    pairs["methods"] = {"gold_subquestions": {}, "solver": {"learning_rate": 1e-3}}
    changes.check_unchanged(make_study(pairs))  # nothing has been made yet
    write_results(study, 1)
    with pytest.raises(UserError) as caught:  # the solver's own directory is gone
        changes.check_unchanged(make_study(pairs))
    message = str(caught.value)
    assert f"{gold.directory.path}: {solver.name}: learning_rate was 5e-05, is now 0.001" in message
    assert message.count("learning_rate") == 1
    publish_directory(solver.directory.export, "export", finished=True)
    with pytest.raises(UserError, match=rf"  {solver.directory.path}: learning_rate was"):
        changes.check_unchanged(make_study(pairs))
    pairs["methods"] = {"gold_subquestions": {"max_new_tokens": 7}}
    with pytest.raises(
        UserError, match="evaluate stories-test-gold_subquestions: max_new_tokens was 256, is now 7"
    ):
        changes.check_unchanged(make_study(pairs))


@pytest.fixture
def command(tmp_path: Path, tools: Path, pairs: dict[str, Any]) -> Command:
    pairs["num_ranks"] = 1  # no launcher: these tests are about the order
    pairs["models"] = {"small": {"config_name": "stories-0.2m"}, "large": {"config_name": "stories-3m"}}
    pairs["methods"] = {"cot": {}, "iterative_ahead": {"models": ["large"], "decomposer_model": "small"}}
    return Command(tmp_path, tools, pairs)


def test_a_study_of_pairs_is_run_and_continued(command: Command) -> None:
    """stand_in.py fails to evaluate a model that does not exist."""
    status, output = command("run")
    assert status == 0, output
    assert output.splitlines()[0] == "study tiny: 5 runs, 14 stages, 0 done"
    pair = "stories.iterative_ahead.small+large.s0"
    assert f"[13/14] evaluate {pair} on stories-test: 66.7% [48.8, 80.8] (" in output
    status, output = command("status")
    rows = {row[0]: row[1:] for row in map(str.split, output.splitlines()) if row}
    assert rows[pair] == ["66.7%", "[48.8,", "80.8]"]
    assert rows["stories.solver.large.s0"] == ["done", "1.500", "done"]

    for run in ("stories.solver.large.s0", "stories.decomposer.small.s0"):
        shutil.rmtree(command.study.run(run).path)
    assert "14 stages, 14 done" in command("run")[1], "the models are not needed after the evaluation"
    shutil.rmtree(command.study.run(pair).path)
    status, output = command("run")
    assert status == 0 and "14 stages, 9 done" in output, output
    assert "cot" not in "".join(output.splitlines()[1:-2])


def test_a_failed_training_stops_only_its_pairs(command: Command, pairs: dict[str, Any]) -> None:
    pairs["models"]["small"]["config_overrides"] = "exit=1"
    command.write(pairs)
    status, output = command("run", "--keep_going")
    assert status == 2
    failed = ("train stories.cot.small.s0", "train stories.decomposer.small.s0")
    assert f"error: 2 of 14 stages failed: {'; '.join(failed)}" in output
    assert "evaluate stories.cot.large.s0 on stories-test: 66.7%" in output
    assert "convert stories.solver.large.s0: 1 kB" in output, "it depends on nothing that failed"
    assert "evaluate stories.iterative_ahead" not in output
    assert "report tiny: done" in output
