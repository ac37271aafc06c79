"""Shards: round trip of problems, views, equal bytes from any number of builders, rejected records, corrupt files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.models.tokenizer import fingerprint, load_tokenizer
from trainer.problems.sources import read_problems
from trainer.settings import PrepareSettings
from trainer.shards import segments
from trainer.shards.methods import VIEWS, SegmentRole, view_of
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.storage import atomic_dir


def _gsm8k(shared_data: Path, folder: Path, **changes: object) -> PrepareSettings:
    values = {
        "data": "gsm8k",
        "data_path": str(shared_data / "gsm8k"),
        "split": "test_socratic",
        "tokenizer_name": str(shared_data / "gpt2-tokenizer"),
        "output_dir": str(folder),
    }
    return PrepareSettings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return prepare(_gsm8k(shared_data, tmp_path_factory.mktemp("shards") / "gsm8k"))


def test_problems_survive_the_round_trip(gsm8k: Shards, shared_data: Path) -> None:
    source = list(read_problems("gsm8k", "test_socratic", str(shared_data / "gsm8k")))
    assert [gsm8k.problem(index) for index in range(len(gsm8k))] == source
    assert len(gsm8k) == 1319


def test_decoded_segments_are_the_text(gsm8k: Shards, shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    for index in range(0, len(gsm8k), 20):
        expected = segments.segment_texts(gsm8k.problem(index))
        found = [(role, tokenizer.decode(tokens.tolist())) for role, tokens in gsm8k.segments(index)]
        assert found[:-1] == expected[:-1]
        assert found[-1] == (SegmentRole.ANSWER, expected[-1][1] + "<|endoftext|>")


def test_bulk_lengths_are_those_of_the_examples(gsm8k: Shards) -> None:
    for name in VIEWS:
        for with_results in (False, True):
            view = view_of(name, with_results)
            lengths, learned_lengths = gsm8k.lengths(view), gsm8k.target_lengths(view)
            usable = np.flatnonzero(lengths)  # a problem without a calculation has no plan
            assert len(usable) > 1000
            for index in usable[::50].tolist():
                tokens, learned = gsm8k.example(index, view)
                assert len(tokens) == len(learned) == lengths[index]
                assert learned.sum() == learned_lengths[index]
                assert not learned[: len(gsm8k.prompt(index))].any()


def test_total_lengths_count_all_segments(gsm8k: Shards) -> None:
    totals = gsm8k.total_lengths()
    assert len(totals) == len(gsm8k) and totals.sum() == len(gsm8k.tokens)
    for index in range(0, len(gsm8k), 50):
        assert totals[index] == sum(len(tokens) for _, tokens in gsm8k.segments(index))


def test_decomposer_and_solver_share_what_socratic_learns(gsm8k: Shards) -> None:
    for index in range(0, len(gsm8k), 50):
        tokens, socratic = gsm8k.example(index, view_of("socratic"))
        solver_tokens, solver = gsm8k.example(index, view_of("solver"))
        assert np.array_equal(tokens, solver_tokens)
        decomposer = socratic & ~solver
        num_question_tokens = len(gsm8k.segment_tokens(index, SegmentRole.SUBQUESTION))
        assert decomposer.sum() == num_question_tokens + len(
            gsm8k.segment_tokens(index, SegmentRole.DELIMITER)
        )
        assert not (solver & ~socratic).any()


def test_bytes_do_not_depend_on_the_number_of_threads(shared_data: Path, tmp_path: Path) -> None:
    one = prepare(_gsm8k(shared_data, tmp_path / "one", split="train", num_processes=1, max_problems=4200))
    two = prepare(_gsm8k(shared_data, tmp_path / "two", split="train", num_processes=2, max_problems=4200))
    assert len(one) == 4200
    assert one.manifest == two.manifest


def test_builders_that_race_leave_one_finished_directory(shared_data: Path, tmp_path: Path) -> None:
    settings = ["--data", "gsm8k", "--data_path", str(shared_data / "gsm8k"), "--split", "test"]
    settings += [
        "--tokenizer_name",
        str(shared_data / "gpt2-tokenizer"),
        "--output_dir",
        str(tmp_path / "shards"),
    ]
    command = [sys.executable, "tools/prepare_shards.py", *settings, "--max_problems", "300"]
    root = Path(__file__).parents[2]
    builders = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [builder.communicate(timeout=600)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], printed
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert len(Shards.open(tmp_path / "shards", verify=True)) == 300


def test_shards_of_equal_settings_are_kept_and_of_others_refused(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = _gsm8k(shared_data, tmp_path / "shards", max_problems=20)
    first = prepare(settings)
    assert prepare(settings).fingerprint == first.fingerprint
    assert "already prepared" in capsys.readouterr().out
    other = _gsm8k(shared_data, tmp_path / "shards", max_problems=21)
    with pytest.raises(UserError, match="max_problems: 20 there, 21 now"):
        prepare(other)
    assert len(prepare(_gsm8k(shared_data, tmp_path / "shards", max_problems=21, overwrite=True))) == 21


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "unfinished"])
def test_damaged_shards_are_refused(shared_data: Path, tmp_path: Path, damage: str) -> None:
    prepare(_gsm8k(shared_data, tmp_path / "shards", max_problems=20))
    tokens = tmp_path / "shards" / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    if damage == "truncated":
        tokens.write_bytes(content[:-2])
    elif damage == "flipped":
        content[100] ^= 1
        tokens.write_bytes(content)
    elif damage == "missing":
        tokens.unlink()
    else:
        (tmp_path / "shards" / atomic_dir.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"tokens\.bin|not finished"):
        Shards.open(tmp_path / "shards", verify=damage == "flipped")


def test_bad_records_are_set_aside_with_line_and_reason(shared_data: Path, tmp_path: Path) -> None:
    good = {"question": "How many are 2 and 3?", "answer": "5", "steps": [{"solution": "2+3 = <<2+3=5>>5"}]}
    lines = [
        json.dumps({"id": "a", **good}).encode(),
        b"{not json",
        b'{"question": "\xff", "answer": "1"}',
        json.dumps({"id": "b", "question": "No answer?"}).encode(),
        json.dumps({"id": "a", **good}).encode(),
        json.dumps({"id": "long", **good, "question": "word " * 200}).encode(),
        json.dumps({"id": "nul", **good, "question": "a\x00b"}).encode(),
        json.dumps({"id": "c", **good, "question": "Is <|endoftext|> the end?"}).encode(),
    ]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    settings = PrepareSettings(
        data="jsonl",
        data_path=str(tmp_path / "mine.jsonl"),
        tokenizer_name=str(shared_data / "gpt2-tokenizer"),
        output_dir=str(tmp_path / "shards"),
        max_length=100,
    )
    shards = prepare(settings)
    assert [shards.problem(index).id for index in range(len(shards))] == ["a", "c"]
    rejects = [json.loads(line) for line in (tmp_path / "shards" / "rejects.jsonl").read_text().splitlines()]
    assert sum(shards.facts["rejects"].values()) == len(rejects) == 6
    reasons = {reject["line"]: reject["reason"] for reject in rejects if reject["reason"] != "too_long"}
    assert reasons == {2: "not_json", 3: "not_utf8", 4: "no_answer", 5: "repeated_id", 7: "nul_character"}
    # The end-of-sequence token in a text is plain text.
    eos = load_tokenizer(shared_data / "gpt2-tokenizer").eos_token_id
    tokens, _ = shards.example(1, view_of("cot"))
    assert (tokens == eos).sum() == 1


def test_a_method_without_its_steps_has_no_examples(shared_data: Path, tmp_path: Path) -> None:
    settings = PrepareSettings(
        data="strategyqa",
        data_path=str(shared_data / "strategyqa"),
        split="dev",
        tokenizer_name=str(shared_data / "gpt2-tokenizer"),
        output_dir=str(tmp_path / "shards"),
        with_facts=True,
    )
    shards = prepare(settings)
    assert (shards.lengths(view_of("answer_only")) > 0).all()
    assert (shards.lengths(view_of("decomposer")) > 0).all()
    assert not shards.lengths(view_of("cot")).any()
    assert shards.facts["problems_per_method"]["cot"] == 0
    facts = shards.problem(0).facts
    text = load_tokenizer(shared_data / "gpt2-tokenizer").decode(shards.prompt(0).tolist())
    assert facts and all(fact in text for fact in facts)


def test_fingerprint_is_equal_after_saving_and_differs_between_tokenizers(
    shared_data: Path, tmp_path: Path
) -> None:
    gpt2, stories = load_tokenizer(shared_data / "gpt2-tokenizer"), load_tokenizer("stories")
    gpt2.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(gpt2) != fingerprint(stories)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_inspect_shows_what_is_learned(gsm8k: Shards) -> None:
    command = [sys.executable, "tools/prepare_shards.py", "--output_dir", str(gsm8k.path), "--inspect", "1"]
    done = subprocess.run(
        [*command, "--method", "cot"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "<<16-3-4=9>>9 duck eggs" in done.stdout
    assert "How many eggs does Janet sell?" not in done.stdout  # a sub-question: cot does not read it
