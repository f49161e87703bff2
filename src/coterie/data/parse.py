"""Turns tables into rows of a task: which column is what, and which label has which index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from coterie.data.files import Table
from coterie.data.rows import ChoiceRow, PromptRow, Row, TextRow
from coterie.data.settings import Columns
from coterie.data.template import columns_of, fill
from coterie.types import DataError, Json, TaskKind

TEXT_PAIR = "text_pair"
CHOICES = "choices"


def parse(
    tables: Mapping[str, Table], columns: Columns, kind: TaskKind, labels: Sequence[str] | None
) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...] | None]:
    """The rows of each table, in its order, and the label names (None for generation).

    Without ``labels`` the names are those of the training rows, sorted; other rows have no others. With them, a label
    is one of the names, or, where no name is itself a number, an index into them. The candidates of multiple choice
    are those of the column ``choices``, and the label names where there is no such column; where not all rows have
    the same, there are no label names. Raises :class:`DataError` that names the file and line.
    """
    _check_template(columns, kind)
    if kind == "generation":
        return {split: tuple(_prompt_rows(table, columns)) for split, table in tables.items()}, None
    if kind == "multiple_choice" and _has_choices(tables.values(), columns):
        found = {split: tuple(_choice_rows(table, columns, labels or ())) for split, table in tables.items()}
        return dict(found), _in_common(found.values())
    names = tuple(labels) if labels is not None else _trained_labels(tables, columns)
    if len(set(names)) < len(names):
        raise DataError(f"a label is listed twice in {listing(names)}; label names are unique")
    if kind == "classification":
        return {split: tuple(_text_rows(table, columns, names)) for split, table in tables.items()}, names
    if len(names) < 2 or not all(name.strip() for name in names):
        raise DataError(
            f"{next(iter(tables.values())).source}: the candidates are the label names, two or more and none of them "
            f"empty, not {listing(list(map(repr, names)))}; name them in data.labels, or give the rows choices"
        )
    return {split: tuple(_label_rows(table, columns, names)) for split, table in tables.items()}, names


def found_labels(tables: Iterable[Table], columns: Columns) -> tuple[str, ...]:
    """The names of the labels that occur, sorted: as numbers if they all are, else as text."""
    names = {_label(value, table.where(row)) for table in tables for row, value in _column(table, columns, "label")}
    return tuple(sorted(names, key=int if all(map(_is_integer, names)) else str))


def _trained_labels(tables: Mapping[str, Table], columns: Columns) -> tuple[str, ...]:
    """The labels of the training rows; a row elsewhere with another is a misspelt one, as like as not."""
    names = found_labels([tables["train"]], columns)
    for table in tables.values():
        for row, value in _column(table, columns, "label"):
            if (label := _label(value, table.where(row))) not in names:
                raise DataError(
                    f"{table.where(row)}: no training row has the label {label!r}, they have {listing(names)}; "
                    "correct it, or list all labels in data.labels"
                )
    return names


def listing(names: Sequence[str], most: int = 12) -> str:
    """``a, b, c`` or, of many, ``a, b, ... (150 in all)``."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _text_rows(table: Table, columns: Columns, names: Sequence[str]) -> Iterable[TextRow]:
    pairs = _pairs(table, columns)
    texts = _column(table, columns, "text")
    for (row, text), label, pair in zip(texts, _labels(table, columns, names), pairs, strict=True):
        yield TextRow(_string(text, table.where(row), columns.text), label, pair)


def _labels(table: Table, columns: Columns, names: Sequence[str]) -> Iterable[int]:
    """The index of each row's label in ``names``."""
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_integer, names)):
        index |= {str(i): i for i in range(len(names))}
    for row, value in _column(table, columns, "label"):
        label = _label(value, table.where(row))
        if label not in index:
            raise DataError(f"{table.where(row)}: the label {label!r} is none of {listing(names)}")
        yield index[label]


def _prompt_rows(table: Table, columns: Columns) -> Iterable[PromptRow]:
    prompts, completions = _prompts(table, columns), _column(table, columns, "completion")
    for prompt, (row, completion) in zip(prompts, completions, strict=True):
        yield PromptRow(prompt, _string(completion, table.where(row), columns.completion))


def _label_rows(table: Table, columns: Columns, names: Sequence[str]) -> Iterable[ChoiceRow]:
    """Rows whose candidates are the label names, a space before each where the prompt does not end in white space."""
    apart, spaced = tuple(names), tuple(f" {name}" for name in names)
    for prompt, label in zip(_prompts(table, columns), _labels(table, columns, names), strict=True):
        yield ChoiceRow(prompt, apart if prompt[-1].isspace() else spaced, label)


def _choice_rows(table: Table, columns: Columns, names: Sequence[str]) -> Iterable[ChoiceRow]:
    """Rows with candidates of their own."""
    prompts, found = _prompts(table, columns), _column(table, columns, CHOICES)
    for prompt, (row, given), (_, value) in zip(prompts, found, _column(table, columns, "label"), strict=True):
        choices = _candidates(given, table.where(row), columns.choices or CHOICES)
        yield ChoiceRow(prompt, choices, _answer(value, choices, names, table.where(row)))


