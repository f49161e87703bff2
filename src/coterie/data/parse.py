"""Turns tables into rows of a task: finds the columns and gives each label its index."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from coterie.data.conversations import chat_row, form_of, instruction_row
from coterie.data.files import RowTable
from coterie.data.preferences import preference_row
from coterie.data.rows import ChoiceRow, GenerationRow, PreferenceRow, PromptRow, Row, TextRow
from coterie.data.settings import Columns
from coterie.data.template import columns_of, fill
from coterie.text import parse_json
from coterie.types import DataError, TaskKind

TEXT_PAIR = "text_pair"
CHOICES = "choices"
LONGEST_TEXT = 1_000_000  # characters: beyond what any base reads, and minutes of work for a tokenizer
_DIGITS = 4000  # of a label that is a number; Python reads no more than 4300


def parse(
    tables: Mapping[str, RowTable], columns: Columns, kind: TaskKind, labels: Sequence[str] | None
) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...] | None]:
    """The rows of each table, in its order, and the label names (None for generation).

    Without ``labels`` the names are those of the training rows, sorted, and the other rows may have no others. With
    ``labels``, a row's label is one of them, or, where none of them is itself a number, an index into them. The
    candidates of multiple choice are those of the column ``choices``, or the label names where there is no such
    column; where rows differ in their candidates, there are no label names. Raises :class:`DataError` that names the
    file and line.
    """
    _check_template(columns, kind)
    if kind == "generation":
        return {split: tuple(_generation_rows(table, columns)) for split, table in tables.items()}, None
    if kind == "multiple_choice" and _has_choices(tables.values(), columns):
        chosen = {split: tuple(_choice_rows(table, columns, labels or ())) for split, table in tables.items()}
        return dict(chosen), _in_common(chosen.values())
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


def found_labels(tables: Iterable[RowTable], columns: Columns) -> tuple[str, ...]:
    """The names of the labels that occur, sorted: as numbers if they all are, else as text."""
    names = {_label(value, table.where(row)) for table in tables for row, value in _column(table, columns, "label")}
    return tuple(sorted(names, key=int if all(map(_is_integer, names)) else str))


def _trained_labels(tables: Mapping[str, RowTable], columns: Columns) -> tuple[str, ...]:
    """The labels of the training rows. One that occurs only in another split is refused: most are spelling mistakes."""
    names = found_labels([tables["train"]], columns)
    _check_spelling(names, tables["train"], columns)
    for table in tables.values():
        for row, value in _column(table, columns, "label"):
            if (label := _label(value, table.where(row))) not in names:
                raise DataError(
                    f"{table.where(row)}: no training row has the label {label!r}, only {listing(names)}. "
                    "Correct it, or list all labels in data.labels"
                )
    return names


def _check_spelling(names: Sequence[str], table: RowTable, columns: Columns) -> None:
    """Raises :class:`DataError` for names that differ in capital letters or white space alone: slips, in most files."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(folded(name), name)
        if other != name:
            rows = (row for row, value in _column(table, columns, "label") if _label(value, "") == name)
            raise DataError(
                f"{table.where(next(rows))}: the label {name!r} differs from {other!r} only in capital letters or "
                "spaces; correct one, or list both in data.labels"
            )


def folded(name: str) -> str:
    """``name`` without its differences in capital letters, white space and forms of a character."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def listing(names: Sequence[str], most: int = 12) -> str:
    """``a, b, c``, or of many names ``a, b, ... (150 in all)``."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _text_rows(table: RowTable, columns: Columns, names: Sequence[str]) -> Iterable[TextRow]:
    pairs = _pairs(table, columns)
    texts = _column(table, columns, "text")
    for (row, text), label, pair in zip(texts, _labels(table, columns, names), pairs, strict=True):
        yield TextRow(_string(text, table.where(row), columns.text), label, pair)


def _labels(table: RowTable, columns: Columns, names: Sequence[str]) -> Iterable[int]:
    """The index of each row's label in ``names``."""
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_integer, names)):
        index |= {str(i): i for i in range(len(names))}
    for row, value in _column(table, columns, "label"):
        label = _label(value, table.where(row))
        if label not in index:
            raise DataError(f"{table.where(row)}: the label {label!r} is not one of {listing(names)}")
        yield index[label]


