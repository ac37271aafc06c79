"""Build a shard directory: several threads tokenise, one writes in source order, a rename commits.

The bytes do not depend on the number of threads. Several builders of the same directory may race: each writes
under its own temporary name, the first rename wins and the others find its result.
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

# Counts the ways a problem was cut into segments so far. 2: with guidance. 3: every segment as inside the text, checked by
# decoding, behind all tokens that the tokenizer puts before a text; the same bytes as 2 for most byte-level tokenizers.
_SEGMENTS, _UNCHANGED_SEGMENTS = 3, 2
_MAX_CHANGED = 0.5  # of all problems; more: the tokenizer is unfit


def prepare(settings: PrepareSettings) -> Shards:
    """Read problems, tokenise them, write `settings.output_dir`; a finished directory of the same making is kept.

    Raises UserError if the directory holds shards of another making, or if no problem is left.
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
            raise UserError(_difference(final, recipe) + "; another builder was first") from None
    if building != final:
        atomic_dir.replace_directory(final, building)
    shards = Shards.open(final)
    terminal.info(f"{final}: {summary_line(shards)} in {terminal.duration(time.monotonic() - start)}")
    return shards


def summary_line(shards: Shards) -> str:
    """One line: how much there is, and what was set aside and why."""
    facts = shards.facts
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(facts["rejects"].items()))
    return f"{len(shards)} problems, {facts['num_tokens']} tokens" + (
        f"; set aside: {rejected}" if rejected else ""
    )


def _build(settings: PrepareSettings, tokenizer: Any, staging: Path, facts: dict[str, Any]) -> None:
    """Write all files of the directory and fill `facts` with what they hold."""
    source = settings.data_path or settings.data
    rejects: list[RejectedRecord] = []
    problems = _accepted(_records(settings), rejects)
    first = next(problems, None)
    if first is None:
        reasons = dict(Counter(reject.reason for reject in rejects))
        raise UserError(f"{source} split {settings.split!r}: no usable problem ({reasons})")
    token_dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    writer = ShardWriter(staging, token_dtype)
    wanted = itertools.islice(itertools.chain([first], problems), settings.max_problems or None)
    tokenised = tokenise_all(wanted, tokenizer, settings.with_facts, settings.num_processes)
    changed = 0
    with terminal.progress("tokenise", settings.max_problems or _expected(settings)) as bar:
        for problem, segments, change in tokenised:
            length = example_length(segments)
            if change:
                changed += 1
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
    if changed > _MAX_CHANGED * (changed + writer.num_problems):
        detail = next(reject.detail for reject in rejects if reject.reason == "changed_by_tokenizer")
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} changes the text of {changed} of {changed + writer.num_problems} problems "
            f"({detail}): choose a tokenizer that gives texts back as they are"
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
    """What a data set takes beyond split and path."""
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
    """What decides the bytes of the shards: equal recipes give equal shards."""
    names = ("data", "split", "max_length", "max_problems", "with_facts")
    recipe = {
        **{name: getattr(settings, name) for name in names},
        **_options(settings),
        "segments": _UNCHANGED_SEGMENTS if _as_before(tokenizer) else _SEGMENTS,
    }
    recipe["source"] = source_digest(
        settings.data, settings.split, settings.data_path or None, **_options(settings)
    )
    return {**recipe, "tokenizer": fingerprint(tokenizer)}


def _as_before(tokenizer: Any) -> bool:
    """Return whether shards have the same bytes as when segments were tokenised as if each were a whole text."""
    codec, bos = segment_tokenizer(tokenizer), tokenizer.bos_token_id
    prefix = [token for token in tokenizer("")["input_ids"] if token == bos]
    return codec.is_lossless and not codec.continues_differently and prefix == bos_tokens(tokenizer)


def _has_fingerprint(final: Path, recipe: dict[str, Any]) -> bool:
    return atomic_dir.read_manifest(final, KIND)["facts"]["recipe"] == recipe


def _difference(final: Path, recipe: dict[str, Any]) -> str:
    old = atomic_dir.read_manifest(final, KIND)["facts"]["recipe"]
    keys = sorted(key for key in old.keys() | recipe.keys() if old.get(key) != recipe.get(key))
    changes = ", ".join(f"{key}: {old.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
    return f"{final} holds shards made in another way ({changes})"
