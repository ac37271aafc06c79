from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.report.synthetic_study import make_evaluation_run, make_run, make_study, write_evaluation
from trainer.errors import UserError
from trainer.report.columns import to_dicts
from trainer.report.error_types import analyse
from trainer.report.load import load_frames
from trainer.report.paired_tests import compare_methods, predictions_by_evaluation
from trainer.report.report_data import ReportData
from trainer.report.statistics import estimates, mcnemar
from trainer.report.summary import (
    CELL_KEYS,
    best_methods,
    compared_pairs,
    contrasts,
    headline_text,
    seed_spread,
    summarise,
)
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory, StudyDirectory


def _one(folder: Path, **changes: Any) -> RunDirectory:
    run = make_run(folder, "cot", "stories-2m", 2_013_952, seed=0)
    write_evaluation(run, "cot", "stories-2m", 2_013_952, 0, 0, **changes)
    return run


def _comparisons(folder: Path) -> list[dict[str, Any]]:
    evaluations = load_frames([folder]).evaluations
    answers = predictions_by_evaluation(analyse(evaluations)[0])
    return to_dicts(compare_methods(evaluations, answers))


def _runs(*paths: Path) -> dict[str, dict[str, Any]]:
    """Return one row of each run, by name."""
    return {row["run"]: row for row in to_dicts(load_frames(list(paths)).runs)}


def _panels(*paths: Path) -> list[str]:
    return list(load_frames(list(paths)).evaluations["panel"].unique())


def _headline(path: Path) -> str:
    data = ReportData("", load_frames([path]))
    return headline_text(data.headlines[0])


def _pairs(*rows: tuple[str, int, str, str, list[float]]) -> pd.DataFrame:
    """Return compared_pairs() of tests: (panel, size, first, second, p per seed; negative if the first method is better)."""
    tests = [
        {"panel": panel, "model": f"m{size}", "parameters": size, "first": first, "second": second, "n": 100}
        | {"p_holm": abs(p), "only_first": 20 if p < 0 else 10, "only_second": 15}
        for panel, size, first, second, p_values in rows
        for p in p_values
    ]
    return compared_pairs(pd.DataFrame(tests))


def _cells(*rows: tuple[int, str, list[float]]) -> pd.DataFrame:
    scores = [
        {
            "panel": "p",
            "model": f"m{size}",
            "parameters": size,
            "method": method,
            "correct": 100 * a,
            "n": 100,
        }
        for size, method, accuracies in rows
        for a in accuracies
    ]
    return estimates(pd.DataFrame(scores), CELL_KEYS).assign(total_parameters=1)


def _change_results(run: RunDirectory, change: Callable[[dict[str, Any]], None]) -> Path:
    path = run.evaluation("stories-test-cot").results
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


def test_a_study_is_read_as_it_was_written(study: StudyDirectory) -> None:
    runs = _runs(study.path)
    assert len(runs) == 13
    run = runs["stories.socratic.stories-13m.s1"]
    names = [run[name] for name in ("train_data", "method", "run_method", "model", "seed")]
    assert names == ["stories", "socratic", "socratic", "stories-13m", 1]
    assert run["parameters"] == 13_107_200 and run["max_steps"] == 240 and run["missing"] == ""
    assert run["training_steps"] == 240 and run["learned_tokens"] == 240 * 1400
    results = json.loads(run["results_path"].read_text())
    for rule in ("strict", "flexible"):
        stated = results["accuracy"][rule]
        assert (run[f"{rule}_correct"], run["n"]) == (stated["correct"], stated["n"])
        found = run[f"{rule}_low"], run[f"{rule}_high"]
        assert found == pytest.approx((stated["low"], stated["high"]))


