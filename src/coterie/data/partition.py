"""Splits rows over simulated clients: who gets which, as row numbers.

A partitioner is a public function of this module whose first parameter is ``rows``; its keyword-only parameters are
the settings of ``[data.partition]`` that it takes (those without a default are required). All of them work in the same
way: sort the rows of each split into classes, decide how many rows of each class each client gets
(:mod:`coterie.data.counts`), and let :func:`_shares` draw them. So no row ever goes to two clients. Every draw is a
function of the seed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coterie.data.counts import (
    Classes,
    Ints,
    PerClient,
    apportion,
    assign_labels,
    classes_of,
    client_sizes,
    divided,
    even_over_held,
    per_class,
    stratified,
)
from coterie.data.parse import listing
from coterie.ops.streams import stream_seed
from coterie.types import CoterieError

Ids = Sequence[tuple[str, str | None]]  # id and group of each client


@dataclass(frozen=True)
class RowIndex:
    """The rows to split. Per split, for each row: its label's name, if it has one, its dataset, its columns."""

    labels: Mapping[str, Sequence[str | None]]
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)

    def by_label(self, column: str | None = None) -> Classes:
        """A class for each label, or for each value of ``column``. Raises :class:`CoterieError` for a row without."""
        if column is not None:
            return classes_of({split: self._values(split, column) for split in self.labels})
        if any(label is None for labels in self.labels.values() for label in labels):
            raise CoterieError(
                "rows of generation, and rows with candidates of their own, have no labels to split by; set "
                "data.partition.column"
            )
        return classes_of({split: [str(label) for label in labels] for split, labels in self.labels.items()})

    def by_dataset(self) -> Classes:
        """A class for each dataset, in the order in which they come."""
        names = list(dict.fromkeys(name for each in self.datasets.values() for name in each))
        return classes_of(self.datasets, names)

    def as_one(self) -> Classes:
        """One class that holds every row."""
        return Classes([""], {split: np.zeros(len(labels), np.int64) for split, labels in self.labels.items()})

    def _values(self, split: str, column: str) -> list[str]:
        if any(record.get(column) in (None, "") for record in self.columns[split]):
            known = listing(list(dict.fromkeys(name for record in self.columns[split] for name in record)))
            raise CoterieError(
                f"data.partition.column is {column!r}, but a {split} row has no value there; the columns are {known}"
            )
        return [str(record[column]) for record in self.columns[split]]


@dataclass(frozen=True)
class Share:
    """One client's part: its id, its group if the partition knows one, and per split its row numbers, ascending."""

    id: str
    group: str | None
    rows: Mapping[str, Ints]


def by_dataset(
    rows: RowIndex, per_client: PerClient, seed: int, *, clients: int = 1, stratify: bool = False
) -> list[Share]:
    """``clients`` clients for each dataset, at random and of equal size; the group is the dataset.

    ``stratify`` gives every client its labels in the dataset's proportions, as near as whole rows allow.
    """
    classes = rows.by_dataset()
    ids = [(f"{name}-{i}", name) for name in classes.names for i in range(clients)]
    counts = per_class(classes, range(len(classes.names)), clients, per_client)
    if stratify:
        classes, counts = stratified(classes, rows.by_label(), counts)
    return _shares(ids, classes, counts, seed)


def natural(
    rows: RowIndex, per_client: PerClient, seed: int, *, column: str, clients: int | None = None
) -> list[Share]:
    """One client for each value of ``column`` (or for the ``clients`` values with the most training rows)."""
    classes = rows.by_label(column)
    held = classes.held("train")
    values = int(np.count_nonzero(held))
    if clients is not None and clients > values:
        raise CoterieError(
            f"data.partition.clients is {clients}, but {column!r} has {values} values with training rows; lower it"
        )
    chosen = sorted(int(k) for k in np.argsort(-held, kind="stable")[: clients or values])
    ids = [(classes.names[k], classes.names[k]) for k in chosen]
    return _shares(ids, classes, per_class(classes, chosen, 1, per_client), seed)


def iid(rows: RowIndex, per_client: PerClient, seed: int, *, clients: int) -> list[Share]:
    """Every client the same number of rows, at random."""
    classes = rows.as_one()
    return _shares(_numbered(clients), classes, per_class(classes, [0], clients, per_client), seed)


def quantity_skew(rows: RowIndex, per_client: PerClient, seed: int, *, clients: int, alpha: float) -> list[Share]:
    """Training rows of client c: 1, and a share p_c of the others, p ~ Dir(alpha). ``train_rows`` is the mean.

    Validation and test rows are the same number for every client, so that all are measured with the same precision.
    """
    classes = rows.as_one()
    counts = per_class(classes, [0], clients, per_client)
    total = int(counts["train"].sum())
    part = _numbers(seed, "quantity_skew").dirichlet(np.full(clients, alpha))
    extra = apportion(part, np.full(clients, total), total - clients)
    return _shares(_numbered(clients), classes, counts | {"train": 1 + extra[:, None]}, seed)


