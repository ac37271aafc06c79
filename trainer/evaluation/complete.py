"""Complete prompts with a causal LM, e.g. a teacher or a base model."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation.backend_check import check_texts
from trainer.evaluation.backends import Backend
from trainer.evaluation.backends.choice import BackendChoice, choose_backend, make_backend
from trainer.evaluation.decoding import STUDENT
from trainer.evaluation.generate import generate, make_sampler
from trainer.evaluation.rollout import Program, Rollout, RolloutContext, RolloutModel
from trainer.evaluation.stop_tokens import StopTokens, end_of_text_ids
from trainer.models.load import context_length

_MAX_TOKENS_PER_CHARACTER = 4  # a UTF-8 character has at most 4 bytes, and a token at least one byte


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
    """Yield (index of the prompt, text, number of generated tokens, finished) in the order in which the texts end.

    finished: True if the text ended with an end token or was cut before the first `stop` string, False if it reached
    `max_new_tokens` or the context length. seeds: one sampling seed per prompt (default: the prompt's index). For k samples
    of a prompt, pass the prompt k times with different seeds. A sample does not depend on the other prompts. batch_size:
    maximum number of prompts that are decoded together. backend: a result of `completion_backend`, or "slots",
    "transformers" or "auto" to run its check now. Raises UserError if logits are not finite, or if no backend passes.
    """
    if not prompts:
        return
    if isinstance(backend, str):
        backend = completion_backend(model, prompts, max_new_tokens, "the model", backend)
    stop_tokens = StopTokens(tokenizer)
    rollout_model = RolloutModel(
        frozenset(), context_length(model.config) or float("inf"), end_of_text_ids(model, tokenizer)
    )
    context = RolloutContext(stop_tokens, [rollout_model], {STUDENT: 0}, max_new_tokens, calculator=False)
    # If the newest token completes a stop string, the stop string lies within the last `num_last` tokens.
    num_last = _MAX_TOKENS_PER_CHARACTER * max(map(len, stop), default=0)

    def program(rollout: Rollout) -> Program[None]:
        def is_done(tokens: list[int]) -> bool:
            return bool(stop) and _find_first(stop_tokens.text(tokens[-num_last:]), stop) is not None

        def set_text(text: str) -> None:
            rollout.lines = [text[: _find_first(text, stop)]]

        yield from rollout.generate(STUDENT, is_done, set_text)
        rollout.finished = True

    rollouts = (
        Rollout(index, prompt, context, program, [seeds[index] if seeds else index])
        for index, prompt in enumerate(prompts)
    )
    num_slots = min(batch_size, len(prompts))
    capacity = _capacity(model, prompts, max_new_tokens)
    decoder: Backend[Rollout] = make_backend(
        backend, 0, model, num_slots, capacity, make_sampler(temperature, top_p)
    )
    for rollout in generate([decoder], rollouts, Rollout.on_token, num_slots):
        yield rollout.index, rollout.text, rollout.generated.total(), rollout.finished


def completion_backend(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    name: str,
    requested: str = "auto",
) -> BackendChoice:
    """Return the fastest backend for `completions` that passes the check on prompts of different lengths.

    name: the model's name in messages. requested: "slots" or "transformers" to check only this backend, "auto" to check
    both. Raises UserError if no backend passes.
    """
    texts = check_texts(prompts, _capacity(model, prompts, max_new_tokens))
    return choose_backend(model, texts, name, requested)


def _capacity(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    return int(min(max(map(len, prompts)) + max_new_tokens, context_length(model.config) or float("inf")))


def _find_first(text: str, stop: tuple[str, ...]) -> int | None:
    """Return the position of the first stop string in `text`; None if `text` contains no stop string."""
    return min((text.find(string) for string in stop if string in text), default=None)
