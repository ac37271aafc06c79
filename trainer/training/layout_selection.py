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
from trainer.training.layouts import DESCRIPTIONS, PACKED, PADDED, Layout

_CPU_TOKENS = 128  # of the run's first example; an accelerator takes a whole pack
_NO_MEMORY = "memory"


class LayoutSelection:
    """The candidate layouts of a run, and the choice among them."""

    def __init__(self, settings: TrainSettings, config: Any, resumed: Layout | None):
        """`resumed`: the layout of the checkpoint from which the run is resumed."""
        self._settings = settings
        self._config = config
        self._resumed = resumed
        packed_attention.register()
        self._layouts = [resumed] if resumed is not None else layouts.candidates(config, settings.packing)

    def choose(self, engine: Any, data: PackedDataset, is_untrained: bool) -> LayoutChoice:
        """Collective. Check the layouts on the engine's weights and set its attention. Raises UserError on every rank.

        `is_untrained`: the weights are random and no step was made.
        """
        outcome = self._check(engine, check_examples(self._settings, data), is_untrained)
        if isinstance(outcome, NoLayout):
            raise UserError(self._explain(outcome))
        set_attention(engine.module, outcome.layout.attention)
        return outcome

    def _check(self, engine: Any, examples: list[Example], is_untrained: bool) -> LayoutChoice | NoLayout:
        """Collective. Check on a plain copy of the model on rank 0, or without memory for it in the engine itself."""
        model = model_copy.copy_model(engine, self._config, is_untrained)
        if model is not None:
            outcome = self._check_copy(model, engine, examples) if distributed.is_main_process() else None
            if distributed.is_main_process():
                model_copy.free(model)
            outcome = distributed.broadcast_object(outcome)
            if outcome != _NO_MEMORY:
                return outcome  # type: ignore[no-any-return]
        try:
            return choose_layout(
                engine, self._layouts, examples, load.device(), agree=distributed.broadcast_object
            )
        except NoLayout as error:
            return error

    def _check_copy(self, model: Any, engine: Any, examples: list[Example]) -> LayoutChoice | NoLayout | str:
        in_training_dtype = functools.partial(model_copy.in_training_dtype, model, engine)
        training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
        try:
            return choose_layout(
                model,
                self._layouts,
                examples,
                load.device(),
                # Accelerators have separate kernels for bf16; on a CPU the functions are those of fp32.
                in_training_dtype if self._settings.bf16 and torch.cuda.is_available() else None,
            )
        except NoLayout as error:
            return error
        except torch.OutOfMemoryError:
            return _NO_MEMORY

    def _explain(self, error: NoLayout) -> str:
        if self._resumed is not None:
            return (
                f"this run was started with the layout {self._resumed}, but {error}; resume it with the versions of "
                "transformers and torch in its environment.json, or start from zero with --overwrite_output_dir"
            )
        if self._settings.packing == "true" and error.rejected:
            return f"{self._name} cannot be trained packed: {error}; use --packing auto"
        tried = "; ".join(f"{layout}: {reason}" for layout, reason in error.rejected)
        return f"{self._name} cannot be trained: {tried or error}"

    @property
    def _name(self) -> str:
        return self._settings.model_name_or_path or self._settings.config_name


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
        longest = max(longest, _longest_held_out(settings), key=lambda example: len(example[0]))
    length = min(len(shortest[0]), len(first[0][0]))
    short = [(tokens[:length], loss_mask[:length]) for tokens, loss_mask in (shortest, first[0])]
    return [*first, longest, *short]


def _longest_held_out(settings: TrainSettings) -> Example:
    shards = Shards.open(settings.eval_shards)
    view = view_of(settings.method, settings.train_on_calculator_results)
    lengths = shards.lengths(view)
    fitting = np.where(lengths <= settings.pack_length, lengths, 0)
    return shards.example(int(fitting.argmax()), view)


def layout_of_checkpoint(checkpoint: Path, run: RunDirectory) -> Layout | None:
    """Return the layout recorded in a checkpoint or implied by the run's settings, else None."""
    recorded = atomic_dir.read_manifest(checkpoint)["facts"].get("layout")
    if recorded:
        return Layout(recorded["rows"], recorded["attention"])
    try:
        settings = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        packing = settings["packing"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    # Before layouts were recorded, `packing` was true or false, and padded rows always had sdpa.
    layout_of_packing = {True: Layout(PACKED, packed_attention.NAME), False: Layout(PADDED, "sdpa")}
    return layout_of_packing.get(packing)


def check_same_layout(layout: Layout | None, packing: str, checkpoint: Path) -> None:
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
        terminal.warning(f"not {fastest.rows}: {reason}; instead: {DESCRIPTIONS[choice.layout.rows]}")
    terminal.info(
        f"  layout: {choice.layout}; logits differ from the model's own by {choice.difference:.0e} of their standard "
        f"deviation (allowed: {choice.tolerance:.0e}, {choice.num_examples} examples, {choice.compared_in})"
    )


def record_layout(choice: LayoutChoice, run: RunDirectory) -> dict[str, Any]:
    """Add the layout to environment.json (rank 0); return its facts for the checkpoints."""
    record = {
        "rows": choice.layout.rows,
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
