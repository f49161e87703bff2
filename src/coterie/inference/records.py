"""Reads rows one after the other, so that a file of any size takes little memory, and goes on after a bad one.

:mod:`coterie.data.files` reads the files of a run, which are small enough to hold, and refuses one with a bad row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from coterie.data.files import Record
from coterie.inference.answers import Rejected
from coterie.text import parse_json
from coterie.types import DataError

PARQUET_ROWS = 1024  # read at a time


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
    """The rows of a CSV file with a header. A row is located by the line it begins on."""
    reader = csv.reader(_lines(file), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            yield Rejected(f"{name}:{start}: not a line of CSV: {fault}")
            continue
        if header is None:
            header = fields or None
        elif len(fields) > len(header):
            yield Rejected(
                f"{name}:{start}: {len(fields)} fields for {len(header)} columns; quote fields that hold commas"
            )
        elif any(_UNDECODED in field for field in fields):
            yield Rejected(f"{name}:{start}: not UTF-8")
        elif fields:
            yield Located(dict(zip(header, fields, strict=False)), f"{name}:{start}")


_UNDECODED = "\ufffd"


def _lines(file: BinaryIO) -> Iterator[str]:
    """The lines with their ends, as :mod:`csv` wants them; bytes that are not UTF-8 become a character that says so."""
    for number, line in enumerate(file):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors="replace")


def _parquet(path: Path) -> Iterator[Read]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield Located(record, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as fault:  # OSError: a damaged file
        reason = str(fault).strip().splitlines()[0]
        raise DataError(f"{path}: not a Parquet file that can be read: {reason}; write it again") from fault


READERS: Mapping[str, Callable[[BinaryIO, str], Iterator[Read]]] = {".jsonl": jsonl_records, ".csv": csv_records}


def as_json_line(columns: Mapping[str, object]) -> str:
    """One line of JSON. A value that JSON does not have (a date of a Parquet file) is written as text."""
    return json.dumps(columns, ensure_ascii=False, default=str) + "\n"
