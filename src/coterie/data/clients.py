"""Loads the data of a run's clients from ``[data]``: their own files, or datasets that are split over them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from coterie.data.duplicates import Counts, duplicates_of, duplicates_text, totals
from coterie.data.files import RowTable, read_table
from coterie.data.manifest import client_entry
from coterie.data.parse import folded, listing, parse
from coterie.data.rows import SPLITS, ClientData, FederatedData, client_data
from coterie.data.settings import ClientFiles, DataSettings
from coterie.data.simulated import load_datasets, split_datasets
from coterie.data.sources import Dataset
from coterie.data.sources.folder import read_folder
from coterie.data.splits import choose, complete
from coterie.text import name_fault
from coterie.types import ClientInfo, DataError, TaskKind

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def load_data(settings: DataSettings, kind: TaskKind, seed: int, root: Path) -> FederatedData:
    """The clients that ``settings`` describe. Relative paths start at ``root``, the folder of the config file.

    Raises :class:`DataError` that names the file and line, or the client, and says what to change.
    """
    if settings.datasets:
        datasets = load_datasets(settings, root)
        _check_files(dataset for _, dataset in datasets)
        clients, about = split_datasets(datasets, settings, kind, seed, root)
        listed = [name for entry, dataset in datasets for name in entry.labels or dataset.labels or ()]
    else:
        clients, listed = _own_files(settings, kind, seed, root)
        about = {}
    _check_ids([client.info.id for client, _ in clients])
    _check_names([client.info for client, _ in clients], kind)
    _check_labels([client.info for client, _ in clients], kind)
    _check_spelling([client.info for client, _ in clients], kind, {*listed, *(settings.labels or ())})
    own = {files.id: files.columns for files in settings.clients if files.columns}
    entries = {}
    for client, tables in clients:
        recognised = kind == "generation" and not settings.datasets
        columns = own.get(client.info.id, settings.columns) if recognised else None
        entries[client.info.id] = client_entry(client, tables, root, columns)
    twice = duplicates_of([client for client, _ in clients])
    _check_duplicates(twice, settings)
    if twice:
        about = {**about, "duplicates": {"in all": totals(twice), **twice}}
    apart = _newcomers(settings, entries)
    if apart:
        about = {**about, "newcomers": {name: entries.pop(name) for name in apart}}
    manifest = {"kind": kind, "seed": seed, **about, "clients": entries}
    notes = [f"{duplicates_text(twice)}; manifest.json has the numbers"] if twice else []
    if apart:
        take, them = ("takes", "it") if len(apart) == 1 else ("take", "them")
        notes.append(f"{listing(apart)} {take} no part ([data] newcomers); coterie compare lets {them} join afterwards")
    there, late = ([c for c, _ in clients if (c.info.id in apart) is out] for out in (False, True))
    return FederatedData(tuple(there), manifest, tuple(notes), tuple(late))


def _newcomers(settings: DataSettings, clients: Collection[str]) -> list[str]:
    """The clients that take no part. Raises :class:`DataError` for names of none, and where nobody is left."""
    if unknown := sorted(set(settings.newcomers) - set(clients)):
        raise DataError(
            f"data.newcomers names {listing(unknown)}, but no client is called so; the clients are "
            f"{listing(sorted(clients))}"
        )
    if clients and set(clients) == set(settings.newcomers):
        raise DataError("data.newcomers names every client, so nobody takes part; leave some out of it")
    return sorted(settings.newcomers)


def _own_files(
    settings: DataSettings, kind: TaskKind, seed: int, root: Path
) -> tuple[list[tuple[ClientData, list[RowTable]]], list[str]]:
    """Clients with files of their own, each with its tables; and the labels that single clients list."""
    _check_ids([files.id for files in settings.clients])
    given = [(files, _tables(files, root)) for files in settings.clients] or _client_folders(settings, root)
    _check_files(dataset for _, dataset in given)
    clients = []
    for files, dataset in given:
        labels = files.labels or settings.labels or dataset.labels
        rows, names = parse(dataset.tables, files.columns or settings.columns, kind, labels)
        splits = complete(rows, settings, seed, f"client {files.id}")
        chosen = {split: choose(split, splits[split], settings, seed, files.id) for split in SPLITS}
        clients.append((client_data(files.id, files.group, chosen, names), list(dataset.tables.values())))
    return clients, [name for files, dataset in given for name in files.labels or dataset.labels or ()]


def _tables(files: ClientFiles, root: Path) -> Dataset:
    paths = {"train": files.train, "validation": files.validation, "test": files.test}
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
    datasets = [read_folder(folder) for folder in folders]
    return [(ClientFiles(id=data.name, train="", group=data.group), data) for data in datasets]


def _check_ids(ids: Sequence[str]) -> None:
    for name in ids:
        if not SAFE_ID.fullmatch(name):
            raise DataError(
                f"the client id {name!r} is not a valid folder name; use up to 100 letters, digits, '.', '_' and '-', "
                "and begin with a letter or digit"
            )
    lower = [name.lower() for name in ids]  # some file systems treat a and A as one name
    twice = sorted(name for name in ids if lower.count(name.lower()) > 1)
    if twice:
        raise DataError(f"two clients are called {listing(twice)}; ids must differ by more than capital letters")


def _check_names(clients: Sequence[ClientInfo], kind: TaskKind) -> None:
    """Raises :class:`DataError` for a label or a group that a terminal or a page could not show as it is."""
    allowed = "\n\t" if kind == "multiple_choice" else ""  # where candidates are labels
    for client in clients:
        for what, name in [*(("label", label) for label in client.labels or ()), ("group", client.group or "")]:
            if fault := name_fault(name, allowed if what == "label" else ""):
                raise DataError(f"client {client.id}: the {what} {fault}; rename it")


def _check_labels(clients: Sequence[ClientInfo], kind: TaskKind) -> None:
    """Raises :class:`DataError` for a client with one label, which any model gets right."""
    for client in clients:
        if kind == "classification" and len(client.labels or ()) < 2:
            raise DataError(
                f"client {client.id} has only the label {listing(client.labels or ())}, so there is nothing to tell "
                "apart; list all labels in data.labels, or leave the client out"
            )


def _check_spelling(clients: Sequence[ClientInfo], kind: TaskKind, listed: Collection[str]) -> None:
    """Raises :class:`DataError` where two clients spell a label differently, unless both spellings are ``listed``.

    Otherwise what is one label would be two, without a word. Candidates of multiple choice are text, not names.
    """
    first: dict[str, tuple[str, str]] = {}
    for client in clients if kind == "classification" else ():
        for name in client.labels or ():
            other, spelling = first.setdefault(folded(name), (client.id, name))
            if spelling != name and not {name, spelling} <= {*listed}:
                raise DataError(
                    f"client {client.id}: the label {name!r} differs from client {other}'s {spelling!r} only in "
                    "capital letters or spaces; correct one, or, if they are different labels, list each in the "
                    "labels of its client or dataset"
                )


def _check_duplicates(counts: Counts, settings: DataSettings) -> None:
    if counts and settings.duplicates == "refuse":
        raise DataError(f'{duplicates_text(counts)}; remove them, or set data.duplicates = "warn"')


def _check_files(datasets: Iterable[Dataset]) -> None:
    """Raises :class:`DataError` where two splits, or two clients' training rows, are the same file or a copy of it.

    Clients may be tested on the same rows.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, table in (item for dataset in datasets for item in dataset.tables.items()):
        other, source = seen.setdefault(table.sha256, (split, table.source))
        if source is not table.source and (split != other or split == "train"):
            what = "is given twice" if source == table.source else f"is a copy of {source}"
            raise DataError(
                f"{table.source} {what}; use different rows for each split, and for training at each client"
            )
