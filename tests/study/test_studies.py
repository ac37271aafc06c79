"""The study files of this repository load without a network, and their exemplars are correct."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from trainer.problems import answers, calculator
from trainer.problems.problem import Problem
from trainer.problems.sources import read_problems
from trainer.study import stages
from trainer.study.methods import FEW_SHOT, PAIRS, SINGLE_MODEL_METHODS
from trainer.study.study_file import STUDY_KEYS, Study, load_study

REPOSITORY = Path(__file__).resolve().parents[2]
STUDIES = sorted((REPOSITORY / "studies").glob("*.yaml"))
EXEMPLARS = sorted((REPOSITORY / "studies" / "exemplars").glob("*.jsonl"))


def study(name: str, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(REPOSITORY)
    path = Path("studies") / f"{name}.yaml"
    return load_study(yaml.safe_load(path.read_text(encoding="utf-8")), path)


def rows(found: Study) -> set[tuple[str, str]]:
    """Return (method, model) of every evaluated run."""
    names = [run.directory.name.split(".", 1)[1].rpartition(".s")[0] for run in found.runs if run.evaluations]
    return {(name.split(".", 1)[0], name.split(".", 1)[1]) for name in names}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_describes_its_stages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(path.stem, monkeypatch)
    assert found.name == path.stem
    labels = [stage.label for stage in stages.study_stages(found)]
    assert len(set(labels)) == len(labels) > 5


def test_the_papers_grids_have_all_their_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"answer_only", "cot", "socratic"}
    two = {"iterative_ahead", "iterative_interleaved"}
    sizes = {"small", "medium", "large"}
    cells = {(method, size) for method in one | two for size in sizes}
    gold = {("gold_subquestions", size) for size in sizes}
    assert cells | gold <= rows(study("gsm8k_gpt2", monkeypatch))
    assert cells | gold <= rows(study("strategyqa_gpt2", monkeypatch))
    assert cells <= rows(study("svamp_gpt2", monkeypatch))
    for name in ("gsm8k_gpt2", "svamp_gpt2", "strategyqa_gpt2", "ladder_qwen2.5"):
        assert "few_shot" in {method for method, _ in rows(study(name, monkeypatch))}
    evaluated = [e for run in study("gsm8k_gpt2", monkeypatch).runs for e in run.evaluations]
    assert {e.calculator for e in evaluated} == {True, False}


def test_data_without_steps_has_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("svamp", "strategyqa"):
        found = study(f"{name}_gpt2", monkeypatch)
        annotate, prepare = stages.study_stages(found)[:2]
        assert annotate.label == f"annotate {name}-train"
        assert prepare.needs == (annotate.label,)
        assert prepare.settings.data == "jsonl"
        assert prepare.settings.data_path == f"annotations/{name}-train/result/annotated.jsonl"
        assert found.prepare_settings[1].data == name, "the evaluated set is the published one"


def test_larger_models_are_divided_further(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study("ladder_qwen2.5", monkeypatch)
    configs = {run.train.model_label: run.train.deepspeed for run in found.runs if run.train}
    order = [Path(path).stem for path in configs.values()]
    assert list(configs) == ["0.5b", "1.5b", "3b", "7b", "14b"]
    assert order == sorted(order) and order[0] == "zero1" and order[-1] == "zero3"
    packs = {
        run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps * run.num_ranks
        for run in found.runs
        if run.train
    }
    assert packs == {32}, "every size takes the same packs a step"


def test_the_quickstarts_learning_rates_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tried training is that of the quickstart except for the learning rate, and no test problem is used."""
    chosen = {
        run.train.model_label: dataclasses.asdict(run.train) | {"num_ranks": run.num_ranks}
        for run in study("quickstart", monkeypatch).runs
        if run.train and (run.train.method, run.train.seed) == ("cot", 0)
    }
    tried = study("quickstart_learning_rates", monkeypatch)
    rates = defaultdict(set)
    for run in tried.runs:
        assert run.train
        model, rate = run.train.model_label.split("-", 1)
        assert run.train.learning_rate == float(rate)
        rates[model].add(run.train.learning_rate)
        for key, value in {**dataclasses.asdict(run.train), "num_ranks": run.num_ranks}.items():
            if key not in ("output_dir", "model_label", "learning_rate", "train_shards"):
                assert value == chosen[model][key], (run.name, key)
    assert rates.keys() == chosen.keys()
    for model, training in chosen.items():
        assert training["learning_rate"] in rates[model], model
    assert {settings.split for settings in tried.prepare_settings} == {"train", "validation"}


@pytest.mark.parametrize("path", EXEMPLARS, ids=lambda path: path.stem)
def test_exemplars_are_right(path: Path) -> None:
    """Every annotated calculation is correct, and the last one of a numeric problem gives its answer."""
    problems = list(read_problems("jsonl", "train", str(path)))
    assert 4 <= len(problems) <= 8
    for problem in problems:
        assert isinstance(problem, Problem), problem
        assert problem.steps and all(step.question.endswith("?") and step.solution for step in problem.steps)
        for step in problem.steps:
            spans = list(calculator.split_annotations(step.solution))
            assert sum(is_result for _, is_result in spans) == step.solution.count("<<")
        if "strategyqa" in path.stem:
            assert problem.answer in ("yes", "no")
        else:
            (expression,) = calculator.annotated_expressions(problem.steps[-1].solution)
            assert answers.answers_match(problem.answer, calculator.evaluate(expression) or "")


def test_yes_and_no_are_balanced_enough() -> None:
    path = REPOSITORY / "studies" / "exemplars" / "strategyqa_cot.jsonl"
    found = [p.answer for p in read_problems("jsonl", "train", str(path)) if isinstance(p, Problem)]
    assert found.count("yes") >= 2 and found.count("no") >= 2


def test_the_documentation_names_every_key_and_method() -> None:
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    for name in (*STUDY_KEYS, *SINGLE_MODEL_METHODS, *PAIRS, FEW_SHOT, *(path.name for path in STUDIES)):
        assert f"`{name}`" in text, name
    for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert set(yaml.safe_load(example)) <= set(STUDY_KEYS)


def test_the_first_example_of_the_documentation_is_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    example = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    names = [
        run.directory.path.as_posix() for run in load_study(yaml.safe_load(example), Path("mine.yaml")).runs
    ]
    assert {"runs/mine/gsm8k.cot.small.s0", "runs/mine/gsm8k.iterative_interleaved.small.s0"} <= set(names)
