"""Convert one DeepSpeed checkpoint to a Hugging Face folder by streaming; the folder is published atomically."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.export import model_card
from trainer.export.source import CheckpointSource, is_already_exported, open_checkpoint, output_directory
from trainer.models import architecture, load
from trainer.runtime import startup, terminal
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir
from trainer.storage.manifest import ExportFacts, FileDigest

if TYPE_CHECKING:
    from trainer.export.config_check import ExportTensors
    from trainer.export.safetensors_writer import OutputShard

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SPARE_BYTES = 4 << 20  # manifest, model card and file system overhead
_MEGABYTE = 10**6


def convert(settings: ConvertSettings) -> Path:
    """Write the export and return its folder. Without `overwrite`, an export of the same checkpoint and options is kept.

    Peak memory is a few chunks of 16 MiB, or twice the largest rearranged tensor if this is more. Only `verify` loads the
    whole model. The CRC-32 of every storage is checked. File sizes must match the manifest; with `verify`, the digests must
    match too. Raises UserError if the checkpoint is unfinished, is corrupt or does not match its config.json, if the
    output folder has other content than this export (`overwrite` replaces any other export), or if the disk is full.
    """
    max_shard_bytes = parse_size(settings.max_shard_size)
    source = open_checkpoint(Path(settings.checkpoint_dir))
    final = output_directory(source, settings.output_dir)
    dtype = source.facts["dtype"] if settings.dtype == "same" else settings.dtype
    facts: ExportFacts = {
        **source.facts,
        "checkpoint": str(source.path),
        "checkpoint_digest": source.digest,
        "export_dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    if is_already_exported(final, facts, settings.overwrite or settings.dry_run):
        terminal.info(f"already exported: {final}")
        if settings.verify:
            _verify(final, source, dtype)
        return final
    with ThreadPoolExecutor(1) as background:
        _stream(settings, source, final, facts, background)
    return final


def parse_size(text: str) -> int:
    """Return a size such as "500MB" in bytes. Units are decimal, as in transformers. Raises UserError for invalid text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?B)", text.strip().upper().replace(" ", ""))
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size is {text!r}; write a number and KB, MB, GB or TB, e.g. 5GB")
    return size


def _stream(
    settings: ConvertSettings,
    source: CheckpointSource,
    final: Path,
    facts: ExportFacts,
    background: ThreadPoolExecutor,
) -> None:
    """Plan, write, verify and publish the export.

    architecture.json in the checkpoint usually lists the tensors that the model class saves. Without this file, the list is
    computed in the background, because importing transformers takes longer than writing a small model. Meanwhile, the stored
    tensors are written under their names in the checkpoint. If the list requires other files, all files are written again.
    """
    import torch

    from trainer.export import config_check, safetensors_writer
    from trainer.zero import layout

    opened = layout.open_files(source.path, facts["zero_stage"], facts["world_size"], facts["dtype"])
    stored = layout.locate_weights(opened)
    folder = source.model_folder
    check = config_check.check_against_config
    layout_future = background.submit(check, stored, source.path, folder, facts["export_dtype"])
    startup.freeze_gc()
    dtype_name = load.TORCH_DTYPE_NAMES[facts["export_dtype"]]

    def plan(export: ExportTensors | None) -> list[OutputShard]:
        tensors: Any = export.tensors if export else stored.tensors
        names = export.kept_dtypes.items() if export else ()
        return safetensors_writer.split_into_shards(
            tensors,
            getattr(torch, dtype_name),
            facts["max_shard_bytes"],
            {name: getattr(torch, kept_dtype) for name, kept_dtype in names},
        )

    if settings.dry_run:
        _print_shards(plan(layout_future.result()), final)
        return
    shards = plan(layout_future.result() if architecture.is_recorded(folder) else None)
    _check_disk(final, shards)
    staging = atomic_dir.create_staging(final)
    try:
        files = _write_weights(shards, staging, layout_future, plan)
        export = layout_future.result()
        if plan(export) != shards:
            for path in staging.iterdir():
                path.unlink()
            shards = plan(export)
            _check_disk(final, shards)
            files = _write_weights(shards, staging, layout_future, plan)
        expected = export.expected
        facts["num_parameters"] = expected.num_parameters
        if expected.text_part_of:
            facts["text_part_of"] = expected.text_part_of
            whole = f"the multimodal model ({expected.text_part_of})"
            terminal.info(f"the export is the text part of {whole}: a {expected.class_name}")
        texts = {
            "config.json": config_check.config_text(folder, expected, dtype_name),
            "generation_config.json": config_check.generation_config_text(folder, expected),
            "README.md": model_card.text(facts, expected.class_name, dtype_name),
        }
        if (tokenizer_config := config_check.tokenizer_config_text(folder)) is not None:
            texts["tokenizer_config.json"] = tokenizer_config
        if len(shards) > 1:
            index = safetensors_writer.index_text(shards, expected.num_parameters)
            texts[safetensors_writer.INDEX_NAME] = index
        files |= _write_small_files(texts, folder, staging, set(files))
        if settings.verify:
            _verify(staging, source, facts["export_dtype"])
        atomic_dir.publish(staging, final, "export", facts, files, replace=atomic_dir.is_complete(final))
    except atomic_dir.ArtifactExistsError:
        raise UserError(f"{final} was written by another process meanwhile, and is kept") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{final.parent}: the disk is full; all files of this export were removed") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = terminal.size_text(_weight_bytes(shards))
    sizes = f"{facts['num_parameters']:,} parameters, {size}, {dtype_name}"
    terminal.info(f"exported {source.path} to {final}: {sizes}")


