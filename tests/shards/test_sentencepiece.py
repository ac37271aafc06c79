"""Tokenizers that put a space before every text: segments have the tokens of the whole text and decode to it."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.sentencepiece import KINDS, save_tokenizer
from trainer.errors import UserError
from trainer.evaluation.pipeline import exemplar_tokens, insert_exemplars
from trainer.evaluation.stop_tokens import StopTokens
from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.models.tokenizer import load_tokenizer
from trainer.problems.problem import Problem, Step
from trainer.problems.sources import read_problems
from trainer.settings import PrepareSettings
from trainer.shards.methods import SegmentRole, view_of
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.shards.segments import bos_tokens, segment_texts

_COUNT = 60


@pytest.fixture(scope="module")
def built(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Shards]]:
    """Return tokenizer folder and shards of GSM8K's first test problems for every kind of tokenizer."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    problems = list(read_problems("gsm8k", "test_socratic", str(shared_data / "gsm8k")))[:300]
    corpus = [text for problem in problems for _, text in segment_texts(problem)]  # type: ignore[arg-type]
    return {
        kind: (
            saved := save_tokenizer(kind, corpus, folder / kind),
            _prepare(shared_data, saved, folder / f"{kind}-shards"),
        )
        for kind in KINDS
    }


def _prepare(shared_data: Path, tokenizer: Path, folder: Path, **changes: object) -> Shards:
    values = {
        "data": "gsm8k", "data_path": str(shared_data / "gsm8k"), "split": "test_socratic",
        "tokenizer_name": str(tokenizer), "output_dir": str(folder), "max_problems": _COUNT, "max_length": 4096,
    }  # fmt: skip
    return prepare(PrepareSettings(**{**values, **changes}))  # type: ignore[arg-type]


def _text(problem: Problem, roles: frozenset[SegmentRole]) -> str:
    return "".join(text for role, text in segment_texts(problem) if role in roles)


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_decodes_to_its_text(kind: str, built: dict[str, tuple[Path, Shards]]) -> None:
    folder, shards = built[kind]
    assert len(shards) == _COUNT and not shards.facts["rejects"]
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in ("cot", "socratic", "decomposer", "answer_only", "planner_equations"):
        view = view_of(name)
        for index in range(0, _COUNT, 7):
            tokens, _ = shards.example(index, view)
            found = plain.decode(tokens.tolist(), skip_special_tokens=False)
            end = "</s>" if SegmentRole.ANSWER in view.inputs else ""
            assert found == f"<s> {_text(shards.problem(index), view.inputs)}{end}"


