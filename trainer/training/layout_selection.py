"""The layout of a run: what may be tried, on which examples it is checked, and what is recorded about it.

A run that goes on keeps the layout it began with, so that its numbers are those of a run that was never killed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
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

_CPU_TOKENS = 128  # of the run's first example; an accelerator takes a whole pack in no time
_NO_MEMORY = "memory"


class LayoutSelection:
    """Which layouts a run may have, and which one it gets."""

    def __init__(self, settings: TrainSettings, config: Any, kept: Layout | None):
        """`kept`: the layout of the checkpoint that the run goes on from."""
        self._settings = settings
        self._config = config
        self._kept = kept
        packed_attention.register()
        self._layouts = [kept] if kept is not None else layouts.candidates(config, settings.packing)

    def choose(self, engine: Any, data: PackedDataset, fresh: bool) -> LayoutChoice:
        """Collective. Check the layouts on the engine's weights, set its attention; a UserError is raised on every rank.

        `fresh`: the weights are random and no step was made.
        """
        outcome = self._check(engine, check_examples(self._settings, data), fresh)
        if isinstance(outcome, NoLayout):
            raise UserError(self._explain(outcome))
        set_attention(engine.module, outcome.layout.attention)
        return outcome

    def report(self, choice: LayoutChoice) -> None:
        """Say in one line which layout the run has, and in another why it is not packed."""
        if choice.rejected:
            fastest, reason = choice.rejected[0]
            terminal.warning(f"not {fastest.rows}: {reason}; instead: {DESCRIPTIONS[choice.layout.rows]}")
        terminal.info(
            f"  layout: {choice.layout}; logits differ from the model's own by {choice.difference:.0e} of their standard "
            f"deviation (allowed: {choice.tolerance:.0e}, {choice.num_examples} examples, {choice.compared_in})"
        )

    def record(self, choice: LayoutChoice) -> dict[str, Any]:
        """Return the facts for environment.json and the checkpoints."""
        return {
            "rows": choice.layout.rows,
            "attention": choice.layout.attention,
            "largest_difference": choice.difference,
            "tolerance": choice.tolerance,
            "compared_examples": choice.num_examples,
            "compared_in": choice.compared_in,
            "fallback_reason": choice.reason,
        }

    def _check(self, engine: Any, examples: list[Example], fresh: bool) -> LayoutChoice | NoLayout:
        """Collective. On a plain copy of the model on rank 0; where memory does not allow it, in the engine itself."""
        model = model_copy.copy_model(engine, self._config, fresh)
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
        @contextlib.contextmanager
        def as_trained() -> Iterator[None]:
            before = model_copy.as_trained(model, engine)
            try:
                yield
            finally:
                model_copy.set_parameters(model, before)

        training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
        try:
            return choose_layout(
                model,
                self._layouts,
                examples,
                load.device(),
                # Accelerators have kernels for bf16 alone; on a CPU the functions are those of fp32.
                as_trained if self._settings.bf16 and torch.cuda.is_available() else None,
            )
        except NoLayout as error:
            return error
        except torch.OutOfMemoryError:
            return _NO_MEMORY

    def _explain(self, error: NoLayout) -> str:
        if self._kept is not None:
            return (
                f"this run was begun with the layout {self._kept}, but {error}; go on with the versions of transformers "
                "and torch it was begun with (environment.json), or begin again with --overwrite_output_dir"
            )
        if self._settings.packing == "true" and error.rejected:
            return f"{self._name} cannot be trained packed: {error}; use --packing auto"
        tried = "; ".join(f"{layout}: {reason}" for layout, reason in error.rejected)
        return f"{self._name} cannot be trained: {tried or error}"

    @property
    def _name(self) -> str:
        return self._settings.model_name_or_path or self._settings.config_name


def check_examples(settings: TrainSettings, data: PackedDataset) -> list[Example]:
    """Return real examples of a run: its first ones, the longest of training and evaluation, and a short one twice.

    The second short one is the beginning of the first example, as long as the short one, so that a batch of rows of equal
    length is among what is checked. The longest shows whether windows, chunks and LongRoPE are respected.
    """
    first = data.micro_batch(range(1), 1).examples
    if load.device().type == "cpu":
        first = [(tokens[:_CPU_TOKENS], learned[:_CPU_TOKENS]) for tokens, learned in first[:1]]
    longest, shortest = data.longest(), data.shortest()
    if settings.eval_shards:
        longest = max(longest, _longest_held_out(settings), key=lambda example: len(example[0]))
    length = min(len(shortest[0]), len(first[0][0]))
    beginning = first[0][0][:length], first[0][1][:length]
    return [*first, longest, (shortest[0][:length], shortest[1][:length]), beginning]


def _longest_held_out(settings: TrainSettings) -> Example:
    shards = Shards.open(settings.eval_shards)
    view = view_of(settings.method, settings.train_on_calculator_results)
    lengths = shards.lengths(view)
    fitting = np.where(lengths <= settings.pack_length, lengths, 0)
    return shards.example(int(fitting.argmax()), view)


def layout_of_checkpoint(checkpoint: Path, run: RunDirectory) -> Layout | None:
    """Return the layout a checkpoint was trained in; None if neither it nor the run's settings say."""
    recorded = atomic_dir.read_manifest(checkpoint)["facts"].get("layout")
    if recorded:
        return Layout(recorded["rows"], recorded["attention"])
    try:
        settings = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        packing = settings["packing"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    # Before layouts were recorded, `packing` was true or false, and padded rows always had sdpa.
    before = {True: Layout(PACKED, packed_attention.NAME), False: Layout(PADDED, "sdpa")}
    return before.get(packing)


def check_same_layout(kept: Layout | None, packing: str, checkpoint: Path) -> None:
    """Raise UserError if a run cannot go on from a checkpoint with this setting of `packing`."""
    if kept is None or packing == "auto" or kept.is_packed == (packing == "true"):
        return
    raise UserError(
        f"{checkpoint} belongs to another run (its layout is {kept}, now packing is {packing}); use --packing auto to keep "
        "the layout, another output_dir, or --overwrite_output_dir to start from zero"
    )


def write_record(run: RunDirectory, record: dict[str, Any]) -> None:
    """Add the record to environment.json (rank 0)."""
    if distributed.is_main_process():
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
        atomic_dir.write_text(run.environment, json.dumps({**facts, "layout": record}, indent=1) + "\n")