def _generation_rows(table: RowTable, columns: Columns) -> Iterable[GenerationRow]:
    match form_of(table, columns):
        case "prompt":
            return _prompt_rows(table, columns)
        case "preference":
            return _preference_rows(table, columns)
        case "instruction":
            return (instruction_row(record, table.where(row), _bounded) for row, record in enumerate(table.records))
        case "messages" | "conversations" as name:
            column = columns.messages or name
            values = _column(table, columns.model_copy(update={"messages": column}), "messages")
            return (chat_row(value, table.where(row), column, _bounded) for row, value in values)


def _prompt_rows(table: RowTable, columns: Columns) -> Iterable[PromptRow]:
    prompts, completions = _prompts(table, columns), _column(table, columns, "completion")
    for prompt, (row, completion) in zip(prompts, completions, strict=True):
        yield PromptRow(prompt, _string(completion, table.where(row), columns.completion))


def _preference_rows(table: RowTable, columns: Columns) -> Iterable[PreferenceRow]:
    """Rows with two answers; without a column of prompts, both are whole conversations."""
    if columns.template is None and columns.prompt not in table.columns:
        prompts: Iterable[object] = [None] * len(table.records)
    else:
        prompts = _prompts(table, columns) if columns.template else [v for _, v in _column(table, columns, "prompt")]
    pairs = zip(_column(table, columns, "chosen"), _column(table, columns, "rejected"), strict=True)
    for prompt, ((row, chosen), (_, rejected)) in zip(prompts, pairs, strict=True):
        yield preference_row(prompt, chosen, rejected, table.where(row), columns, _bounded)


def _label_rows(table: RowTable, columns: Columns, names: Sequence[str]) -> Iterable[ChoiceRow]:
    """Rows whose candidates are the label names, with a space before each unless the prompt ends in one."""
    apart, spaced = tuple(names), tuple(f" {name}" for name in names)
    for prompt, label in zip(_prompts(table, columns), _labels(table, columns, names), strict=True):
        yield ChoiceRow(prompt, apart if prompt[-1].isspace() else spaced, label)


def _choice_rows(table: RowTable, columns: Columns, names: Sequence[str]) -> Iterable[ChoiceRow]:
    """Rows with candidates of their own."""
    prompts, candidates = _prompts(table, columns), _column(table, columns, CHOICES)
    for prompt, (row, given), (_, value) in zip(prompts, candidates, _column(table, columns, "label"), strict=True):
        choices = _candidates(given, table.where(row), columns.choices or CHOICES)
        yield ChoiceRow(prompt, choices, _answer(value, choices, names, table.where(row)))


def _has_choices(tables: Iterable[RowTable], columns: Columns) -> bool:
    """Whether rows have candidates of their own: if one has, all must."""
    return columns.choices is not None or any(record.get(CHOICES) for table in tables for record in table.records)


def _candidates(value: object, where: str, column: str) -> tuple[str, ...]:
    """Two texts or more, from a list or from a list written as JSON (in CSV files)."""
    if isinstance(value, str):
        with suppress(ValueError):  # not a list: refused below
            value = parse_json(value)
    if not isinstance(value, list):
        raise DataError(f'{where}: {column} is {value!r}, not a list of texts such as ["yes", "no"]')
    for i, choice in enumerate(value):
        if not isinstance(choice, str):
            raise DataError(f"{where}: {column}[{i}] is {choice!r}, not text")
        if not choice.strip():
            raise DataError(f"{where}: {column}[{i}] is empty; every candidate must have text")
        _bounded(choice, where, f"{column}[{i}]")
    if len(value) < 2:
        raise DataError(f"{where}: {column} holds {len(value)} candidate(s); give two or more")
    if len({choice.strip() for choice in value}) < len(value):
        raise DataError(f"{where}: a candidate is listed twice in {column}, {listing(value)}")
    return tuple(value)


