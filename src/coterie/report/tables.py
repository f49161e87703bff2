"""Any JSON as text and tables that people can read: units for numbers, a table for every list of records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coterie.types import Json
from coterie.units import duration, size

MISSING = "-"
PERCENT = {"accuracy", "macro_f1", "rouge_l", "exact_match"}
_WORDS = {"macro_f1": "macro F1", "matthews": "Matthews", "rouge_l": "ROUGE-L"}
_LONG_LIST = 12  # entries of a list that a cell shows


@dataclass(frozen=True)
class Table:
    """A table of values as they came from JSON; ``show`` makes them readable."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Json]]


def words(name: str) -> str:
    """A name in JSON as readers know it."""
    return _WORDS.get(name, name.replace("_", " "))


def show(value: Json, name: str = "") -> str:
    """A value as text for readers; ``name`` tells its unit. What is missing or no number is ``-``."""
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


def tables(value: Mapping[str, Json], title: str) -> list[Table]:
    """Any JSON mapping as tables: one of its plain entries, one of each list or mapping of records inside it."""
    plain: list[tuple[str, Json]] = []
    found: list[Table] = []
    for key, item in _flat(value):
        if records := _records(item):
            columns = list(dict.fromkeys(column for _, row in records for column in row))
            found.append(Table(key, ["", *columns], [[n, *(row.get(c) for c in columns)] for n, row in records]))
        elif _is_matrix(item):
            found.append(Table(key, ["", *map(str, range(len(item[0])))], [[i, *row] for i, row in enumerate(item)]))
        else:
            plain.append((key, item))
    return ([Table(title, ["", ""], plain)] if plain else []) + found


def _flat(tree: Mapping[str, Json], path: str = "") -> Iterator[tuple[str, Json]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not _records(value):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _records(value: Json) -> list[tuple[str, dict[str, Json]]]:
    """``(name, row)`` of a list of mappings, or of a mapping of mappings that have the same keys; else nothing.

    A mapping inside the rows becomes columns where all rows have it with the same keys.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    rows = [(str(name), row) for name, row in items]
    if len(rows) < 2 or not all(isinstance(row, dict) and row for _, row in rows):
        return []
    if isinstance(value, dict) and len({frozenset(row) for _, row in rows}) > 1:
        return []
    inner = {key for key in rows[0][1] if _alike([row.get(key) for _, row in rows])}
    return [(name, dict(_spread(row, inner))) for name, row in rows]


def _alike(values: Sequence[Json]) -> bool:
    return all(isinstance(value, dict) and value and value.keys() == values[0].keys() for value in values)


def _spread(row: Mapping[str, Json], inner: set[str]) -> Iterator[tuple[str, Json]]:
    for key, value in row.items():
        if key in inner:
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


def _is_matrix(value: Json) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], list):
        return False
    return all(isinstance(row, list) and len(row) == len(value[0]) > 0 for row in value)


def _number(value: float, name: str) -> str:
    if name in PERCENT:
        return f"{100 * value:.1f}%"
    if name.startswith("bytes") or name.endswith("bytes"):
        return size(value)
    if name == "seconds" or name.startswith("seconds "):
        return duration(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.3f}" if name in ("loss", "matthews") else f"{value:.4g}"
