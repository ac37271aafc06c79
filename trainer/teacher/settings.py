"""Settings of tools/annotate.py. Nothing is imported here but the standard library, so that `--help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.settings import DTYPES
from trainer.storage.configuration import check_at_least, check_given, check_one_of, setting

DATASETS = ("svamp", "strategyqa", "gsm8k", "jsonl")
STYLES = ("cot", "socratic")
TOKEN_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
TEACHER_APIS = ("chat", "completions")


@dataclass
class AnnotateSettings:
    """Problems without steps -> the same problems with a teacher's steps, verified."""

    data: str = setting("svamp", "data set", choices=DATASETS)
    data_path: str = setting("", "local file, local folder or hub name")
    split: str = setting("train", "which split to annotate: train, validation, test, ...")
    seed: int = setting(
        0, "seed of the split (svamp), of the choice of exemplars, of a local model's samples"
    )
    max_problems: int = setting(0, "annotate only the first so many problems (0: all)")
    output_dir: str = setting("", "directory of responses and result, e.g. annotations/svamp-train")
    style: str = setting("socratic", "what the teacher writes", choices=STYLES)
    base_url: str = setting("", "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    model: str = setting("", "the model's name at the endpoint (its key: OPENAI_API_KEY in the environment)")
    api: str = setting("chat", "'completions' for a model that knows no chat", choices=TEACHER_APIS)
    model_name_or_path: str = setting("", "instead of an endpoint: local causal LM, local folder or hub name")
    dtype: str = setting("fp32", "numbers the local model computes in", choices=DTYPES)
    batch_size: int = setting(16, "sequences the local model decodes at the same time")
    prompt: str = setting("", "prompt file (jinja2) instead of the style's own in trainer/teacher/prompts")
    exemplars: str = setting("", "JSONL file of solved problems to show (few-shot)")
    exemplars_from_gold: int = setting(0, "show so many solved problems of exemplars_data")
    exemplars_data: str = setting("stories::train", "DATA:PATH:SPLIT that has steps; stories are generated")
    gold_hint: bool = setting(False, "show the gold answer to the teacher (labelled in all results)")
    with_facts: bool = setting(False, "show a problem's facts (StrategyQA)")
    num_samples: int = setting(1, "most answers a problem; the next is asked for where none was kept so far")
    keep_all: bool = setting(False, "ask for all samples and keep every good one, as <id>, <id>#2, ...")
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    max_new_tokens: int = setting(512, "longest answer in tokens")
    stop: list[str] = setting([], "texts that end an answer (default: none in a chat, else the next problem)")
    token_limit_field: str = setting("max_tokens", "its name in a chat request", choices=TOKEN_LIMIT_FIELDS)
    concurrency: int = setting(8, "requests under way at the same time")
    requests_per_minute: float = setting(0.0, "never send more than this, repetitions included (0: no limit)")
    timeout_seconds: float = setting(120.0, "longest wait for one answer")
    max_attempts: int = setting(6, "attempts a request before it counts as unanswered")
    retry_seconds: float = setting(1.0, "first wait before a repetition, then doubled; Retry-After wins")
    allow_unanswered: bool = setting(False, "finish although the endpoint left requests unanswered")
    min_steps: int = setting(1, "a chain of fewer steps is rejected")
    max_steps: int = setting(12, "a chain of more steps is rejected")
    require_annotations: bool = setting(False, "reject a chain to a number without any <<a*b=c>>")
    decontaminate: list[str] = setting([], "test sets DATA:PATH:SPLIT whose questions must not be annotated")
    decontaminate_ngram: int = setting(13, "so many words in common are a match (0: only the whole question)")
    price_per_million_input: float = setting(0.0, "price of a million prompt tokens, for the cost")
    price_per_million_output: float = setting(0.0, "price of a million completion tokens, for the cost")
    overwrite: bool = setting(False, "replace a result that was made in another way (responses are kept)")
    dry_run: bool = setting(False, "only show how many requests there are, their cost and one prompt")

    def __post_init__(self) -> None:
        check_given("data_path", self.data_path)
        check_given("output_dir", self.output_dir)
        check_one_of("data", self.data, DATASETS)
        check_one_of("style", self.style, STYLES)
        check_one_of("api", self.api, TEACHER_APIS)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("token_limit_field", self.token_limit_field, TOKEN_LIMIT_FIELDS)
        if bool(self.base_url) == bool(self.model_name_or_path):
            raise UserError(
                "give either base_url (an endpoint) or model_name_or_path (local), not both or none"
            )
        if bool(self.base_url) != bool(self.model):
            raise UserError("base_url (where) and model (which one) go together")
        if self.exemplars and self.exemplars_from_gold:
            raise UserError("give either exemplars (a file) or exemplars_from_gold (a number), not both")
        for name in (
            "batch_size",
            "num_samples",
            "max_new_tokens",
            "concurrency",
            "max_attempts",
            "min_steps",
        ):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_steps", self.max_steps, self.min_steps)
        not_negative = ("max_problems", "exemplars_from_gold", "temperature", "requests_per_minute")
        prices = ("price_per_million_input", "price_per_million_output")
        for name in (*not_negative, *prices, "retry_seconds", "decontaminate_ngram"):
            check_at_least(name, getattr(self, name), 0)
        if not 0 < self.timeout_seconds < math.inf:
            raise UserError(f"timeout_seconds is {self.timeout_seconds}; it must be a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability above 0 and at most 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError("several samples of temperature 0 would all be the same; give a temperature")