@pytest.mark.parametrize("kind", KINDS)
def test_segments_have_the_tokens_they_have_inside_the_text(
    kind: str, built: dict[str, tuple[Path, Shards]]
) -> None:
    """A newline is a token of its own here, so segments that end at newlines have the tokens of the whole text."""
    folder, shards = built[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of("decomposer")
    for index in range(_COUNT):
        tokens, _ = shards.example(index, view)
        assert tokens.tolist() == tokenizer(_text(shards.problem(index), view.inputs))["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_calculator_results_have_the_tokens_of_the_shards(
    kind: str, built: dict[str, tuple[Path, Shards]]
) -> None:
    folder, shards = built[kind]
    stop_tokens = StopTokens(load_tokenizer(folder))
    results = 0
    for index in range(_COUNT):
        segments = shards.segments(index)
        expected = [
            text for role, text in segment_texts(shards.problem(index)) if role == SegmentRole.CALCULATOR
        ]
        found = [tokens.tolist() for role, tokens in segments if role == SegmentRole.CALCULATOR]
        assert [list(stop_tokens.tokens(text)) for text in expected] == found
        assert [stop_tokens.text(tokens) for tokens in found] == expected
        results += len(found)
        delimiter = next(tokens.tolist() for role, tokens in segments if role == SegmentRole.DELIMITER)
        answer = next(tokens.tolist() for role, tokens in segments if role == SegmentRole.ANSWER)
        assert list(stop_tokens.tokens("####")) == delimiter
        assert stop_tokens.text(answer[:-1]) == f" {shards.problem(index).answer}"
    assert results > 50


def test_an_annotation_is_continued_with_the_tokens_of_the_shards(
    built: dict[str, tuple[Path, Shards]],
) -> None:
    stop_tokens = StopTokens(load_tokenizer(built["legacy"][0]))
    written = stop_tokens.tokens("She has 48/2 = <<48/2=")
    assert stop_tokens.calculator_result(written) == stop_tokens.tokens("24>>")
    assert (
        stop_tokens.text([*written, *stop_tokens.calculator_result(written)]) == "She has 48/2 = <<48/2=24>>"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_after_exemplars_continues_their_text(
    kind: str, built: dict[str, tuple[Path, Shards]]
) -> None:
    folder, shards = built[kind]
    tokenizer = load_tokenizer(folder)
    exemplars = [Problem("a", "How many?", "3", (Step("", "1+2 = <<1+2=3>>3"),)), shards.problem(1)]
    shown = "".join(_text(problem, view_of("cot").inputs) + "\n\n" for problem in exemplars)
    prompt = insert_exemplars(shards.prompt(0).tolist(), exemplar_tokens(exemplars, tokenizer), tokenizer)
    question = shards.problem(0).question + "\n"
    assert tokenizer.decode(prompt) == f"<s> {shown}{question}"
    line = tokenizer(f"\n{question}", add_special_tokens=False)[
        "input_ids"
    ]  # a space, the newline, the question
    assert prompt[-len(line) + 2 :] == line[2:]


def test_byte_level_prompts_are_unchanged_after_exemplars(shared_data: Path, tmp_path: Path) -> None:
    shards = _prepare(shared_data, shared_data / "gpt2-tokenizer", tmp_path / "s", max_problems=2)
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    exemplars = exemplar_tokens([shards.problem(1)], tokenizer)
    prompt = shards.prompt(0).tolist()
    assert insert_exemplars(prompt, exemplars, tokenizer) == [*exemplars, *prompt]
    assert not segment_tokenizer(tokenizer).continues_differently


def _characters(kind: str, folder: Path) -> Path:
    """Save a tokenizer of ASCII characters in `folder` and return it."""
    unknown = "<unk>" if kind == "unknown" else None
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *sorted(set(string.printable))])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    made.decoder = decoders.Fuse()
    if kind == "nfkc":
        made.normalizer = normalizers.NFKC()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token=unknown
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["drops", "unknown", "nfkc"])
def test_problems_that_a_tokenizer_changes_are_set_aside(
    kind: str, shared_data: Path, tmp_path: Path
) -> None:
    shards = _prepare(
        shared_data, _characters(kind, tmp_path / "t"), tmp_path / "s", max_problems=0, split="train"
    )
    source = list(read_problems("gsm8k", "train", str(shared_data / "gsm8k")))
    kept = {shards.problem(index).id for index in range(len(shards))}
    foreign = [
        problem.id
        for problem in source
        if isinstance(problem, Problem) and not "".join(text for _, text in segment_texts(problem)).isascii()
    ]
    assert kept == {problem.id for problem in source if isinstance(problem, Problem)} - set(foreign)
    assert shards.facts["rejects"]["changed_by_tokenizer"] == len(foreign) > 100
    rejects = [
        json.loads(line) for line in (shards.path / "rejects.jsonl").read_text().rstrip("\n").split("\n")
    ]
    assert {reject["reason"] for reject in rejects} == {"changed_by_tokenizer"}
    assert all(" became " in reject["detail"] for reject in rejects)


def test_a_tokenizer_that_changes_most_problems_is_refused(shared_data: Path, tmp_path: Path) -> None:
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *string.ascii_lowercase, " ", "\n"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "t"
    )
    with pytest.raises(UserError, match=r"changes the text of 60 of 60 problems \(.* became "):
        _prepare(shared_data, tmp_path / "t", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_bos_tokens_are_those_before_a_text_not_after_it(tmp_path: Path, shared_data: Path) -> None:
    """GLM puts `[gMASK]<sop>` before a text; T5 puts its EOS after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    assert bos_tokens(tokenizer) == []
    marks = [("a", tokenizer.convert_tokens_to_ids("a")), ("b", tokenizer.convert_tokens_to_ids("b"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="a b $A a", special_tokens=marks)
    assert bos_tokens(tokenizer) == [index for _, index in marks]
