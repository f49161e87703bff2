"""``coterie predict``: a file of rows through a client's model, and a file of answers out."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coterie.inference.answers import COLUMNS, Answer, Rejected
from coterie.inference.predict import Predictor
from coterie.inference.records import READERS, Located, Read, as_json_line, read_records
from coterie.types import CoterieError

STDIN = "-"
_STDOUT = Path("/dev/stdout")
Write = Callable[[Mapping[str, object]], None]


@dataclass
class Progress:
    """How many rows were read so far, and how many of them have no answer."""

    rows: int = 0
    rejected: int = 0


def predict_file(
    predictor: Predictor,
    file: str,
    out: Path | None,
    *,
    reads: str = "jsonl",
    writes: str = "",
    prefix: str = "",
    reject: Callable[[str], None],
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer the rows of ``file`` ("-": standard input, in the format ``reads``) in ``out``, or on standard output.

    An answer is a row with its own columns and those of :data:`COLUMNS`, each after ``prefix``. ``writes`` is jsonl or
    csv, by default what the name of ``out`` ends in. ``reject`` is called with the reason for every row without an
    answer, which is left out; ``watch`` after every row. An ``out`` that is no regular file (a pipe, a device) is
    written to as it is.
    Raises :class:`CoterieError` for a file that cannot be read, for an ``out`` that cannot be written or that is
    ``file``, and for rows that have a column of an answer already.
    """
    kind = writes or ("csv" if out and out.suffix.lower() == ".csv" else "jsonl")
    if out and out.exists() and _STDOUT.exists() and out.samefile(_STDOUT):
        out = None  # by any of its names, and wherever it leads: no file is to take its place
    _check_out(out, file, writes)
    progress = Progress()
    own = [prefix + name for name in COLUMNS[predictor.task.kind]]
    with _output(out, kind) as write:
        for row, answer in predictor.answers(_checked(_rows(file, reads), own)):
            progress.rows += 1
            if isinstance(answer, Rejected):
                progress.rejected += 1
                reject(answer.reason)
            elif isinstance(row, Located):
                write({**row.record, **_columns(answer, prefix)})
            watch(progress)
    return progress


def _check_out(out: Path | None, file: str, writes: str) -> None:
    """Raises :class:`CoterieError` for a file of answers that could not be written, before there is any answer."""
    if out is None:
        return
    if out.is_dir():
        raise CoterieError(f"{out} is a folder; name a file for the answers")
    if not writes and out.suffix.lower() not in (".csv", ".jsonl"):
        raise CoterieError(f"{out}: the answers are written as .jsonl or .csv; name the file so, or give --format")
    if file != STDIN and out.exists() and Path(file).exists() and out.samefile(file):
        raise CoterieError(f"{out} is the file that is read; name another one for the answers")


def _rows(file: str, reads: str) -> Iterator[Read]:
    if file != STDIN:
        return read_records(Path(file))
    reader = READERS.get(f".{reads}")
    if reader is None:
        kinds = ", ".join(kind[1:] for kind in READERS)
        raise CoterieError(f"standard input is {reads!r}, which needs a file; give the file's name, or one of {kinds}")
    return reader(sys.stdin.buffer, "standard input")


def _checked(rows: Iterator[Read], own: Sequence[str]) -> Iterator[Read]:
    """The rows. Raises :class:`CoterieError` for a column that an answer would replace."""
    for row in rows:
        taken = [name for name in own if isinstance(row, Located) and name in row.record]
        if taken:
            raise CoterieError(
                f"{_where(row)}: the row has a column {taken[0]!r} already, which the answer would replace; give the "
                "answer's columns another beginning with --prefix"
            )
        yield row


def _where(row: Read) -> str:
    return row.where if isinstance(row, Located) else row.reason


def _columns(answer: Answer, prefix: str) -> dict[str, object]:
    return {prefix + name: value for name, value in answer.columns().items()}


@contextmanager
def _output(out: Path | None, kind: str) -> Iterator[Write]:
    """A function that writes one row. A regular file appears under its name once all rows are in it."""
    if out is None:
        with _standard_output() as file:
            yield _writer(file, kind)
        return
    if out.exists() and not out.is_file():
        with out.open("w", encoding="utf-8", newline="") as file:
            yield _writer(file, kind)
        return
    out = out.resolve()  # of a link, the file that it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield _writer(file, kind)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _standard_output() -> Iterator[IO[str]]:
    """Standard output as UTF-8, whatever the locale."""
    sys.stdout.flush()
    file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
    try:
        yield file
    finally:
        file.flush()
        file.detach()


def _writer(file: IO[str], kind: str) -> Write:
    if kind == "jsonl":
        return lambda columns: _ignored(file.write(as_json_line(columns)))
    if kind != "csv":
        raise CoterieError(f"the answers are written as jsonl or csv, not {kind!r}")
    return _CsvWriter(file)


def _ignored(_: int) -> None:
    """Drop the number of characters written."""


class _CsvWriter:
    """Writes rows as CSV; the first one has the columns. A list or a mapping becomes JSON."""

    def __init__(self, file: IO[str]) -> None:
        self.writer = csv.writer(file, lineterminator="\n")
        self.columns: list[str] = []

    def __call__(self, columns: Mapping[str, object]) -> None:
        """Write one row."""
        if not self.columns:
            self.columns = list(columns)
            self.writer.writerow(self.columns)
        if more := [name for name in columns if name not in self.columns]:
            raise CoterieError(
                f"a row has the column {more[0]!r}, which the first row lacks; write JSONL instead of CSV"
            )
        self.writer.writerow([_cell(columns.get(name)) for name in self.columns])


def _cell(value: object) -> object:
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else json.dumps(value, ensure_ascii=False, default=str)
