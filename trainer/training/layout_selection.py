"""Selection of a run's layout: its candidates, the examples of the check, and the record of the result.

A resumed run keeps its layout, so that its numbers are those of a run without interruption.
"""

from __future__ import annotations

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
from trainer.storage.run_directory import RunDirectory
from trainer.training import layouts, model_copy
from trainer.training.batches import PackedDataset
from trainer.training.layout_check import Example, LayoutChoice, NoLayout, choose_layout
from trainer.training.layouts import DESCRIPTIONS, PACKED, PADDED, BatchLayout

_CPU_TOKENS = 128  # of the run's first example; an accelerator takes a whole pack


def select_layout(
    engine: Any,
    settings: TrainSettings,
    config: Any,
    data: PackedDataset,
    resumed: BatchLayout | None,
    is_untrained: bool,
) -> LayoutChoice:
    """Collective. Check the layouts on the engine's weights and set its attention. Raises UserError on every rank.

    They are checked on a plain copy of the model on rank 0, or without memory for it in the engine itself. `resumed`: the
    layout of the checkpoint from which the run is resumed. `is_untrained`: the weights are random and no step was made.
    """
    packed_attention.register()
    tried = [resumed] if resumed is not None else layouts.candidates(config, settings.packing)
    examples = check_examples(settings, data)
    outcome: LayoutChoice | NoLayout | None = None  # None: no memory for a copy
    model = model_copy.copy_model(engine, config, is_untrained)
    if model is not None:
        if distributed.is_main_process():
            outcome = _check_copy(model, engine, settings, tried, examples)
            model_copy.free(model)
        outcome = distributed.broadcast_object(outcome)
    if outcome is None:
        try:
            outcome = choose_layout(
                engine, tried, examples, load.device(), agree=distributed.broadcast_object
            )
        except NoLayout as error:
            outcome = error
    if isinstance(outcome, NoLayout):
        raise UserError(_explain(outcome, settings, resumed))
    set_attention(engine.module, outcome.layout.attention)
    return outcome


def _check_copy(
    model: Any, engine: Any, settings: TrainSettings, tried: list[BatchLayout], examples: list[Example]
) -> LayoutChoice | NoLayout | None:
    # Accelerators have separate kernels for bf16; on a CPU the functions are those of fp32.
    compare_bf16 = settings.bf16 and torch.cuda.is_available()
    in_training_dtype = functools.partial(model_copy.in_training_dtype, model, engine)
    training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
    try:
        return choose_layout(
            model, tried, examples, load.device(), in_training_dtype if compare_bf16 else None
        )
    except NoLayout as error:
        return error
    except torch.OutOfMemoryError:
        return None


def _explain(error: NoLayout, settings: TrainSettings, resumed: BatchLayout | None) -> str:
    name = settings.model_name_or_path or settings.config_name
    if resumed is not None:
        return (
            f"this run was started with the layout {resumed}, but {error}; resume it with the versions of "
            "transformers and torch in its environment.json, or start from zero with --overwrite_output_dir"
        )
    if settings.packing == "true" and error.rejected:
        return f"{name} cannot be trained packed: {error}; use --packing auto"
    tried = "; ".join(f"{layout}: {reason}" for layout, reason in error.rejected)
    return f"{name} cannot be trained: {tried or error}"


def check_examples(settings: TrainSettings, data: PackedDataset) -> list[Example]:
    """Return real examples of a run: its first ones, the longest of training and validation, and two short ones.

    The longest covers windows, chunks and LongRoPE. The two short ones, the shortest example and the beginning of the
    first, have the same length, so that a batch of rows of equal length is checked.
    """
    first = data.micro_batch(range(1), 1).examples
    if load.device().type == "cpu":
        first = [(tokens[:_CPU_TOKENS], loss_mask[:_CPU_TOKENS]) for tokens, loss_mask in first[:1]]
    longest, shortest = data.longest(), data.shortest()
    if settings.eval_shards:
        shards = Shards.open(settings.eval_shards)
        view = view_of(settings.method, settings.train_on_calculator_results)
        lengths = shards.lengths(view)
        fitting = np.where(lengths <= settings.pack_length, lengths, 0)
        held_out = shards.example(int(fitting.argmax()), view)
        longest = max(longest, held_out, key=lambda example: len(example[0]))
    length = min(len(shortest[0]), len(first[0][0]))
    short = [(tokens[:length], loss_mask[:length]) for tokens, loss_mask in (shortest, first[0])]
    return [*first, longest, *short]


def layout_of_checkpoint(checkpoint: Path, run: RunDirectory) -> BatchLayout | None:
    """Return the layout recorded in a checkpoint or implied by the run's settings, else None."""
    recorded = atomic_dir.read_manifest(checkpoint)["facts"].get("layout")
    if recorded:
        return BatchLayout(recorded["rows"], recorded["attention"])
    try:
        settings = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        packing = settings["packing"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    # Before layouts were recorded, `packing` was true or false, and padded rows always had sdpa.
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
    """Log the layout of the run, with a warning if it is not the fastest."""
    if choice.rejected:
        fastest, reason = choice.rejected[0]
        terminal.warning(
            f"not {fastest.arrangement}: {reason}; instead: {DESCRIPTIONS[choice.layout.arrangement]}"
        )
    terminal.info(
        f"  layout: {choice.layout}; logits differ from the model's own by {choice.difference:.0e} of their standard "
        f"deviation (allowed: {choice.tolerance:.0e}, {choice.num_examples} examples, {choice.compared_in})"
    )


def record_layout(choice: LayoutChoice, run: RunDirectory) -> dict[str, Any]:
    """Add the layout to environment.json (rank 0); return its facts for the checkpoints."""
    record = {
        "rows": choice.layout.arrangement,
        "attention": choice.layout.attention,
        "largest_difference": choice.difference,
        "tolerance": choice.tolerance,
        "compared_examples": choice.num_examples,
        "compared_in": choice.compared_in,
        "fallback_reason": choice.reason,
    }
    if distributed.is_main_process():
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
        atomic_dir.write_text(run.environment, json.dumps({**facts, "layout": record}, indent=1) + "\n")
    return record