def test_unfinished_runs_are_kept_with_what_is_missing(study: StudyDirectory) -> None:
    trained = make_run(study.path, "cot", "stories-2m", 2_013_952, seed=3)
    shutil.rmtree(trained.export)
    with atomic_dir.atomic_directory(trained.checkpoint(240), "checkpoint", {"finished": True, "step": 240}):
        pass
    make_run(study.path, "cot", "stories-2m", 2_013_952, seed=4)
    make_run(study.path, "cot", "stories-2m", 2_013_952, seed=5).evaluation(
        "stories-test-cot"
    ).rank_files.mkdir(parents=True)
    planned = {
        name: {"train": {}, "evaluate": {"stories-test-cot": {}}} for name in ("stories.cot.stories-2m.s6",)
    }
    study.settings.write_text(json.dumps({"format": 1, "runs": planned}))  # JSON is YAML
    runs = _runs(study.path)
    missing = {name: run["missing"] for name, run in runs.items() if run["missing"]}
    assert missing == {
        "stories.cot.stories-13m.s2": "training stopped at step 91 of 240, no checkpoint",
        "stories.cot.stories-2m.s3": "trained, not exported",
        "stories.cot.stories-2m.s4": "not evaluated",
        "stories.cot.stories-2m.s5": "evaluation missing: stories-test-cot",
        "stories.cot.stories-2m.s6": "not started",
    }
    unnamed = runs["stories.cot.stories-13m.s2"]
    assert unnamed["parameters"] == 13_107_200 and unnamed["broken_metrics_lines"] == 1


