"""Every setting of every tool: plain dataclasses, checked where they are made, unknown keys refused.

A tool's flags, the keys of its YAML file and the fields here are the same words; where Hugging Face has a word for
it, it is theirs. Nothing is imported here but the standard library, so that `--help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.storage.configuration import check_at_least, check_given, check_one_of, setting

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
    """Problems -> token shards that every method and run shares."""

    data: str = setting("stories", "data set", choices=DATA)
    data_path: str = setting("", "local file, local folder or hub name (stories need none)")
    split: str = setting("train", "which split to read: train, validation, test, ...")
    tokenizer_name: str = setting("", "tokenizer: local folder or hub name; 'stories' makes the embedded one")
    output_dir: str = setting("", "shard directory to write, e.g. shards/gsm8k-train")
    max_length: int = setting(
        1024, "longest example in tokens (guidance not counted); longer ones are set aside"
    )
    max_problems: int = setting(0, "stop after this many problems (0: all)")
    with_facts: bool = setting(False, "put a problem's facts (StrategyQA) before its question")
    num_processes: int = setting(0, "threads that tokenise (0: one per core)")
    seed: int = setting(0, "seed of generated data (stories) and of splits made here (svamp)")
    num_problems: int = setting(4000, "stories: how many problems to generate")
    min_steps: int = setting(2, "stories: fewest steps of a problem")
    max_steps: int = setting(4, "stories: most steps of a problem")
    overwrite: bool = setting(False, "replace shards that were made with other settings")
    inspect: int = setting(0, "show this many examples of finished shards in colour instead of building")
    method: str = setting("socratic", "whose view --inspect shows", choices=METHODS)

    def __post_init__(self) -> None:
        check_one_of("data", self.data, DATA)
        check_one_of("method", self.method, METHODS)
        check_given("output_dir", self.output_dir)
        if not self.inspect:
            check_given("tokenizer_name", self.tokenizer_name)
            if self.data != "stories":
                check_given("data_path", self.data_path)
        check_at_least("max_length", self.max_length, 8)
        check_at_least("num_problems", self.num_problems, 1)
        check_at_least("min_steps", self.min_steps, 1)
        check_at_least("max_steps", self.max_steps, self.min_steps)
        for name in ("max_problems", "num_processes", "inspect"):
            check_at_least(name, getattr(self, name), 0)


@dataclass
class TrainSettings:
    """One student: a model, a method, a shard set, a seed."""

    train_shards: str = setting("", "shard directory made by tools/prepare_shards.py")
    output_dir: str = setting("", "run directory, e.g. runs/my_study/gsm8k.socratic.gpt2.s0")
    method: str = setting("socratic", "what is read and what is learned", choices=METHODS)
    model_name_or_path: str = setting("", "pretrained causal LM: local folder or hub name")
    config_name: str = setting(
        "", "random weights from a config: local folder, hub name, or a size such as stories-2m"
    )
    config_overrides: str = setting("", "changes to the config, e.g. n_layer=6,n_embd=384,n_head=6")
    model_label: str = setting("", "the model's name in reports (default: the last part of its path)")
    deepspeed: str = setting("", "DeepSpeed config, e.g. ds_configs/zero2.json (default: ZeRO 1)")
    per_device_train_batch_size: int = setting(1, "packs a device takes in one forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes of a device in one optimizer step")
    pack_length: int = setting(1024, "tokens of a pack; whole examples are packed into it")
    packing: str = setting(
        "auto",
        "whole examples in one row: 'auto' where the model's own numbers come out, else padded rows; 'true': or refuse; 'false': never",
        choices=PACKING,
    )
    train_on_calculator_results: bool = setting(
        False, "also learn what the calculator writes (needed to evaluate without it)"
    )
    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    weight_decay: float = setting(0.0, "weight decay of matrices; biases and norms are never decayed")
    adam_beta1: float = setting(0.9, "AdamW beta1")
    adam_beta2: float = setting(0.999, "AdamW beta2")
    adam_epsilon: float = setting(1e-8, "AdamW epsilon")
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this (0: never)")
    lr_scheduler_type: str = setting("cosine", "after the warm-up", choices=SCHEDULES)
    warmup_steps: int = setting(0, "optimizer steps of linear warm-up")
    warmup_ratio: float = setting(0.0, "warm-up as a part of all steps, if warmup_steps is 0")
    num_train_epochs: float = setting(3.0, "passes over the data, if max_steps is not given")
    max_steps: int = setting(0, "optimizer steps (0: follow num_train_epochs)")
    seed: int = setting(0, "seed of weights, data order and dropout")
    bf16: bool = setting(False, "compute in bf16 with fp32 master weights")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    eval_shards: str = setting("", "shard directory for the periodic evaluation")
    eval_steps: int = setting(0, "evaluate the loss every so many steps (0: never)")
    eval_max_problems: int = setting(256, "problems of the periodic evaluation")
    save_steps: int = setting(500, "checkpoint every so many steps; the last step always is one")
    save_total_limit: int = setting(2, "checkpoints kept")
    resume_from_checkpoint: str = setting(
        "auto", "'auto': newest valid one in output_dir if any; or a checkpoint directory"
    )
    overwrite_output_dir: bool = setting(
        False, "start from zero although the output_dir holds checkpoints (they are removed)"
    )
    report_to: str = setting(
        "none", "metrics.jsonl is always written; 'wandb' adds a W&B run", choices=("none", "wandb")
    )
    wandb_project: str = setting("socratic-trainer", "W&B project")
    timeout_seconds: int = setting(1800, "a collective that waits longer than this ends the run")
    heartbeat_timeout_seconds: int = setting(
        300, "a rank without a sign of life for so long is named and the run ended (0: never)"
    )
    time_limit_seconds: int = setting(
        0, "save and end before so many seconds have passed (0: the Slurm job's own limit, if there is one)"
    )
    max_restarts: int = setting(
        5, "restarts by the scheduler without a new checkpoint before the run gives up"
    )
    dry_run: bool = setting(False, "only show what memory, disk and time the run would need here")

    def __post_init__(self) -> None:
        check_given("train_shards", self.train_shards)
        check_given("output_dir", self.output_dir)
        self.check()

    def check(self) -> None:
        """Everything but which data and where to; a plan may leave both open. Raises UserError."""
        check_one_of("method", self.method, METHODS)
        self.packing = _yes_or_no(self.packing)
        check_one_of("packing", self.packing, PACKING)
        check_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_one_of("report_to", self.report_to, ("none", "wandb"))
        if bool(self.model_name_or_path) == bool(self.config_name):
            raise UserError(
                "give either model_name_or_path (pretrained) or config_name (random weights), not both or none"
            )
        if self.config_overrides and not self.config_name:
            raise UserError(
                "config_overrides changes a config with random weights; it cannot go with model_name_or_path"
            )
        at_least_one = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "save_steps",
            "save_total_limit",
        )
        for name in (*at_least_one, "timeout_seconds"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("pack_length", self.pack_length, 8)
        not_negative = (
            "max_steps",
            "time_limit_seconds",
            "max_restarts",
            "warmup_steps",
            "eval_steps",
            "weight_decay",
            "max_grad_norm",
        )
        for name in not_negative:
            check_at_least(name, getattr(self, name), 0)
        if self.max_steps == 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: both max_steps and num_train_epochs are 0")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate}; it must be a positive number")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"warmup_ratio is {self.warmup_ratio}; it is a part of all steps, between 0 and 1"
            )
        if self.eval_steps and not self.eval_shards:
            raise UserError("eval_steps is set but eval_shards is not")


def _yes_or_no(value: str | bool) -> str:
    """Return "true" or "false" for every spelling that a setting of type bool accepts, other words unchanged."""
    word = str(value).lower()
    return {"yes": "true", "1": "true", "no": "false", "0": "false"}.get(word, word)


@dataclass
class EvaluateSettings:
    """A student, or a decomposer and a solver together, answers every problem of a shard set once."""

    model_name_or_path: str = setting("", "export folder, checkpoint folder, local model or hub name")
    shards: str = setting("", "shard directory of the held-out problems")
    decomposer: str = setting("", "export that asks the sub-questions (decomposer[_interleaved], socratic)")
    solver: str = setting("", "export that solves them, instead of model_name_or_path (solver, socratic)")
    subquestions: str = setting(
        "decomposer", "who asks the solver; 'gold': the data", choices=("decomposer", "gold")
    )
    guidance_from: str = setting(
        "planner",
        "where a guided decomposer has the plan from; 'gold': the data",
        choices=("planner", "gold"),
    )
    planner: str = setting("", "export that writes the plan of a guided decomposer (planner_*)")
    max_steps: int = setting(16, "most sub-questions a decomposer asks")
    output_dir: str = setting("", "evaluation directory (default: in the run directory of the export)")
    mode: str = setting(
        "auto", "'auto': the export's own method; 'few_shot': any model, shown exemplars", choices=MODES
    )
    exemplars: str = setting("", "few_shot: JSONL file of solved problems that come before each problem")
    model_label: str = setting(
        "", "the model's name in reports (default: what its training said, or its path)"
    )
    calculator: bool = setting(True, "write the results of <<...=>> annotations while generating")
    temperature: float = setting(
        0.0, "0: greedy; else sampled, with noise that depends on seed and problem only"
    )
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    seed: int = setting(0, "seed of sampling")
    max_new_tokens: int = setting(256, "longest answer in tokens, all models of a pair together")
    batch_size: int = setting(32, "sequences decoded at the same time on one rank")
    backend: str = setting(
        "auto",
        "how the model is decoded; 'slots': one cache for all sequences, fast; 'transformers': its own cache, for every "
        "family; 'auto': slots if they give the model's own numbers, else transformers",
        choices=BACKENDS,
    )
    max_problems: int = setting(0, "evaluate only the first so many problems (0: all)")
    dtype: str = setting("fp32", "numbers the model computes in", choices=DTYPES)
    allow_unfinished: bool = setting(False, "evaluate an export of a run that was not finished")
    max_restarts: int = setting(
        5, "restarts by the scheduler without a new answer before the evaluation gives up"
    )
    overwrite: bool = setting(False, "evaluate again although results with other settings are there")

    def __post_init__(self) -> None:
        check_given("shards", self.shards)
        self._check_who_answers()
        check_one_of("mode", self.mode, MODES)
        if (self.mode == "few_shot") != bool(self.exemplars):
            raise UserError("mode few_shot and exemplars (a JSONL file of solved problems) go together")
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("backend", self.backend, BACKENDS)
        check_at_least("temperature", self.temperature, 0)
        check_one_of("subquestions", self.subquestions, ("decomposer", "gold"))
        check_one_of("guidance_from", self.guidance_from, ("planner", "gold"))
        for name in ("max_new_tokens", "batch_size", "max_steps"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_restarts", self.max_restarts, 0)
        check_at_least("max_problems", self.max_problems, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability above 0 and at most 1")

    def _check_who_answers(self) -> None:
        """One student alone, or a solver with somebody who asks it."""
        if not self.model_name_or_path and not self.solver:
            missing = (
                "a solver as well" if self.decomposer else "model_name_or_path, or decomposer and solver"
            )
            raise UserError(f"who answers? Give {missing}")
        if self.model_name_or_path and (
            self.solver or self.decomposer or self.planner or self.subquestions == "gold"
        ):
            raise UserError(
                "give either model_name_or_path (one student) or solver (with decomposer), not both"
            )
        if self.solver and (self.subquestions == "gold") == bool(self.decomposer):
            raise UserError(
                "a solver is asked either by a decomposer (an export) or, with subquestions gold, by the data"
            )
        if self.planner and (not self.decomposer or self.guidance_from == "gold"):
            raise UserError(
                "a planner guides a decomposer; it has no part with gold sub-questions or gold guidance"
            )


@dataclass
class ConvertSettings:
    """A ZeRO checkpoint -> a Hugging Face folder."""

    checkpoint_dir: str = setting(
        "", "checkpoint directory, or a run directory (its newest checkpoint)", positional=True
    )
    output_dir: str = setting("", "folder to write (default: export/ in the run directory)")
    max_shard_size: str = setting("5GB", "largest safetensors file, e.g. 500MB or 5GB")
    dtype: str = setting("same", "'same' as trained, or fp32, or bf16", choices=("same", *DTYPES))
    verify: bool = setting(
        False, "reload the export, compare every weight and print the largest logit difference"
    )
    overwrite: bool = setting(False, "replace an export of another checkpoint")
    dry_run: bool = setting(False, "only show what would be written, with sizes")

    def __post_init__(self) -> None:
        check_given("checkpoint_dir", self.checkpoint_dir)
        check_one_of("dtype", self.dtype, ("same", *DTYPES))


@dataclass
class PlanSettings(TrainSettings):
    """Before a run or a study is submitted: what it needs. Takes every setting of a training, and the hardware."""

    study: str = setting("", "plan all runs of this study file instead of one training")
    gpu: str = setting("auto", "accelerator, e.g. a100-80gb, h100, cpu (auto: what this machine has)")
    nodes: int = setting(1, "machines")
    gpus_per_node: int = setting(1, "accelerators of a machine (with --gpu cpu: processes)")
    host_memory_gb: float = setting(0.0, "memory of a machine in GB (0: this machine's, or not checked)")
    disk_gb: float = setting(0.0, "space for the runs in GB (0: what is free at output_dir, if it exists)")
    mean_length: int = setting(200, "tokens of an example, if no train_shards are given")
    num_problems: int = setting(0, "examples, if no train_shards are given (0: unknown; give max_steps)")
    calibrate: str = setting("", "finished run directory: take its measured speed instead of the default one")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        if not self.study:
            self.check()
        check_at_least("nodes", self.nodes, 1)
        check_at_least("gpus_per_node", self.gpus_per_node, 1)
        check_at_least("mean_length", self.mean_length, 2)
        for name in ("host_memory_gb", "disk_gb", "num_problems"):
            check_at_least(name, getattr(self, name), 0)


@dataclass
class DoctorSettings:
    """Can this machine, or every node of this allocation, train and give right numbers?"""

    output_dir: str = setting(
        ".", "where runs will be written: space, speed and atomic renames are tested here"
    )
    min_free_gb: float = setting(10.0, "less free space than this at output_dir is a failure")
    known_good: str = setting(
        "", "known-good versions, name==version lines (default: the ones of this release)"
    )
    skip: list[str] = setting([], "groups of checks to leave out, e.g. parity network")
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        check_given("output_dir", self.output_dir)
        check_at_least("min_free_gb", self.min_free_gb, 0)


@dataclass
class PlotSettings:
    """Run directories -> report with plots."""

    runs: list[str] = setting([], "study directories or run directories", positional=True)
    output_dir: str = setting("", "where the report goes (default: report/ in the first study directory)")
    title: str = setting("", "title of the report")
    max_examples: int = setting(
        2000, "predictions to page through, shared evenly among evaluations (0: none)"
    )
    bertscore_model: str = setting(
        "",
        "local model folder that scores sub-questions (needs the extra 'bertscore'; nothing is downloaded)",
    )

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name at least one study directory or run directory, e.g. runs/quickstart")
        check_at_least("max_examples", self.max_examples, 0)
