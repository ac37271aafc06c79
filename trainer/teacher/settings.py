"""Settings of annotation. Imports no heavy library, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.settings import DTYPES
from trainer.storage.configuration import (
    check_at_least,
    check_choices,
    check_given,
    check_positive,
    check_probability,
    setting,
)

DATASETS = ("svamp", "strategyqa", "gsm8k", "jsonl")
STYLES = ("cot", "socratic")
TOKEN_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
TEACHER_APIS = ("chat", "completions")


@dataclass
class AnnotateSettings:
    """Annotate problems with solution steps that a teacher writes and the filter checks."""

    data: str = setting("svamp", "data set", choices=DATASETS)
    data_path: str = setting("", "local file, local folder or hub name")
    split: str = setting("train", "which split to annotate: train, validation, test, ...")
    seed: int = setting(
        0, "seed of the split (svamp), of the choice of exemplars and of a local model's samples"
    )
    max_problems: int = setting(0, "annotate at most this many problems (0: all)")
    output_dir: str = setting("", "directory of responses and result, e.g. annotations/svamp-train")
    style: str = setting("socratic", "format of the chains", choices=STYLES)
    base_url: str = setting("", "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    model: str = setting("", "the model's name at the endpoint (its key: OPENAI_API_KEY in the environment)")
    api: str = setting("chat", "'completions' for a model without a chat template", choices=TEACHER_APIS)
    model_name_or_path: str = setting("", "instead of an endpoint: local causal LM, local folder or hub name")
    dtype: str = setting("fp32", "dtype of the local model", choices=DTYPES)
    batch_size: int = setting(16, "sequences that the local model decodes concurrently")
    prompt: str = setting("", "prompt file (Jinja2) instead of the built-in one in trainer/teacher/prompts")
    exemplars: str = setting("", "JSONL file of solved problems to show (few-shot)")
    exemplars_from_gold: int = setting(0, "number of solved problems of exemplars_data to show")
    exemplars_data: str = setting("stories::train", "DATA:PATH:SPLIT that has steps; stories are generated")
    gold_hint: bool = setting(False, "show the gold answer to the teacher (labelled in all results)")
    with_facts: bool = setting(False, "show a problem's facts (StrategyQA)")
    num_samples: int = setting(
        1, "maximum samples per problem; the next is requested if none was kept so far"
    )
    keep_all: bool = setting(False, "request all samples and keep every correct one, as <id>, <id>#2, ...")
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    max_new_tokens: int = setting(512, "maximum tokens of a response")
    stop: list[str] = setting(
        [], "strings that end a response (default: none in a chat, else the start of another problem)"
    )
    token_limit_field: str = setting(
        "max_tokens", "name of the token limit in a chat request", choices=TOKEN_LIMIT_FIELDS
    )
    concurrency: int = setting(8, "concurrent requests")
    requests_per_minute: float = setting(0.0, "maximum request rate, retries included (0: no limit)")
    timeout_seconds: float = setting(120.0, "timeout of one request")
    max_attempts: int = setting(6, "attempts per request before it counts as unanswered")
    retry_seconds: float = setting(
        1.0, "first wait before a retry, then doubled; Retry-After takes precedence"
    )
    allow_unanswered: bool = setting(False, "finish although requests have no response")
    min_steps: int = setting(1, "reject chains with fewer steps")
    max_steps: int = setting(12, "reject chains with more steps")
    require_annotations: bool = setting(False, "reject chains to a number without any <<a*b=c>>")
    decontaminate: list[str] = setting([], "test sets DATA:PATH:SPLIT whose questions must not be annotated")
    decontaminate_ngram: int = setting(
        13, "a common n-gram of this many words is a match (0: equal questions only)"
    )
    price_per_million_input: float = setting(0.0, "price of a million prompt tokens, for the cost")
    price_per_million_output: float = setting(0.0, "price of a million completion tokens, for the cost")
    overwrite: bool = setting(
        False, "replace a result that was made with other settings (responses are kept)"
    )
    dry_run: bool = setting(False, "only print the number of requests, their cost and one prompt")

    def __post_init__(self) -> None:
        check_given(self, "data_path", "output_dir")
        check_choices(self)
        if bool(self.base_url) == bool(self.model_name_or_path):
            raise UserError(
                "give either base_url (an endpoint) or model_name_or_path (local), not both or none"
            )
        if bool(self.base_url) != bool(self.model):
            raise UserError("base_url and model must be given together")
        if self.exemplars and self.exemplars_from_gold:
            raise UserError("give either exemplars (a file) or exemplars_from_gold (a number), not both")
        check_at_least(self, 1, "batch_size", "num_samples", "max_new_tokens", "concurrency", "max_attempts")
        check_at_least(self, 1, "min_steps")
        check_at_least(self, self.min_steps, "max_steps")
        check_at_least(self, 0, "max_problems", "exemplars_from_gold", "temperature", "requests_per_minute")
        check_at_least(self, 0, "price_per_million_input", "price_per_million_output")
        check_at_least(self, 0, "retry_seconds", "decontaminate_ngram")
        check_positive(self, "timeout_seconds")
        check_probability(self, "top_p")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError("samples of temperature 0 are all equal; give a temperature")