def _write_weights(
    shards: list[OutputShard],
    staging: Path,
    layout_future: Future[ExportTensors],
    plan: Callable[[ExportTensors], list[OutputShard]],
) -> dict[str, FileDigest]:
    """Write the safetensors files and return their sizes and digests for the manifest.

    Writing stops early if the result of `layout_future` requires other files than `shards`. Raises UserError if
    `layout_future` fails or the checkpoint is corrupt.
    """
    from trainer.export import safetensors_writer
    from trainer.zero.checksum_reader import ChecksumReader

    files, num_written, is_confirmed = {}, 0, False
    with (
        terminal.progress_bar("MB written", _weight_bytes(shards) // _MEGABYTE) as bar,
        ChecksumReader() as reader,
    ):

        def advance(num_bytes: int) -> None:
            nonlocal num_written, is_confirmed
            num_written += num_bytes
            bar.update(num_written // _MEGABYTE)
            if not is_confirmed and layout_future.done():
                is_confirmed = True
                if plan(layout_future.result()) != shards:
                    raise _LayoutMismatch

        with contextlib.suppress(_LayoutMismatch):
            for shard in shards:
                files[shard.name] = safetensors_writer.write(shard, staging / shard.name, reader, advance)
            reader.verify_checksums()
    return files


class _LayoutMismatch(Exception):
    """Raised if the export needs other files than the files that are being written."""


def _write_small_files(
    texts: dict[str, str], model_folder: Path, staging: Path, weights: set[str]
) -> dict[str, FileDigest]:
    """Copy the files of `model_folder`, then write `texts` (name -> content). `weights`: names of weight files.

    Return the digests of all files in `staging` that are not in `weights`.
    """
    for path in sorted(model_folder.rglob("*")):
        name = path.relative_to(model_folder).as_posix()
        if path.is_file() and name not in weights | {architecture.ARCHITECTURE_FILE}:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / name)
    for name, content in texts.items():
        (staging / name).write_text(content, encoding="utf-8")
    written = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    return atomic_dir.digest_files(staging, written - weights)


def _verify(export: Path, source: CheckpointSource, dtype: str) -> None:
    import torch

    from trainer.export.verify import verify

    atomic_dir.verify_digests(source.path)
    result = verify(export, source.path, source.facts, getattr(torch, load.TORCH_DTYPE_NAMES[dtype]))
    terminal.info(
        f"verified: {result.num_tensors} tensors equal the checkpoint bit for bit"
        f"{'' if dtype == 'fp32' else ' after rounding'}; largest logit difference {result.max_logit_difference:.3g}"
    )


def _print_shards(shards: list[OutputShard], final: Path) -> None:
    for shard in shards:
        size = terminal.size_text(shard.num_bytes)
        terminal.info(f"{size:>10}  {shard.name}, {len(shard.tensors)} tensors")
    total = terminal.size_text(_weight_bytes(shards))
    free = terminal.size_text(shutil.disk_usage(_existing_parent(final)).free)
    terminal.info(f"would write {total} to {final}; {free} are free there")


def _check_disk(final: Path, shards: list[OutputShard]) -> None:
    folder, needed = _existing_parent(final), _weight_bytes(shards) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free} bytes free, the export needs {needed}: {needed - free} bytes are missing; "
            "make room or give another output_dir"
        )


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _weight_bytes(shards: list[OutputShard]) -> int:
    return sum(shard.num_bytes for shard in shards)
