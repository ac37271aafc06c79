"""Selection of a run's layout: examples for the check (layout_check.py), choice, and record of the result.

A layout is an arrangement of examples in rows, with an attention implementation (see layouts.py). A resumed run keeps its
layout, so that the losses equal those of an uninterrupted run.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from trainer.errors import UserError
from trainer.models import load, packed_attention, training_kernels
from trainer.models.default_attention import set_attention
from trainer.runtime import distributed, terminal
from trainer.settings import TrainSettings
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.manifest import LayoutRecord
from trainer.storage.run_directory import RunDirectory
from trainer.training import layouts, model_copy
from trainer.training.batches import PackedDataset
from trainer.training.layout_check import Example, LayoutChoice, NoLayout, choose_layout
from trainer.training.layouts import DESCRIPTIONS, PACKED, PADDED, BatchLayout

_CPU_TOKENS = 128  # on a CPU, the first pack is cut to this many tokens of its first example, to save time


def select_layout(
    engine: Any,
    settings: TrainSettings,
    config: Any,
    data: PackedDataset,
    resumed: BatchLayout | None,
    is_untrained: bool,
) -> LayoutChoice:
    """Collective. Return the first layout that passes the check of layout_check.py, with the results of the check.

    Sets the engine's attention to that of the layout. Raises UserError on every rank if no layout passes.

    The check uses a plain copy of the engine's model on rank 0. If rank 0 lacks the memory for a copy, the check uses the
    engine itself on all ranks. `resumed`: the layout of the checkpoint from which the run is resumed; None for a new run or
    an unknown layout. `is_untrained`: the weights are random, and no optimizer step has been made.
    """
    packed_attention.register()
    tried = [resumed] if resumed is not None else layouts.candidates(config, settings.packing)
    examples = check_examples(settings, data)
    outcome: LayoutChoice | NoLayout | None = None
    try:
        model = model_copy.copy_model(engine, config, is_untrained)
        if model is not None:
            if distributed.is_main_process():
                outcome = _check_copy(model, engine, settings, tried, examples)
                model_copy.free(model)
            outcome = distributed.broadcast_object(outcome)
        if outcome is None:  # rank 0 lacks the memory for a copy
            agree = distributed.broadcast_object
            outcome = choose_layout(engine, tried, examples, load.local_device(), agree=agree)
        if isinstance(outcome, NoLayout):
            raise outcome
    except NoLayout as error:
        raise UserError(_explain(error, settings, resumed)) from None
    set_attention(engine.module, outcome.layout.attention)
    return outcome


def _check_copy(
    model: Any, engine: Any, settings: TrainSettings, tried: list[BatchLayout], examples: list[Example]
) -> LayoutChoice | NoLayout | None:
    on_accelerator = torch.cuda.is_available()
    training_kernels.patch_kernels(model, on_accelerator=on_accelerator)
    in_training_dtype = None
    if settings.bf16 and on_accelerator:  # also check in bf16, which uses other kernels than fp32
        in_training_dtype = functools.partial(model_copy.in_training_dtype, model, engine)
    try:
        return choose_layout(model, tried, examples, load.local_device(), in_training_dtype)
    except NoLayout as error:
        return error
    except torch.OutOfMemoryError:
        return None


def _explain(error: NoLayout, settings: TrainSettings, resumed: BatchLayout | None) -> str:
    name = settings.model_name_or_path or settings.config_name
    if resumed is not None:
        return (
            f"this run was started with the layout {resumed}, but {error}; resume it with the versions of transformers "
            "and torch in the run's environment.json, or start from zero with --overwrite_output_dir"
        )
    if settings.packing == "true" and error.rejected:
        return f"{name} cannot be trained packed: {error}; use --packing auto"
    tried = "; ".join(f"{layout}: {reason}" for layout, reason in error.rejected)
    return f"{name} cannot be trained: {tried or error}"


def check_examples(settings: TrainSettings, data: PackedDataset) -> list[Example]:
    """Return the examples of the first pack, the longest training or validation example, and two short examples.

    The longest example tests attention windows, chunks and LongRoPE. The shortest training example and the beginning of
    the first example, both cut to the same length, test a batch of rows of equal length.
    """
    first = data.micro_batch(range(1), 1).examples
    if load.local_device().type == "cpu":
        first = [(tokens[:_CPU_TOKENS], loss_mask[:_CPU_TOKENS]) for tokens, loss_mask in first[:1]]
    shortest, longest = data.shortest_and_longest()
    if settings.eval_shards:
        shards = Shards.open(settings.eval_shards)
        view = view_of(settings.method, settings.train_on_calculator_results)
        lengths = shards.lengths(view)
        usable_lengths = np.where(lengths <= settings.pack_length, lengths, 0)
        held_out = shards.example(int(usable_lengths.argmax()), view)
        longest = max(longest, held_out, key=lambda example: len(example[0]))
    length = min(len(shortest[0]), len(first[0][0]))
    short = [(tokens[:length], loss_mask[:length]) for tokens, loss_mask in (shortest, first[0])]
    return [*first, longest, *short]


def layout_of_checkpoint(checkpoint: Path, run: RunDirectory) -> BatchLayout | None:
    """Return the layout in the checkpoint's manifest. For an old manifest, return that of the run's settings, or None."""
    recorded = atomic_dir.read_manifest(checkpoint)["facts"].get("layout")
    if recorded:
        return BatchLayout(recorded["rows"], recorded["attention"])
    try:
        packing = yaml.safe_load(run.settings.read_text(encoding="utf-8"))["packing"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    # Old runs recorded no layout: their `packing` is true or false, and their padded rows used sdpa attention.
    layout_of_packing = {True: BatchLayout(PACKED, packed_attention.NAME), False: BatchLayout(PADDED, "sdpa")}
    return layout_of_packing.get(packing)


def check_same_layout(layout: BatchLayout | None, packing: str, checkpoint: Path) -> None:
    """Raise UserError if the setting `packing` contradicts the layout of the checkpoint."""
    if layout is None or packing == "auto" or layout.is_packed == (packing == "true"):
        return
    raise UserError(
        f"{checkpoint} belongs to another run (its layout is {layout}, now packing is {packing}); use --packing auto to "
        "keep the layout, another output_dir, or --overwrite_output_dir to start from zero"
    )


def report_layout(choice: LayoutChoice) -> None:
    if choice.rejected:
        fastest, reason = choice.rejected[0]
        instead = DESCRIPTIONS[choice.layout.arrangement]
        terminal.warning(f"not {fastest.arrangement}: {reason}; instead: {instead}")
    # `record_layout` records the measured difference.
    terminal.info(f"  layout: {choice.layout}, compared with the model's own forward pass")


def record_layout(choice: LayoutChoice, run: RunDirectory) -> LayoutRecord:
    """Add the layout to environment.json on rank 0. Return the record, which is also in each checkpoint's manifest."""
    record: LayoutRecord = {
        "rows": choice.layout.arrangement,
        "attention": choice.layout.attention,
        "largest_difference": choice.difference,
        "tolerance": choice.tolerance,
        "compared_examples": choice.num_examples,
        "compared_in": choice.compared_in,
        "fallback_reason": choice.fallback_reason,
    }
    if distributed.is_main_process():
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
        atomic_dir.write_text(run.environment, json.dumps({**facts, "layout": record}, indent=1) + "\n")
    return record
