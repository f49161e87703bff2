"""Values from JSON as text and tables: units for numbers, a table for every list of records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coterie.units import duration, energy, operations, size

MISSING = "-"
PERCENT = {"accuracy", "macro_f1", "rouge_l", "exact_match", "token_f1", "numeric", "reward_accuracy"}
_WORDS = {"macro_f1": "macro F1", "matthews": "Matthews", "rouge_l": "ROUGE-L", "token_f1": "token F1"}
_LONG_LIST = 12  # entries of a list that a cell shows


@dataclass(frozen=True)
class Table:
    """A table of values as they came from JSON; ``show`` makes them readable."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


def words(name: str) -> str:
    """A name from JSON, as readers see it."""
    return _WORDS.get(name, name.replace("_", " "))


def label(path: str) -> str:
    """A path of names from JSON, as readers see it: ``unused.train`` is ``unused: train``."""
    first, dot, rest = path.partition(".")
    return f"{words(first)}: {rest}" if dot else words(first)


def show(value: object, name: str = "") -> str:
    """A value as text for readers; ``name`` determines its unit. A missing value, or NaN, is ``-``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value, name)
    if isinstance(value, (list, tuple)):
        text = ", ".join(show(item) for item in value[:_LONG_LIST])
        return f"{text}, ... ({len(value)})" if len(value) > _LONG_LIST else text or MISSING
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(item, key)}" for key, item in value.items()) or MISSING
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def tables(value: Mapping[str, object], title: str) -> list[Table]:
    """A mapping as tables: one of its plain entries, one of each list or mapping of records inside it."""
    plain: list[tuple[str, object]] = []
    inner: list[Table] = []
    for key, item in _flat(value):
        if records := _records(item):
            columns = list(dict.fromkeys(column for _, row in records for column in row))
            inner.append(Table(key, ["", *columns], [[n, *(row.get(c) for c in columns)] for n, row in records]))
        elif matrix := _matrix(item):
            head = ["", *map(str, range(len(matrix[0])))]
            inner.append(Table(key, head, [[i, *row] for i, row in enumerate(matrix)]))
        else:
            plain.append((key, item))
    return ([Table(title, ["", ""], plain)] if plain else []) + inner


def _flat(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not _records(value):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _records(value: object) -> list[tuple[str, dict[str, object]]]:
    """``(name, row)`` of a list of mappings, or of a mapping of mappings that have the same keys; else nothing.

    A mapping inside the rows becomes columns where all rows have it with the same keys.
    """
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    entries = list(items)
    rows = [(str(name), row) for name, row in entries if isinstance(row, dict) and row]
    if len(entries) < 2 or len(rows) < len(entries):
        return []
    if isinstance(value, dict) and len({frozenset(row) for _, row in rows}) > 1:
        return []
    inner = {key for key in rows[0][1] if _same_keys([row.get(key) for _, row in rows])}
    return [(name, dict(_flattened(row, inner))) for name, row in rows]


def _same_keys(values: Sequence[object]) -> bool:
    mappings = [value for value in values if isinstance(value, dict) and value]
    return len(mappings) == len(values) and len({frozenset(value) for value in mappings}) == 1


def _flattened(row: Mapping[str, object], inner: set[str]) -> Iterator[tuple[str, object]]:
    for key, value in row.items():
        if key in inner and isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


def _matrix(value: object) -> list[list[object]]:
    """A list of lists that are of one length; else nothing."""
    rows = [row for row in value if isinstance(row, list) and row] if isinstance(value, list) else []
    whole = isinstance(value, list) and len(rows) == len(value) and len({len(row) for row in rows}) == 1
    return rows if whole else []


def _number(value: float, name: str) -> str:
    if name in PERCENT:
        return f"{100 * value:.1f}%"
    if name.startswith("bytes") or name.endswith("bytes"):
        return size(value)
    if name == "gflop":
        return operations(value)
    if name == "joules":
        return energy(value)
    if name == "seconds" or name.startswith("seconds "):
        return duration(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.3f}" if name in ("loss", "matthews") else f"{value:.4g}"
