from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.errors import UserError
from trainer.study.study_file import Study, load_study

REPOSITORY = Path(__file__).resolve().parents[2]
MakeStudy = Callable[[dict[str, Any]], Study]


def test_runs_are_models_by_methods_by_data_by_seeds(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["models"]["large"] = {"config_name": "stories-3m", "learning_rate": "2e-3"}
    values["data"]["more"] = {"train": {"data": "stories"}, "test": {"data": "stories"}}
    values["seeds"] = [0, 1]
    study = make_study(values)
    names = [run.name for run in study.runs]
    assert len(names) == len(set(names)) == 16
    assert names[:4] == [
        "stories.answer_only.small.s0",
        "stories.answer_only.large.s0",
        "stories.cot.small.s0",
        "stories.cot.large.s0",
    ]
    assert names[8] == "stories.answer_only.small.s1", "all runs of a seed come before the next seed"
    run = study.runs[3]
    assert run.directory.path == Path("runs/tiny/stories.cot.large.s0")
    assert (run.train.method, run.train.seed, run.train.model_label) == ("cot", 0, "large")
    assert (run.train.learning_rate, run.train.max_steps) == (2e-3, 2)
    assert run.train.train_shards == "shards/stories-train"
    assert [e.shards for e in run.evaluations] == ["shards/stories-test"]
    assert run.evaluations[0].output_dir == "runs/tiny/stories.cot.large.s0/evaluation/stories-test-cot"


def test_sets_besides_train_and_validation_are_evaluated(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["data"]["stories"] |= {
        "validation": {},
        "longer": {"split": "test", "min_steps": 5, "max_steps": 6},
    }
    values["train"]["eval_steps"] = 10
    run = make_study(values).runs[0]
    assert run.train.train_shards == "shards/stories-train"
    assert run.train.eval_shards == "shards/stories-validation"
    assert [e.shards for e in run.evaluations] == ["shards/stories-test", "shards/stories-longer"]


def test_methods_may_have_settings(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["methods"] = {"answer_only": {"max_steps": 7}, "cot": None}
    assert [run.train.max_steps for run in make_study(values).runs] == [7, 2]


def test_flags_win_over_the_file(values: dict[str, Any]) -> None:
    values["num_parallel"] = 2
    assert load_study(values, Path("tiny.yaml")).num_parallel == 2
    study = load_study(values, Path("tiny.yaml"), "elsewhere", "tokens", 3, 4)
    assert (study.num_ranks, study.num_parallel) == (3, 4)
    assert study.directory.path == Path("elsewhere/tiny")
    assert study.prepare_settings[0].output_dir == "tokens/stories-train"


def test_seeds_of_one_model(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["models"]["large"] = {"config_name": "stories-3m", "seeds": [2, 0, 1]}
    values["methods"] = ["cot"]
    names = [run.name for run in make_study(values).runs]
    assert names == [f"stories.cot.{name}" for name in ("small.s0", "large.s0", "large.s2", "large.s1")]


WRONG = {
    "modles: {}": "tiny.yaml: unknown key 'modles' (did you mean 'models'?)",
    "study: a/b": "tiny.yaml: study: 'a/b' is not a name",
    "study: null": "tiny.yaml: study is missing",
    "num_ranks: 0": "tiny.yaml: num_ranks is 0",
    "num_parallel: 0": "tiny.yaml: num_parallel is 0; it is the number of stages at the same time, at least 1",
    "num_parallel: all": "tiny.yaml: num_parallel is 'all'",
    "num_parallel: true": "tiny.yaml: num_parallel is True",
    "launcher: srun": "tiny.yaml: launcher is 'srun'; choose one of auto, deepspeed, mpiexec",
    "seeds: [0, 0]": "tiny.yaml: seeds: [0, 0] names a seed twice",
    "models: {m: {config_name: stories-0.2m, seeds: 3}}": "tiny.yaml: models.m: seeds is 3, expected a list",
    "seeds: many": "tiny.yaml: seeds is 'many', expected a list",
    "methods: [cott]": "tiny.yaml: methods: 'cott' is not a method; choose from answer_only, cot, socratic, iterative_",
    "methods: [iterativ_ahead]": "(did you mean 'iterative_ahead'?)",
    "methods: {cot: {models: [big]}}": "tiny.yaml: methods.cot.models: there is no 'big'; choose from small",
    "methods: {cot: {models: small}}": "tiny.yaml: methods.cot.models is 'small', expected a list of names, e.g. [small]",
    "methods: {cot: {data: [story]}}": "methods.cot.data: there is no 'story'; choose from stories (did you mean 'stories'?)",
    "methods: {solver: {learning_rat: 1}}": "tiny.yaml: methods.solver: unknown setting 'learning_rat' (did you mean",
    "methods: {iterative_ahead: {learning_rate: 1}}": "tiny.yaml: methods.iterative_ahead: unknown setting 'learning_rate'",
    "methods: {iterative_ahead: {decomposer_model: smal}}": "methods.iterative_ahead.decomposer_model: there is no 'smal'; "
    "choose from small (did you mean 'small'?)",
    "methods: {gold_subquestions: {decomposer_model: small}}": "unknown setting 'decomposer_model'",
    "methods: {iterative_ahead: {solver: x}}": "tiny.yaml: methods.iterative_ahead: solver is decided by the study",
    "methods: {iterative_ahead: {mode: cot}}": "tiny.yaml: methods.iterative_ahead: mode is decided by the method",
    "methods: {few_shot: {exemplars: nowhere.jsonl}}": "methods.few_shot: model small has random weights",
    "methods: {few_shot: {exemplar: x}}": "methods.few_shot: unknown setting 'exemplar' (did you mean 'exemplars'?)",
    "evaluate: {mode: few_shot}": "tiny.yaml: evaluate: few_shot is a method;",
    "evaluations: {calculator: true}": "tiny.yaml: evaluations is {'calculator': True}, expected a list",
    "evaluations: [{calculater: true}]": "tiny.yaml: evaluations[0]: unknown setting 'calculater' (did you mean 'calculator'?)",
    "evaluations: [{}, {top_p: 0.9}]": "tiny.yaml: evaluations: two of them would both be stories-test-answer_only",
    "models: {m: {config_name: stories-0.2m, num_ranks: none}}": "tiny.yaml: models.m: num_ranks is 'none'",
    "data: {a: {train: {data: stories}, b-c: {data: stories}}, a-b: {train: {data: stories}, c: {data: stories}}}": ""
    "tiny.yaml: data.a.b-c and data.a-b.c would both be shards/a-b-c; rename one",
    "methods: [cot, cot]": "names something twice",
    "methods: {cot: {lr: 1}}": "tiny.yaml: methods.cot: unknown setting 'lr'",
    "models: {}": "tiny.yaml: models: there are none",
    "models: {m: 3}": "tiny.yaml: models.m is 3, expected 'key: value' lines",
    "models: {m: {learning_rat: 1}}": "tiny.yaml: models.m: unknown setting 'learning_rat' (did you mean 'learning_rate'?)",
    "models: {m: {learning_rate: fast}}": "tiny.yaml: models.m: learning_rate is 'fast', expected float",
    "models: {m: {}}": "tiny.yaml: run stories.answer_only.m.s0: no model: give model_name_or_path",
    "models: {m: {seed: 3, config_name: x}}": "tiny.yaml: models.m: seed is decided by the study; remove it",
    "models: {m: {model_name_or_path: ./nowhere}}": "models.m: model_name_or_path: there is no file or folder ./nowhere",
    "models: {m: {config_name: stories-9m}}": "tiny.yaml: models.m: config_name: there is no 'stories-9m'; choose from",
    "train: {learning_rate: -1}": "tiny.yaml: train: learning_rate is -1.0; it must be a positive",
    "train: {deepspeed: ds_configs/none.json}": "tiny.yaml: train: deepspeed: there is no file ds_configs/none.json",
    "train: {eval_steps: 3}": "eval_steps is set but eval_shards is not",
    "evaluate: {batch_size: 0}": "tiny.yaml: evaluate: batch_size is 0; it must be at least 1",
    "evaluate: {shards: x}": "tiny.yaml: evaluate: shards is decided by the study",
    "convert: {dtype: fp8}": "tiny.yaml: convert: dtype is 'fp8'; choose one of same, fp32, bf16",
    "prepare: [a]": "tiny.yaml: prepare is ['a'], expected",
    "prepare: {max_length: 512}": "tiny.yaml: data.stories.train: tokenizer_name is required",
    "data: {stories: {test: {}}}": "tiny.yaml: data.stories: there is no set named 'train' to learn from",
    "data: {stories: {train: {}}}": "tiny.yaml: data.stories: there is no set to evaluate on",
    "data: {mine: {train: {}, test: {}}}": "tiny.yaml: data.mine.train: data is missing",
    "data: {a.b: {train: {}}}": "tiny.yaml: data.a.b: a data set's name has no dot",
    "data: {gsm8k: {train: {}, test: {}}}": "tiny.yaml: data.gsm8k.train: data_path is required",
    "data: {gsm8k: {train: {data_path: none.jsonl}, test: {}}}": "data.gsm8k.train: data_path: there is no file or "
    "folder none.jsonl",
    "data: {stories: {train: {num_problem: 3}}}": "data.stories.train: unknown setting 'num_problem' (did you mean "
    "'num_problems'?)",
}


@pytest.mark.parametrize("text", WRONG)
def test_faults_are_reported_with_their_key_path(
    values: dict[str, Any], make_study: MakeStudy, text: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_study({**values, **yaml.safe_load(text)})
    assert WRONG[text] in str(caught.value)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_the_studies_of_the_repository_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    study = load_study(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    assert study.name == path.stem
    assert study.runs
