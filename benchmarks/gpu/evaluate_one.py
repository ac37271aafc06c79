"""One way to answer problems: python -m benchmarks.gpu.evaluate_one ours|static|continuous [--tiny]

The same student, prompts, length limit and precision, greedy, no calculator. Timed from the first prompt to the last
answer, after a few problems to warm up. The last line on stdout is JSON, with a digest of every answer.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import torch

from benchmarks.gpu import materials
from trainer.evaluation.decoding import STUDENT, Decoding
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer
from trainer.problems.problem import DELIMITER
from trainer.shards.read import Shards

Answers = dict[str, str]  # id -> text


def main() -> None:
    way, tiny = sys.argv[1], "--tiny" in sys.argv
    problems = 12 if tiny else 1000
    limit, batch = (24, 4) if tiny else (450, 256)
    shards = materials.stories("test", problems, tiny)
    export = materials.student(tiny)
    dtype = "fp32" if tiny else "bf16"
    model = load.load_model(export, dtype, "sdpa").to(device=load.local_device())
    tokenizer = load_tokenizer(export)
    solve = {"ours": ours, "static": static, "continuous": continuous}[way]
    solve(model, tokenizer, shards, range(min(problems, batch // 2)), limit, batch)
    start = time.perf_counter()
    answers = solve(model, tokenizer, shards, range(problems), limit, batch)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "problems_per_second": problems / seconds,
                "answers": {key: _digest(up_to_answer(text)) for key, text in sorted(answers.items())},
                "tokens": sum(len(tokenizer(text)["input_ids"]) for text in answers.values()),
                "dtype": dtype,
            }
        )
    )


def ours(model: Any, tokenizer: Any, shards: Shards, which: range, limit: int, batch: int) -> Answers:
    from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
    from trainer.evaluation.work_queue import COUNTER_NAMES
    from trainer.runtime.shared_counter import shared_counter

    decoding = Decoding("socratic", calculator=False, max_new_tokens=limit, batch_size=batch)
    pipeline = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, decoding)
    with shared_counter(COUNTER_NAMES) as counter:
        return {found["id"]: found["text"] for found in predictions(pipeline, which, counter)}


def static(model: Any, tokenizer: Any, shards: Shards, which: range, limit: int, batch: int) -> Answers:
    """Generate on batches padded on the left, sorted by the prompt's length."""
    found: Answers = {}
    order = sorted(which, key=lambda index: -len(shards.prompt(index)))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        prompts = [shards.prompt(index).tolist() for index in indices]
        width = max(map(len, prompts))
        padded = [[tokenizer.eos_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=_config(tokenizer, limit),
            )
        for index, row in zip(indices, out[:, width:].tolist(), strict=True):
            found[shards.problem(index).id] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def continuous(model: Any, tokenizer: Any, shards: Shards, which: range, limit: int, batch: int) -> Answers:
    """Generate with transformers' continuous batching, on a GPU with its own defaults of cache and CUDA graphs."""
    from transformers.generation import ContinuousBatchingConfig

    prompts = [shards.prompt(index).tolist() for index in which]
    longest = max(map(len, prompts)) + limit
    small: dict[str, Any] = {"max_requests_per_batch": batch}
    if not torch.cuda.is_available():  # it would take most of the host's memory
        small |= {"num_blocks": batch * (-(-longest // 32)) + 8, "page_size": 32, "max_batch_tokens": 512}
    found = model.generate_batch(
        inputs=prompts,
        generation_config=_config(tokenizer, limit),
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **small),
        max_new_tokens=limit,
    )
    texts = (tokenizer.decode(one.generated_tokens, skip_special_tokens=True) for one in found.values())
    return {shards.problem(index).id: text for index, text in zip(which, texts, strict=True)}


def _config(tokenizer: Any, limit: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def up_to_answer(text: str) -> str:
    """Return the text up to the answer's line, where `ours` stops; `generate` continues to the end token."""
    reasoning, delimiter, answer = text.partition(DELIMITER)
    return reasoning + delimiter + answer.partition("\n")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
