"""Build a shard directory: tokenise problems in several threads, write them in source order, and publish the directory.

Threads are used instead of processes, because the compiled tokenizer releases the GIL, and each process would spend 4 CPU
seconds on imports. The files do not depend on the number of threads. Several processes may build the same directory at the
same time. Each process writes to its own staging directory, and the first rename publishes the shards. The other processes
then use the published shards, or raise UserError if these shards were made with other settings.
"""

import gc
import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from trainer.shards.methods import VIEWS, SegmentRole
from trainer.shards.read import KIND, PROBLEMS, REJECTS, TOKENIZER, Shards
from trainer.shards.segments import Segment, bos_tokens, example_length, tokenise
from trainer.storage import atomic_dir

# Versions of the rules by which the segments of a problem are tokenised. Version 2 tokenised each segment as a separate text
# and started the example with BOS. Version 3 tokenises a segment as the continuation of the text before it, checks the tokens
# by decoding, and starts the example with all tokens that the tokenizer puts before a text. If both versions give the same
# tokens, `_fingerprint` records version 2, so that shards of earlier releases stay valid.
_SEGMENTATION, _EARLIER_SEGMENTATION = 3, 2
_MAX_CHANGED_RATIO = 0.5  # maximum share of problems whose text changes when it is encoded and decoded
_CHUNK_PROBLEMS = 32  # problems per tokenizer call; the overhead of a call equals the time for one problem
_MAX_PENDING_CHUNKS = 16  # maximum number of chunks per thread that are submitted but not yet written
_BUFFER_BYTES = 1 << 20


def prepare(settings: PrepareSettings) -> Shards:
    """Tokenise problems, write them as shards to `settings.output_dir`, and return the shards.

    If the directory already holds shards with the same recipe (see `_fingerprint`), return these shards unchanged. Raises
    UserError if the directory holds other shards and `overwrite` is False, or if the tokenizer or all problems are unusable.
    """
    final = Path(settings.output_dir)
    tokenizer = load_tokenizer(settings.tokenizer_name)
    startup.freeze_gc()
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path} has no EOS token, which ends every answer")
    recipe = _fingerprint(settings, tokenizer)
    replace = atomic_dir.is_complete(final)
    if replace:
        difference = _difference(final, recipe)
        if not difference:
            shards = Shards.open(final)
            terminal.info(f"{final}: already prepared: {_summary(shards)}")
            return shards
        if not settings.overwrite:
            raise UserError(difference + "; choose another output_dir or give --overwrite")
    facts: dict[str, Any] = {"recipe": recipe, "data": settings.data, "split": settings.split}
    start = time.monotonic()
    try:
        with atomic_dir.atomic_directory(final, KIND, facts, replace) as staging:
            tokenizer.save_pretrained(staging / TOKENIZER)
            _build(settings, tokenizer, staging, facts)
    except atomic_dir.ArtifactExistsError:
        if difference := _difference(final, recipe):
            raise UserError(difference + "; another process built them first") from None
    shards = Shards.open(final)
    terminal.info(f"{final}: {_summary(shards)}; {terminal.duration_text(time.monotonic() - start)}")
    return shards


