from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trainer.errors import UserError
from trainer.problems.problem import Problem
from trainer.problems.sources import read_problems, source_digest


def test_a_file_and_its_folder_give_the_same_problems(shared_data):
    folder = shared_data / "strategyqa"
    from_folder = list(read_problems("strategyqa", "dev", str(folder)))
    assert list(read_problems("strategyqa", "dev", str(folder / "dev.json"))) == from_folder


def test_stories_need_no_path_and_accept_their_options():
    stories = list(read_problems("stories", "test", seed=3, num_problems=5))
    assert len(stories) == 5 and all(isinstance(story, Problem) for story in stories)


@pytest.mark.parametrize(
    ("data", "split", "path", "options", "message"),
    [
        ("gsm8", "train", "gsm8k", {}, "did you mean 'gsm8k'"),
        ("gsm8k", "train", None, {}, "needs a path: .*train.jsonl.*openai/gsm8k"),
        ("gsm8k", "train", "/no/such/folder", {}, "/no/such/folder does not exist"),
        ("gsm8k", "train", "missing/train.jsonl", {}, "does not exist"),
        ("gsm8k", "validation", "gsm8k", {}, "no gsm8k split 'validation'.*found test.jsonl.*train.jsonl"),
        ("gsm8k", "train_socratic", "gsm8k", {}, "no gsm8k split 'train_socratic'"),
        ("gsm8k", "test", "gsm8k/train.jsonl", {}, "looks like the split 'train', but split is 'test'"),
        ("gsm8k", "train", "gsm8k", {"seed": 1}, "gsm8k takes no option 'seed'"),
        ("gsm8k", "train", "gsm8k", {"revision": "main"}, "revision"),
        ("svamp", "dev", "svamp", {}, "svamp has no split 'dev'; choose one of train, test, all"),
        ("svamp", "test", "strategyqa", {}, "no SVAMP.json; found dev.json, train.json"),
        ("strategyqa", "test", "strategyqa", {}, "found dev.json, train.json"),
        ("jsonl", "train", "gpt2-tokenizer/merges.txt", {}, "not one record .*not_json"),
        ("stories", "train", "stories.jsonl", {}, "leave the path empty"),
    ],
)
def test_user_errors(shared_data, monkeypatch, data, split, path, options, message):
    monkeypatch.chdir(shared_data)
    with pytest.raises(UserError, match=message):
        list(read_problems(data, split, path, **options))


def test_most_errors_are_raised_before_iteration(shared_data):
    with pytest.raises(UserError):
        read_problems("gsm8k", "validation", str(shared_data / "gsm8k"))


def test_an_empty_folder_and_a_wrong_split_have_different_errors(tmp_path):
    with pytest.raises(UserError, match=r"found no \.json or \.jsonl file"):
        read_problems("jsonl", "train", str(tmp_path))


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch):
    """Redirect the cache of `datasets` to a temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _hub_copy(folder, shared_data):
    """Write a folder as `hf download --repo-type dataset` does: parquet files, and configurations in README.md."""
    import pyarrow
    from pyarrow import parquet

    for configuration, name in (("main", "test"), ("socratic", "test_socratic")):
        lines = (shared_data / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:50]
        (folder / configuration).mkdir()
        parquet.write_table(
            pyarrow.Table.from_pylist([json.loads(line) for line in lines]),
            folder / configuration / "test.parquet",
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - split: test\n    path: main/test.parquet\n"
        "- config_name: socratic\n  data_files:\n  - split: test\n    path: socratic/test.parquet\n---\n"
    )


def test_a_hub_copy_gives_the_same_problems_as_the_files(shared_data, tmp_path, datasets_cache):
    _hub_copy(tmp_path, shared_data)
    for split in ("test", "test_socratic"):
        from_files = list(read_problems("gsm8k", split, str(shared_data / "gsm8k")))[:50]
        assert list(read_problems("gsm8k", split, str(tmp_path))) == from_files
    with pytest.raises(UserError, match=r"configuration main, split train.*ValueError.*Unknown split"):
        read_problems("gsm8k", "train", str(tmp_path))


def test_source_digest_depends_on_the_content(shared_data, tmp_path, datasets_cache):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q?", "answer": 1}\n')
    before = source_digest("jsonl", "mine", str(file))
    assert source_digest("jsonl", "mine", str(tmp_path)) == before
    file.write_text('{"question": "q?", "answer": 2}\n')
    assert source_digest("jsonl", "mine", str(file)) != before

    hub_copy = tmp_path / "gsm8k"
    hub_copy.mkdir()
    _hub_copy(hub_copy, shared_data)
    before = source_digest("gsm8k", "test", str(hub_copy))
    assert source_digest("gsm8k", "test", str(hub_copy)) == before
    (hub_copy / "main" / "test.parquet").write_bytes((hub_copy / "socratic" / "test.parquet").read_bytes())
    assert source_digest("gsm8k", "test", str(hub_copy)) != before

    digests = {source_digest("stories", "train", seed=seed) for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_svamp_from_the_hub_has_the_same_split_as_the_file(shared_data, tmp_path, datasets_cache):
    """Hub copies have other splits, which are ignored, and answers as text."""
    import pyarrow
    from pyarrow import parquet

    records = json.loads((shared_data / "svamp" / "SVAMP.json").read_bytes())
    rows = [{**record, "Answer": str(record["Answer"])} for record in records]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[600:]), tmp_path / "data" / "train-0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[:600]), tmp_path / "data" / "test-0.parquet")
    from_hub = {p.id: p for p in read_problems("svamp", "test", str(tmp_path)) if isinstance(p, Problem)}
    from_file = read_problems("svamp", "test", str(shared_data / "svamp"))
    assert from_hub == {p.id: p for p in from_file if isinstance(p, Problem)} and len(from_hub) == 299


def test_an_unreachable_hub_is_a_user_error(tmp_path):
    """Runs in a subprocess, because `datasets` reads the variables at import."""
    script = (
        "from trainer.errors import UserError\n"
        "from trainer.problems.sources import read_problems\n"
        "try:\n    read_problems('gsm8k', 'test', 'openai/gsm8k')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "cannot load openai/gsm8k (configuration main, split test" in done.stdout
    assert "HF_HUB_OFFLINE=1" in done.stdout and "path to the files" in done.stdout