def test_a_run_whose_export_was_deleted_after_its_evaluation_is_finished(tmp_path: Path) -> None:
    run = _one(tmp_path / "study")
    shutil.rmtree(run.export)
    assert load_frames([run.path]).runs["missing"].tolist() == [""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["accuracy"]["strict"].update(correct=301), "correct <= n"),
        (lambda r: r["accuracy"]["strict"].update(accuracy=0.9), "strict says 0.9 but"),
        (lambda r: r["accuracy"].pop("flexible"), "accuracy flexible is None"),
        (lambda r: r.update(num_problems=299), "num_problems is 299"),
        (lambda r: r["by_num_steps"].pop("2"), "by_num_steps does not add up"),
        (lambda r: r["by_num_steps"].update(many=r["accuracy"]), "the key 'many'"),
        (lambda r: r.update(seconds="soon"), "seconds is 'soon', expected float"),
        (lambda r: r.update(format=2), "format is 2, expected 1"),
        (lambda r: r.update(method="socratic"), "method is 'socratic' but .*settings.yaml says 'cot'"),
        (lambda r: r.update(train_seed=1), "train_seed is 1 but .*settings.yaml says 0"),
    ],
)
def test_contradictory_results_are_refused(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    path = _change_results(_one(tmp_path / "study"), change)
    with pytest.raises(UserError, match=message) as error:
        load_frames([tmp_path / "study"])
    assert str(path) in str(error.value)


def test_unreadable_results_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    run = _one(tmp_path / "study")
    run.evaluation("stories-test-cot").results.write_text('{"format": 1, "accu')
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        load_frames([run.path])
    with pytest.raises(UserError, match="is not a directory"):
        load_frames([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no runs"):
        load_frames([tmp_path / "empty"])


def test_evaluations_of_one_run_are_of_one_model(tmp_path: Path) -> None:
    run = _one(tmp_path / "study")
    write_evaluation(run, "cot", "stories-2m", 2_013_952, 0, 0, data="svamp", num_parameters=7)
    with pytest.raises(UserError, match="num_parameters is 7 but"):
        load_frames([run.path])


def test_seeds_do_not_narrow_the_interval(study: StudyDirectory) -> None:
    evaluations = load_frames([study.path]).evaluations
    cells = summarise(evaluations)
    assert cells["panel"].unique().tolist() == ["stories test"] and len(cells) == 2 * 3
    assert cells["method"].tolist() == ["answer_only", "cot", "socratic"] * 2
    assert cells["model"].unique().tolist() == ["stories-2m", "stories-13m"]
    for cell in to_dicts(cells):
        seeds = evaluations[
            (evaluations["model"] == cell["model"]) & (evaluations["method"] == cell["method"])
        ]
        assert cell["n"] == 300 and cell["num_seeds"] == 2 and cell["standard_error"] is not None
        assert cell["mean"] == pytest.approx(seeds["strict_accuracy"].mean())
        assert seeds["strict_low"].min() <= cell["low"] < cell["mean"] < cell["high"]
        assert cell["high"] <= seeds["strict_high"].max()


def test_incomparable_accuracies_are_in_different_panels(tmp_path: Path) -> None:
    run = _one(tmp_path / "study")
    student = ("cot", "stories-2m", 2_013_952, 0, 0)
    write_evaluation(run, *student, calculator=False)
    write_evaluation(run, *student, data="svamp")
    write_evaluation(run, *student, split="hard", mode="answer_only")
    write_evaluation(run, *student, split="half", step=120, finished=False)
    sampled = write_evaluation(run, *student, data="warm", temperature=0.7, train_data="stories")
    sampled.rename(sampled.with_name("warm-test-cot-t0.7-s0"))
    assert _panels(run.path) == [
        "stories test",
        "stories half · stopped at step 120",
        "stories hard · asked for answer_only",
        "stories test · no calculator",
        "svamp test · trained on stories",
        "warm test · trained on stories · temperature 0.7",
    ]


def test_a_model_evaluated_twice_is_not_two_seeds(tmp_path: Path) -> None:
    run = _one(tmp_path / "study")
    copy = write_evaluation(run, "cot", "stories-2m", 2_013_952, 0, 1, calculator=False)
    record = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(record | {"calculator": True}))
    assert _panels(run.path) == [
        "stories test · stories-test-cot",
        "stories test · stories-test-cot-no-calculator",
    ]
    assert (summarise(load_frames([run.path]).evaluations)["num_seeds"] == 1).all()


def test_studies_are_joined_unless_a_run_is_in_both(tmp_path: Path) -> None:
    make_study(tmp_path / "small", sizes={"a": 1000}, methods=("cot",), seeds=(0,))
    make_study(tmp_path / "large", sizes={"b": 9000}, methods=("cot",), seeds=(0,))
    make_study(tmp_path / "again", sizes={"a": 1000}, methods=("cot",), seeds=(0,))
    joined = summarise(load_frames([tmp_path / "small", tmp_path / "large"]).evaluations)
    assert joined[["panel", "parameters", "model"]].values.tolist() == [
        ["stories test", 1000, "a"],
        ["stories test", 9000, "b"],
    ]
    assert _panels(tmp_path / "small", tmp_path / "again") == ["again · stories test", "small · stories test"]


def test_the_headline_is_computed_from_the_largest_model(study: StudyDirectory) -> None:
    cells = summarise(load_frames([study.path]).evaluations)
    text = _headline(study.path)
    large = cells[cells["model"] == "stories-13m"]
    best = large.loc[large["mean"].idxmax()]
    said = f"{100 * best['mean']:.0f} % [{100 * best['low']:.0f}, {100 * best['high']:.0f}]"
    assert text.startswith(
        f"On 300 problems of stories test, models of 13.1M parameters: socratic {said}, cot "
    )
    assert ". Mean of 2 training seeds. " in text
    weak = [
        row
        for row in _comparisons(study.path)
        if row["model"] == "stories-13m"
        and row["p_holm"] >= 0.05
        and "answer_only" in (row["first"], row["second"])
    ]
    assert not weak and text.endswith(" All differences are significant.")


def test_the_headline_of_a_pair_names_both_sizes(tmp_path: Path) -> None:
    run = make_evaluation_run(tmp_path / "study", "iterative_ahead", "m", 5000, 0)
    write_evaluation(run, "iterative_ahead", "m", 5000, 0, 0)
    assert "iterative_ahead (two models of 5k) " in _headline(tmp_path / "study")
    assert "One training seed" in _headline(tmp_path / "study")


def test_a_difference_is_significant_if_it_is_with_every_seed() -> None:
    pairs = _pairs(
        *(
            ("p", 1, "a", "b", [0.01, 0.02]),
            ("p", 1, "a", "c", [0.01, 0.2]),
            ("p", 1, "b", "c", [-0.01, 0.02]),
        ),
        ("p", 2, "a", "b", [-0.03]),
    )
    assert pairs["better"].tolist() == ["b", "", "", "a"]
    assert pairs["difference"].tolist() == pytest.approx([0.05, 0.05, 0.0, -0.05])
    assert pairs["p_min"].tolist() == [0.01, 0.01, 0.01, 0.03] and pairs["p_max"].tolist()[1] == 0.2


def test_the_best_method_of_a_row_beats_all_others() -> None:
    cells = _cells(
        (1, "a", [0.1]), (1, "b", [0.5]), (1, "c", [0.5]), (2, "a", [0.1]), (2, "b", [0.5]), (3, "a", [1.0])
    )
    pairs = _pairs(
        *(("p", 1, "a", "b", [0.01]), ("p", 1, "a", "c", [0.01]), ("p", 1, "b", "c", [0.5])),
        ("p", 2, "a", "b", [0.01]),
    )
    assert best_methods(cells, pairs).tolist() == [False, False, False, False, True, False]
    assert not best_methods(cells, pairs[:0]).any()


def test_contrasts_name_the_sizes_at_which_a_method_is_better() -> None:
    sizes = (12_000, 35_000, 100_000)
    cells = _cells(
        *((size, method, [0.5]) for size in sizes for method in ("answer_only", "cot", "socratic"))
    )
    p_values = {"cot": ([0.5], [0.01], [0.001]), "socratic": ([0.3], [0.2], [0.9])}
    rows = [
        ("p", size, first, second, p_values[second][number])
        for first, second in (("answer_only", "cot"), ("cot", "socratic"))
        for number, size in enumerate(sizes)
    ]
    assert contrasts(cells, _pairs(*rows)) == [
        "cot is significantly better than answer_only at 35k and 100k; no significant difference at 12k.",
        "socratic and cot differ significantly at no size.",
    ]
    better = [("p", size, "answer_only", "cot", [-0.01]) for size in sizes]
    assert contrasts(cells, _pairs(*better)) == [
        "answer_only is significantly better than cot at every size."
    ]


def test_the_spread_between_seeds_is_named() -> None:
    cells = _cells(
        (1000, "cot", [0.4]), (2000, "cot", [0.5, 0.62, 0.55]), (2000, "socratic", [0.7, 0.71, 0.72])
    )
    assert seed_spread(cells) == (
        "At 2k parameters there are 3 training seeds. They differ most for cot: 50 % to 62 %."
    )
    assert "one seed" in seed_spread(cells[:1])


def test_comparisons_count_problem_by_problem(study: StudyDirectory) -> None:
    found = _comparisons(study.path)
    assert len(found) == 2 * 2 * 3 and not any(row["refusal"] for row in found)
    wanted = {"model": "stories-13m", "seed": 1, "first": "cot", "second": "socratic"}
    one = next(row for row in found if wanted.items() <= row.items())
    correct = []
    for method in ("cot", "socratic"):
        path = study.run(f"stories.{method}.stories-13m.s1").evaluation(f"stories-test-{method}").predictions
        correct.append([json.loads(line)["correct_strict"] for line in path.read_text().splitlines()])
    pairs = list(zip(*correct, strict=True))
    b, c = pairs.count((True, False)), pairs.count((False, True))
    assert (one["only_first"], one["only_second"], one["n"]) == (b, c, 300)
    assert (one["both"], one["neither"]) == (pairs.count((True, True)), pairs.count((False, False)))
    assert one["p"] == mcnemar(b, c) and one["p"] <= one["p_holm"] <= 1


def test_different_problems_are_not_compared(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", sizes={"m": 1000}, seeds=(0,)).path
    shorter = StudyDirectory(folder).run("stories.answer_only.m.s0")
    shutil.rmtree(shorter.evaluations)
    write_evaluation(shorter, "answer_only", "m", 1000, 0, 0, num_problems=290)
    changed = (
        StudyDirectory(folder).run("stories.socratic.m.s0").evaluation("stories-test-socratic").predictions
    )
    first, rest = changed.read_text().split("\n", 1)
    changed.write_text(json.dumps(json.loads(first) | {"question": "Who?"}) + "\n" + rest)
    refusals = [row["refusal"] for row in _comparisons(folder)]
    assert refusals == [
        "different problems: 0 only in the first, 10 only in the second",
        "different problems: 0 only in the first, 10 only in the second",
        "different problems: 1 of the same id differ in question or answer",
    ]
    changed.unlink()
    assert _comparisons(folder)[2]["refusal"] == "predictions missing"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-1], "of 299 strict correct, but .*results.json says"),
        (lambda lines: [*lines[:-1], lines[0]], "line 300: id 'stories-[0-9a-f]+' occurs twice"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 300: not JSON"),
        (lambda lines: [*lines[:-1], "[1]"], "line 300: not JSON of one object"),
        (lambda lines: [*lines[:-1], '{"id": 7}'], "line 300: not a prediction"),
    ],
)
def test_predictions_that_do_not_fit_the_results_are_refused(
    tmp_path: Path, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    path = _one(tmp_path / "study").evaluation("stories-test-cot").predictions
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=message) as error:
        _comparisons(tmp_path / "study")
    assert str(path) in str(error.value)
