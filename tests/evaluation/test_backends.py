"""Whole evaluations of families with unusual caches or attention: the texts equal those of `generate`, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.distributed import run_well
from tests.evaluation.test_evaluate import read, settings
from tests.models.small_configs import small
from trainer.errors import UserError
from trainer.evaluation.backends import SequenceState
from trainer.evaluation.backends.choice import make_backend
from trainer.evaluation.backends.transformers import CACHE_USES, CacheUse, TransformersBackend
from trainer.evaluation.complete import completion_backend, completions
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.generate import generate, make_sampler
from trainer.models.tokenizer import load_tokenizer
from trainer.problems.jsonl import record_from_problem
from trainer.settings import EvaluateSettings
from trainer.shards.read import Shards
from trainer.storage.run_directory import EvaluationDirectory

# The fastest correct backend, and its use of the family's cache.
FAMILIES: dict[str, tuple[str, CacheUse | None]] = {
    "lfm2": ("transformers", CACHE_USES[0]),
    "qwen3_5_text": ("transformers", CACHE_USES[0]),
    "mamba": ("transformers", CACHE_USES[1]),  # processes several tokens at once only with an empty state
    "rwkv": ("transformers", CACHE_USES[3]),  # its single steps mix the rows of a batch
    "openai-gpt": ("transformers", CACHE_USES[0]),  # has no cache
    "doge": ("transformers", CACHE_USES[3]),  # its attention selects keys from the whole text
    "deepseek_v3": ("slots", None),
    "gemma2": ("slots", None),
    "bloom": ("slots", None),
    "falcon": ("slots", None),
    "gpt_neo": ("transformers", CACHE_USES[0]),  # its classes compute attention themselves
}
OTHER_SETTINGS: dict[str, dict[str, Any]] = {"rwkv": {"attention_hidden_size": 64}}


def make(family: str, vocabulary: int = 1024) -> PreTrainedModel:
    """Return a model with random weights, large enough that texts vary."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        small(family, vocab_size=vocabulary, **OTHER_SETTINGS.get(family, {})), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = 0  # the stories' end token
    return model.eval()  # type: ignore[no-any-return]


def folder(model: PreTrainedModel, shards: Shards, path: Path) -> Path:
    model.save_pretrained(path)
    load_tokenizer(shards.tokenizer_path).save_pretrained(path)
    return path


def continued(model: PreTrainedModel, prompt: list[int], number: int) -> list[int]:
    """Return the tokens that transformers generates, without the end token."""
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=number, eos_token_id=0, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] == 0 else tokens


def predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in EvaluationDirectory(path).predictions.read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_generate(family: str, shards: Shards, tmp_path: Path) -> None:
    model = make(family)
    path = folder(model, shards, tmp_path / family)
    given = {"mode": "cot", "max_new_tokens": 20, "calculator": False, "batch_size": 4}
    backend, use = FAMILIES[family]
    for requested in ("auto", "transformers"):
        out = tmp_path / requested
        results = evaluate(settings(path, shards, **given, backend=requested, output_dir=str(out)))
        found = results["backends"]["student"]
        assert found["name"] == (backend if requested == "auto" else requested)
        assert 0 <= found["difference"] < 1e-4
        if found["name"] == "transformers" and use is not None:
            assert found["cache_use"] == vars(use)
        tokenizer = load_tokenizer(shards.tokenizer_path)
        for index, line in enumerate(predictions(out)):
            tokens = continued(model, shards.prompt(index).tolist(), 20)
            assert line["text"] == tokenizer.decode(tokens)
    assert (
        results["identity"]
        == json.loads(EvaluationDirectory(tmp_path / "auto").results.read_text())["identity"]
    )
    if backend == "transformers":
        with pytest.raises(UserError, match=rf"{family} cannot be decoded in slots: .*use backend auto"):
            evaluate(settings(path, shards, **given, backend="slots", output_dir=str(tmp_path / "slots")))