def _has_choices(tables: Iterable[Table], columns: Columns) -> bool:
    """Whether rows have candidates of their own: then all must."""
    return columns.choices is not None or any(record.get(CHOICES) for table in tables for record in table.records)


def _candidates(value: Json, where: str, column: str) -> tuple[str, ...]:
    """Two texts or more, of a list or of a list's JSON, which is what a CSV file can hold."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):  # no list, as the next lines say
            value = json.loads(value)
    if not isinstance(value, list):
        raise DataError(f'{where}: {column} is {value!r}, not a list of texts such as ["yes", "no"]')
    for i, choice in enumerate(value):
        if not isinstance(choice, str):
            raise DataError(f"{where}: {column}[{i}] is {choice!r}, not text")
        if not choice.strip():
            raise DataError(f"{where}: {column}[{i}] is empty; every candidate has a text")
    if len(value) < 2:
        raise DataError(f"{where}: {column} holds {len(value)} candidate(s); there is a choice between two or more")
    if len({choice.strip() for choice in value}) < len(value):
        raise DataError(f"{where}: a candidate is listed twice in {column}, {listing(value)}")
    return tuple(value)


def _answer(value: Json, choices: Sequence[str], names: Sequence[str], where: str) -> int:
    """The index of the right one of ``choices``: an integer as it is; text is that of a candidate, else one of the
    label ``names``, which stands for its place, else (where no candidate is itself a number) an integer in digits."""
    texts = [choice.strip() for choice in choices]
    label, numbered = _label(value, where), not isinstance(value, str)
    places = {name: i for i, name in enumerate(names)}
    places |= {} if numbered else {text: i for i, text in enumerate(texts)}
    if label in places:
        found = places[label]
    elif _is_integer(label) and (numbered or not any(map(_is_integer, texts))):
        found = int(label)
    else:
        raise DataError(f"{where}: the label {label!r} is none of the candidates {listing(texts)}")
    if not 0 <= found < len(choices):
        raise DataError(f"{where}: the label {label} is no place among {len(choices)} candidates; 0 is the first")
    return found


def _in_common(splits: Iterable[Sequence[ChoiceRow]]) -> tuple[str, ...] | None:
    """The candidates, if all rows have the same in the same order."""
    (first, *others) = {row.choices for rows in splits for row in rows}
    return None if others else tuple(choice.strip() for choice in first)


def _check_template(columns: Columns, kind: TaskKind) -> None:
    """Raises :class:`DataError` for a template where there is no prompt, and for one that gives the answer away."""
    if columns.template is None:
        return
    if kind == "classification":
        raise DataError("data.columns.template makes a prompt, and task.kind is classification; leave it out")
    answer = columns.completion if kind == "generation" else columns.label
    if answer in columns_of(columns.template):
        raise DataError(f"data.columns.template has {{{answer}}}: the answer would stand in the prompt; leave it out")


def _prompts(table: Table, columns: Columns) -> list[str]:
    """The prompts: of their column, or made of others by the template."""
    if columns.template is None:
        return [_string(value, table.where(row), columns.prompt) for row, value in _column(table, columns, "prompt")]
    names = columns_of(columns.template)
    for name in names:
        if name not in table.columns:
            known = listing(table.columns) or "none"
            raise DataError(f"{table.source}: no column {name!r} for data.columns.template; its columns are {known}")
    filled = [[_plain(value, table.where(row), name) for row, value in _values(table, name)] for name in names]
    return [fill(columns.template, dict(zip(names, values, strict=True))) for values in zip(*filled, strict=True)]


def _column(table: Table, columns: Columns, role: str) -> Iterable[tuple[int, Json]]:
    """Row number and value of the column that plays ``role``. Raises for an unknown column, an empty value."""
    name = getattr(columns, role) or role
    if name not in table.columns:
        known = listing(table.columns) or "none"
        fix = f"Set data.columns.{role}" + (", or data.columns.template" if role == "prompt" else "")
        raise DataError(f"{table.source}: no column {name!r}; its columns are {known}. {fix}")
    return _values(table, name)


def _values(table: Table, name: str) -> Iterable[tuple[int, Json]]:
    """Row number and value of the column ``name``. Raises for an empty value."""
    for row, record in enumerate(table.records):
        value = record.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{table.where(row)}: the row has no {name}")
        yield row, value


def _pairs(table: Table, columns: Columns) -> Sequence[str | None]:
    """The second sentences: all or, where no row has one and none was asked for, none."""
    name = columns.text_pair or TEXT_PAIR
    if columns.text_pair is None and not any(record.get(name) for record in table.records):
        return [None] * len(table.records)
    return [_string(value, table.where(row), name) for row, value in _column(table, columns, TEXT_PAIR)]


def _string(value: Json, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {value!r}, not text")
    return value


def _plain(value: Json, where: str, column: str) -> str:
    """Text as it is, a number in digits."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {column} is {value!r}, neither text nor a number; the template has no use for it")
    return str(value)


def _label(value: Json, where: str) -> str:
    """The name of a label: text as it is, an integer in digits. Raises for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: the label {value!r} is neither text nor an integer")
    return str(value).strip()


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
