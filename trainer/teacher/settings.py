"""Settings of annotation. This module imports no heavy library, so that `--help` is fast."""

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.settings import DATA, DTYPES
from trainer.storage.configuration import check_not_empty, check_values, setting

# Settings that determine which problems are annotated and which samples are kept.
RESULT_SETTINGS = (
    *("data", "split", "seed", "max_problems", "style", "gold_hint", "with_facts", "num_samples", "keep_all"),
    *("min_steps", "max_steps", "require_annotations", "decontaminate_ngram"),
)
SAMPLING_SETTINGS = ("temperature", "top_p", "max_new_tokens")


@dataclass
class AnnotateSettings:
    """Settings of tools/annotate.py: a teacher writes solution steps for problems, and a filter checks the steps."""

    data: str = setting("svamp", "data set", choices=tuple(name for name in DATA if name != "stories"))
    data_path: str = setting("", "data set: local file, local folder or Hub name")
    split: str = setting("train", "split to annotate, e.g. train, validation or test")
    seed: int = setting(0, "seed of the split (svamp), the choice of exemplars and a local model's samples")
    max_problems: int = setting(0, "annotate at most this many problems (0: all)", minimum=0)
    output_dir: str = setting("", "directory of responses and result, e.g. annotations/svamp-train")
    style: str = setting("socratic", "'socratic': steps with sub-questions", choices=("cot", "socratic"))
    base_url: str = setting("", "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    model: str = setting("", "the model's name at the endpoint (API key: OPENAI_API_KEY in the environment)")
    api: str = setting("chat", "'completions': no chat template", choices=("chat", "completions"))
    model_name_or_path: str = setting("", "local teacher, a causal LM, if no endpoint: folder or Hub name")
    dtype: str = setting("fp32", "dtype of the local model", choices=DTYPES)
    batch_size: int = setting(16, "sequences that the local model decodes concurrently", minimum=1)
    prompt: str = setting("", "prompt file (Jinja2) instead of the built-in one in trainer/teacher/prompts")
    exemplars: str = setting("", "JSONL file of solved problems to show (few-shot)")
    exemplars_from_gold: int = setting(0, "show this many solved problems of exemplars_data", minimum=0)
    exemplars_data: str = setting("stories::train", "DATA:PATH:SPLIT that has steps; stories are generated")
    gold_hint: bool = setting(False, "show the gold answer to the teacher (labelled in all results)")
    with_facts: bool = setting(False, "show a problem's facts (StrategyQA)")
    num_samples: int = setting(1, "maximum samples per problem; the first accepted one is kept", minimum=1)
    keep_all: bool = setting(False, "request all samples and keep every correct one, as <id>, <id>#2, ...")
    temperature: float = setting(0.0, "temperature of sampling (0: greedy)", minimum=0)
    top_p: float = setting(1.0, "sample the likeliest tokens of this total probability", probability=True)
    max_new_tokens: int = setting(512, "maximum tokens of a response", minimum=1)
    stop: list[str] = setting([], "strings that end a response (default: 'Problem:'; in a chat none)")
    token_limit_field: str = setting(
        "max_tokens", "name of the token limit in chats", choices=("max_tokens", "max_completion_tokens")
    )
    concurrency: int = setting(8, "concurrent requests", minimum=1)
    requests_per_minute: float = setting(0.0, "maximum request rate, with retries (0: no limit)", minimum=0)
    timeout_seconds: float = setting(120.0, "timeout of one request", positive=True)
    max_attempts: int = setting(6, "attempts per request before it counts as unanswered", minimum=1)
    retry_seconds: float = setting(1.0, "first wait before a retry, then doubled (or Retry-After)", minimum=0)
    allow_unanswered: bool = setting(False, "finish although requests have no response")
    min_steps: int = setting(1, "reject solutions with fewer steps", minimum=1)
    max_steps: int = setting(12, "reject solutions with more steps", minimum="min_steps")
    require_annotations: bool = setting(False, "reject numeric solutions without any calculation <<a*b=c>>")
    decontaminate: list[str] = setting([], "test sets DATA:PATH:SPLIT whose questions must not be annotated")
    decontaminate_ngram: int = setting(13, "this many equal words in a row match (0: all words)", minimum=0)
    price_per_million_input: float = setting(0.0, "price of a million prompt tokens", minimum=0)
    price_per_million_output: float = setting(0.0, "price of a million completion tokens", minimum=0)
    overwrite: bool = setting(False, "replace a result of other settings (responses are kept)")
    dry_run: bool = setting(False, "only print the number of requests, their cost and one prompt")

    def __post_init__(self) -> None:
        check_not_empty(self, "data_path", "output_dir")
        check_values(self)
        if bool(self.base_url) == bool(self.model_name_or_path):
            raise UserError("give either base_url (endpoint) or model_name_or_path (local), not both or none")
        if bool(self.base_url) != bool(self.model):
            raise UserError("base_url and model must be given together")
        if self.exemplars and self.exemplars_from_gold:
            raise UserError("give either exemplars (a file) or exemplars_from_gold (a number), not both")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError("all samples are equal at temperature 0; give a temperature")
