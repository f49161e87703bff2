"""Simulated clients: datasets that are split over clients by a partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from coterie.data import sources
from coterie.data.files import Record, RowTable
from coterie.data.manifest import dataset_entry
from coterie.data.parse import parse
from coterie.data.partition import RowIndex, Share, partition
from coterie.data.rows import SPLITS, ChoiceRow, ClientData, Row, TextRow, client_data, label_of
from coterie.data.settings import DatasetEntry, DataSettings
from coterie.data.sources import Dataset
from coterie.data.splits import complete, rows_per_client
from coterie.types import DataError, TaskKind

T = TypeVar("T")


@dataclass(frozen=True)
class _Example:
    """A row of a dataset that is to be split, with its label names and its other columns."""

    row: Row
    dataset: str
    labels: tuple[str, ...] | None
    record: Record


Pooled = Mapping[str, Sequence[_Example]]  # by split, the rows of all datasets


def split_datasets(
    datasets: Sequence[tuple[DatasetEntry, Dataset]], settings: DataSettings, kind: TaskKind, seed: int, root: Path
) -> tuple[list[tuple[ClientData, list[RowTable]]], dict[str, object]]:
    """The clients that share the datasets, each with the tables its rows come from, and the manifest's part on them."""
    how = settings.partition
    pooled: dict[str, list[_Example]] = {split: [] for split in SPLITS}
    for entry, dataset in datasets:
        for split, examples in _examples(entry, dataset, settings, kind, seed).items():
            pooled[split] += examples
    rows = rows_per_client(settings)
    options = how.model_dump(exclude={"name", "own_labels"}, exclude_none=True)
    shares = partition(_index(pooled), how.name, rows, seed, options)
    tables = {dataset.name: list(dataset.tables.values()) for _, dataset in datasets}
    clients = []
    for share in shares:
        client, names = _client_of(share, pooled, how.own_labels)
        clients.append((client, [table for name in tables if name in names for table in tables[name]]))
    used = {split: sum(share.rows[split].size for share in shares) for split in SPLITS}
    about: dict[str, object] = {
        "partition": {**how.model_dump(exclude_none=True), "rows": rows},
        "datasets": {
            dataset.name: dataset_entry(
                dataset, root, (entry.columns or settings.columns) if kind == "generation" else None
            )
            for entry, dataset in datasets
        },
        "unused": {split: len(pooled[split]) - used[split] for split in SPLITS},
    }
    return clients, about


def load_datasets(settings: DataSettings, root: Path) -> list[tuple[DatasetEntry, Dataset]]:
    """The datasets of ``data.datasets``, each with its entry. Raises :class:`DataError` for names that occur twice."""
    loaded = []
    for given in settings.datasets:
        entry = DatasetEntry(source=given) if isinstance(given, str) else given
        datasets = sources.load(entry.source, root, entry.columns or settings.columns)
        if entry.name and len(datasets) > 1:
            raise DataError(f"{entry.source!r} stands for {len(datasets)} datasets; to name them, list them one by one")
        loaded += [(entry, replace(dataset, name=entry.name or dataset.name)) for dataset in datasets]
    twice = [name for name, count in Counter(dataset.name for _, dataset in loaded).items() if count > 1]
    if twice:
        raise DataError(f"two datasets are called {twice[0]!r}; give one another name in data.datasets")
    return loaded


def _examples(
    entry: DatasetEntry, dataset: Dataset, settings: DataSettings, kind: TaskKind, seed: int
) -> dict[str, Sequence[_Example]]:
    labels = entry.labels or settings.labels or dataset.labels
    rows, names = parse(dataset.tables, entry.columns or settings.columns, kind, labels)
    examples = {
        split: [
            _Example(row, dataset.name, names, record) for row, record in zip(rows[split], table.records, strict=True)
        ]
        for split, table in dataset.tables.items()
    }
    return complete(examples, settings, seed, f"dataset {dataset.name}")


def _index(pooled: Pooled) -> RowIndex:
    def label(example: _Example) -> str | None:
        number = label_of(example.row)
        return example.labels[number] if example.labels and number is not None else None

    def each(what: Callable[[_Example], T]) -> dict[str, list[T]]:
        return {split: [what(example) for example in examples] for split, examples in pooled.items()}

    return RowIndex(each(label), each(lambda e: e.dataset), each(lambda e: {"dataset": e.dataset, **e.record}))


def _client_of(share: Share, pooled: Pooled, own_labels: bool) -> tuple[ClientData, set[str]]:
    """The client of one share, and the names of the datasets that its rows come from."""
    examples = {split: [pooled[split][i] for i in rows] for split, rows in share.rows.items()}
    spaces = {example.labels: example.dataset for each in examples.values() for example in each}
    rows = {split: tuple(example.row for example in each) for split, each in examples.items()}
    if len(spaces) > 1 and any(isinstance(row, TextRow) for each in rows.values() for row in each):
        raise DataError(
            f"client {share.id} would mix datasets with different labels ({', '.join(spaces.values())}); "
            "set data.partition.name to by_dataset"
        )
    names = next(iter(spaces)) if len(spaces) == 1 else None  # rows of multiple choice bring their candidates along
    if own_labels:
        if names is None:
            raise DataError(
                f"data.partition.own_labels: the rows of client {share.id} have no labels in common; leave it out"
            )
        rows, names = _reindexed(rows, names, share.id)
    datasets = {example.dataset for each in examples.values() for example in each}
    return client_data(share.id, share.group, rows, names), datasets


def _reindexed(
    rows: Mapping[str, Sequence[Row]], names: Sequence[str], client: str
) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...]]:
    """The rows with labels (and candidates) renumbered over the names that occur, in their original order."""
    occur = sorted({label for each in rows.values() for row in each if (label := label_of(row)) is not None})
    index = {label: i for i, label in enumerate(occur)}
    if len(occur) < 2 and any(isinstance(row, ChoiceRow) for each in rows.values() for row in each):
        raise DataError(
            f"client {client} has rows of only one label, {names[occur[0]]}, so there is nothing to learn; leave "
            "data.partition.own_labels out"
        )

    def reindexed(row: Row) -> Row:
        match row:
            case TextRow():
                return replace(row, label=index[row.label])
            case ChoiceRow():
                return replace(row, choices=tuple(row.choices[i] for i in occur), answer=index[row.answer])
            case _:
                return row

    return {split: tuple(map(reindexed, each)) for split, each in rows.items()}, tuple(names[label] for label in occur)
