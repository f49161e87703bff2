"""The manifest of a run: which client has how many rows of what, from which files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from coterie.data.conversations import form_of
from coterie.data.files import RowTable
from coterie.data.rows import ClientData, label_of
from coterie.data.settings import Columns
from coterie.data.sources import Dataset


def client_entry(
    client: ClientData, tables: Sequence[RowTable], root: Path, columns: Columns | None = None
) -> dict[str, object]:
    """The manifest's entry for one client, whose rows come from ``tables``.

    ``columns``: those of its own files, if they are rows of generation.
    """
    info = client.info
    counts = {split: Counter(map(label_of, rows)) for split, rows in client.splits.items()}
    return {
        "group": info.group,
        "labels": list(info.labels) if info.labels is not None else None,
        "rows": {split: len(rows) for split, rows in client.splits.items()},
        "label_counts": {
            split: {name: count[i] for i, name in enumerate(info.labels or ()) if count[i]}
            for split, count in counts.items()
        },
        "files": _files(tables, root),
        **_forms(tables, root, columns),
    }


def dataset_entry(dataset: Dataset, root: Path, columns: Columns | None = None) -> dict[str, object]:
    """The manifest's entry for a dataset that was split over clients; ``columns`` as in :func:`client_entry`."""
    return {
        "rows": {split: len(table.records) for split, table in dataset.tables.items()},
        "files": _files(dataset.tables.values(), root),
        **_forms(dataset.tables.values(), root, columns),
        "notes": list(dataset.notes),
    }


def _files(tables: Iterable[RowTable], root: Path) -> dict[str, str]:
    """The sources of the rows, relative to the config's folder, each with its SHA-256."""
    return {_source(table, root): table.sha256 for table in tables}


def _forms(tables: Iterable[RowTable], root: Path, columns: Columns | None) -> dict[str, object]:
    """The form in which the rows of each source were recognised, where ``columns`` are given."""
    return {} if columns is None else {"forms": {_source(table, root): form_of(table, columns) for table in tables}}


def _source(table: RowTable, root: Path) -> str:
    return os.path.relpath(table.source, root.resolve()) if os.path.isabs(table.source) else table.source
