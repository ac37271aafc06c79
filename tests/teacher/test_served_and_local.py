"""Tests of one teacher, served by `transformers serve` (chat, completions) and run locally.

The model is tiny and has random weights: its texts are no chains, but greedy texts must be equal everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.teacher.test_annotate import lines, result_of, settings, summary_of
from trainer.errors import UserError
from trainer.models.load import load_config, write_random_weights
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.process_group import free_port
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.annotate import annotate
from trainer.teacher.settings import AnnotateSettings

MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small Llama that never ends its text, with a chat template."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = load_tokenizer("stories")
    tokenizer.chat_template = (
        "{% for message in messages %}User: {{ message['content'] }}\nTeacher: {% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    config = load_config("stories-0.2m", "tie_word_embeddings=false,initializer_range=0.3", len(tokenizer))
    write_random_weights(config, 0, folder)
    return folder


@pytest.fixture(scope="module")
def served(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on a free port; yields its base_url."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(teacher), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def texts(wanted: AnnotateSettings) -> dict[str, str]:
    """Annotate three problems; return the teacher's texts by problem."""
    annotate(wanted)
    directory = AnnotationDirectory(Path(wanted.output_dir))
    summary = json.loads((directory.result / "summary.json").read_text())
    records = lines(directory.responses)
    assert summary["samples"] == {"kept": 0, "rejected": 3} and len(records) == 3
    assert len(lines(directory.result / "rejected.jsonl")) == 3
    assert summary["tokens"]["completion"] == sum(record["completion_tokens"] for record in records)
    assert summary["tokens"]["prompt"] > 3 * 100
    return {record["problem"]: record["text"] for record in records}


def local(data_file: Path, teacher: Path, **changes: object) -> AnnotateSettings:
    values = {"base_url": "", "model": "", "model_name_or_path": str(teacher), "max_problems": 3}
    return settings(data_file, **{**values, "max_new_tokens": MAX_NEW_TOKENS, **changes})


def test_served_and_local_texts_are_the_same(data_file: Path, served: str, teacher: Path) -> None:
    plain = data_file.parent / "plain"
    shutil.copytree(teacher, plain, ignore=shutil.ignore_patterns("chat_template*"))
    served_by = {"base_url": served, "model": str(teacher), "model_name_or_path": ""}
    ways: dict[str, dict] = {
        "chat": {**served_by, "stop": ["\nProblem:"]},
        "local chat": {},
        "completions": {**served_by, "api": "completions"},
        "local": {"model_name_or_path": str(plain)},
    }
    found = {
        name: texts(local(data_file, teacher, output_dir=str(data_file.parent / name), **way))
        for name, way in ways.items()
    }
    assert found["chat"] == found["local chat"] != found["completions"] == found["local"]
    assert all(len(set(text)) > 3 for text in found["local"].values())  # not one repeated token
    assert len(set(found["local"].values())) == 3


def test_samples_of_a_local_model_do_not_depend_on_the_batch(data_file: Path, teacher: Path) -> None:
    sampled = {"temperature": 1.0, "num_samples": 2, "max_problems": 2}
    found = []
    for batch_size, seed in ((1, 0), (3, 0), (3, 1)):
        folder = data_file.parent / f"out-{batch_size}-{seed}"
        annotate(
            local(data_file, teacher, output_dir=str(folder), batch_size=batch_size, seed=seed, **sampled)
        )
        records = lines(AnnotationDirectory(folder).responses)
        assert len(records) == 4  # no chain is kept, so both samples were requested
        found.append({(record["problem"], record["sample"]): record["text"] for record in records})
    assert found[0] == found[1] != found[2]
    assert len(set(found[0].values())) == 4


def test_another_model_of_the_same_name_is_another_teacher(data_file: Path, teacher: Path) -> None:
    annotate(local(data_file, teacher))
    responses = AnnotationDirectory(data_file.parent / "out").responses
    other = data_file.parent / teacher.name
    load_tokenizer(teacher).save_pretrained(other)
    write_random_weights(load_config(str(teacher)), 1, other)
    with pytest.raises(UserError, match="model_digest"):
        annotate(local(data_file, other))
    annotate(local(data_file, other, overwrite=True))
    assert len(lines(responses)) == 6
    assert summary_of(data_file)["responses"] == {"used": 3, "kept_from_other_prompts_or_models": 3}


def test_a_prompt_that_fills_the_context_is_truncated(data_file: Path, teacher: Path) -> None:
    with data_file.open("a") as file:
        file.write(json.dumps({"question": "one two three " * 600, "answer": "1", "id": "long"}) + "\n")
    annotate(local(data_file, teacher, max_problems=0))
    reasons = {record["id"]: record for record in lines(result_of(data_file) / "rejected.jsonl")}
    assert (reasons["long"]["reason"], reasons["long"]["text"]) == ("truncated", "")
    assert sum(record["text"] != "" for record in reasons.values()) == 12


def test_no_such_model(data_file: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        annotate(local(data_file, data_file.parent / "nowhere"))
