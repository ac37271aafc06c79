"""Whole evaluations of pairs of models: files, directories, resuming, and rejected settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import run, run_well
from tests.evaluation.conftest import remade
from tests.evaluation.test_evaluate import read
from trainer.errors import UserError
from trainer.evaluation import job
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.rank_files import read_rank_files
from trainer.report.load import load_frames
from trainer.settings import EvaluateSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory, StudyDirectory

MODE = "iterative_interleaved"


@pytest.fixture(scope="module")
def pair(export_for: Callable[[str], Path]) -> dict[str, str]:
    return {"decomposer": str(export_for("decomposer_interleaved")), "solver": str(export_for("solver"))}


@pytest.fixture(scope="module")
def uninterrupted(
    pair: dict[str, str], shards: Shards, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationDirectory:
    """Results of one process without interruption."""
    directory = EvaluationDirectory(tmp_path_factory.mktemp("uninterrupted") / "evaluation")
    evaluate(settings(shards, **pair, output_dir=str(directory.path)))
    return directory


def settings(shards: Shards, **given: Any) -> EvaluateSettings:
    return EvaluateSettings(**{"shards": str(shards.path), "batch_size": 4, **given})


def size_of(export: str) -> int:
    return int(atomic_dir.read_manifest(Path(export))["facts"]["num_parameters"])


def test_pair_has_a_run_beside_those_of_its_models(pair: dict[str, str], shards: Shards) -> None:
    results = evaluate(settings(shards, **pair))
    study = StudyDirectory(Path(pair["solver"]).parents[1])
    run = study.run(f"stories.{MODE}.tiny.s0")
    directory = run.evaluation(f"stories-test-{MODE}")
    assert json.loads(directory.results.read_text()) == results
    sizes = {role: size_of(pair[role]) for role in pair}
    assert sizes["decomposer"] != sizes["solver"]
    assert {
        "mode": MODE, "method": MODE, "model_name": "tiny", "train_seed": 0, "train_data": "stories", "warnings": [],
        "num_parameters": sizes["solver"], "total_parameters": sum(sizes.values()), "finished": True,
    }.items() <= results.items()  # fmt: skip
    for role, export in pair.items():
        assert results[role] == {
            "name": export, "model_name": "tiny", "method": "solver" if role == "solver" else "decomposer_interleaved",
            "num_parameters": sizes[role], "export_digest": atomic_dir.manifest_digest(Path(export)),
        }  # fmt: skip
    lines = [json.loads(line) for line in directory.predictions.read_text().splitlines()]
    assert [line["id"] for line in lines] == [shards.problem(index).id for index in range(10)]
    assert results["accuracy"]["strict"]["correct"] == 10
    for name in ("generated_tokens", "calculator_results_given"):
        assert sum(line[name] for line in lines) == results[name] > 0
    assert all(set(line["generated_by"]) == {"decomposer", "solver"} for line in lines)

    settings_file = yaml.safe_load(run.settings.read_text())
    assert settings_file["solver"] == pair["solver"] and EvaluateSettings(**settings_file)
    assert run.path in [found.path for found in study.runs()]
    found = load_frames([run.path]).evaluations  # the report reads them
    assert found[["mode", "method", "parameters"]].values.tolist() == [[MODE, MODE, sizes["solver"]]]


def test_gold_questions_guided_pairs_and_one_model_in_both_roles(
    pair: dict[str, str], export_for: Callable[[str], Path], shards: Shards
) -> None:
    study = StudyDirectory(Path(pair["solver"]).parents[1])
    gold = evaluate(settings(shards, solver=pair["solver"], subquestions="gold", calculator=False))
    where = study.run("stories.gold_subquestions.tiny.s0").evaluation(
        "stories-test-gold_subquestions-no_calculator"
    )
    assert where.results.is_file() and gold["total_parameters"] == gold["num_parameters"] == size_of(
        pair["solver"]
    )
    assert gold["calculator_results_given"] == 0 and "decomposer" not in gold
    assert "the solver has no calculator" in gold["warnings"][0]

    both = evaluate(
        settings(shards, decomposer=str(export_for("socratic").parent), solver=str(export_for("socratic")))
    )
    name = f"{MODE}_socratic"
    assert study.run(f"stories.{name}.tiny.s0").evaluation(f"stories-test-{name}").results.is_file()
    assert both["mode"] == MODE and both["total_parameters"] == both["num_parameters"]
    assert both["accuracy"]["strict"]["correct"] == 10

    guided = {"decomposer": str(export_for("decomposer_operators")), "solver": pair["solver"]}
    planner = str(export_for("planner_operators"))
    run = study.run("stories.iterative_ahead_operators.tiny.s0")
    for changes, name, num_models in (
        ({"planner": planner}, "stories-test-iterative_ahead_operators", 3),
        ({"guidance_from": "gold"}, "stories-test-iterative_ahead_operators-gold_guidance", 2),
    ):
        results = evaluate(settings(shards, **guided, **changes))
        assert run.evaluation(name).results.is_file() and results["accuracy"]["strict"]["correct"] == 10
        assert (results["guidance"], results["guidance_from"]) == (
            "operators",
            changes.get("guidance_from", "planner"),
        )
        models = [*guided.values(), *([planner] if num_models == 3 else [])]
        assert results["total_parameters"] == sum(map(size_of, models))


def test_directories(pair: dict[str, str], shards: Shards, tmp_path: Path) -> None:
    larger = remade(Path(pair["decomposer"]), tmp_path / "mine" / "stories.decomposer_interleaved.big.s0")
    solver = remade(Path(pair["solver"]), tmp_path / "mine" / "stories.solver.small.s0", model_name="small")
    evaluate(settings(shards, decomposer=str(larger), solver=str(solver), max_problems=1))
    run = RunDirectory(tmp_path / "mine" / f"stories.{MODE}.big+small.s0")
    results = json.loads(run.evaluation(f"stories-test-{MODE}").results.read_text())
    assert results["model_name"] == "tiny + small"
    for name in (
        "mine/stories.solver.small.s1",
        "other/stories.solver.small.s0",
        "mine/svamp.solver.small.s0",
    ):
        unrelated = remade(Path(pair["solver"]), tmp_path / name)
        with pytest.raises(UserError, match=r"not in runs of one study.*output_dir"):
            evaluate(settings(shards, decomposer=str(larger), solver=str(unrelated)))
    evaluation = RunDirectory(solver.parent).evaluation("mine")
    RunDirectory(solver.parent).settings.write_text("method: solver\n")  # of a training: not overwritten
    job.write_settings(settings(shards, **pair), evaluation)
    assert RunDirectory(solver.parent).settings.read_text() == "method: solver\n"


def test_three_ranks_and_a_killed_rank(
    pair: dict[str, str], shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    flags = [f"--{role}={export}" for role, export in pair.items()]
    flags += [f"--shards={shards.path}", "--batch_size=2"]
    directory = EvaluationDirectory(tmp_path / "three")
    output = run_well(["tools/evaluate.py", *flags, f"--output_dir={directory.path}"], 3)
    assert "strict 100.0 % (10/10" in output and f"{MODE}, greedy" in output
    assert read(directory) == read(uninterrupted)
    killed = EvaluationDirectory(tmp_path / "killed")
    arguments = [
        "-m",
        "tests.evaluation.one_rank",
        "kill:1:2",
        json.dumps(pair),
        str(shards.path),
        str(killed.path),
    ]
    assert all(outcome.status != 0 for outcome in run(arguments, 2, timeout=100))
    assert len(list(read_rank_files(killed.rank_files.glob("*.jsonl")))) >= 2
    assert not killed.results.exists()
    evaluate(settings(shards, **pair, output_dir=str(killed.path)))
    assert read(killed) == read(uninterrupted) and not killed.rank_files.exists()


def test_results_depend_on_every_model(pair: dict[str, str], shards: Shards, tmp_path: Path) -> None:
    """Results are rejected if either model of the pair has changed."""
    where = str(tmp_path / "there")
    first = evaluate(settings(shards, **pair, output_dir=where))
    assert evaluate(settings(shards, **pair, output_dir=where, batch_size=1)) == first
    with pytest.raises(UserError, match="max_steps: 16 there, 2 now"):
        evaluate(settings(shards, **pair, output_dir=where, max_steps=2))
    for role in pair:
        other = remade(Path(pair[role]), tmp_path / role, step=78)
        with pytest.raises(UserError, match=r"other settings .export_digests"):
            evaluate(settings(shards, **{**pair, role: str(other)}, output_dir=where))
    cut = evaluate(settings(shards, **pair, output_dir=where, max_new_tokens=5, overwrite=True))
    assert cut["unfinished"] == 10
    lines = [json.loads(line) for line in (tmp_path / "there" / "predictions.jsonl").read_text().splitlines()]
    assert {line["stopped"] for line in lines} == {"max_new_tokens"}


def test_incompatible_models_are_rejected(
    pair: dict[str, str], export_for: Callable[[str], Path], shards: Shards, tmp_path: Path
) -> None:
    out = {"output_dir": str(tmp_path / "out")}
    foreign = remade(Path(pair["decomposer"]), tmp_path / "foreign", tokenizer_fingerprint="0" * 64)
    with pytest.raises(
        UserError, match=rf"decomposer {foreign} and the solver {pair['solver']} have different tok"
    ):
        evaluate(settings(shards, **{**pair, "decomposer": str(foreign)}, **out))
    with pytest.raises(
        UserError, match="of method decomposer_interleaved; a solver is of method solver or socratic"
    ):
        evaluate(settings(shards, decomposer=pair["decomposer"], solver=pair["decomposer"], **out))
    with pytest.raises(UserError, match=r"one half of a pair.*--decomposer and --solver"):
        evaluate(settings(shards, model_name_or_path=pair["solver"], **out))
    with pytest.raises(UserError, match="mode cot is for one model"):
        evaluate(settings(shards, **pair, mode="cot", **out))
    plain = tmp_path / "plain"
    shutil.copytree(pair["solver"], plain, ignore=shutil.ignore_patterns(atomic_dir.MANIFEST))
    with pytest.raises(UserError, match=f"the solver {plain} does not record its training method"):
        evaluate(settings(shards, **{**pair, "solver": str(plain)}, **out))
    stopped = remade(
        Path(pair["decomposer"]), tmp_path / "stopped", finished=False, step=5, seed=1, data="svamp"
    )
    with pytest.raises(UserError, match="stopped at step 5"):
        evaluate(settings(shards, **{**pair, "decomposer": str(stopped)}, **out))
    results = evaluate(
        settings(shards, **{**pair, "decomposer": str(stopped)}, **out, allow_unfinished=True, max_problems=2)
    )
    assert results["warnings"] == [
        "the decomposer's training stopped at step 5, before its end",
        "the decomposer was trained with data svamp, the solver with data stories",
        "the decomposer was trained with seed 1, the solver with seed 0",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no model to evaluate"),
        ({"decomposer": "d"}, "a solver as well"),
        ({"solver": "s"}, "one source of sub-questions"),
        ({"solver": "s", "decomposer": "d", "subquestions": "gold"}, "one source of sub-questions"),
        ({"model_name_or_path": "m", "solver": "s", "decomposer": "d"}, "not both"),
        ({"model_name_or_path": "m", "subquestions": "gold"}, "not both"),
        ({"solver": "s", "subquestions": "gold", "planner": "p"}, "a planner needs a decomposer"),
        (
            {"solver": "s", "decomposer": "d", "planner": "p", "guidance_from": "gold"},
            "a planner needs a decomposer",
        ),
        ({"solver": "s", "decomposer": "d", "max_steps": 0}, "max_steps is 0"),
        ({"solver": "s", "decomposer": "d", "subquestions": "golden"}, "did you mean 'gold'"),
    ],
)
def test_missing_or_contradictory_roles(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluateSettings(shards="x", **given)


def test_data_without_subquestions_is_rejected(
    pair: dict[str, str], shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = Shards.segments
    monkeypatch.setattr(
        Shards, "segments", lambda self, i: [s for s in segments(self, i) if s[0] != 1 or i < 4]
    )
    gold = {"solver": pair["solver"], "subquestions": "gold", "output_dir": str(tmp_path)}
    results = evaluate(settings(shards, **gold))
    assert results["warnings"] == ["6 of 10 problems have no gold sub-questions to show"]
    monkeypatch.setattr(Shards, "segments", lambda self, i: [s for s in segments(self, i) if s[0] != 1])
    with pytest.raises(UserError, match="holds no sub-questions"):
        evaluate(settings(shards, **gold, overwrite=True))
