"""Settings of the tools, as dataclasses that check their values on construction.

Each field is a flag of the tool and a key of its YAML file. A setting that Hugging Face has too keeps Hugging Face's name.
This module imports no third-party library, so that `--help` is fast.
"""

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.storage.configuration import check_not_empty, check_values, setting

METHODS = (
    *("answer_only", "cot", "socratic", "decomposer", "decomposer_interleaved", "solver"),
    *("planner_operators", "decomposer_operators", "decomposer_interleaved_operators"),
    *("planner_equations", "decomposer_equations", "decomposer_interleaved_equations"),
)
FEW_SHOT = "few_shot"  # evaluation mode for any model; the prompt contains exemplars
DATA = ("gsm8k", "svamp", "strategyqa", "jsonl", "stories")
DTYPES = ("fp32", "bf16")


@dataclass
class PrepareSettings:
    """Settings of tools/prepare_shards.py, which tokenises problems into shards. All methods and runs share the shards."""

    data: str = setting("stories", "data set", choices=DATA)
    data_path: str = setting("", "data set: local file, local folder or Hub name (stories need none)")
    split: str = setting("train", "split to read, e.g. train, validation or test")
    tokenizer_name: str = setting("", "local folder or Hub name; 'stories': the small tokenizer for stories")
    output_dir: str = setting("", "shard directory to write, e.g. shards/gsm8k-train")
    max_length: int = setting(1024, "reject problems with more tokens (plans are not counted)", minimum=8)
    max_problems: int = setting(0, "stop after this many problems (0: all)", minimum=0)
    with_facts: bool = setting(False, "put a problem's facts (StrategyQA) before its question")
    num_processes: int = setting(0, "threads that tokenise (0: one per core)", minimum=0)
    seed: int = setting(0, "seed that generates stories, and that divides svamp into train and test")
    num_problems: int = setting(4000, "stories: number of problems to generate", minimum=1)
    min_steps: int = setting(2, "stories: minimum steps of a problem", minimum=1)
    max_steps: int = setting(4, "stories: maximum steps of a problem", minimum="min_steps")
    overwrite: bool = setting(False, "replace shards that were made with other settings")
    inspect: int = setting(0, "build nothing, print this many examples of existing shards", minimum=0)
    method: str = setting("socratic", "method whose examples --inspect prints", choices=METHODS)

    def __post_init__(self) -> None:
        check_values(self)
        check_not_empty(self, "output_dir")
        if not self.inspect:
            check_not_empty(self, "tokenizer_name")
            if self.data != "stories":
                check_not_empty(self, "data_path")


