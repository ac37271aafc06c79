"""Few-shot evaluation of an undistilled model: prompts, and the end of its texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.errors import UserError
from trainer.evaluation.backends import slots
from trainer.evaluation.decoding import FEW_SHOT, STUDENT, Decoding
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.pipeline import Pipeline, RoleModel, exemplar_tokens, predictions
from trainer.models.kv_cache import ForwardBatch, prepare_prefill
from trainer.models.tokenizer import load_tokenizer
from trainer.problems.jsonl import record_from_problem
from trainer.problems.sources import read_exemplars
from trainer.runtime.shared_counter import ProcessCounter
from trainer.settings import EvaluateSettings
from trainer.shards.methods import VIEWS
from trainer.shards.read import Shards


@pytest.fixture
def exemplars(shards: Shards, tmp_path: Path) -> Path:
    """Two of the stories, solved."""
    path = tmp_path / "exemplars.jsonl"
    path.write_text(
        "".join(json.dumps(record_from_problem(shards.problem(index))) + "\n" for index in (0, 1))
    )
    return path


@pytest.fixture
def base(shards: Shards, tmp_path: Path) -> Path:
    """Folder of a base model: no manifest, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shards.facts["vocabulary_size"], hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    load_tokenizer(shards.tokenizer_path).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_prompt_is_the_exemplars_as_training_examples_and_the_problem(
    shards: Shards, exemplars: Path, base: Path
) -> None:
    tokenizer = load_tokenizer(shards.tokenizer_path)
    found = exemplar_tokens(read_exemplars(str(exemplars)), tokenizer)
    between = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    expected: list[int] = []
    for index in (0, 1):
        tokens, _ = shards.example(index, VIEWS["cot"])
        expected += [*tokens.tolist()[:-1], *between]  # without the end-of-sequence token
    assert found == expected

    role_models = {STUDENT: RoleModel(LlamaForCausalLM.from_pretrained(base), None)}
    pipeline = Pipeline(role_models, tokenizer, shards, Decoding(FEW_SHOT), read_exemplars(str(exemplars)))
    assert pipeline.rollout(5).sequences[0].pending == [*found, *shards.prompt(5).tolist()]


def test_text_ends_with_the_line_of_the_answer(shards: Shards, exemplars: Path, base: Path) -> None:
    tokenizer = load_tokenizer(shards.tokenizer_path)
    role_models = {STUDENT: RoleModel(LlamaForCausalLM.from_pretrained(base), None)}
    pipeline = Pipeline(role_models, tokenizer, shards, Decoding(FEW_SHOT), read_exemplars(str(exemplars)))
    rollout = pipeline.rollout(5)
    written = tokenizer("It has 3+4 = 7 cups.\n#### 7\n\nAnother story", add_special_tokens=False)[
        "input_ids"
    ]
    for token in written:
        if rollout.next_model is None:
            break
        rollout.on_token(token)
    assert (rollout.text, rollout.finished) == ("It has 3+4 = 7 cups.\n#### 7", True)


def test_exemplars_are_processed_once_without_changing_texts(
    shards: Shards, exemplars: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(shards.tokenizer_path)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)  # greedy texts vary
    decoding = Decoding(FEW_SHOT, max_new_tokens=12, batch_size=2, calculator=False)
    pipeline = Pipeline(
        {STUDENT: RoleModel(model, None)}, tokenizer, shards, decoding, read_exemplars(str(exemplars))
    )
    expected = {}
    for index in range(6):
        prompt = torch.tensor([pipeline.rollout(index).sequences[0].pending])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=0
        )
        tokens = [token for token in output[0, prompt.shape[1] :].tolist() if token]
        expected[shards.problem(index).id] = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert len(set(expected.values())) > 2

    num_processed: list[int] = []

    def counted(*arguments: Any) -> ForwardBatch:
        step = prepare_prefill(*arguments)
        num_processed.append(step.input_ids.shape[1])
        return step

    monkeypatch.setattr(slots, "prepare_prefill", counted)
    given = list(predictions(pipeline, range(6), ProcessCounter()))
    assert {prediction["id"]: prediction["text"] for prediction in given} == expected
    own = sum(len(shards.prompt(index)) for index in range(6))
    assert sum(num_processed) <= len(pipeline.shared_prefix) + own + 6 * 12 < 6 * len(pipeline.shared_prefix)


def test_results_of_an_undistilled_model(shards: Shards, exemplars: Path, base: Path, tmp_path: Path) -> None:
    def settings(**more: object) -> EvaluateSettings:
        given = {
            "model_name_or_path": str(base),
            "shards": str(shards.path),
            "mode": "few_shot",
            "max_new_tokens": 12,
        }
        out = tmp_path / "runs" / "mine" / "stories.few_shot.base.s0" / "evaluation" / "stories-test-few_shot"
        return EvaluateSettings(**{**given, "exemplars": str(exemplars), "output_dir": str(out), **more})

    results = evaluate(settings(model_label="the base"))
    assert (results["method"], results["mode"], results["model_name"]) == ("few_shot", "few_shot", "the base")
    assert results["num_problems"] == results["unfinished"] == 10  # random weights generate no answer
    assert (tmp_path / "runs" / "mine" / "stories.few_shot.base.s0" / "settings.yaml").is_file()

    first, second = exemplars.read_text().splitlines()
    exemplars.write_text(f"{second}\n{first}\n")
    with pytest.raises(UserError, match="exemplars"):
        evaluate(settings(model_label="the base"))


def test_bad_exemplar_and_distilled_model_are_rejected(
    shards: Shards, exemplars: Path, base: Path, export_for: Callable[[str], Path]
) -> None:
    given = {"shards": str(shards.path), "mode": "few_shot", "exemplars": str(exemplars)}
    with pytest.raises(UserError, match="cannot answer in mode few_shot"):
        evaluate(EvaluateSettings(model_name_or_path=str(export_for("cot")), **given))
    exemplars.write_text(exemplars.read_text() + '{"question": "How many?"}\n')
    with pytest.raises(UserError, match=r"exemplars.jsonl, line 3: no_answer"):
        evaluate(EvaluateSettings(model_name_or_path=str(base), output_dir="out", **given))
