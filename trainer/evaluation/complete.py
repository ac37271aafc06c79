"""Continue any prompts with any causal LM: for teachers and base models that know nothing of our methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation.backend_check import check_texts
from trainer.evaluation.backends import Backend
from trainer.evaluation.backends.choice import BackendChoice, choose_backend, make_backend
from trainer.evaluation.decoding import STUDENT
from trainer.evaluation.generate import generate, make_sampler
from trainer.evaluation.rollout import ModelSlot, Program, Rollout, RolloutContext
from trainer.evaluation.stop_tokens import StopTokens, end_of_text_ids
from trainer.models.load import context_length

_TOKENS_PER_CHARACTER = 4  # at most: a token is at least a byte


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    backend: BackendChoice | str = "auto",
) -> Iterator[tuple[int, str, int, bool]]:
    """Yield (index of the prompt, text, generated tokens, finished) as they end, which is not in order.

    A text ends with an end token or right before the first of the `stop` strings (finished), else at `max_new_tokens`
    or at the model's context. `seeds`: one for each prompt (default: its index); what is sampled depends on the
    prompt and its seed alone. To sample k texts, give a prompt k times. backend: how the model is decoded; a name is
    checked first. Raises UserError for logits that are not finite, and for a model that no backend is right for.
    """
    if not prompts:
        return
    if isinstance(backend, str):
        backend = completion_backend(model, prompts, max_new_tokens, "the model", backend)
    language = StopTokens(tokenizer)
    context = context_length(model.config) or float("inf")
    rules = RolloutContext(
        language,
        [ModelSlot(frozenset(), context, end_of_text_ids(model, tokenizer))],
        {STUDENT: 0},
        max_new_tokens,
        False,
    )
    tail = max((_TOKENS_PER_CHARACTER * len(text) for text in stop), default=0)

    def method(solution: Rollout) -> Program[None]:
        def is_over(tokens: list[int]) -> bool:
            return bool(stop) and _first(language.text(tokens[-tail:]), stop) is not None

        def keep(text: str) -> None:
            end = _first(text, stop)
            solution.lines = [text[:end]]

        yield from solution.generate(STUDENT, is_over, keep)
        solution.finished = True

    waiting = iter(range(len(prompts)))

    def draw() -> Rollout | None:
        index = next(waiting, None)
        if index is None:
            return None
        return Rollout(index, prompts[index], rules, method, [seeds[index] if seeds else index])

    num_slots = min(batch_size, len(prompts))
    capacity = _capacity(model, prompts, max_new_tokens)
    decoder: Backend[Rollout] = make_backend(
        backend, 0, model, num_slots, capacity, make_sampler(temperature, top_p)
    )
    for solution in generate([decoder], draw, Rollout.on_token, num_slots):
        yield solution.index, solution.text, solution.generated.total(), solution.finished


def completion_backend(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    name: str,
    requested: str = "auto",
) -> BackendChoice:
    """Return how `completions` of these prompts are decoded, after a check on the shortest, a middle and the longest.

    name: the model's, for messages. Raises UserError if no backend is right, or the requested one is not.
    """
    texts = check_texts(prompts, _capacity(model, prompts, max_new_tokens))
    return choose_backend(model, texts, name, requested)


def _capacity(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return the longest sequence in tokens."""
    context = context_length(model.config) or float("inf")
    return int(min(max(map(len, prompts)) + max_new_tokens, context))


def _first(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of the stop strings begins."""
    found = [place for place in (text.find(one) for one in stop) if place >= 0]
    return min(found, default=None)
