"""Generate responses with a local teacher, which is any causal LM that transformers loads."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trainer.evaluation import model_reference
from trainer.evaluation.backends.choice import TRANSFORMERS, BackendChoice
from trainer.evaluation.complete import completion_backend, completions
from trainer.evaluation.sampling import sampling_seed
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer, max_text_token_id
from trainer.runtime import terminal
from trainer.teacher.job import AnnotationJob
from trainer.teacher.prompts import stop_texts
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest


def query_local_model(
    job: AnnotationJob, queues: Sequence[Sequence[TeacherRequest]], log: ResponseLog
) -> None:
    """Process the queues in rounds and append the responses to the log.

    A queue holds requests for samples of one problem. Each round runs the next request of every queue, at most
    `batch_size` requests at a time. A queue ends early if the job needs no more samples of the queue's problem. A sample
    depends only on the seed and the request, not on the batch. The response to a prompt that fills the model's context is
    empty and has finish reason "length".
    """
    settings = job.settings
    name = model_reference.find_model(settings.model_name_or_path).name
    load.load_config(name)  # raises UserError for a folder without a model, before the tokenizer is loaded
    tokenizer = load_tokenizer(name)
    model = load.load_model(name, settings.dtype)
    load.check_vocabulary(model.config, max_text_token_id(tokenizer), name)
    model.to(device=load.local_device())  # type: ignore[call-arg]
    backend: BackendChoice | None = None
    waiting = [list(queue) for queue in queues]
    with terminal.progress_bar("annotate", sum(map(len, waiting))) as bar:
        num_done = 0
        while waiting:
            by_key: dict[str, TeacherRequest] = {}  # equal requests run once
            for queue in waiting:
                if log.get(queue[0].key) is None:
                    by_key.setdefault(queue[0].key, queue[0])
            requests = list(by_key.values())
            prompts = [_tokens(tokenizer, request.prompt) for request in requests]
            if backend is None and prompts:
                backend = completion_backend(model, prompts, settings.max_new_tokens, name)
                if backend.name == TRANSFORMERS:
                    terminal.info(f"{name}: {backend.describe()}")
            texts = completions(
                model,
                tokenizer,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seeds=[sampling_seed(settings.seed, request.key) for request in requests],
                stop=tuple(stop_texts(settings)),
                batch_size=settings.batch_size,
                backend=backend or "auto",
            )
            for index, text, num_tokens, is_finished in texts:
                reason = "stop" if is_finished else "length"
                log.append(requests[index], name, Response(text, reason, len(prompts[index]), num_tokens))
                num_done += 1
                bar.update(num_done)
            answered, waiting = waiting, []
            for first, *rest in answered:
                response = log.get(first.key)
                assert response is not None
                if rest and not job.needs_no_more_samples(first, response):
                    waiting.append(rest)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of the prompt, as a user message if the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(str(chat), add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
