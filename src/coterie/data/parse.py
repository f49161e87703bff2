"""Turns tables into rows of a task: which column is what, and which label has which index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from coterie.data.files import Table
from coterie.data.rows import Kind, PromptRow, Row, TextRow
from coterie.data.settings import Columns
from coterie.types import CoterieError, Json

TEXT_PAIR = "text_pair"


def parse(
    tables: Mapping[str, Table], columns: Columns, kind: Kind, labels: Sequence[str] | None
) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...] | None]:
    """The rows of each table, in its order, and the label names (None for generation).

    Without ``labels`` the names are those found in the tables, sorted. With them, a label is one of the names, or,
    where no name is itself a number, an index into them. Raises :class:`CoterieError` that names the file and line.
    """
    if kind == "generation":
        return {split: tuple(_prompt_rows(table, columns)) for split, table in tables.items()}, None
    names = tuple(labels) if labels is not None else found_labels(tables.values(), columns)
    if len(set(names)) < len(names):
        raise CoterieError(f"a label is listed twice in {listing(names)}; label names are unique")
    return {split: tuple(_text_rows(table, columns, names)) for split, table in tables.items()}, names


def found_labels(tables: Iterable[Table], columns: Columns) -> tuple[str, ...]:
    """The names of the labels that occur, sorted: as numbers if they all are, else as text."""
    names = {_label(value, table.where(row)) for table in tables for row, value in _column(table, columns, "label")}
    return tuple(sorted(names, key=int if all(map(_is_integer, names)) else str))


def listing(names: Sequence[str], most: int = 12) -> str:
    """``a, b, c`` or, of many, ``a, b, ... (150 in all)``."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _text_rows(table: Table, columns: Columns, names: Sequence[str]) -> Iterable[TextRow]:
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_integer, names)):
        index |= {str(i): i for i in range(len(names))}
    pairs = _pairs(table, columns)
    texts = _column(table, columns, "text")
    values = _column(table, columns, "label")
    for (row, text), (_, value), pair in zip(texts, values, pairs, strict=True):
        label = _label(value, table.where(row))
        if label not in index:
            raise CoterieError(f"{table.where(row)}: the label {label!r} is none of {listing(names)}")
        yield TextRow(_string(text, table.where(row), columns.text), index[label], pair)


def _prompt_rows(table: Table, columns: Columns) -> Iterable[PromptRow]:
    prompts, completions = _column(table, columns, "prompt"), _column(table, columns, "completion")
    for (row, prompt), (_, completion) in zip(prompts, completions, strict=True):
        where = table.where(row)
        yield PromptRow(_string(prompt, where, columns.prompt), _string(completion, where, columns.completion))


def _column(table: Table, columns: Columns, role: str) -> Iterable[tuple[int, Json]]:
    """Row number and value of the column that plays ``role``. Raises for an unknown column, an empty value."""
    name = getattr(columns, role) or role
    if name not in table.columns:
        known = listing(table.columns) or "none"
        raise CoterieError(f"{table.source}: no column {name!r}; its columns are {known}. Set data.columns.{role}")
    for row, record in enumerate(table.records):
        value = record.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise CoterieError(f"{table.where(row)}: the row has no {name}")
        yield row, value


def _pairs(table: Table, columns: Columns) -> Sequence[str | None]:
    """The second sentences: all or, where no row has one and none was asked for, none."""
    name = columns.text_pair or TEXT_PAIR
    if columns.text_pair is None and not any(record.get(name) for record in table.records):
        return [None] * len(table.records)
    return [_string(value, table.where(row), name) for row, value in _column(table, columns, TEXT_PAIR)]


def _string(value: Json, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise CoterieError(f"{where}: {column} is {value!r}, not text")
    return value


def _label(value: Json, where: str) -> str:
    """The name of a label: text as it is, an integer in digits. Raises for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise CoterieError(f"{where}: the label {value!r} is neither text nor an integer")
    return str(value).strip()


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
