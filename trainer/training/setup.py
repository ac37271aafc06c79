"""Setup of a run before its first step: data, batch plan, engine, layout, and the checkpoint to resume from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime import distributed, terminal
from trainer.runtime.distributed import DistributedEnvironment
from trainer.runtime.stop_request import StopRequest
from trainer.settings import TrainSettings
from trainer.shards.methods import view_of
from trainer.shards.model_tokenizer import check_model_fits_shards
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.configuration import rename_old_keys
from trainer.storage.manifest import CheckpointFacts, RunFacts
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, ds_config, layout_selection, time_limit
from trainer.training.batches import BatchPlan, PackedDataset
from trainer.training.engine import build_engine
from trainer.training.layout_check import LayoutChoice
from trainer.training.run_files import code_fingerprint, remove_leftovers, write_run_files

# Names of settings that may differ when a run is resumed. All other settings must stay the same. The number of ranks, the
# ZeRO stage, offload and micro-batches may change if each step takes as many packs as before: `_check_same_batch_plan`.
_MAY_CHANGE_ON_RESUME = {
    "deepspeed", "output_dir", "train_shards", "eval_shards", "eval_steps", "eval_max_problems", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "overwrite_output_dir", "report_to", "wandb_project", "timeout_seconds", "dry_run",
    "time_limit_seconds", "max_restarts", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "heartbeat_timeout_seconds", "packing",
}  # fmt: skip


@dataclass
class TrainState:
    """State of a run in progress. `facts` are written into the manifest of every checkpoint."""

    settings: TrainSettings
    environment: DistributedEnvironment
    run: RunDirectory
    shards: Shards
    data: PackedDataset
    batch_plan: BatchPlan
    config: Any
    engine: Any
    first_step: int
    facts: RunFacts
    layout_choice: LayoutChoice


def setup_training(
    settings: TrainSettings, environment: DistributedEnvironment, run: RunDirectory, stop: StopRequest
) -> TrainState | None:
    """Collective. Check settings and data, build the engine, and load the checkpoint to resume from, if any.

    Sets the deadline of `stop`. Returns None if the run is already finished. Raises UserError on every rank
    if settings, data, model or checkpoint do not fit together.
    """
    distributed.assert_same_on_all_ranks("installation", code_fingerprint())
    if distributed.is_main_process():
        remove_leftovers(run)
    with distributed.errors_on_all_ranks():
        # One rank of each node checks the digests, because each node may have its own copy of the shards.
        shards = Shards.open(settings.train_shards, verify=environment.local_rank == 0)
    tokenizer = load_tokenizer(shards.tokenizer_path)
    config = _config(settings, shards, tokenizer)
    view = view_of(settings.method, settings.train_on_calculator_results)
    data = PackedDataset(shards, settings.method, view, settings.pack_length, settings.seed)
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    epochs, world_size = settings.num_train_epochs, environment.world_size
    plan = BatchPlan.make(micro, accumulation, world_size, data.packs_per_epoch, epochs, settings.max_steps)
    resolved = ds_config.resolve_ds_config(settings, world_size)
    name = settings.model_name_or_path or settings.config_name
    facts: RunFacts = {
        "method": settings.method,
        "data": shards.facts["data"],
        "model_name": settings.model_label or Path(name).name,
        "base_model": name,
        "pretrained": bool(settings.model_name_or_path),
        "seed": settings.seed,
        "num_parameters": load.num_parameters(config),
        "world_size": world_size,
        "zero_stage": ds_config.zero_stage(resolved),
        "dtype": "bf16" if settings.bf16 else "fp32",
        "train_on_calculator_results": settings.train_on_calculator_results,
        "shards_fingerprint": shards.fingerprint,
        "tokenizer_fingerprint": shards.facts["tokenizer_fingerprint"],
        "packs_per_epoch": data.packs_per_epoch,
    }
    compared = {**facts, "plan": repr(plan), "ds_config": resolved}
    distributed.assert_same_on_all_ranks("training setup", compared)
    time_limit.set_deadline(stop, settings.time_limit_seconds, run, facts)
    start = _find_checkpoint(settings, run, facts, plan)
    layout, first_step = None, 0
    if start is not None:
        progress: CheckpointFacts = atomic_dir.read_manifest(start)["facts"]
        if progress["finished"]:
            return None
        first_step = progress["step"]
        layout = layout_selection.layout_of_checkpoint(start, run)
        layout_selection.check_same_layout(layout, settings.packing, start)
    if distributed.is_main_process():
        write_run_files(settings, run, resolved, facts, config, tokenizer, is_resumed=start is not None)
    engine = build_engine(settings, run, config, resolved, empty=start is not None)
    if start is not None:
        checkpoint.load(engine, start)
        terminal.info(f"resumed from {start}")
    is_untrained = first_step == 0 and not settings.model_name_or_path
    choice = layout_selection.select_layout(engine, settings, config, data, layout, is_untrained)
    facts["layout"] = layout_selection.record_layout(choice, run)
    return TrainState(
        settings, environment, run, shards, data, plan, config, engine, first_step, facts, choice
    )


def _config(settings: TrainSettings, shards: Shards, tokenizer: Any) -> Any:
    name = settings.model_name_or_path or settings.config_name
    config = load.load_config(name, settings.config_overrides, len(tokenizer))
    check_model_fits_shards(config, name, shards, tokenizer, bool(settings.model_name_or_path))
    longest, context = int(shards.lengths(view_of(settings.method)).max()), load.context_length(config)
    if context and min(longest, settings.pack_length) > context:
        raise UserError(
            f"{shards.path} has examples of up to {longest} tokens but the context of {name} is {context}: "
            f"prepare the shards again with --max_length {context}, or set pack_length to {context}"
        )
    # In GPT-2, the EOS token is also the padding token. It is not masked in examples: masks depend on lengths only.
    config.eos_token_id = tokenizer.eos_token_id
    config.use_cache = False
    return config


def _find_checkpoint(
    settings: TrainSettings, run: RunDirectory, facts: RunFacts, plan: BatchPlan
) -> Path | None:
    """Collective. Return the valid checkpoint to resume this run from, or None to start from zero.

    With `overwrite_output_dir`, remove all checkpoints. Raises UserError if the checkpoint is damaged or of another run.
    """
    if settings.overwrite_output_dir:
        checkpoint.remove_all(run)
        return None
    if settings.resume_from_checkpoint == "auto":
        path = checkpoint.latest_valid(run)
    else:
        path = Path(settings.resume_from_checkpoint)
        checkpoint.check_valid(path)
    if path is not None:
        old_facts = atomic_dir.read_manifest(path)["facts"]
        _check_same_run(run, path, old_facts, settings, facts)
        _check_same_batch_plan(path, old_facts, plan)
    return path


def _check_same_run(
    run: RunDirectory,
    path: Path,
    old: Mapping[str, object],
    settings: TrainSettings,
    facts: Mapping[str, object],
) -> None:
    names = ("shards_fingerprint", "num_parameters", "dtype", "method", "seed")
    pairs = [(name, old[name], facts[name]) for name in names]
    if run.settings.is_file():
        old_settings = _read_settings(run)
        ignored = {*names, *_MAY_CHANGE_ON_RESUME}
        pairs += [
            (key, old_settings.get(key), value)
            for key, value in asdict(settings).items()
            if key not in ignored
        ]
    changes = [f"{key}: {before!r} there, {now!r} now" for key, before, now in pairs if before != now]
    if changes:
        raise UserError(
            f"{path} belongs to another run ({'; '.join(changes)}); use another output_dir, "
            "or --overwrite_output_dir to start from zero"
        )


def _read_settings(run: RunDirectory) -> dict[str, Any]:
    try:
        content = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        content = str(error).splitlines()[0]
    if not isinstance(content, dict):
        raise UserError(
            f"{run.settings} cannot be read ({content}), so its settings cannot be compared with this run's; restore the "
            "file, or remove it if you are sure that the settings agree"
        )
    rename_old_keys(TrainSettings, content, str(run.settings))
    return content


def _check_same_batch_plan(path: Path, old: CheckpointFacts, plan: BatchPlan) -> None:
    """Raise UserError, with a remedy, if `plan` has another number of packs per step than the checkpoint's run."""
    if plan.pack_range(old["step"] - 1)[1] == old["packs_consumed"]:
        return
    num_packs, ranks = round(old["packs_consumed"] / old["step"]), plan.world_size
    if num_packs % ranks:
        divisors = ", ".join(str(number) for number in range(1, num_packs + 1) if num_packs % number == 0)
        remedy = f"{ranks} ranks cannot share {num_packs} packs: valid numbers of ranks are {divisors}"
    else:
        micro = plan.packs_per_micro_batch if num_packs % (ranks * plan.packs_per_micro_batch) == 0 else 1
        accumulation = num_packs // (ranks * micro)
        remedy = f"give --per_device_train_batch_size {micro} --gradient_accumulation_steps {accumulation}"
    raise UserError(
        f"{path}: a step took {num_packs} packs, now it would take {plan.packs_per_step} ({ranks} ranks x "
        f"{plan.accumulation_steps} micro-batches x {plan.packs_per_micro_batch} packs); {remedy}"
    )
