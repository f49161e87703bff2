"""Reads one file of rows: JSONL, CSV or Parquet, by the ending of its name."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.data.parquet import parquet_records
from coterie.text import check_pairs, parse_json
from coterie.types import DataError

Record = Mapping[str, object]


@dataclass(frozen=True)
class RowTable:
    """Rows as read (column name to value), their source, and the source's SHA-256.

    ``lines`` holds the line of each record in a text file (1 is the first), or nothing.
    """

    source: str
    records: Sequence[Record]
    sha256: str
    lines: Sequence[int] = ()

    def where(self, row: int) -> str:
        """``FILE:LINE`` of record ``row`` (from 0), or ``SOURCE, row N`` (from 1) where there are no lines."""
        return f"{self.source}:{self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"

    @property
    def columns(self) -> list[str]:
        """Every column of any record, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record))


def table_of(source: str, records: Sequence[Record]) -> RowTable:
    """A table of records that come from no file; its hash is that of their JSON."""
    text = "\n".join(json.dumps(record, sort_keys=True, default=str) for record in records)
    for row, record in enumerate(records):
        _check_text(record, f"{source}, row {row + 1}")
    return RowTable(source, records, hashlib.sha256(text.encode()).hexdigest())


def _check_text(record: Record, where: str) -> None:
    try:
        check_pairs("".join(value for value in record.values() if isinstance(value, str)))
    except ValueError as fault:
        raise DataError(f"{where}: {fault}") from fault


def read_table(path: Path, split: str = "train") -> RowTable:
    """The rows of a split's file.

    Raises :class:`DataError` for a missing file, an unknown ending, a file that cannot be read, and one without rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type; the types are {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    content = path.read_bytes()
    records, lines = reader(path, content)
    if not records:
        more = ", or leave the file out" if split != "train" else ""
        raise DataError(f"{path}: no rows; add some{more}")
    return RowTable(str(path), records, hashlib.sha256(content).hexdigest(), lines)


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from fault


def _jsonl(path: Path, content: bytes) -> tuple[list[Record], list[int]]:
    records: list[Record] = []
    lines = []
    for number, line in enumerate(_text(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as fault:
            raise DataError(f"{path}:{number}: not a line of JSON: {fault}") from fault
        if not isinstance(record, dict):
            raise DataError(f'{path}:{number}: a row is a JSON object such as {{"text": "..."}}, not {line[:40]}')
        records.append(record)
        lines.append(number)
    return records, lines


def _csv(path: Path, content: bytes) -> tuple[list[Record], list[int]]:
    reader = csv.reader(io.StringIO(_text(path, content), newline=""), strict=True)
    header: list[str] | None = None
    records: list[Record] = []
    lines = []
    start = 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
            elif fields and header is not None:
                if len(fields) > len(header):
                    raise DataError(
                        f"{path}:{start}: {len(fields)} fields for {len(header)} columns; quote fields that hold commas"
                    )
                records.append(dict(zip(header, fields, strict=False)))
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as fault:
        raise DataError(f"{path}:{start}: not a line of CSV: {fault}") from fault
    return records, lines


def _parquet(path: Path, content: bytes) -> tuple[list[Record], list[int]]:
    return [record for records in parquet_records(path, content) for record in records], []


READERS: dict[str, Callable[[Path, bytes], tuple[list[Record], list[int]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
