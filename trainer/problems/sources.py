"""Read the problems of a data set from a local file or folder, the Hugging Face Hub, or the stories generator.

Only the tools that prepare data read the Hub, in one process with internet or a filled cache. Training and evaluation read
shards instead. So ranks do not race for the cache of the library `datasets` (its GitHub issues 4661 and 5412), and compute
nodes need no network.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.problems import gsm8k, jsonl, stories, strategyqa, svamp
from trainer.problems.problem import MAX_REJECTED_TEXT, Problem, RecordError, RejectedRecord
from trainer.problems.records import JsonRecord, read_records
from trainer.settings import DATA
from trainer.storage.atomic_dir import file_digest
from trainer.storage.configuration import did_you_mean

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = (".json", ".jsonl")
_SPLIT_NAMES = ("train", "validation", "dev", "test")


@dataclass(frozen=True)
class DatasetSource:
    """Format and file names of a data set.

    from_record: function (record, default id) -> Problem. files: file names in a folder, in order of preference, with {} in
    place of the split. hub: function from the split to (configuration, split) on the Hub, where split None means all splits.
    hub_example: a Hub name for error messages. options: names of the `options` that `read_problems` accepts.
    """

    name: str
    from_record: Callable[[dict[str, Any], str], Problem]
    files: tuple[str, ...]
    hub: Callable[[str], tuple[str | None, str | None]] = lambda split: (None, split)
    hub_example: str = ""
    options: tuple[str, ...] = ("revision",)


_SOURCES = (
    DatasetSource("gsm8k", gsm8k.problem_from_record, ("{}.jsonl",), gsm8k.hub_split, "openai/gsm8k"),
    DatasetSource(
        *("svamp", svamp.problem_from_record, ("SVAMP.json",), lambda split: (None, None), "ChilleD/SVAMP"),
        options=("revision", "seed"),
    ),
    DatasetSource(
        "strategyqa",
        strategyqa.problem_from_record,
        ("{}.json", "{}.jsonl"),
        hub_example="ChilleD/StrategyQA",
    ),
    DatasetSource("jsonl", jsonl.problem_from_record, ("{}.jsonl", "{}.json")),
)
_DATASETS = {source.name: source for source in _SOURCES}


def read_problems(
    data: str, split: str, path: str | None = None, **options: Any
) -> Iterator[Problem | RejectedRecord]:
    """Yield the problems of one split in the order of the data, with a RejectedRecord for every invalid record.

    data: a name in DATA. split: see the data set's module (gsm8k: train, test, train_socratic, test_socratic; svamp: train,
    test, all; strategyqa: train, dev; jsonl: prefix of default ids and, if `path` is a folder, file name without suffix).
    path: a local file, a local folder with the published files (jsonl: `<split>.jsonl`), a folder of .parquet files
    downloaded from the Hub, or a Hub name; empty for stories. options: `seed` for svamp, `revision` for the Hub, the
    arguments of `stories.generate_problems` for stories.

    A record is rejected if an earlier record has the same id. Raises UserError for an unknown data set, split, option or
    path, for an unreachable Hub, and, after the last record, if there is no valid problem.
    """
    if data not in DATA:
        hint = did_you_mean(data, DATA)
        raise UserError(f"unknown data set {data!r}; choose one of {', '.join(DATA)}{hint}")
    if data == "stories":
        if path:
            raise UserError(f"stories are generated, they are not read from {path}; leave the path empty")
        return stories.generate_problems(split, **options)
    data_set = _DATASETS[data]
    for name in options:
        if name not in data_set.options:
            raise UserError(f"{data} takes no option {name!r}; it takes {', '.join(data_set.options)}")
    if data == "svamp" and split not in svamp.SPLITS:
        raise UserError(f"svamp has no split {split!r}; choose one of {', '.join(svamp.SPLITS)}")
    source, records = _open(data_set, split, path, options.get("revision"))
    if data == "svamp" and split != "all":
        args = (split, options.get("seed", 0))
        records = (r for r in records if isinstance(r, RejectedRecord) or svamp.in_split(r.value, *args))
    return _problems(data_set, split, source, records)


def read_exemplars(path: str) -> list[Problem]:
    """Return the solved problems for few-shot prompts from a JSONL file (see jsonl.py), in order.

    Raises UserError if a line is invalid; the message names the first such line.
    """
    exemplars = []
    for record in read_problems("jsonl", Path(path).stem, path):
        if isinstance(record, RejectedRecord):
            fault = f"{record.reason}: {record.detail}"
            raise UserError(f"{path}, line {record.line}: {fault}; correct the exemplar")
        exemplars.append(record)
    return exemplars


def source_digest(data: str, split: str, path: str | None = None, **options: Any) -> str:
    """Return a string that identifies the source's content.

    For a local file, or a folder of .parquet files, the string is the SHA-256 of the content. For a Hub name, it is
    `hub:<name>@<revision>`. For stories, it is the SHA-256 of the first 64 problems, so it depends on the generator's code.
    """
    if data == "stories":
        first = itertools.islice(read_problems(data, split, path, **options), 64)
        return hashlib.sha256(repr(list(first)).encode()).hexdigest()
    source, _ = _open(_DATASETS[data], split, path, options.get("revision"))
    local = Path(source).expanduser()
    if local.is_dir():
        files = sorted(local.rglob("*.parquet"))
        listing = "".join(f"{file.relative_to(local).as_posix()} {file_digest(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    return file_digest(local) if local.is_file() else f"hub:{source}@{options.get('revision')}"


def _problems(
    data_set: DatasetSource, split: str, source: str, records: Iterable[JsonRecord | RejectedRecord]
) -> Iterator[Problem | RejectedRecord]:
    data = data_set.name
    prefix = split if data == "jsonl" else f"{data}-{split.removesuffix(gsm8k.SOCRATIC)}"
    first_line: dict[str, int] = {}
    first_reject: RejectedRecord | None = None
    for record in records:
        if isinstance(record, JsonRecord):
            try:
                problem = data_set.from_record(record.value, f"{prefix}-{record.position:06d}")
                if line := first_line.get(problem.id):
                    raise RecordError("repeated_id", f"{problem.id!r} is the id of line {line} too")
            except RecordError as error:
                record = RejectedRecord(source, record.line, error.reason, error.detail, record.raw)
            else:
                first_line[problem.id] = record.line
                yield problem
                continue
        first_reject = first_reject or record
        yield record
    if first_line:
        return
    if first_reject:
        raise UserError(
            f"{source}: not one record of the {data} split {split!r} is a problem. The first, "
            f"line {first_reject.line}: {first_reject.reason}, {first_reject.detail}. Is it {data} data?"
        )
    raise UserError(f"{source}: the {data} split {split!r} is empty; check that the file is complete")


def _open(
    data_set: DatasetSource, split: str, path: str | None, revision: str | None
) -> tuple[str, Iterable[JsonRecord | RejectedRecord]]:
    """Return the source's path or Hub name, and the source's records."""
    hub_example = f", or a Hub name such as {data_set.hub_example}" if data_set.hub_example else ""
    if not path:
        folder = f"a folder with {data_set.files[0].format(split)}"
        raise UserError(f"{data_set.name} needs a path: a file, or {folder}{hub_example}")
    local = Path(path).expanduser()
    is_hub_name = not local.exists() and _HUB_NAME.fullmatch(path) and local.suffix not in _SUFFIXES
    # The data set is on the Hub, or the folder was downloaded from the Hub.
    if is_hub_name or next(local.rglob("*.parquet"), None):
        return path, _read_hub(path if is_hub_name else str(local), *data_set.hub(split), revision)
    if revision:
        raise UserError(f"revision ({revision!r}) is for Hub data sets, but {path} is a local path")
    if not local.exists():
        raise UserError(f"{path} does not exist; give an existing file or folder{hub_example}")
    file = _file_in(local, data_set, split) if local.is_dir() else local
    named = file.stem.removesuffix(gsm8k.SOCRATIC)
    if named in _SPLIT_NAMES and named != split.removesuffix(gsm8k.SOCRATIC):
        raise UserError(f"{file} looks like the split {named!r}, but split is {split!r}; make them agree")
    return str(file), read_records(file)


def _read_hub(
    name: str, configuration: str | None, split: str | None, revision: str | None
) -> Iterator[JsonRecord]:
    """Return the rows of a split, or of all splits in order if `split` is None, on the Hub or in a folder from the Hub.

    Raises UserError with the message of `datasets` if the data set, configuration or split is unknown or cannot be loaded.
    """
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, configuration, split=split, revision=revision)
        splits = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    except Exception as error:  # `datasets` raises a dozen types of error, from four packages
        raise UserError(
            f"cannot load {name} (configuration {configuration}, split {split}, revision {revision}) as a hub "
            f"data set: {type(error).__name__}: {str(error).strip()}\n"
            "A local path must be a file or folder with the data set's files. Without internet, run this once on a "
            "machine with internet and the same HF_HOME, then set HF_HUB_OFFLINE=1; or give a path to the files."
        ) from error
    return (
        JsonRecord(position + 1, position, row, raw=repr(row)[:MAX_REJECTED_TEXT])
        for position, row in enumerate(itertools.chain.from_iterable(splits))
    )


def _file_in(folder: Path, data_set: DatasetSource, split: str) -> Path:
    names = [name.format(split) for name in data_set.files]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    raise UserError(
        f"no {data_set.name} split {split!r} in {folder}: there is no {' or '.join(names)}; "
        f"found {', '.join(present) or 'no .json or .jsonl file'}"
    )