@dataclass
class TrainSettings:
    """Settings of tools/train.py, for one training run."""

    train_shards: str = setting("", "shard directory made by tools/prepare_shards.py")
    output_dir: str = setting("", "run directory, e.g. runs/my_study/gsm8k.socratic.gpt2.s0")
    method: str = setting("socratic", "what the model reads and learns to write", choices=METHODS)
    model_name_or_path: str = setting("", "pretrained causal LM: local folder or Hub name")
    config_name: str = setting("", "config for random weights: local folder, Hub name, or e.g. stories-2m")
    config_overrides: str = setting("", "changes to the config, e.g. n_layer=6,n_embd=384,n_head=6")
    model_label: str = setting("", "the model's name in reports (default: the last part of its path)")
    deepspeed: str = setting("", "DeepSpeed config, e.g. ds_configs/zero2.json (default: ZeRO 1)")
    per_device_train_batch_size: int = setting(1, "packs per device and forward pass", minimum=1)
    gradient_accumulation_steps: int = setting(1, "forward passes per device and optimizer step", minimum=1)
    pack_length: int = setting(1024, "maximum tokens of a pack, which holds whole examples", minimum=8)
    packing: str = setting(
        "auto",
        "'true': one row per pack, an error if that changes the logits; 'false': one padded row per example; 'auto': one row "
        "per pack if the logits do not change, else one padded row per example",
        choices=("auto", "true", "false"),
    )
    train_on_calculator_results: bool = setting(
        False, "include calculator results in the loss", old_names=("learn_calculator_results",)
    )
    learning_rate: float = setting(5e-5, "peak learning rate of AdamW", positive=True)
    weight_decay: float = setting(0.0, "weight decay of matrices (never of biases and norms)", minimum=0)
    adam_beta1: float = setting(0.9, "AdamW beta1")
    adam_beta2: float = setting(0.999, "AdamW beta2")
    adam_epsilon: float = setting(1e-8, "AdamW epsilon")
    max_grad_norm: float = setting(1.0, "maximum gradient norm (0: no clipping)", minimum=0)
    lr_scheduler_type: str = setting(
        "cosine", "learning rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_steps: int = setting(0, "optimizer steps of linear warm-up", minimum=0)
    warmup_ratio: float = setting(0.0, "warm-up as a fraction of all steps, if warmup_steps is 0")
    num_train_epochs: float = setting(3.0, "epochs, if max_steps is 0")
    max_steps: int = setting(0, "optimizer steps (0: follow num_train_epochs)", minimum=0)
    seed: int = setting(0, "seed of weights, data order and dropout")
    bf16: bool = setting(False, "compute in bf16 with fp32 master weights")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    eval_shards: str = setting("", "shard directory for the validation loss")
    eval_steps: int = setting(0, "optimizer steps from one validation to the next (0: never)", minimum=0)
    eval_max_problems: int = setting(256, "maximum problems of a validation")
    save_steps: int = setting(500, "optimizer steps between checkpoints; the last is always saved", minimum=1)
    save_total_limit: int = setting(2, "maximum number of checkpoints kept", minimum=1)
    resume_from_checkpoint: str = setting(
        "auto", "checkpoint directory; 'auto': the latest valid checkpoint in output_dir, if any"
    )
    overwrite_output_dir: bool = setting(False, "remove the checkpoints in output_dir and start from step 0")
    report_to: str = setting(
        "none", "'wandb': add a W&B run; metrics.jsonl is always written", choices=("none", "wandb")
    )
    wandb_project: str = setting("socratic-trainer", "W&B project")
    timeout_seconds: int = setting(1800, "timeout of collective operations", minimum=1)
    heartbeat_timeout_seconds: int = setting(
        300, "stop if a rank sends no heartbeat for this time (0: never)", old_names=("silence_seconds",)
    )
    time_limit_seconds: int = setting(
        0, "save and stop within this time (0: Slurm's limit, if any)", minimum=0
    )
    max_restarts: int = setting(5, "maximum scheduler restarts without a new checkpoint", minimum=0)
    dry_run: bool = setting(False, "print the memory, disk space and time the run would need here, and exit")

    def __post_init__(self) -> None:
        check_not_empty(self, "train_shards", "output_dir")
        self.check()

    def check(self) -> None:
        """Raise UserError for an invalid setting, except for an empty train_shards or output_dir (plan.py needs neither)."""
        check_values(self)
        if not self.model_name_or_path and not self.config_name:
            raise UserError("no model: give model_name_or_path (pretrained) or config_name (random weights)")
        if self.model_name_or_path and self.config_name:
            raise UserError("model_name_or_path and config_name are both set; remove one of them")
        if self.config_overrides and not self.config_name:
            raise UserError("config_overrides needs config_name; it cannot be used with model_name_or_path")
        if self.max_steps == 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: both max_steps and num_train_epochs are 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"warmup_ratio is {self.warmup_ratio}; it is a fraction of all steps, between 0 and 1"
            )
        if self.eval_steps and not self.eval_shards:
            raise UserError("eval_steps is set but eval_shards is not")


@dataclass
class EvaluateSettings:
    """Settings of tools/evaluate.py, for one model or for a solver with an optional decomposer and planner."""

    model_name_or_path: str = setting("", "model: export folder, checkpoint folder, local folder or Hub name")
    shards: str = setting("", "shard directory of the held-out problems")
    decomposer: str = setting("", "export that writes the sub-questions (decomposer[_interleaved], socratic)")
    solver: str = setting("", "export that solves sub-questions, for a pair of models (solver, socratic)")
    subquestions: str = setting(
        "decomposer", "source of the solver's sub-questions; 'gold': the data", choices=("decomposer", "gold")
    )
    guidance_from: str = setting(
        "planner", "source of a guided decomposer's plan; 'gold': the data", choices=("planner", "gold")
    )
    planner: str = setting("", "export that writes the plan of a guided decomposer (planner_*)")
    max_steps: int = setting(16, "maximum sub-questions per problem", minimum=1)
    output_dir: str = setting("", "evaluation directory (default: in the run directory of the export)")
    mode: str = setting(
        "auto",
        "format of the answers; 'auto': as the export was trained; 'few_shot': any model, prompted with --exemplars",
        choices=("auto", "answer_only", "cot", "socratic", FEW_SHOT),
    )
    exemplars: str = setting("", "few_shot: JSONL file of solved problems that precede each problem")
    model_label: str = setting("", "the model's name in reports (default: as in training, or its path)")
    calculator: bool = setting(True, "insert the results of <<...=>> annotations during generation")
    temperature: float = setting(0.0, "0: greedy; else sampling, seeded by seed and problem only", minimum=0)
    top_p: float = setting(1.0, "sample the likeliest tokens of this total probability", probability=True)
    seed: int = setting(0, "seed of sampling")
    max_new_tokens: int = setting(256, "maximum generated tokens per problem, by all models", minimum=1)
    batch_size: int = setting(32, "sequences decoded concurrently on one rank", minimum=1)
    backend: str = setting(
        "auto",
        "'slots': fast, one KV cache for all sequences; 'transformers': slower, for every model family; 'auto': slots if "
        "both give the same logits, else transformers",
        choices=("auto", "slots", "transformers"),
    )
    max_problems: int = setting(0, "evaluate only this many problems, from the first (0: all)", minimum=0)
    dtype: str = setting("fp32", "dtype of weights and computation", choices=DTYPES)
    allow_unfinished: bool = setting(False, "evaluate an export of a run that was not finished")
    max_restarts: int = setting(5, "maximum scheduler restarts without a new answer", minimum=0)
    overwrite: bool = setting(False, "replace results that were made with other settings")

    def __post_init__(self) -> None:
        check_not_empty(self, "shards")
        # The settings must name either one model, or a solver and one source of sub-questions.
        if not self.model_name_or_path and not self.solver:
            missing = "a solver as well" if self.decomposer else "model_name_or_path or a pair of models"
            raise UserError(f"there is no model to evaluate; give {missing}")
        is_pair = self.solver or self.decomposer or self.planner or self.subquestions == "gold"
        if self.model_name_or_path and is_pair:
            raise UserError("give either model_name_or_path or solver (with decomposer), not both")
        if self.solver and (self.subquestions == "gold") == bool(self.decomposer):
            raise UserError(
                "a solver needs one source of sub-questions: decomposer EXPORT, or subquestions gold (from the data)"
            )
        if self.planner and (not self.decomposer or self.guidance_from == "gold"):
            raise UserError("a planner needs a decomposer, and no gold sub-questions or gold guidance")
        check_values(self)
        if (self.mode == FEW_SHOT) != bool(self.exemplars):
            raise UserError("mode few_shot needs exemplars (JSONL of solved problems); other modes take none")