def _answer(value: object, choices: Sequence[str], names: Sequence[str], where: str) -> int:
    """The index of the right one of ``choices``.

    An integer is that index. Text is a candidate, else one of the label ``names`` (for its position), else, where no
    candidate is itself a number, an index in digits.
    """
    texts = [choice.strip() for choice in choices]
    label, numbered = _label(value, where), not isinstance(value, str)
    known = {name: i for i, name in enumerate(names)}
    known |= {} if numbered else {text: i for i, text in enumerate(texts)}
    if label in known:
        index = known[label]
    elif _is_integer(label) and (numbered or not any(map(_is_integer, texts))):
        index = int(label)
    else:
        raise DataError(f"{where}: the label {label!r} is not one of the candidates {listing(texts)}")
    if not 0 <= index < len(choices):
        raise DataError(f"{where}: the label {label} is out of range for {len(choices)} candidates; 0 is the first")
    return index


def _in_common(splits: Iterable[Sequence[ChoiceRow]]) -> tuple[str, ...] | None:
    """The candidates, if all rows have the same ones in the same order."""
    (first, *others) = {row.choices for rows in splits for row in rows}
    return None if others else tuple(choice.strip() for choice in first)


def _check_template(columns: Columns, kind: TaskKind) -> None:
    """Raises :class:`DataError` for a template in a task without prompts, and for one that contains the answer."""
    if columns.template is None:
        return
    if kind == "classification":
        raise DataError("data.columns.template is for prompts, and task.kind is classification; leave it out")
    answer = columns.completion if kind == "generation" else columns.label
    if answer in columns_of(columns.template):
        raise DataError(f"data.columns.template has {{{answer}}}, which puts the answer into the prompt; leave it out")


def _prompts(table: RowTable, columns: Columns) -> list[str]:
    """The prompts: from their column, or from other columns through the template."""
    if columns.template is None:
        return [_string(value, table.where(row), columns.prompt) for row, value in _column(table, columns, "prompt")]
    names = columns_of(columns.template)
    for name in names:
        if name not in table.columns:
            known = listing(table.columns) or "none"
            raise DataError(f"{table.source}: no column {name!r} for data.columns.template; its columns are {known}")
    filled = [[_plain(value, table.where(row), name) for row, value in _values(table, name)] for name in names]
    return [fill(columns.template, dict(zip(names, values, strict=True))) for values in zip(*filled, strict=True)]


def _column(table: RowTable, columns: Columns, role: str) -> Iterable[tuple[int, object]]:
    """Row number and value of the column that plays ``role``. Raises for an unknown column, an empty value."""
    name = getattr(columns, role) or role
    if name not in table.columns:
        known = listing(table.columns) or "none"
        fix = f"Set data.columns.{role}" + (", or data.columns.template" if role == "prompt" else "")
        raise DataError(f"{table.source}: no column {name!r}; its columns are {known}. {fix}")
    return _values(table, name)


def _values(table: RowTable, name: str) -> Iterable[tuple[int, object]]:
    """Row number and value of the column ``name``. Raises for an empty value."""
    for row, record in enumerate(table.records):
        value = record.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{table.where(row)}: the row has no {name}")
        yield row, value


def _pairs(table: RowTable, columns: Columns) -> Sequence[str | None]:
    """The second sentences; None for all rows where none has one and no column is set for them."""
    name = columns.text_pair or TEXT_PAIR
    if columns.text_pair is None and not any(record.get(name) for record in table.records):
        return [None] * len(table.records)
    return [_string(value, table.where(row), name) for row, value in _column(table, columns, TEXT_PAIR)]


def _string(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {value!r}, not text")
    return _bounded(value, where, column)


def _bounded(text: str, where: str, column: str) -> str:
    """``text``. Raises :class:`DataError` where it is too long."""
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"{where}: {column} has {len(text):,} characters, more than the {LONGEST_TEXT:,} of the longest text; cut "
            "it, or divide it over several rows"
        )
    return text


def _plain(value: object, where: str, column: str) -> str:
    """Text as it is, a number in digits."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {column} is {value!r}, neither text nor a number, so the template cannot use it")
    return _bounded(str(value), where, column)


def _label(value: object, where: str) -> str:
    """The name of a label: text as it is, an integer in digits. Raises :class:`DataError` for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: the label {value!r} is neither text nor an integer")
    return str(value).strip()


def _is_integer(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isdecimal() and len(digits) <= _DIGITS
