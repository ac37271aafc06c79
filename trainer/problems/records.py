"""Reader of JSON Lines files and JSON arrays (SVAMP, StrategyQA) that continues after invalid records.

Records have line numbers. An invalid record becomes a RejectedRecord. Numbers with fraction or exponent become Decimal.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from trainer.errors import UserError
from trainer.problems.problem import MAX_REJECTED_TEXT, RecordError, RejectedRecord

MAX_RECORD_BYTES = 1 << 20  # the longest record of the supported data sets has 3 kB (StrategyQA)
_BUFFER_BYTES = 1 << 20  # large, because the thread must acquire the GIL again after every read
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")


@dataclass(frozen=True)
class JsonRecord:
    """Parsed record of a file.

    line: first line of the record, from 1. position: index among all records of the file, from 0. raw: first 200 characters
    of the record's text, for RejectedRecord.
    """

    line: int
    position: int
    value: dict[str, Any]
    raw: str


def read_records(path: Path) -> Iterator[JsonRecord | RejectedRecord]:
    """Yield every record of a file in order, skipping blank lines.

    A file is read as JSON Lines if its name ends in `.jsonl` or its first character is not `[`. Raises UserError if the file
    cannot be read.
    """
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            start = file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip()
            file.seek(0)
            is_array = start.startswith(b"[") and path.suffix != ".jsonl"
            for position, (line, raw) in enumerate(_elements(file.read()) if is_array else _lines(file)):
                text = raw[: 4 * MAX_REJECTED_TEXT].decode("utf-8", errors="replace").strip()
                text = text[:MAX_REJECTED_TEXT]
                record: JsonRecord | RejectedRecord
                try:
                    record = JsonRecord(line, position, _parse(raw), text)
                except RecordError as error:
                    record = RejectedRecord(str(path), line, error.reason, error.detail, text)
                yield record
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; check the path and its permissions"
        raise UserError(message) from error


def required_text(record: dict[str, Any], key: str, reason: str) -> str:
    """Return the stripped text under `key`. Raises RecordError if the value is not a string or is blank.

    `reason`: reason of the error for a missing or blank value.
    """
    value = record.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RecordError(reason, f"no {key!r}" if value is None else f"{key!r} is blank")
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{key!r} is {json_type(value)}, expected text")
    return value.strip()


def answer_text(record: dict[str, Any], key: str) -> str:
    """Return the answer under `key` as text: 1E2 as "100", 2.50 as "2.5", true as "yes", false as "no".

    Raises RecordError if the answer is missing, blank, a list, an object or not finite, or its exponent is beyond +-30.
    """
    value = record.get(key)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):  # only records from the Hub have floats; repr restores the original decimal
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        if not value.is_finite() or abs(value.adjusted()) > 30:
            raise RecordError("bad_answer", f"{key!r} is {value}, which is no number of a word problem")
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value) if isinstance(value, int) else required_text(record, key, "no_answer")


def optional_texts(record: dict[str, Any], key: str) -> list[str]:
    """Return the list of strings under `key`, or [] if the key is missing or null. Raises RecordError for other values."""
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordError("wrong_type", f"{key!r} is {json_type(value)}, expected a list of texts")
    return value


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of every line that is not blank, but at most MAX_RECORD_BYTES + 1 bytes of a line."""
    for number in itertools.count(1):
        rest = raw = file.readline(MAX_RECORD_BYTES + 1)
        if not raw:
            return
        while rest and not rest.endswith(b"\n"):  # skip the rest of a line that is too long
            rest = file.readline(MAX_RECORD_BYTES)
        raw = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        if raw.strip(b" \t\r\n"):
            yield number, raw


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of every element of a JSON array.

    An invalid element ends before the next line that has the first element's indentation and then `{`. If no such line
    follows, the element extends to the end of the file. If the array is truncated, the last yielded bytes are not JSON.
    """
    text = content.decode("utf-8", errors="surrogateescape")  # encode() below restores invalid bytes
    at = _BETWEEN_ELEMENTS.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    indent = text[text.rfind("\n", 0, at) + 1 : at]
    next_element = re.compile(rf"\n{indent}(?=\{{)" if not indent.strip(" \t") else r"\Z")
    line, previous = 1, 0
    while not text.startswith("]", at):
        line, previous = line + text.count("\n", previous, at), at
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            match = next_element.search(text, at + 1)
            end = match.end() if match else len(text)
        yield line, text[at:end].encode("utf-8", errors="surrogateescape")
        if end == len(text):
            return
        at = _BETWEEN_ELEMENTS.match(text, end).end()  # type: ignore[union-attr]


def _parse(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`. Raises RecordError if `raw` is too long, contains NUL, or is not a JSON object."""
    if len(raw) > MAX_RECORD_BYTES:
        raise RecordError("too_long", f"over {MAX_RECORD_BYTES} bytes")
    if b"\0" in raw:  # the file has a hole, e.g. after a crash or on a full disk
        raise RecordError("nul_character", f"the record contains NUL at byte {raw.index(0)}")
    try:
        value = _DECODER.decode(raw.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise RecordError("not_utf8", f"byte {error.start} of the record, 0x{raw[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", f"{error}" if raw else "the file ends inside its array") from None
    if not isinstance(value, dict):
        raise RecordError("not_an_object", f"the record is {json_type(value)}")
    return value


def json_type(value: object) -> str:
    """Return the type of a JSON value in words, for error messages. For a bool, return "true" or "false"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), "a number")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_reject_constant)
