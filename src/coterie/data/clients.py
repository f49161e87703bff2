"""Builds a federation from ``[data]``: reads the files, splits what is to be split, and writes down who got what."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from coterie.data import sources
from coterie.data.files import Record, Table, read_table
from coterie.data.parse import listing, parse
from coterie.data.partition import Pool, Share, partition
from coterie.data.rows import SPLITS, ChoiceRow, ClientData, FederatedData, Row, TextRow, label_of
from coterie.data.settings import ClientFiles, DatasetEntry, DataSettings
from coterie.data.sources import Dataset
from coterie.data.sources.folder import read_folder
from coterie.ops.streams import stream_seed
from coterie.types import ClientInfo, DataError, Json, TaskKind

T = TypeVar("T")
Loaded = tuple[list[tuple[ClientData, list[Table]]], dict[str, Json]]  # clients with their files; for the manifest
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class _Example:
    """A row of a dataset that is to be split, with its other columns."""

    row: Row
    dataset: str
    labels: tuple[str, ...] | None
    record: Record


def load_data(settings: DataSettings, kind: TaskKind, seed: int, root: Path) -> FederatedData:
    """The clients that ``settings`` describe. Relative paths start at ``root``, the folder of the config file.

    Raises :class:`DataError` that names the file and line, or the client, and says what to change.
    """
    clients, about = (_split if settings.datasets else _own_files)(settings, kind, seed, root)
    _check_ids([client.info.id for client, _ in clients])
    entries = {client.info.id: _entry(client, files, root) for client, files in clients}
    manifest = {"kind": kind, "seed": seed, **about, "clients": entries}
    return FederatedData(tuple(client for client, _ in clients), manifest)


def _own_files(settings: DataSettings, kind: TaskKind, seed: int, root: Path) -> Loaded:
    """Clients with files of their own, and what the manifest says of all of them together."""
    _check_ids([files.id for files in settings.clients])
    found = [(files, _tables(files, root)) for files in settings.clients] or _client_folders(settings, root)
    _check_files(dataset for _, dataset in found)
    clients = []
    for files, dataset in found:
        labels = files.labels or settings.labels or dataset.labels
        rows, names = parse(dataset.tables, files.columns or settings.columns, kind, labels)
        split = _complete(rows, settings, seed, f"client {files.id}")
        chosen = {name: _choose(name, split[name], settings, seed, files.id) for name in SPLITS}
        clients.append((_client(files.id, files.group, chosen, names), list(dataset.tables.values())))
    return clients, {}


def _tables(files: ClientFiles, root: Path) -> Dataset:
    paths = {split: getattr(files, split) for split in SPLITS}
    try:
        return Dataset(files.id, {split: read_table((root / p).resolve(), split) for split, p in paths.items() if p})
    except DataError as fault:
        raise DataError(f"client {files.id}: {fault}") from fault


def _client_folders(settings: DataSettings, root: Path) -> list[tuple[ClientFiles, Dataset]]:
    path = (root / str(settings.folder)).resolve()
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; data.folder holds one folder per client")
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        raise DataError(f"{path}: no folders; data.folder holds one folder per client, with a file train.jsonl in it")
    return [(ClientFiles(id=folder.name, train=""), read_folder(folder)) for folder in folders]


def _split(settings: DataSettings, kind: TaskKind, seed: int, root: Path) -> Loaded:
    """Clients that divide datasets among themselves, and what the manifest says of the datasets."""
    how = settings.partition
    datasets = _datasets(settings, root)
    pool: dict[str, list[_Example]] = {split: [] for split in SPLITS}
    for entry, dataset in datasets:
        for split, examples in _examples(entry, dataset, settings, kind, seed).items():
            pool[split] += examples
    rows = {split: _asked(settings, split) for split in SPLITS}
    options = how.model_dump(exclude={"name", "own_labels"}, exclude_none=True)
    shares = partition(_pool(pool), how.name, rows, seed, options)
    tables = {dataset.name: list(dataset.tables.values()) for _, dataset in datasets}
    clients = []
    for share in shares:
        client, held = _cut(share, pool, how.own_labels)
        clients.append((client, [table for name in tables if name in held for table in tables[name]]))
    used = {split: sum(share.rows[split].size for share in shares) for split in SPLITS}
    about = {
        "partition": {**how.model_dump(exclude_none=True), "rows": rows},
        "datasets": {dataset.name: _about(dataset, root) for _, dataset in datasets},
        "unused": {split: len(pool[split]) - used[split] for split in SPLITS},
    }
    return clients, about


def _datasets(settings: DataSettings, root: Path) -> list[tuple[DatasetEntry, Dataset]]:
    found = []
    for given in settings.datasets:
        entry = DatasetEntry(source=given) if isinstance(given, str) else given
        loaded = sources.load(entry.source, root, entry.columns or settings.columns)
        if entry.name and len(loaded) > 1:
            raise DataError(f"{entry.source!r} is {len(loaded)} datasets; to name them, list them one by one")
        found += [(entry, replace(dataset, name=entry.name or dataset.name)) for dataset in loaded]
    twice = [name for name, count in Counter(dataset.name for _, dataset in found).items() if count > 1]
    if twice:
        raise DataError(f"two datasets are called {twice[0]!r}; give one another name in data.datasets")
    _check_files(dataset for _, dataset in found)
    return found


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
    return _complete(examples, settings, seed, f"dataset {dataset.name}")


def _pool(examples: Mapping[str, Sequence[_Example]]) -> Pool:
    def label(example: _Example) -> str | None:
        number = label_of(example.row)
        return example.labels[number] if example.labels and number is not None else None

    def each(what: Callable[[_Example], T]) -> dict[str, list[T]]:
        return {split: [what(example) for example in found] for split, found in examples.items()}

    return Pool(each(label), each(lambda e: e.dataset), each(lambda e: {"dataset": e.dataset, **e.record}))


def _cut(share: Share, pool: Mapping[str, Sequence[_Example]], own_labels: bool) -> tuple[ClientData, set[str]]:
    """The client of one share, and the names of the datasets that its rows come from."""
    examples = {split: [pool[split][i] for i in rows] for split, rows in share.rows.items()}
    spaces = {example.labels: example.dataset for found in examples.values() for example in found}
    rows = {split: tuple(example.row for example in found) for split, found in examples.items()}
    if len(spaces) > 1 and any(isinstance(row, TextRow) for found in rows.values() for row in found):
        raise DataError(
            f"client {share.id} would mix datasets of different labels ({', '.join(spaces.values())}); "
            "set data.partition.name to by_dataset"
        )
    names = next(iter(spaces)) if len(spaces) == 1 else None  # rows to choose for bring their candidates along
    if own_labels:
        if names is None:
            raise DataError(
                f"data.partition.own_labels: the rows of client {share.id} have no labels in common to choose from; "
                "leave it out"
            )
        rows, names = _reindexed(rows, names, share.id)
    held = {example.dataset for found in examples.values() for example in found}
    return _client(share.id, share.group, rows, names), held


def _reindexed(
    rows: Mapping[str, Sequence[Row]], names: Sequence[str], client: str
) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...]]:
    """The rows with labels (and candidates) counted over the names that occur, in the order they had."""
    occur = sorted({label for found in rows.values() for row in found if (label := label_of(row)) is not None})
    index = {label: i for i, label in enumerate(occur)}
    if len(occur) < 2 and any(isinstance(row, ChoiceRow) for found in rows.values() for row in found):
        raise DataError(
            f"client {client} has rows of one label alone, {names[occur[0]]}, and so nothing to choose between; leave "
            "data.partition.own_labels out"
        )

    def moved(row: Row) -> Row:
        match row:
            case TextRow():
                return replace(row, label=index[row.label])
            case ChoiceRow():
                return replace(row, choices=tuple(row.choices[i] for i in occur), answer=index[row.answer])
            case _:
                return row

    return {split: tuple(map(moved, found)) for split, found in rows.items()}, tuple(names[label] for label in occur)


def _complete(splits: Mapping[str, Sequence[T]], settings: DataSettings, seed: int, of: str) -> dict[str, Sequence[T]]:
    """All three splits: one that is missing is cut from the training rows, at random."""
    rows = list(splits["train"])
    order = np.random.default_rng(stream_seed(seed, "cut", of)).permutation(len(rows))
    done = {split: splits.get(split, ()) for split in SPLITS}
    start = 0
    for split, fraction in (("test", settings.test_fraction), ("validation", settings.validation_fraction)):
        if split not in splits and fraction > 0:
            end = start + max(1, round(fraction * len(rows)))
            done[split] = [rows[i] for i in np.sort(order[start:end])]
            start = end
    if start >= len(rows):
        raise DataError(
            f"{of}: {len(rows)} training row(s) are too few to cut other splits from; give files for validation and "
            "test, or set data.validation_fraction and data.test_fraction to 0"
        )
    done["train"] = [rows[i] for i in np.sort(order[start:])]
    return done


def _choose(split: str, rows: Sequence[Row], settings: DataSettings, seed: int, client: str) -> tuple[Row, ...]:
    """As many rows as ``data.<split>_rows`` asks for, at random."""
    asked = _asked(settings, split)
    if asked > len(rows):
        raise DataError(f"client {client} has {len(rows)} {split} rows, {asked} are asked for; lower data.{split}_rows")
    order = np.random.default_rng(stream_seed(seed, "choose", client, split)).permutation(len(rows))
    return tuple(rows[i] for i in np.sort(order[: asked or len(rows)]))


def _asked(settings: DataSettings, split: str) -> int:
    return {"train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows}[split]


def _client(
    name: str, group: str | None, rows: Mapping[str, Sequence[Row]], labels: tuple[str, ...] | None
) -> ClientData:
    counts = {f"num_{split}": len(rows[split]) for split in SPLITS}
    return ClientData(
        ClientInfo(name, labels=labels, group=group, **counts), {split: tuple(rows[split]) for split in SPLITS}
    )


def _check_ids(ids: Sequence[str]) -> None:
    for name in ids:
        if not SAFE_ID.fullmatch(name):
            raise DataError(
                f"the client id {name!r} cannot name a folder; use letters, digits, '.', '_' and '-', at most 100, "
                "and begin with a letter or digit"
            )
    lower = [name.lower() for name in ids]  # some file systems do not tell a from A
    twice = sorted(name for name in ids if lower.count(name.lower()) > 1)
    if twice:
        raise DataError(f"two clients are called {listing(twice)}; ids are unique, capital letters aside")


def _check_files(datasets: Iterable[Dataset]) -> None:
    """Raises :class:`DataError` where two splits, or two clients' training rows, are the same file or a copy of it.

    Clients may be tested on the same rows.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, table in (item for dataset in datasets for item in dataset.tables.items()):
        other, source = seen.setdefault(table.sha256, (split, table.source))
        if source is not table.source and (split != other or split == "train"):
            what = "is given twice" if source == table.source else f"holds the same rows as {source}"
            raise DataError(f"{table.source} {what}; splits never share rows, nor do clients to train on")


def _about(dataset: Dataset, root: Path) -> Json:
    return {
        "rows": {split: len(table.records) for split, table in dataset.tables.items()},
        "files": _files(dataset.tables.values(), root),
        "notes": list(dataset.notes),
    }


def _entry(client: ClientData, tables: Sequence[Table], root: Path) -> Json:
    """What the manifest says of one client."""
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
    }


def _files(tables: Iterable[Table], root: Path) -> Json:
    """Where the rows came from, relative to the config file's folder, and the SHA-256 of that."""
    return {
        os.path.relpath(table.source, root.resolve()) if os.path.isabs(table.source) else table.source: table.sha256
        for table in tables
    }
