"""Reads rows one after the other, so that a file of any size takes little memory, and goes on after a bad one.

:mod:`coterie.data.files` reads the files of a run, which are small enough to hold, and refuses one with a bad row.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from coterie.data.files import Record
from coterie.data.parquet import parquet_records
from coterie.inference.answers import Rejected
from coterie.text import parse_json
from coterie.types import DataError


@dataclass(frozen=True)
class Located:
    """A row as read, and where: ``FILE:LINE``, or ``FILE, row N`` where there are no lines."""

    record: Record
    where: str


Read = Located | Rejected


def read_records(path: Path) -> Iterator[Read]:
    """The rows of a JSONL, CSV or Parquet file, and the reason for each that cannot be read.

    Raises :class:`DataError` for a missing file, an unknown ending, and a file that cannot be read at all.
    """
    kind = path.suffix.lower()
    if kind not in (*READERS, ".parquet"):
        raise DataError(f"{path}: unknown file type; the types are {', '.join(READERS)}, .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        yield from READERS[kind](file, str(path))


def jsonl_records(file: BinaryIO, name: str) -> Iterator[Read]:
    """The rows of lines of JSON; empty lines are skipped."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as fault:  # JSON or UTF-8
            reason = "not UTF-8" if isinstance(fault, UnicodeDecodeError) else f"not a line of JSON: {fault}"
            yield Rejected(f"{name}:{number}: {reason}")
            continue
        if isinstance(record, dict):
            yield Located(record, f"{name}:{number}")
        else:
            yield Rejected(f'{name}:{number}: a row is a JSON object such as {{"text": "..."}}')


def csv_records(file: BinaryIO, name: str) -> Iterator[Read]:
    """The rows of a CSV file with a header, with None for a field that a row lacks.

    A row is located by the line it begins on. Reading goes on after a row that is not CSV, past all lines that its
    quotes reach over. Raises :class:`DataError` for a header that names a column twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD))
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        start = lines.number + 1
        lines.quotes = 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            while lines.quotes % 2 and next(lines, None) is not None:
                pass
            yield Rejected(f"{name}:{start}: not a line of CSV: {fault}")
            continue
        if header is None:
            header = fields or None
            if twice := [column for column in fields if fields.count(column) > 1]:
                raise DataError(f"{name}:{start}: two columns are called {twice[0]!r}; rename one")
        elif len(fields) > len(header):
            yield Rejected(
                f"{name}:{start}: {len(fields)} fields for {len(header)} columns; quote fields that hold commas"
            )
        elif any(map(_UNDECODED.search, fields)):
            yield Rejected(f"{name}:{start}: not UTF-8")
        elif fields:
            yield Located({**dict.fromkeys(header), **dict(zip(header, fields, strict=False))}, f"{name}:{start}")


_FIELD = 2**26  # characters, beyond the longest text
_UNDECODED = re.compile("[\udc80-\udcff]")  # what bytes that are not UTF-8 become


@dataclass
class _Lines:
    """The lines of a file with their ends, as :mod:`csv` wants them; how many were read, and the quotes in them."""

    file: BinaryIO
    number: int = 0
    quotes: int = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.file).decode("utf-8" if self.number else "utf-8-sig", errors="surrogateescape")
        self.number += 1
        self.quotes += line.count('"')
        return line


def _parquet(path: Path) -> Iterator[Read]:
    records = (record for records in parquet_records(path, whole=False) for record in records)
    for row, record in enumerate(records, start=1):
        yield Located(record, f"{path}, row {row}")


READERS: Mapping[str, Callable[[BinaryIO, str], Iterator[Read]]] = {".jsonl": jsonl_records, ".csv": csv_records}


def as_json_line(columns: Mapping[str, object]) -> str:
    """One line of JSON. A value that JSON does not have becomes null (NaN), Base64 (bytes) or text (a date)."""
    return json.dumps(_plain(columns), ensure_ascii=False, default=str, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return value