def dirichlet(
    rows: RowIndex, per_client: PerClient, seed: int, *, clients: int, alpha: float, column: str | None = None
) -> list[Share]:
    """Every client the same number of rows, its labels in proportions p_c ~ Dir(alpha) (Hsu et al., 1909.06335).

    Clients take their training rows in turn. Where a label runs out, the others in the client's proportions replace it,
    and then any. Validation and test rows follow the proportions of the client's training rows.
    """
    classes = rows.by_label(column)
    wish = _numbers(seed, "dirichlet").dirichlet(np.full(len(classes.names), alpha), size=clients)  # [c, k]
    counts: dict[str, Ints] = {}
    for split in sorted(classes.of, key=lambda split: split != "train"):
        left = classes.held(split)
        sizes = client_sizes(split, int(left.sum()), clients, per_client)
        counts[split] = np.zeros(wish.shape, np.int64)
        for c in range(clients):
            counts[split][c] = apportion(wish[c], left, int(sizes[c]))
            left = left - counts[split][c]
        if split == "train":
            wish = counts["train"] / counts["train"].sum(axis=1, keepdims=True)
    return _shares(_numbered(clients), classes, counts, seed)


def pathological(
    rows: RowIndex, per_client: PerClient, seed: int, *, clients: int, labels_per_client: int, column: str | None = None
) -> list[Share]:
    """Every client ``labels_per_client`` labels, with the same number of rows of each if there are enough.

    Labels are dealt so that each has nearly as many holders as any other. Where no number of rows is set, a label's
    rows are divided among its holders.
    """
    classes = rows.by_label(column)
    if labels_per_client > len(classes.names):
        raise CoterieError(
            f"data.partition.labels_per_client is {labels_per_client}, but there are {len(classes.names)} labels"
        )
    holds = assign_labels(clients, len(classes.names), labels_per_client, _numbers(seed, "pathological"))
    counts = {
        split: even_over_held(classes, split, holds, per_client[split])
        if per_client.get(split)
        else divided(classes.held(split), holds)
        for split in classes.of
    }
    return _shares(_numbered(clients), classes, counts, seed)


def partitioners() -> dict[str, Callable[..., list[Share]]]:
    """Every partitioner by name."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    public = {name: call for name, call in functions if not name.startswith("_") and name != partition.__name__}
    return {name: call for name, call in public.items() if next(iter(inspect.signature(call).parameters), "") == "rows"}


def partition(
    rows: RowIndex, name: str, per_client: PerClient, seed: int, options: Mapping[str, object]
) -> list[Share]:
    """The shares that partitioner ``name`` makes.

    Raises :class:`CoterieError` for an unknown name, a wrong option, and too few rows.
    """
    known = partitioners()
    if name not in known:
        raise CoterieError(f"unknown partition {name!r}; data.partition.name is one of {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters.values()
    takes = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
    missing = [f"data.partition.{option}" for option, needed in takes.items() if needed and option not in options]
    if missing:
        raise CoterieError(f"the partition {name} needs {' and '.join(missing)}")
    unused = [option for option in options if option not in takes]
    if unused:
        raise CoterieError(f"the partition {name} does not use {' or '.join(unused)}; it uses {', '.join(takes)}")
    return known[name](rows, per_client, seed, **options)


def _shares(ids: Ids, classes: Classes, counts: Mapping[str, Ints], seed: int) -> list[Share]:
    """Draw ``counts[split][c, k]`` rows of class k for client c, at random and without replacement."""
    for c, (name, _) in enumerate(ids):
        if counts["train"][c].sum() == 0:
            raise CoterieError(f"client {name} gets no training row; lower data.partition.clients, or take more rows")
    drawn_rows: list[dict[str, Ints]] = [{} for _ in ids]
    for split, codes in classes.of.items():
        drawn: list[list[Ints]] = [[] for _ in ids]
        for k, name in enumerate(classes.names):
            members = _numbers(seed, "draw", split, name).permutation(np.flatnonzero(codes == k))
            ends = np.cumsum(counts[split][:, k])
            for c, end in enumerate(ends):
                drawn[c].append(members[end - counts[split][c, k] : end])
        for c, parts in enumerate(drawn):
            drawn_rows[c][split] = np.sort(np.concatenate(parts))
    return [Share(_slug(name), group, got) for (name, group), got in zip(ids, drawn_rows, strict=True)]


def _numbered(clients: int) -> Ids:
    return [(f"client-{c}", None) for c in range(clients)]


def _numbers(seed: int, *purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, "partition", *purpose))


def _slug(name: str) -> str:
    """``name`` as a folder name: runs of signs other than letters, digits, ``.``, ``_`` and ``-`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "client"