def test_hybrid_with_calculator_in_batches_alone_and_on_two_ranks(
    export_for: Callable[..., Path], shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calculator results force several tokens into rows of a batch."""
    export = export_for("socratic", hybrid=True)
    read_by_batch = {}
    for batch_size in (1, 4, 16):
        out = tmp_path / str(batch_size)
        results = evaluate(settings(export, shards, batch_size=batch_size, output_dir=str(out)))
        assert results["accuracy"]["strict"]["correct"] == 10 and results["calculator_results_given"] > 10
        assert results["backends"]["student"]["name"] == "transformers"
        read_by_batch[batch_size] = read(EvaluationDirectory(out))
    output = capsys.readouterr().out
    assert "student: decoding by the model's own forward pass and cache: in slots its logits differ" in output
    assert read_by_batch[1] == read_by_batch[4] == read_by_batch[16]
    arguments = [f"--{name}={value}" for name, value in {
        "model_name_or_path": export, "shards": shards.path, "output_dir": tmp_path / "two", "batch_size": 2,
    }.items()]  # fmt: skip
    output = run_well(["tools/evaluate.py", *arguments], 2)
    assert output.count("own forward pass and cache") == 1 and "strict 100.0 % (10/10" in output
    assert read(EvaluationDirectory(tmp_path / "two")) == read_by_batch[4]


def test_hybrid_as_solver_and_as_decomposer(
    export_for: Callable[..., Path], shards: Shards, tmp_path: Path
) -> None:
    """Requests wait for the other model, so with two models a batch is one request."""
    given: dict[str, Any] = {"shards": str(shards.path), "batch_size": 4}
    solver = str(export_for("solver", hybrid=True))
    for hybrid, decomposer in ((False, "slots"), (True, "transformers")):
        export = str(export_for("decomposer_interleaved", hybrid=hybrid))
        results = evaluate(
            EvaluateSettings(decomposer=export, solver=solver, output_dir=str(tmp_path / decomposer), **given)
        )
        assert results["accuracy"]["strict"]["correct"] == 10 and results["unfinished"] == 0
        names = {role: choice["name"] for role, choice in results["backends"].items()}
        assert names == {"decomposer": decomposer, "solver": "transformers"}
    gold = evaluate(
        EvaluateSettings(subquestions="gold", solver=solver, output_dir=str(tmp_path / "gold"), **given)
    )
    assert gold["accuracy"]["strict"]["correct"] == 10  # whole sub-questions are forced in a batch


@pytest.mark.parametrize("family", ["lfm2", "mamba", "rwkv"])
def test_few_shot(family: str, shards: Shards, tmp_path: Path) -> None:
    """The exemplars are processed once if the cache can be copied and continued, else in every batch."""
    model = make(family)
    path = folder(model, shards, tmp_path / family)
    exemplars = tmp_path / "exemplars.jsonl"
    exemplars.write_text(
        "".join(json.dumps(record_from_problem(shards.problem(index))) + "\n" for index in (0, 1))
    )
    out = tmp_path / "out"
    evaluate(
        settings(path, shards, mode="few_shot", exemplars=str(exemplars), max_new_tokens=12, calculator=False,
                 output_dir=str(out))
    )  # fmt: skip
    tokenizer = load_tokenizer(shards.tokenizer_path)
    shown = tokenizer("".join(_as_exemplar(shards, index) for index in (0, 1)), add_special_tokens=False)
    for index, line in enumerate(predictions(out)):
        prompt = [*shown["input_ids"], *shards.prompt(index).tolist()]
        text = tokenizer.decode(continued(model, prompt, 12))
        reasoning, delimiter, answer = text.partition("####")
        assert line["text"] == reasoning + delimiter + answer.partition("\n")[0]


def _as_exemplar(shards: Shards, index: int) -> str:
    problem = shards.problem(index)
    solutions = "".join(f"{step.solution}\n" for step in problem.steps)
    return f"{problem.question}\n{solutions}#### {problem.answer}\n\n"


class ForcedText:
    """Request with `forced` tokens after each chosen token."""

    def __init__(self, prompt: list[int], forced: list[int], length: int) -> None:
        self.sequences = [SequenceState(list(prompt))]
        self.next_model: int | None = 0
        self.tokens = list(prompt)
        self._forced, self._length = forced, length

    def on_token(self, token: int) -> None:
        new = [token, *self._forced]
        self.tokens += new
        self.sequences[0].pending += new
        self.next_model = 0 if len(self.tokens) < self._length else None


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "llama"])
@pytest.mark.parametrize("use", CACHE_USES)
def test_forced_tokens_and_rows_that_leave(family: str, use: CacheUse) -> None:
    """Every use of the cache gives the model's own greedy token after every prefix of every text."""
    model = make(family, 500)
    prompts = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [31, 32, 33, 34, 35], [40] * 9]
    texts = [ForcedText(prompt, list(range(50, 50 + number)), 20 + 2 * number)
             for number, prompt in enumerate(prompts)]  # fmt: skip
    waiting = iter(texts)
    backend = TransformersBackend[ForcedText](0, model, 3, 64, make_sampler(0.0, 1.0), (), use)
    ended = list(generate([backend], waiting, ForcedText.on_token, 3))
    assert len(ended) == len(texts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        with torch.no_grad():
            choices = model(torch.tensor([text.tokens]), use_cache=False).logits[0].argmax(-1).tolist()
        for at in range(len(prompt), len(text.tokens), number + 1):
            assert text.tokens[at] == choices[at - 1]
            assert text.tokens[at + 1 : at + 1 + number] == list(range(50, 50 + number))


def test_prefix_is_read_once_and_copied() -> None:
    model = make("lfm2", 500)
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prefix = list(range(100, 130))
    prompts = [[*prefix, *more] for more in ([7, 8, 9], [20, 21, 22, 23, 24], [30], [31, 32])]
    texts = [ForcedText(prompt, [], len(prompt) + 5) for prompt in prompts]
    waiting = iter(texts)
    backend = TransformersBackend[ForcedText](0, model, 2, 64, make_sampler(0.0, 1.0), prefix)
    list(generate([backend], waiting, ForcedText.on_token, 2))
    handle.remove()
    assert lengths.count(30) == 1 and max(lengths) == 30 and sum(length > 3 for length in lengths) == 1
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.tokens == [*prompt, *continued(model, prompt, 5)]


def test_completions_of_a_teacher_that_is_a_hybrid(shards: Shards) -> None:
    model, tokenizer = make("lfm2"), load_tokenizer(shards.tokenizer_path)
    prompts = [shards.prompt(index).tolist() for index in range(5)]
    found = {
        index: text
        for index, text, *_ in completions(model, tokenizer, prompts, max_new_tokens=9, batch_size=2)
    }
    for index, prompt in enumerate(prompts):
        assert found[index] == tokenizer.decode(continued(model, prompt, 9))
    with pytest.raises(UserError, match="the teacher cannot be decoded in slots"):
        completion_backend(model, prompts, 9, "the teacher", "slots")
    choice = completion_backend(model, prompts, 9, "the teacher")
    assert isinstance(make_backend(choice, 0, model, 2, 64, make_sampler(0.0, 1.0)), TransformersBackend)