def _summary(shards: Shards) -> str:
    rejects = shards.facts["rejects"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
    rejected = f"{sum(rejects.values())} rejected" + (f" ({reasons}; see {REJECTS})" if rejects else "")
    return f"{len(shards):,} problems, {rejected}, {shards.facts['num_tokens']:,} tokens"


def _build(settings: PrepareSettings, tokenizer: Any, staging: Path, facts: dict[str, Any]) -> None:
    """Write all files of the shard directory except the tokenizer. Add the remaining fields of ShardFacts to `facts`."""
    source = settings.data_path or settings.data
    rejects: list[RejectedRecord] = []
    token_dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    writer = ShardWriter(staging, token_dtype)
    records = read_problems(settings.data, settings.split, settings.data_path or None, **_options(settings))
    selected = itertools.islice(_accepted(records, rejects), settings.max_problems or None)
    expected = settings.max_problems or (settings.num_problems if settings.data == "stories" else 0)
    with terminal.progress_bar("tokenise", expected) as bar:
        for problem, segments, change in tokenise_all(
            selected, tokenizer, settings.with_facts, settings.num_processes
        ):
            length = example_length(segments)
            reason, detail = "", ""
            if change:
                reason, detail = "changed_by_tokenizer", change
            elif length > settings.max_length:
                reason, detail = "too_long", f"{length} tokens, max_length is {settings.max_length}"
            if reason:
                detail = f"{problem.id}: {detail}"
                rejects.append(RejectedRecord(source, 0, reason, detail, problem.question))
            else:
                writer.add(problem, segments, length)
            bar.update(writer.num_problems)
    reasons = Counter(reject.reason for reject in rejects)
    num_changed = reasons["changed_by_tokenizer"]
    num_tokenised = num_changed + writer.num_problems
    if num_changed > _MAX_CHANGED_RATIO * num_tokenised:
        detail = next(reject.detail for reject in rejects if reject.reason == "changed_by_tokenizer")
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} changes the text of {num_changed} of {num_tokenised} problems "
            f"({detail}): choose a tokenizer that decodes texts unchanged"
        )
    if not writer.num_problems:
        raise UserError(f"{source} split {settings.split!r}: no usable problem ({dict(reasons)})")
    with open(staging / REJECTS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
    facts.update(
        writer.close(),
        tokenizer_fingerprint=facts["recipe"]["tokenizer"],
        token_dtype=token_dtype.name,
        vocabulary_size=len(tokenizer),
        rejects=dict(reasons),
    )


def _options(settings: PrepareSettings) -> dict[str, Any]:
    """Return the arguments of `read_problems` that depend on the data set."""
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


def _fingerprint(settings: PrepareSettings, tokenizer: Any) -> dict[str, Any]:
    """Return the manifest's "recipe": the settings, versions and digests that determine the bytes of the shards."""
    names = ("data", "split", "max_length", "max_problems", "with_facts")
    options = _options(settings)
    return {
        **{name: getattr(settings, name) for name in names},
        **options,
        "segments": _EARLIER_SEGMENTATION if _has_earlier_segments(tokenizer) else _SEGMENTATION,
        "source": source_digest(settings.data, settings.split, settings.data_path or None, **options),
        "tokenizer": fingerprint(tokenizer),
    }


def _has_earlier_segments(tokenizer: Any) -> bool:
    """Return whether segmentation versions 2 and 3 (see `_SEGMENTATION`) give the same tokens with this tokenizer."""
    codec, bos = segment_tokenizer(tokenizer), tokenizer.bos_token_id
    prefix = [token for token in tokenizer("")["input_ids"] if token == bos]
    return codec.is_lossless and not codec.continues_differently and prefix == bos_tokens(tokenizer)


def _difference(final: Path, recipe: dict[str, Any]) -> str:
    """Return a message if `recipe` differs from the recipe of the shards in `final`, else ""."""
    old = atomic_dir.read_manifest(final, KIND)["facts"]["recipe"]
    keys = sorted(key for key in old.keys() | recipe.keys() if old.get(key) != recipe.get(key))
    changes = ", ".join(f"{key}: {old.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
    return f"{final} holds shards made in another way ({changes})" if keys else ""


def tokenise_all(
    problems: Iterator[Problem], tokenizer: Any, with_facts: bool, num_threads: int
) -> Iterator[tuple[Problem, list[Segment], str]]:
    """Yield (problem, segments, difference) for every problem in order. See `tokenise` for segments and difference.

    num_threads: number of threads; 0 means one thread per usable core.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of this function use all cores already
    num_threads = num_threads or len(os.sched_getaffinity(0))
    prefix = bos_tokens(tokenizer)
    # Initialise the tokenizer before the threads start, because the initialisation is not thread-safe.
    tokenise([], tokenizer, prefix)

    def tokenise_chunk(chunk: list[Problem]) -> list[tuple[Problem, list[Segment], str]]:
        results = tokenise(chunk, tokenizer, prefix, with_facts)
        return [(problem, *result) for problem, result in zip(chunk, results, strict=True)]

    pending: deque[Future[list[tuple[Problem, list[Segment], str]]]] = deque()
    gc.freeze()  # exclude existing objects from garbage collection: scanning them would take 10 % of the time
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                while chunk := list(itertools.islice(problems, _CHUNK_PROBLEMS)):
                    pending.append(pool.submit(tokenise_chunk, chunk))
                    if len(pending) > _MAX_PENDING_CHUNKS * num_threads:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, leave the pending chunks
    finally:
        gc.unfreeze()


class ShardWriter:
    """Writer of one shard directory: `add` appends a problem, `close` writes the index files."""

    def __init__(self, folder: Path, token_dtype: np.dtype):
        self._token_dtype = token_dtype
        # The buffers are large because this thread waits for the GIL after each write to a file.
        self._tokens = open(folder / "tokens.bin", "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115 (closed by close)
        self._problems = open(folder / PROBLEMS, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        self._folder = folder
        self._roles: list[int] = []
        self._ends: list[int] = []
        self._first_segment = [0]
        self._line_starts = [0]
        self._present: Counter[frozenset[SegmentRole]] = Counter()  # roles of a problem -> number of problems
        self._max_length = 0

    @property
    def num_problems(self) -> int:
        return len(self._line_starts) - 1

    def add(self, problem: Problem, segments: Sequence[Segment], length: int) -> None:
        """Append a problem. `length` must be `example_length(segments)`."""
        end = self._ends[-1] if self._ends else 0
        joined = list(itertools.chain.from_iterable(segment.tokens for segment in segments))
        self._tokens.write(np.array(joined, dtype=self._token_dtype).tobytes())
        for segment in segments:
            end += len(segment.tokens)
            self._roles.append(segment.role)
            self._ends.append(end)
        self._first_segment.append(len(self._roles))
        self._max_length = max(self._max_length, length)
        # Use vars(), because dataclasses.asdict would double the time of this method.
        record = {**vars(problem), "steps": [vars(step) for step in problem.steps]}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._problems.write(line)
        self._line_starts.append(self._line_starts[-1] + len(line))
        self._present[frozenset(segment.role for segment in segments)] += 1

    def close(self) -> dict[str, Any]:
        """Write the remaining files and return the counts for the manifest."""
        self._tokens.close()
        self._problems.close()
        arrays = {"roles": (self._roles, "u1"), "ends": (self._ends, "<u8")}
        arrays |= {"segments": (self._first_segment, "<u8"), "lines": (self._line_starts, "<u8")}
        for name, (values, dtype) in arrays.items():
            np.array(values, dtype=dtype).tofile(self._folder / f"{name}.bin")
        return {
            "num_problems": self.num_problems,
            "num_segments": len(self._roles),
            "num_tokens": self._ends[-1] if self._ends else 0,
            "longest_example": self._max_length,
            "problems_per_method": {
                name: sum(count for roles, count in self._present.items() if view.required <= roles)
                for name, view in VIEWS.items()
            },
        }