@dataclass
class ConvertSettings:
    """Settings of tools/convert_checkpoint.py, which converts a ZeRO checkpoint to a Hugging Face model folder."""

    checkpoint_dir: str = setting("", "checkpoint, or run directory (its latest checkpoint)", positional=True)
    output_dir: str = setting("", "folder to write (default: export/ in the run directory)")
    max_shard_size: str = setting("5GB", "maximum size of a safetensors file, e.g. 500MB or 5GB")
    dtype: str = setting("same", "dtype of the weights; 'same': as in training", choices=("same", *DTYPES))
    verify: bool = setting(False, "load the export, compare every weight, print the largest logit difference")
    overwrite: bool = setting(False, "replace an export of another checkpoint")
    dry_run: bool = setting(False, "print the files that would be written, with sizes, and exit")

    def __post_init__(self) -> None:
        check_not_empty(self, "checkpoint_dir")
        check_values(self)


@dataclass
class PlanSettings(TrainSettings):
    """Settings of tools/plan.py: the settings of a training run, and the hardware to plan for."""

    study: str = setting("", "plan all runs of this study file instead of one training")
    gpu: str = setting("auto", "accelerator, e.g. a100-80gb, h100, cpu (auto: this machine's)")
    nodes: int = setting(1, "number of machines", minimum=1)
    gpus_per_node: int = setting(
        1,
        "accelerators per machine (with --gpu cpu: processes); --study: 1 means the num_ranks of the file",
        minimum=1,
    )
    host_memory_gb: float = setting(0.0, "memory per machine in GB (0: this machine's, if known)", minimum=0)
    disk_gb: float = setting(0.0, "disk space in GB (0: free space at output_dir, if it exists)", minimum=0)
    mean_length: int = setting(200, "mean tokens of an example, if no train_shards are given", minimum=2)
    num_problems: int = setting(0, "examples, if no train_shards (0: unknown; give max_steps)", minimum=0)
    calibrate: str = setting("", "run directory of a finished training, to estimate with its measured speed")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        if self.study:
            check_values(self)
        else:
            self.check()


@dataclass
class DoctorSettings:
    """Settings of tools/doctor.py, which checks this machine, or every node of the allocation."""

    output_dir: str = setting(".", "folder for future runs: its space, speed and atomic renames are tested")
    min_free_gb: float = setting(10.0, "minimum free space at output_dir, in GB", minimum=0)
    known_good: str = setting("", "file of known-good name==version lines (default: this release's)")
    skip: list[str] = setting([], "groups of checks to skip, e.g. parity network")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        check_not_empty(self, "output_dir")
        check_values(self)


@dataclass
class PlotSettings:
    """Settings of tools/plot_scaling.py, which writes a report with plots from run directories."""

    runs: list[str] = setting([], "study directories or run directories", positional=True)
    output_dir: str = setting("", "report directory (default: report/ in the first study directory)")
    title: str = setting("", "title of the report")
    max_examples: int = setting(2000, "predictions to show, evenly from all evaluations (0: none)", minimum=0)
    bertscore_model: str = setting("", "local model that scores sub-questions (needs extra 'bertscore')")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name at least one study directory or run directory, e.g. runs/quickstart")
        check_values(self)
