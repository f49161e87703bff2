"""Reads Parquet files in parts, within a bound on the memory: a text that occurs a million times is stored once."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from coterie import units
from coterie.data.parquet_footer import Chunk, chunks_of
from coterie.types import DataError

ROWS = 1024  # read at a time
RATIO = 64  # bytes of memory for each of the file
LEAST = 2**28  # bytes of memory that any file may take
_PART = 2**24  # bytes, about, of the rows that are made at a time
_ROW, _VALUE = 240, 32  # bytes that a row takes, and each of its values beside its text


@dataclass(frozen=True)
class _Bound:
    """The memory that a file of ``size`` bytes may take: all its rows if read ``whole``, else those read at a time."""

    path: Path
    size: int
    whole: bool

    @property
    def most(self) -> int:
        """The bytes of rows."""
        return max(LEAST, RATIO * self.size)

    @property
    def stored(self) -> int:
        """The bytes of columns without compression, of which Arrow and Python hold up to four copies at once."""
        return max(LEAST // 4, RATIO * self.size)

    def check(self, taken: int) -> None:
        if taken > self.most and self.whole:
            self._refuse("its rows", self.most, "fewer rows")
        if taken > self.most:
            self._refuse("its rows that are read at a time", self.most, "smaller row groups")

    def check_stored(self, taken: int) -> None:
        if taken > self.stored:
            self._refuse("the columns of a row group", self.stored, "smaller row groups")

    def _refuse(self, what: str, most: int, instead: str) -> NoReturn:
        raise DataError(
            f"{self.path}: {what} take more than {units.size(most)} of memory, {RATIO} times the file's size or more; "
            f"write {instead}, or write the rows as JSONL"
        )


def parquet_records(
    path: Path, content: bytes | None = None, *, whole: bool = True
) -> Iterator[list[dict[str, object]]]:
    """The rows of the file ``path``, or of its ``content``, some at a time; ``whole`` if the caller keeps them all.

    Raises :class:`DataError` for a file that cannot be read, and before one takes more memory than ``RATIO`` times its
    size, or ``LEAST``: all of its rows if they are kept, else those that are read at a time.
    """
    bound = _Bound(path, path.stat().st_size if content is None else len(content), whole)
    try:
        source = path if content is None else pyarrow.BufferReader(content)
        footer = pyarrow.parquet.read_metadata(source)
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            groups = chunks_of(file)
        if [len(group) for group in groups] != [footer.num_columns] * footer.num_row_groups:
            raise ValueError("its row groups have different columns")
        rows = _check_footer(footer, groups, bound)
        before = 0
        for group, chunks in enumerate(groups):
            for batch in _batches(source, footer, group, chunks, rows, bound.stored):
                taken = _ROW * batch.num_rows + sum(map(_bytes, batch.columns))
                bound.check(before + taken)
                before += taken if whole else 0
                yield from _records(batch, taken)
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: a text in it is not UTF-8: {fault.object[:40]!r}; write the file again") from fault
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as fault:  # OSError: a damaged file
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise DataError(f"{path}: not a Parquet file that can be read: {reason}; write it again") from fault


def _batches(
    source: Path | pyarrow.BufferReader,
    footer: pyarrow.parquet.FileMetaData,
    group: int,
    chunks: Sequence[Chunk],
    rows: int,
    most: int,
) -> Iterator[pyarrow.RecordBatch]:
    """A row group, ``rows`` rows at a time: texts as places in a list of the different ones, however often each occurs.

    Arrow cannot read a list of texts in that way where the file has some of them in such a list and others not. It is
    read as it is then, few rows at a time.
    """
    columns = [(footer.schema.column(at), chunk) for at, chunk in enumerate(chunks)]
    texts = [column.path for column, chunk in columns if column.physical_type == "BYTE_ARRAY" and not chunk.delta]
    done = seen = 0
    with pyarrow.parquet.ParquetFile(source, metadata=footer, read_dictionary=texts) as file:
        try:
            for batch in file.iter_batches(rows, row_groups=[group]):
                yield batch
                done += batch.num_rows
        except pyarrow.ArrowNotImplementedError:
            if all("." not in text for text in texts):
                raise
        else:
            return
    few = max(1, min(rows, most // max(1, sum(chunk.size for chunk in chunks))))
    with pyarrow.parquet.ParquetFile(source, metadata=footer) as file:
        for batch in file.iter_batches(few, row_groups=[group]):
            seen += batch.num_rows
            if seen > done:
                yield batch.slice(max(0, batch.num_rows - (seen - done)))


def _check_footer(footer: pyarrow.parquet.FileMetaData, groups: Sequence[Sequence[Chunk]], bound: _Bound) -> int:
    """Refuse what takes too much by the file's own account. How many rows can be read at a time.

    Arrow reads texts of some encodings in full only. There each may be as long as all that is stored: a text may repeat
    an earlier one, or (DELTA_BYTE_ARRAY) the start of it.
    """
    taken, rows = _ROW * footer.num_rows, ROWS
    columns = [footer.schema.column(at) for at in range(footer.num_columns)]
    for group in groups:
        taken = taken if bound.whole else 0
        bound.check_stored(sum(chunk.size for chunk in group))
        for column, chunk in zip(columns, group, strict=True):
            every = bound.whole or column.max_repetition_level  # lists: a row may have any number of values
            values = chunk.values if every else min(chunk.values, ROWS)
            taken += chunk.size + values * (_VALUE + max(0, column.length))
            if column.physical_type == "BYTE_ARRAY" and chunk.delta:
                rows = max(1, min(rows, bound.stored // max(1, chunk.size)))
                if column.max_repetition_level and chunk.repeats:
                    bound.check_stored(chunk.values * chunk.size)
        bound.check(taken)
    return rows


def _records(batch: pyarrow.RecordBatch, taken: int) -> Iterator[list[dict[str, object]]]:
    """The rows of ``batch``, which take so many bytes, in parts: Arrow's and Python's copies are never both of all."""
    rows = max(1, batch.num_rows * _PART // max(1, taken))
    for start in range(0, batch.num_rows, rows):
        part = batch.slice(start, rows)
        yield pyarrow.RecordBatch.from_arrays(list(map(_plain, part.columns)), part.schema.names).to_pylist()


def _plain(array: pyarrow.Array) -> pyarrow.Array:
    return array.dictionary_decode() if isinstance(array, pyarrow.DictionaryArray) else array


def _bytes(array: pyarrow.Array) -> int:
    """The bytes that ``array`` takes as Python values, about, without making them."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _bytes(array.storage)
    if isinstance(array, pyarrow.DictionaryArray):
        values = array.dictionary
        if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_binary(values.type)):
            return _VALUE * len(array)
        lengths = pyarrow.compute.binary_length(values).cast("int64")
        if pyarrow.types.is_string(values.type):  # one character beyond ASCII can make Python take four bytes for each
            wide = pyarrow.compute.multiply(pyarrow.compute.utf8_length(values).cast("int64"), 4)
            lengths = pyarrow.compute.if_else(pyarrow.compute.string_is_ascii(values), lengths, wide)
        return _VALUE * len(array) + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return _ROW * len(array) + sum(map(_bytes, array.flatten()))
    if pyarrow.types.is_map(kind):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return _VALUE * len(array) + sum(_bytes(of.slice(start, end - start)) for of in (array.keys, array.items))
    if pyarrow.types.is_nested(kind):
        return _VALUE * len(array) + _bytes(array.flatten())
    return _VALUE * len(array) + int(array.nbytes)
