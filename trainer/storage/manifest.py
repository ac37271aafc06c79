"""Types of the JSON objects in manifests and in the result files of runs and evaluations (see docs/formats.md).

Manifests that an earlier version wrote may lack newer fields. Code must read such fields with `get`.
"""

from typing import Any, NotRequired, TypedDict


class FileDigest(TypedDict):
    bytes: int
    sha256: str


class Manifest(TypedDict):
    format: int
    kind: str
    facts: Any  # ShardFacts, CheckpointFacts, ExportFacts or AnnotationFacts
    files: dict[str, FileDigest]


class ShardFacts(TypedDict):
    """Facts of a shard directory. `recipe`: settings and versions that determine the content of the directory."""

    recipe: dict[str, Any]
    data: str
    split: str
    tokenizer_fingerprint: str
    num_problems: int
    num_segments: int
    num_tokens: int
    longest_example: int  # in tokens
    problems_per_method: dict[str, int]
    token_dtype: str
    vocabulary_size: int
    rejects: dict[str, int]  # reason -> number of rejected records


class AnnotationFacts(TypedDict):
    recipe: dict[str, Any]
    teacher: dict[str, Any]
    gold_hint: bool
    endpoint: str
    summary: dict[str, Any]


class LayoutRecord(TypedDict):
    """Batch layout of a training run, and the result of its check (see layout_check.py).

    `largest_difference`: distance from the logits of a plain forward pass, in standard deviations. `tolerance`: its maximum.
    """

    rows: str
    attention: str
    largest_difference: float
    tolerance: float
    compared_examples: int
    compared_in: str
    fallback_reason: str


class RunFacts(TypedDict):
    """Facts of a training run, in environment.json and in the manifest of each of its checkpoints."""

    method: str
    data: str
    model_name: str
    base_model: str
    pretrained: bool
    seed: int
    num_parameters: int
    world_size: int
    zero_stage: int
    dtype: str
    train_on_calculator_results: bool
    shards_fingerprint: str
    tokenizer_fingerprint: str
    packs_per_epoch: int
    layout: NotRequired[LayoutRecord]


class CheckpointFacts(RunFacts):
    step: int
    packs_consumed: int
    finished: bool


class ExportFacts(CheckpointFacts):
    checkpoint: str
    checkpoint_digest: str
    export_dtype: str
    max_shard_bytes: int
    text_part_of: NotRequired[str]


class ValidationResult(TypedDict):
    loss: float  # mean over the learned tokens (tokens with loss), in nats
    learned_tokens: int
    data: str


class StepMetrics(TypedDict):
    """A line of metrics.jsonl for one optimizer step."""

    step: int  # number of completed steps, this step included
    total_steps: int
    epoch: float
    loss: float  # mean over the learned tokens (tokens with loss), in nats
    learned_tokens: int
    tokens: int
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float
    tokens_per_second: float
    mfu: float | None  # model FLOP utilisation; None if the device's peak is not known
    memory_bytes: int | None
    packs_consumed: int
    run_seconds: NotRequired[
        float
    ]  # time of the run so far over all starts; added by MetricsLog, missing in release 0.1


class ValidationLine(TypedDict):
    """A line of metrics.jsonl for one validation."""

    step: int
    evaluation: ValidationResult


class Generation(TypedDict):
    """Fields of `Prediction` about the generation of the text."""

    generated_tokens: int
    calculator_results_given: int
    finished: bool  # False if a length limit cut the text
    generated_by: NotRequired[dict[str, int]]  # pairs only: model's role -> number of generated tokens
    stopped: NotRequired[str]  # pairs only: stop reason (see programs.py), "" after a normal end
    plan: NotRequired[str]  # guided decomposers only: plan that the decomposer reads


class Prediction(Generation):
    """A line of predictions.jsonl."""

    id: str
    question: str
    gold: str
    num_steps: int
    gold_steps: list[dict[str, str]]
    text: str
    strict: str | None  # answer by the strict extraction rule; None if there is no answer
    flexible: str | None  # answer by the flexible extraction rule
    correct_strict: bool
    correct_flexible: bool


class Accuracy(TypedDict):
    """Accuracy under one extraction rule, in results.json. `low` and `high`: bounds of the 95 % Wilson interval."""

    correct: int
    n: int
    accuracy: float
    low: float
    high: float
