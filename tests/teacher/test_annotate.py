"""Tests of annotation against a scripted HTTP server: kept chains, counts, and requests that must not repeat."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.teacher.scripted_endpoint import Reply, chat, serving
from trainer.errors import UserError
from trainer.problems.problem import Problem
from trainer.problems.sources import read_problems
from trainer.storage import atomic_dir
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.annotate import annotate, print_dry_run
from trainer.teacher.prompts import solution_text
from trainer.teacher.settings import AnnotateSettings

Solved = dict[str, Problem]


def settings(data_file: Path, url: str = "", **changes: Any) -> AnnotateSettings:
    values: dict[str, Any] = {
        "data": "jsonl",
        "data_path": str(data_file),
        "split": "mine",
        "output_dir": str(data_file.parent / "out"),
        "base_url": url,
        "model": "m",
        "retry_seconds": 0.01,
    }
    return AnnotateSettings(**{**values, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result_of(data_file: Path) -> Path:
    return AnnotationDirectory(data_file.parent / "out").result


def summary_of(data_file: Path) -> dict[str, Any]:
    return json.loads((result_of(data_file) / "summary.json").read_text())


@pytest.mark.parametrize("style", ["cot", "socratic"])
def test_right_chains_become_problems_with_steps(
    data_file: Path, solved_problems: Solved, style: str, capsys: pytest.CaptureFixture
) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        return chat(solution_text(solved_problems[question], style), prompt_tokens=50, completion_tokens=7)

    prices = {"price_per_million_input": 1000.0, "price_per_million_output": 10000.0}
    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url, style=style, **prices))
        assert len(endpoint.prompts) == len(set(endpoint.prompts)) == len(solved_problems)
        bodies = endpoint.bodies
    assert all(set(b) == {"messages", "model", "temperature", "top_p", "max_tokens"} for b in bodies)
    atomic_dir.verify_digests(result_of(data_file))
    read = list(read_problems("jsonl", "train", str(result_of(data_file) / "annotated.jsonl")))
    for problem, gold in zip(read, solved_problems.values(), strict=True):
        assert isinstance(problem, Problem) and (problem.id, problem.answer) == (gold.id, gold.answer)
        assert [step.solution for step in problem.steps] == [step.solution for step in gold.steps]
        if style == "socratic":
            assert problem.steps == gold.steps
    summary = summary_of(data_file)
    assert summary["tokens"] == {
        "prompt": 50 * len(read),
        "completion": 7 * len(read),
        "responses_without_usage": 0,
    }
    assert summary["cost"] == pytest.approx(len(read) * (0.05 + 0.07))
    by_steps = Counter(str(len(problem.steps)) for problem in solved_problems.values())
    assert {number: row["kept"] for number, row in summary["by_steps_written"].items()} == by_steps
    # The server is closed; a finished result needs no request.
    annotate(settings(data_file, endpoint.url, style=style))
    assert "already annotated" in capsys.readouterr().out


def faulty(solved: Solved, question: str, attempt: int) -> Reply:
    """Return a correct or wrong chain, drawn from question and attempt."""
    right = solution_text(solved[question], "socratic")
    draw = hashlib.sha256(f"{question} {attempt}".encode()).digest()[0] % 11
    return [
        *[chat(right)] * 5,
        chat(right.rpartition("####")[0] + "#### 123456789"),
        chat(right, "length"),
        chat(None, "content_filter"),
        chat(None),
        chat("I do not know."),
        chat(right.replace(">>", "0>>", 1)),
    ][draw]


@pytest.mark.parametrize("keep_all", [False, True])
def test_every_sample_and_every_problem_is_counted_once(
    data_file: Path, solved_problems: Solved, keep_all: bool
) -> None:
    first, *_, last = solved_problems
    held_out = data_file.parent / "held_out.jsonl"
    held_out.write_text(json.dumps({"question": last.upper(), "answer": "1", "id": "t"}) + "\n")
    with data_file.open("a") as file:
        file.write(
            '{"question": "no answer"}\n'
            + json.dumps({"question": first, "answer": "1", "id": "twice"})
            + "\n"
        )
    with serving(lambda question, attempt, _: faulty(solved_problems, question, attempt)) as endpoint:
        annotate(
            settings(
                *(data_file, endpoint.url),
                num_samples=3,
                temperature=0.7,
                keep_all=keep_all,
                decontaminate=[f"jsonl:{held_out}:held_out"],
            )
        )
        asked = Counter(endpoint.prompts)
    folder, summary = result_of(data_file), summary_of(data_file)
    kept, rejected = lines(folder / "annotated.jsonl"), lines(folder / "rejected.jsonl")
    unannotated, contaminated = lines(folder / "unannotated.jsonl"), lines(folder / "contaminated.jsonl")

    samples = Counter((record["id"].partition("#")[0], record["meta"]["sample"]) for record in kept)
    samples += Counter((record["id"], record["sample"]) for record in rejected)
    assert set(samples.values()) == {1}
    for id in {id for id, _ in samples}:
        numbers = sorted(sample for other, sample in samples if other == id)
        assert numbers == list(range(len(numbers)))  # none is skipped
        assert len(numbers) == 3 or (not keep_all and any(record["id"] == id for record in kept))
    ids = {problem.id for problem in solved_problems.values()} | {"twice"}
    annotated = {record["id"].partition("#")[0] for record in kept}
    others = [record["id"] for record in unannotated + contaminated]
    assert len(others) == len(set(others)) and not annotated & set(others) and annotated | set(others) == ids
    assert [record["id"] for record in contaminated] == [solved_problems[last].id]
    assert contaminated[0]["meta"] == {"matches": "jsonl:held_out:t"}
    assert [record["reason"] for record in lines(folder / "bad_records.jsonl")] == ["no_answer"]

    assert summary["problems"] == {
        "annotated": len(annotated),
        "unannotated": len(unannotated),
        "contaminated": 1,
        "bad_records": 1,
    }
    assert summary["samples"] == {"kept": len(kept), "rejected": len(rejected)}
    assert summary["rejected_by_reason"] == Counter(record["reason"] for record in rejected)
    assert sum(row["samples"] for row in summary["by_steps_written"].values()) == len(samples)
    assert sum(row["kept"] for row in summary["by_steps_written"].values()) == len(kept)
    # The repeated question is sent once for both problems; every response is used.
    assert len(set(record["id"] for record in kept)) == len(kept)
    responses = lines(AnnotationDirectory(data_file.parent / "out").responses)
    assert sum(asked.values()) == len(responses) == len({r["key"] for r in responses})
    assert summary["responses"] == {"used": len(responses), "kept_from_other_prompts_or_models": 0}
    if keep_all:
        assert len(responses) == 3 * (len(ids) - 2)
        assert summary["rejected_by_reason"]["duplicate"] > 0


def test_parameters_reach_the_endpoint(data_file: Path) -> None:
    wanted = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 77, "stop": ["\n\n"]}
    with serving(lambda *_: chat("")) as endpoint:
        annotate(settings(data_file, endpoint.url, token_limit_field="max_completion_tokens", **wanted))
        body = endpoint.bodies[0]
    del body["messages"]
    sent = {"temperature": 0.7, "top_p": 0.9, "max_completion_tokens": 77, "stop": ["\n\n"]}
    assert body == {"model": "m", **sent}


def test_gold_hints_are_labelled(data_file: Path, solved_problems: Solved) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        assert f"Correct answer: {solved_problems[question].answer}\n" in prompt
        return chat(solution_text(solved_problems[question], "socratic"))

    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url, gold_hint=True))
    assert all(record["meta"]["gold_hint"] for record in lines(result_of(data_file) / "annotated.jsonl"))
    assert summary_of(data_file)["gold_hint"] is True
    assert atomic_dir.read_manifest(result_of(data_file))["facts"]["gold_hint"] is True


def test_responses_to_another_prompt_are_kept_and_not_used(
    data_file: Path, solved_problems: Solved, capsys: pytest.CaptureFixture
) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        return chat(solution_text(solved_problems[question], "socratic"))

    number = len(solved_problems)
    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url))
        changed = settings(data_file, endpoint.url, exemplars_from_gold=1, max_new_tokens=99)
        with pytest.raises(UserError, match=r"max_new_tokens: 512 there, 99 now.*--overwrite"):
            annotate(changed)
        assert len(endpoint.prompts) == number, "sent before the error"
        assert "exemplars" not in summary_of(data_file)
        changed.overwrite = True
        annotate(changed)
        assert len(endpoint.prompts) == 2 * number
        assert f"{number} responses of other prompts" in capsys.readouterr().out
        annotate(
            settings(data_file, endpoint.url, overwrite=True)
        )  # first settings again: all responses are in the log
        assert len(endpoint.prompts) == 2 * number
    assert summary_of(data_file)["responses"] == {
        "used": number,
        "kept_from_other_prompts_or_models": number,
    }


def test_a_dry_run_sends_nothing_and_writes_nothing(
    data_file: Path, solved_problems: Solved, capsys: pytest.CaptureFixture
) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        return chat(solution_text(solved_problems[question], "socratic"))

    with serving(script) as endpoint:
        wanted = settings(data_file, endpoint.url, price_per_million_output=1000.0)
        print_dry_run(wanted)
        seen = capsys.readouterr().out
        assert "12 requests at most, 0 of them already answered; a run sends 12\n" in seen
        assert f"cost at most about {12 * 512 / 1000:.2f}" in seen
        assert not (data_file.parent / "out").exists() and not endpoint.prompts
        annotate(wanted)
        assert endpoint.prompts[0] in seen or any(prompt in seen for prompt in endpoint.prompts)
        before = sorted(path.stat().st_mtime_ns for path in (data_file.parent / "out").rglob("*"))
        print_dry_run(wanted)
    assert "12 of them already answered; a run sends 0\n" in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in (data_file.parent / "out").rglob("*")) == before


def test_no_kept_chain_is_a_warning(data_file: Path, capsys: pytest.CaptureFixture) -> None:
    with serving(lambda *_: chat("Sorry.")) as endpoint:
        annotate(settings(data_file, endpoint.url))
    assert "no sample was kept" in capsys.readouterr().out
    again = read_problems("jsonl", "train", str(result_of(data_file) / "unannotated.jsonl"))
    assert sum(isinstance(problem, Problem) for problem in again) == 12


def test_a_base_model_completes(data_file: Path, solved_problems: Solved) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        text = solution_text(solved_problems[question], "socratic")
        return Reply({"choices": [{"text": text, "finish_reason": "stop"}]})

    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url, api="completions", max_new_tokens=77))
        body = endpoint.bodies[0]
    assert (body["stop"], body["max_tokens"]) == (["\nProblem:"], 77) and "messages" not in body
    assert summary_of(data_file)["samples"] == {"kept": 12, "rejected": 0}
    assert summary_of(data_file)["tokens"]["responses_without_usage"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "write http://host:port/v1"),
        ({"base_url": "http://me:secret@localhost/v1"}, "OPENAI_API_KEY only"),
        ({"base_url": "http://localhost:x/v1"}, "base_url"),
        ({"decontaminate": ["svamp"]}, "DATA:PATH:SPLIT"),
        ({"decontaminate": ["jsonl:nowhere.jsonl:test"]}, "nowhere.jsonl does not exist"),
        ({"prompt": "nowhere.j2"}, "cannot read the prompt file"),
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_reported_before_a_request_is_sent(
    data_file: Path, changes: dict[str, Any], message: str
) -> None:
    with serving(lambda *_: chat("")) as endpoint:
        with pytest.raises(UserError, match=message) as refused:
            annotate(settings(data_file, **{"url": endpoint.url, **changes}))
        assert "secret" not in str(refused.value)
        assert not endpoint.prompts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": ""}, "give either base_url"),
        ({"model_name_or_path": "x"}, "give either base_url"),
        ({"model": ""}, "must be given together"),
        ({"num_samples": 2}, "give a temperature"),
        ({"exemplars": "x", "exemplars_from_gold": 2}, "not both"),
        ({"min_steps": 3, "max_steps": 2}, "max_steps is 2"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
        ({"top_p": 0.0}, "top_p"),
        ({"style": "soctratic"}, "did you mean 'socratic'"),
        ({"data": "stories"}, "choose one of gsm8k, svamp"),
    ],
)
def test_invalid_settings(data_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(data_file, **{"url": "http://x/v1", **changes})
