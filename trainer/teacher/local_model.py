"""A teacher on this machine: any causal LM that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trainer.evaluation import model_reference
from trainer.evaluation.backends.choice import TRANSFORMERS, BackendChoice
from trainer.evaluation.complete import completion_backend, completions
from trainer.evaluation.sampling import sampling_seed
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer, max_text_token_id
from trainer.runtime import terminal
from trainer.teacher.prompts import stop_texts
from trainer.teacher.responses import Request, Response, ResponseLog
from trainer.teacher.settings import AnnotateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def digest(name_or_path: str) -> str:
    """Of the model's files: a model that was trained on is another teacher. Raises UserError if there is none."""
    return model_reference.content_digest(model_reference.find_model(name_or_path))


def query_local_model(
    settings: AnnotateSettings,
    queues: Sequence[Sequence[Request]],
    log: ResponseLog,
    satisfied: Callable[[Request, Response], bool],
) -> None:
    """Work through the queues in rounds: the next request of a queue is asked if the answer before did not satisfy.

    A sample depends on seed and request alone, not on the batch. A prompt that fills the model's context is answered
    with a text that was cut off at once.
    """
    name = model_reference.find_model(settings.model_name_or_path).name
    load.load_config(name)  # refuses a folder without a model before its tokenizer is looked for
    tokenizer = load_tokenizer(name)
    model = load.load_model(name, settings.dtype)
    load.check_vocabulary(model.config, max_text_token_id(tokenizer), name)
    model.to(device=load.device())  # type: ignore[call-arg]
    context = load.context_length(model.config)
    backend: BackendChoice | None = None
    waiting = [list(queue) for queue in queues]
    with terminal.progress("annotate", sum(map(len, waiting))) as bar:
        num_done = 0
        while waiting:
            asked: dict[str, Request] = {}
            for queue in waiting:
                if log.get(queue[0].key) is None:
                    asked.setdefault(queue[0].key, queue[0])
            requests = list(asked.values())
            prompts = [_tokens(tokenizer, request.prompt) for request in requests]
            fitting = [place for place, prompt in enumerate(prompts) if not context or len(prompt) < context]
            for place in set(range(len(requests))) - set(fitting):
                log.append(requests[place], name, Response("", "length", len(prompts[place]), 0))
            asked_prompts = [prompts[place] for place in fitting]
            if backend is None and fitting:
                backend = completion_backend(model, asked_prompts, settings.max_new_tokens, name)
                if backend.name == TRANSFORMERS:
                    terminal.info(f"{name}: {backend.text()}")
            texts = completions(
                model,
                tokenizer,
                asked_prompts,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seeds=[sampling_seed(settings.seed, requests[place].key) for place in fitting],
                stop=tuple(stop_texts(settings)),
                batch_size=settings.batch_size,
                backend=backend or "auto",
            )
            for index, text, num_tokens, finished in texts:
                place = fitting[index]
                reason = "stop" if finished else "length"
                log.append(requests[place], name, Response(text, reason, len(prompts[place]), num_tokens))
                num_done += 1
                bar.update(num_done)
            waiting = [rest for queue in waiting if (rest := _rest(queue, log, satisfied))]


def _rest(
    queue: list[Request], log: ResponseLog, satisfied: Callable[[Request, Response], bool]
) -> list[Request]:
    """What of a queue is still needed after its first request was answered."""
    response = log.get(queue[0].key)
    assert response is not None
    return [] if satisfied(queue[0], response) else queue[1:]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """As a message of the user where the model was tuned for a chat, else as it is."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(str(chat), add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
