"""Build a shard directory: several threads tokenise, one writes in source order, a rename publishes.

The bytes do not depend on the number of threads. Several builders of the same directory may race: each writes into its
own staging directory, the first rename wins and the others use its result.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.models.tokenizer import fingerprint, load_tokenizer
from trainer.problems.problem import Problem, RejectedRecord
from trainer.problems.sources import read_problems, source_digest
from trainer.runtime import startup, terminal
from trainer.settings import PrepareSettings
from trainer.shards.read import KIND, REJECTS, TOKENIZER, Shards
from trainer.shards.segments import bos_tokens, check_tokenizer, example_length
from trainer.shards.workers import tokenise_all
from trainer.shards.write import ShardWriter
from trainer.storage import atomic_dir

# Version of the segmentation. 2: with guidance. 3: every segment has the tokens it has inside the text, checked by
# decoding, after all tokens that the tokenizer puts before a text; the same bytes as 2 for most byte-level tokenizers.
_SEGMENTATION, _EARLIER_SEGMENTATION = 3, 2
_MAX_CHANGED_RATIO = 0.5  # of problems whose text the tokenizer changes


def prepare(settings: PrepareSettings) -> Shards:
    """Tokenise problems into `settings.output_dir` and return the shards; complete shards of the same settings are kept.

    Raises UserError if the directory holds shards of other settings, or if no problem is usable.
    """
    final = Path(settings.output_dir)
    tokenizer = load_tokenizer(settings.tokenizer_name)
    startup.freeze_gc()
    check_tokenizer(tokenizer)
    recipe = _fingerprint(settings, tokenizer)
    if atomic_dir.is_complete(final):
        if _has_fingerprint(final, recipe):
            terminal.info(f"{final}: already prepared, {len(Shards.open(final))} problems")
            return Shards.open(final)
        if not settings.overwrite:
            raise UserError(_difference(final, recipe) + "; choose another output_dir or give --overwrite")
    building = final.parent / f"{final.name}.new-{os.getpid()}" if atomic_dir.is_complete(final) else final
    facts: dict[str, Any] = {"recipe": recipe, "data": settings.data, "split": settings.split}
    facts["tokenizer_fingerprint"] = recipe["tokenizer"]
    start = time.monotonic()
    try:
        with atomic_dir.atomic_directory(building, KIND, facts) as staging:
            tokenizer.save_pretrained(staging / TOKENIZER)
            _build(settings, tokenizer, staging, facts)
    except atomic_dir.ArtifactExistsError:
        if not _has_fingerprint(final, recipe):
            raise UserError(_difference(final, recipe) + "; another process built them first") from None
    if building != final:
        atomic_dir.replace_directory(final, building)
    shards = Shards.open(final)
    terminal.info(f"{final}: {summary_line(shards)} in {terminal.duration_text(time.monotonic() - start)}")
    return shards


def summary_line(shards: Shards) -> str:
    """Return one line with the numbers of problems and tokens, and of the records set aside by reason."""
    facts = shards.facts
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(facts["rejects"].items()))
    return f"{len(shards)} problems, {facts['num_tokens']} tokens" + (
        f"; set aside: {rejected}" if rejected else ""
    )


def _build(settings: PrepareSettings, tokenizer: Any, staging: Path, facts: dict[str, Any]) -> None:
    """Write all files of the directory and add the counts for the manifest to `facts`."""
    source = settings.data_path or settings.data
    rejects: list[RejectedRecord] = []
    problems = _accepted(_records(settings), rejects)
    first = next(problems, None)
    if first is None:
        reasons = dict(Counter(reject.reason for reject in rejects))
        raise UserError(f"{source} split {settings.split!r}: no usable problem ({reasons})")
    token_dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    writer = ShardWriter(staging, token_dtype)
    selected = itertools.islice(itertools.chain([first], problems), settings.max_problems or None)
    tokenised = tokenise_all(selected, tokenizer, settings.with_facts, settings.num_processes)
    num_changed = 0
    with terminal.progress_bar("tokenise", settings.max_problems or _expected(settings)) as bar:
        for problem, segments, change in tokenised:
            length = example_length(segments)
            if change:
                num_changed += 1
                rejects.append(
                    RejectedRecord(
                        source, 0, "changed_by_tokenizer", f"{problem.id}: {change}", problem.question
                    )
                )
            elif length > settings.max_length:
                detail = f"{problem.id}: {length} tokens, max_length is {settings.max_length}"
                rejects.append(RejectedRecord(source, 0, "too_long", detail, problem.question))
            else:
                writer.add(problem, segments, length)
            bar.update(writer.num_problems)
    num_tokenised = num_changed + writer.num_problems
    if num_changed > _MAX_CHANGED_RATIO * num_tokenised:
        detail = next(reject.detail for reject in rejects if reject.reason == "changed_by_tokenizer")
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} changes the text of {num_changed} of {num_tokenised} problems "
            f"({detail}): choose a tokenizer that decodes texts unchanged"
        )
    with open(staging / REJECTS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
    facts.update(writer.close(), token_dtype=token_dtype.name, vocabulary_size=len(tokenizer))
    facts["rejects"] = dict(Counter(reject.reason for reject in rejects))
    if not facts["num_problems"]:
        raise UserError(f"{source}: every problem was set aside: {facts['rejects']}")


def _records(settings: PrepareSettings) -> Iterator[Problem | RejectedRecord]:
    return read_problems(settings.data, settings.split, settings.data_path or None, **_options(settings))


def _options(settings: PrepareSettings) -> dict[str, Any]:
    """Return the arguments that a data set takes beyond split and path."""
    names = {"stories": ("seed", "num_problems", "min_steps", "max_steps"), "svamp": ("seed",)}
    return {name: getattr(settings, name) for name in names.get(settings.data, ())}


def _accepted(
    records: Iterable[Problem | RejectedRecord], rejects: list[RejectedRecord]
) -> Iterator[Problem]:
    for record in records:
        if isinstance(record, RejectedRecord):
            rejects.append(record)
        else:
            yield record


def _expected(settings: PrepareSettings) -> int:
    return settings.num_problems if settings.data == "stories" else 0


def _fingerprint(settings: PrepareSettings, tokenizer: Any) -> dict[str, Any]:
    """Return all that determines the bytes of the shards; it is stored in the manifest as "recipe"."""
    names = ("data", "split", "max_length", "max_problems", "with_facts")
    recipe = {
        **{name: getattr(settings, name) for name in names},
        **_options(settings),
        "segments": _EARLIER_SEGMENTATION if _has_earlier_segments(tokenizer) else _SEGMENTATION,
    }
    recipe["source"] = source_digest(
        settings.data, settings.split, settings.data_path or None, **_options(settings)
    )
    return {**recipe, "tokenizer": fingerprint(tokenizer)}


def _has_earlier_segments(tokenizer: Any) -> bool:
    """Return whether both versions of the segmentation give the same tokens; version 2 tokenised each segment as a text."""
    codec, bos = segment_tokenizer(tokenizer), tokenizer.bos_token_id
    prefix = [token for token in tokenizer("")["input_ids"] if token == bos]
    return codec.is_lossless and not codec.continues_differently and prefix == bos_tokens(tokenizer)


def _has_fingerprint(final: Path, recipe: dict[str, Any]) -> bool:
    return bool(atomic_dir.read_manifest(final, KIND)["facts"]["recipe"] == recipe)


def _difference(final: Path, recipe: dict[str, Any]) -> str:
    old = atomic_dir.read_manifest(final, KIND)["facts"]["recipe"]
    keys = sorted(key for key in old.keys() | recipe.keys() if old.get(key) != recipe.get(key))
    changes = ", ".join(f"{key}: {old.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
    return f"{final} holds shards made in another way ({changes})"
