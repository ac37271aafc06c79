"""Settings dataclasses of all tools; values are checked on construction.

The fields are a tool's flags and the keys of its YAML file. Names follow Hugging Face where it has the setting. Imports
only the standard library, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.storage.configuration import (
    check_at_least,
    check_choices,
    check_given,
    check_positive,
    check_probability,
    setting,
)

METHODS = (
    *("answer_only", "cot", "socratic", "decomposer", "decomposer_interleaved", "solver"),
    *("planner_operators", "decomposer_operators", "decomposer_interleaved_operators"),
    *("planner_equations", "decomposer_equations", "decomposer_interleaved_equations"),
)
DATA = ("gsm8k", "svamp", "strategyqa", "jsonl", "stories")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("fp32", "bf16")
PACKING = ("auto", "true", "false")
MODES = ("auto", "answer_only", "cot", "socratic", "few_shot")
BACKENDS = ("auto", "slots", "transformers")


@dataclass
class PrepareSettings:
    """Settings of tools/prepare_shards.py: problems to token shards, shared by all methods and runs."""

    data: str = setting("stories", "data set", choices=DATA)
    data_path: str = setting("", "local file, local folder or hub name (stories need none)")
    split: str = setting("train", "split to read: train, validation, test, ...")
    tokenizer_name: str = setting("", "local folder or hub name; 'stories' trains the embedded tokenizer")
    output_dir: str = setting("", "shard directory to write, e.g. shards/gsm8k-train")
    max_length: int = setting(
        1024, "maximum tokens of an example (guidance not counted); longer ones are rejected"
    )
    max_problems: int = setting(0, "stop after this many problems (0: all)")
    with_facts: bool = setting(False, "put a problem's facts (StrategyQA) before its question")
    num_processes: int = setting(0, "threads that tokenise (0: one per core)")
    seed: int = setting(0, "seed of generated data (stories) and of splits made here (svamp)")
    num_problems: int = setting(4000, "stories: number of problems to generate")
    min_steps: int = setting(2, "stories: minimum steps of a problem")
    max_steps: int = setting(4, "stories: maximum steps of a problem")
    overwrite: bool = setting(False, "replace shards that were made with other settings")
    inspect: int = setting(0, "print this many examples of existing shards in colour instead of building")
    method: str = setting("socratic", "method for --inspect", choices=METHODS)

    def __post_init__(self) -> None:
        check_choices(self)
        check_given(self, "output_dir")
        if not self.inspect:
            check_given(self, "tokenizer_name")
            if self.data != "stories":
                check_given(self, "data_path")
        check_at_least(self, 8, "max_length")
        check_at_least(self, 1, "num_problems", "min_steps")
        check_at_least(self, self.min_steps, "max_steps")
        check_at_least(self, 0, "max_problems", "num_processes", "inspect")


@dataclass
class TrainSettings:
    """Settings of tools/train.py: model, method, shards, optimization, checkpoints and limits of one training run."""

    train_shards: str = setting("", "shard directory made by tools/prepare_shards.py")
    output_dir: str = setting("", "run directory, e.g. runs/my_study/gsm8k.socratic.gpt2.s0")
    method: str = setting("socratic", "distillation method: inputs and targets", choices=METHODS)
    model_name_or_path: str = setting("", "pretrained causal LM: local folder or hub name")
    config_name: str = setting(
        "", "random weights from a config: local folder, hub name, or a size such as stories-2m"
    )
    config_overrides: str = setting("", "changes to the config, e.g. n_layer=6,n_embd=384,n_head=6")
    model_label: str = setting("", "the model's name in reports (default: the last part of its path)")
    deepspeed: str = setting("", "DeepSpeed config, e.g. ds_configs/zero2.json (default: ZeRO 1)")
    per_device_train_batch_size: int = setting(1, "packs per device and forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per device and optimizer step")
    pack_length: int = setting(1024, "maximum tokens of a pack of whole examples")
    packing: str = setting(
        "auto",
        "several examples in one row; 'auto': if packed and unpacked logits agree, else padded rows; 'true': fail if "
        "they differ; 'false': padded rows",
        choices=PACKING,
    )
    train_on_calculator_results: bool = setting(
        False,
        "include calculator results in the loss (needed to evaluate without calculator)",
        old_names=("learn_calculator_results",),
    )
    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    weight_decay: float = setting(0.0, "weight decay of matrices; biases and norms are not decayed")
    adam_beta1: float = setting(0.9, "AdamW beta1")
    adam_beta2: float = setting(0.999, "AdamW beta2")
    adam_epsilon: float = setting(1e-8, "AdamW epsilon")
    max_grad_norm: float = setting(1.0, "maximum gradient norm (0: no clipping)")
    lr_scheduler_type: str = setting("cosine", "schedule after the warm-up", choices=SCHEDULES)
    warmup_steps: int = setting(0, "optimizer steps of linear warm-up")
    warmup_ratio: float = setting(0.0, "warm-up as a fraction of all steps, if warmup_steps is 0")
    num_train_epochs: float = setting(3.0, "epochs, if max_steps is 0")
    max_steps: int = setting(0, "optimizer steps (0: follow num_train_epochs)")
    seed: int = setting(0, "seed of weights, data order and dropout")
    bf16: bool = setting(False, "compute in bf16 with fp32 master weights")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    eval_shards: str = setting("", "shard directory for the validation loss")
    eval_steps: int = setting(0, "optimizer steps between evaluations of the validation loss (0: never)")
    eval_max_problems: int = setting(256, "maximum problems of an evaluation of the validation loss")
    save_steps: int = setting(500, "optimizer steps between checkpoints; the last step is always saved")
    save_total_limit: int = setting(2, "maximum number of checkpoints kept")
    resume_from_checkpoint: str = setting(
        "auto", "checkpoint directory; 'auto': latest valid checkpoint in output_dir, if any"
    )
    overwrite_output_dir: bool = setting(False, "remove the checkpoints in output_dir and start from step 0")
    report_to: str = setting(
        "none", "metrics.jsonl is always written; 'wandb' adds a W&B run", choices=("none", "wandb")
    )
    wandb_project: str = setting("socratic-trainer", "W&B project")
    timeout_seconds: int = setting(1800, "timeout of collectives")
    heartbeat_timeout_seconds: int = setting(
        300,
        "stop the run and report a rank that sends no heartbeat for this time (0: never)",
        old_names=("silence_seconds",),
    )
    time_limit_seconds: int = setting(
        0, "save and stop before this time has passed (0: the Slurm job's time limit, if any)"
    )
    max_restarts: int = setting(5, "maximum scheduler restarts without a new checkpoint")
    dry_run: bool = setting(False, "print the memory, disk space and time the run would need here, and exit")

    def __post_init__(self) -> None:
        check_given(self, "train_shards", "output_dir")
        self.check()

    def check(self) -> None:
        """Check all settings except train_shards and output_dir, which a plan may omit. Raises UserError."""
        check_choices(self)
        if bool(self.model_name_or_path) == bool(self.config_name):
            raise UserError(
                "give either model_name_or_path (pretrained) or config_name (random weights), not both or none"
            )
        if self.config_overrides and not self.config_name:
            raise UserError("config_overrides needs config_name; it cannot be used with model_name_or_path")
        check_at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        check_at_least(self, 1, "save_steps", "save_total_limit", "timeout_seconds")
        check_at_least(self, 8, "pack_length")
        check_at_least(self, 0, "max_steps", "time_limit_seconds", "max_restarts", "warmup_steps")
        check_at_least(self, 0, "eval_steps", "weight_decay", "max_grad_norm")
        if self.max_steps == 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: both max_steps and num_train_epochs are 0")
        check_positive(self, "learning_rate")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"warmup_ratio is {self.warmup_ratio}; it is a fraction of all steps, between 0 and 1"
            )
        if self.eval_steps and not self.eval_shards:
            raise UserError("eval_steps is set but eval_shards is not")


@dataclass
class EvaluateSettings:
    """Settings of tools/evaluate.py: one model, or planner, decomposer and solver, on the problems of a shard directory."""

    model_name_or_path: str = setting("", "export folder, checkpoint folder, local model or hub name")
    shards: str = setting("", "shard directory of the held-out problems")
    decomposer: str = setting("", "export that writes the sub-questions (decomposer[_interleaved], socratic)")
    solver: str = setting("", "export that solves them, instead of model_name_or_path (solver, socratic)")
    subquestions: str = setting(
        "decomposer", "source of the solver's sub-questions; 'gold': the data", choices=("decomposer", "gold")
    )
    guidance_from: str = setting(
        "planner",
        "source of a guided decomposer's plan; 'gold': the data",
        choices=("planner", "gold"),
    )
    planner: str = setting("", "export that writes the plan of a guided decomposer (planner_*)")
    max_steps: int = setting(16, "maximum sub-questions per problem")
    output_dir: str = setting("", "evaluation directory (default: in the run directory of the export)")
    mode: str = setting(
        "auto", "'auto': the export's method; 'few_shot': any model, prompted with exemplars", choices=MODES
    )
    exemplars: str = setting("", "few_shot: JSONL file of solved problems that precede each problem")
    model_label: str = setting("", "the model's name in reports (default: as in training, or its path)")
    calculator: bool = setting(True, "write the results of <<...=>> annotations while generating")
    temperature: float = setting(0.0, "0: greedy; else sampling, seeded by seed and problem only")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this total probability")
    seed: int = setting(0, "seed of sampling")
    max_new_tokens: int = setting(256, "maximum generated tokens per problem, over all models of a pair")
    batch_size: int = setting(32, "sequences decoded concurrently on one rank")
    backend: str = setting(
        "auto",
        "'slots': one KV cache for all sequences, fast; 'transformers': generic, for every model family; 'auto': slots if "
        "its logits agree with transformers', else transformers",
        choices=BACKENDS,
    )
    max_problems: int = setting(0, "evaluate only this many problems, from the first (0: all)")
    dtype: str = setting("fp32", "dtype of weights and computation", choices=DTYPES)
    allow_unfinished: bool = setting(False, "evaluate an export of a run that was not finished")
    max_restarts: int = setting(5, "maximum scheduler restarts without a new answer")
    overwrite: bool = setting(False, "replace results that were made with other settings")

    def __post_init__(self) -> None:
        check_given(self, "shards")
        self._check_models()
        check_choices(self)
        if (self.mode == "few_shot") != bool(self.exemplars):
            raise UserError("mode few_shot needs exemplars (JSONL of solved problems); other modes take none")
        check_at_least(self, 1, "max_new_tokens", "batch_size", "max_steps")
        check_at_least(self, 0, "temperature", "max_restarts", "max_problems")
        check_probability(self, "top_p")

    def _check_models(self) -> None:
        """Raise UserError unless there is one model, or a solver with a source of sub-questions."""
        if not self.model_name_or_path and not self.solver:
            missing = (
                "a solver as well" if self.decomposer else "model_name_or_path, or decomposer and solver"
            )
            raise UserError(f"there is no model to evaluate; give {missing}")
        if self.model_name_or_path and (
            self.solver or self.decomposer or self.planner or self.subquestions == "gold"
        ):
            raise UserError("give either model_name_or_path or solver (with decomposer), not both")
        if self.solver and (self.subquestions == "gold") == bool(self.decomposer):
            raise UserError(
                "a solver is asked either by a decomposer (an export) or, with subquestions gold, by the data"
            )
        if self.planner and (not self.decomposer or self.guidance_from == "gold"):
            raise UserError("a planner needs a decomposer, and no gold sub-questions or gold guidance")


@dataclass
class ConvertSettings:
    """Settings of tools/convert_checkpoint.py: a ZeRO checkpoint to a Hugging Face model folder."""

    checkpoint_dir: str = setting(
        "", "checkpoint directory, or a run directory (its latest checkpoint)", positional=True
    )
    output_dir: str = setting("", "folder to write (default: export/ in the run directory)")
    max_shard_size: str = setting("5GB", "maximum size of a safetensors file, e.g. 500MB or 5GB")
    dtype: str = setting("same", "'same' as trained, or fp32, or bf16", choices=("same", *DTYPES))
    verify: bool = setting(
        False, "reload the export, compare every weight and print the largest logit difference"
    )
    overwrite: bool = setting(False, "replace an export of another checkpoint")
    dry_run: bool = setting(False, "print the files that would be written, with sizes, and exit")

    def __post_init__(self) -> None:
        check_given(self, "checkpoint_dir")
        check_choices(self)


@dataclass
class PlanSettings(TrainSettings):
    """Settings of tools/plan.py: those of a training, and the hardware, for estimates before a run or a study."""

    study: str = setting("", "plan all runs of this study file instead of one training")
    gpu: str = setting("auto", "accelerator, e.g. a100-80gb, h100, cpu (auto: this machine's)")
    nodes: int = setting(1, "number of machines")
    gpus_per_node: int = setting(1, "accelerators per machine (with --gpu cpu: processes)")
    host_memory_gb: float = setting(0.0, "memory of a machine in GB (0: this machine's, or not checked)")
    disk_gb: float = setting(0.0, "disk space for the runs in GB (0: free space at output_dir, if it exists)")
    mean_length: int = setting(200, "mean tokens of an example, if no train_shards are given")
    num_problems: int = setting(0, "examples, if no train_shards are given (0: unknown; give max_steps)")
    calibrate: str = setting("", "finished run directory whose measured speed replaces the default one")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        if not self.study:
            self.check()
        check_at_least(self, 1, "nodes", "gpus_per_node")
        check_at_least(self, 2, "mean_length")
        check_at_least(self, 0, "host_memory_gb", "disk_gb", "num_problems")


@dataclass
class DoctorSettings:
    """Settings of tools/doctor.py: checks of this machine, or of every node of the allocation."""

    output_dir: str = setting(".", "folder for future runs: its space, speed and atomic renames are tested")
    min_free_gb: float = setting(10.0, "minimum free space at output_dir")
    known_good: str = setting("", "file of known-good name==version lines (default: this release's)")
    skip: list[str] = setting([], "groups of checks to skip, e.g. parity network")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        check_given(self, "output_dir")
        check_at_least(self, 0, "min_free_gb")


@dataclass
class PlotSettings:
    """Settings of tools/plot_scaling.py: run directories to a report with plots."""

    runs: list[str] = setting([], "study directories or run directories", positional=True)
    output_dir: str = setting("", "report directory (default: report/ in the first study directory)")
    title: str = setting("", "title of the report")
    max_examples: int = setting(
        2000, "predictions in the example viewer, shared evenly among evaluations (0: none)"
    )
    bertscore_model: str = setting(
        "", "local model folder for scoring sub-questions (needs the extra 'bertscore')"
    )

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name at least one study directory or run directory, e.g. runs/quickstart")
        check_at_least(self, 0, "max_examples")
