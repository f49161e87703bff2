"""Splits rows over simulated clients: who gets which, as row numbers.

A partitioner is a public function of this module whose first parameter is ``pool``; its keyword-only parameters are
the settings of ``[data.partition]`` that it takes (those without a default, it needs). All of them work in the same
way: sort the rows of each split into classes, decide how many rows of each class each client gets, and let
:func:`_shares` draw them. So no row ever goes to two clients. Every draw is a function of the seed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.data.parse import listing
from coterie.ops.streams import stream_seed
from coterie.types import CoterieError, Json

Ints = NDArray[np.int64]
Rows = Mapping[str, int]  # split -> rows per client, 0 = as many as there are
Ids = Sequence[tuple[str, str | None]]  # id and group of each client


@dataclass(frozen=True)
class Classes:
    """Names of classes, and per split the class of each row [n], as the number of its name."""

    names: Sequence[str]
    of: Mapping[str, Ints]

    def held(self, split: str) -> Ints:
        """The number of rows in each class [k]."""
        return np.bincount(self.of[split], minlength=len(self.names))


@dataclass(frozen=True)
class Pool:
    """The rows to split. Per split, for each row: its label's name, if it has one, its dataset, its columns."""

    labels: Mapping[str, Sequence[str | None]]
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Mapping[str, Json]]] = field(default_factory=dict)

    def by_label(self, column: str | None = None) -> Classes:
        """A class for each label, or for each value of ``column``. Raises :class:`CoterieError` for a row without."""
        if column is not None:
            return _classes({split: self._values(split, column) for split in self.labels})
        if any(label is None for labels in self.labels.values() for label in labels):
            raise CoterieError(
                "rows to generate, and those with candidates of their own, have no labels to split by; set "
                "data.partition.column"
            )
        return _classes({split: [str(label) for label in labels] for split, labels in self.labels.items()})

    def by_dataset(self) -> Classes:
        """A class for each dataset, in the order in which they come."""
        names = list(dict.fromkeys(name for found in self.datasets.values() for name in found))
        return _classes(self.datasets, names)

    def as_one(self) -> Classes:
        """One class that holds every row."""
        return Classes([""], {split: np.zeros(len(labels), np.int64) for split, labels in self.labels.items()})

    def _values(self, split: str, column: str) -> list[str]:
        if any(record.get(column) in (None, "") for record in self.columns[split]):
            known = listing(list(dict.fromkeys(name for record in self.columns[split] for name in record)))
            raise CoterieError(
                f"data.partition.column is {column!r}, but a {split} row has no such value; the columns are {known}"
            )
        return [str(record[column]) for record in self.columns[split]]


@dataclass(frozen=True)
class Share:
    """One client's part: its id, its group if the partition knows one, and per split its row numbers, ascending."""

    id: str
    group: str | None
    rows: Mapping[str, Ints]


def by_dataset(pool: Pool, rows: Rows, seed: int, *, clients: int = 1, stratify: bool = False) -> list[Share]:
    """``clients`` clients for each dataset, at random and of equal size; the group is the dataset.

    ``stratify`` gives every client its labels in the dataset's proportions, as near as whole rows allow.
    """
    classes = pool.by_dataset()
    ids = [(f"{name}-{i}", name) for name in classes.names for i in range(clients)]
    counts = _per_class(classes, range(len(classes.names)), clients, rows)
    if stratify:
        classes, counts = _stratified(pool, classes, counts)
    return _shares(ids, classes, counts, seed)


def natural(pool: Pool, rows: Rows, seed: int, *, column: str, clients: int | None = None) -> list[Share]:
    """One client for each value of ``column`` (or for the ``clients`` values with the most training rows)."""
    classes = pool.by_label(column)
    held = classes.held("train")
    values = int(np.count_nonzero(held))
    if clients is not None and clients > values:
        raise CoterieError(
            f"data.partition.clients is {clients}, but {column!r} has {values} values with training rows; lower it"
        )
    chosen = sorted(int(k) for k in np.argsort(-held, kind="stable")[: clients or values])
    ids = [(classes.names[k], classes.names[k]) for k in chosen]
    return _shares(ids, classes, _per_class(classes, chosen, 1, rows), seed)


def iid(pool: Pool, rows: Rows, seed: int, *, clients: int) -> list[Share]:
    """Every client the same number of rows, at random."""
    classes = pool.as_one()
    return _shares(_numbered(clients), classes, _per_class(classes, [0], clients, rows), seed)


def quantity_skew(pool: Pool, rows: Rows, seed: int, *, clients: int, alpha: float) -> list[Share]:
    """Training rows of client c: 1 + its part, by p ~ Dir(alpha), of all others. ``train_rows`` is the mean.

    Validation and test rows are the same number for every client, so that all are measured alike.
    """
    classes = pool.as_one()
    counts = _per_class(classes, [0], clients, rows)
    total = int(counts["train"].sum())
    part = _numbers(seed, "quantity_skew").dirichlet(np.full(clients, alpha))
    extra = _round(part, np.full(clients, total), total - clients)
    return _shares(_numbered(clients), classes, counts | {"train": 1 + extra[:, None]}, seed)


def dirichlet(
    pool: Pool, rows: Rows, seed: int, *, clients: int, alpha: float, column: str | None = None
) -> list[Share]:
    """Every client the same number of rows, its labels in proportions p_c ~ Dir(alpha) (Hsu et al., 1909.06335).

    Clients take their training rows in turn; where a label runs out, the others that the client wants stand in, and
    where those run out too, any. Validation and test follow the proportions that the training rows came to.
    """
    classes = pool.by_label(column)
    wish = _numbers(seed, "dirichlet").dirichlet(np.full(len(classes.names), alpha), size=clients)  # [c, k]
    counts: dict[str, Ints] = {}
    for split in sorted(classes.of, key=lambda split: split != "train"):
        left = classes.held(split)
        sizes = _sizes(split, int(left.sum()), clients, rows)
        counts[split] = np.zeros(wish.shape, np.int64)
        for c in range(clients):
            counts[split][c] = _round(wish[c], left, int(sizes[c]))
            left = left - counts[split][c]
        if split == "train":
            wish = counts["train"] / counts["train"].sum(axis=1, keepdims=True)
    return _shares(_numbered(clients), classes, counts, seed)


def pathological(
    pool: Pool, rows: Rows, seed: int, *, clients: int, labels_per_client: int, column: str | None = None
) -> list[Share]:
    """Every client ``labels_per_client`` labels, each in the same number of rows if there are enough of it.

    Labels are dealt so that each has nearly as many holders as any other. With 0 rows asked for, a label's rows are
    divided among its holders.
    """
    classes = pool.by_label(column)
    if labels_per_client > len(classes.names):
        raise CoterieError(
            f"data.partition.labels_per_client is {labels_per_client}, but there are {len(classes.names)} labels"
        )
    holds = _deal(clients, len(classes.names), labels_per_client, _numbers(seed, "pathological"))
    counts = {
        split: _of_held(classes, split, holds, rows[split]) if rows.get(split) else _divided(classes.held(split), holds)
        for split in classes.of
    }
    return _shares(_numbered(clients), classes, counts, seed)


def partitioners() -> dict[str, Callable[..., list[Share]]]:
    """Every partitioner by name."""
    found = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    public = {name: call for name, call in found if not name.startswith("_") and name != partition.__name__}
    return {name: call for name, call in public.items() if next(iter(inspect.signature(call).parameters), "") == "pool"}


def partition(pool: Pool, name: str, rows: Rows, seed: int, options: Mapping[str, Json]) -> list[Share]:
    """The shares that partitioner ``name`` makes. Raises :class:`CoterieError`: unknown name or option, few rows."""
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
        raise CoterieError(f"the partition {name} has no {' or '.join(unused)}; it takes {', '.join(takes)}")
    return known[name](pool, rows, seed, **options)


def _shares(ids: Ids, classes: Classes, counts: Mapping[str, Ints], seed: int) -> list[Share]:
    """Draws ``counts[split][c, k]`` rows of class k for client c, at random and without putting back."""
    for c, (name, _) in enumerate(ids):
        if counts["train"][c].sum() == 0:
            raise CoterieError(f"client {name} got no training row; lower data.partition.clients, or take more rows")
    rows: list[dict[str, Ints]] = [{} for _ in ids]
    for split, codes in classes.of.items():
        drawn: list[list[Ints]] = [[] for _ in ids]
        for k, name in enumerate(classes.names):
            members = _numbers(seed, "draw", split, name).permutation(np.flatnonzero(codes == k))
            ends = np.cumsum(counts[split][:, k])
            for c, end in enumerate(ends):
                drawn[c].append(members[end - counts[split][c, k] : end])
        for c, parts in enumerate(drawn):
            rows[c][split] = np.sort(np.concatenate(parts))
    return [Share(_slug(name), group, got) for (name, group), got in zip(ids, rows, strict=True)]


def _per_class(classes: Classes, chosen: Sequence[int], clients: int, rows: Rows) -> dict[str, Ints]:
    """Rows [c, k] where ``clients`` clients divide each chosen class among themselves."""
    counts = {split: np.zeros((len(chosen) * clients, len(classes.names)), np.int64) for split in classes.of}
    for split, count in counts.items():
        held = classes.held(split)
        for i, k in enumerate(chosen):
            of = f" of {classes.names[k]!r}" if classes.names[k] else ""
            count[i * clients : (i + 1) * clients, k] = _sizes(split, int(held[k]), clients, rows, of)
    return counts


def _stratified(pool: Pool, classes: Classes, counts: Mapping[str, Ints]) -> tuple[Classes, dict[str, Ints]]:
    """``counts`` [c, k] of rows by class, divided over the labels of each class: classes and rows [c, k * label]."""
    labels = pool.by_label()
    number = len(labels.names)
    fine = Classes(
        [f"{name}/{label}" for name in classes.names for label in labels.names],
        {split: classes.of[split] * number + labels.of[split] for split in classes.of},
    )
    divided = {}
    for split, count in counts.items():
        left = fine.held(split).reshape(-1, number)
        wish = left.astype(float)
        rows = np.zeros((*count.shape, number), np.int64)
        for c, k in zip(*np.nonzero(count), strict=True):
            rows[c, k] = _round(wish[k], left[k], int(count[c, k]))
            left[k] -= rows[c, k]
        divided[split] = rows.reshape(len(count), -1)
    return fine, divided


def _sizes(split: str, available: int, clients: int, rows: Rows, of: str = "") -> Ints:
    """Rows of each client [c]: as asked, or an even share of all. Raises :class:`CoterieError` for too few."""
    asked = rows.get(split, 0) or int(split == "train")
    if asked * clients > available:
        cut = f", or raise data.{split}_fraction" if split != "train" and not available else ""
        raise CoterieError(
            f"{clients} client(s) with {asked} {split} row(s) each need {asked * clients}{of}, but there are "
            f"{available}; lower data.{split}_rows or data.partition.clients{cut}"
        )
    if rows.get(split, 0):
        return np.full(clients, asked, np.int64)
    return np.array([available // clients + (c < available % clients) for c in range(clients)], np.int64)


def _of_held(classes: Classes, split: str, holds: Ints, size: int) -> Ints:
    """Rows [c, k]: ``size`` for each client, evenly over the labels that it holds. Raises for too few of them."""
    left = classes.held(split)
    counts = np.zeros_like(holds)
    for c, held in enumerate(holds):
        mine = left * held
        if mine.sum() < size:
            own = listing([name for name, has in zip(classes.names, held, strict=True) if has])
            raise CoterieError(
                f"client {c} needs {size} {split} rows of {own}, but there are {mine.sum()} left; lower "
                f"data.{split}_rows or data.partition.clients, or raise data.partition.labels_per_client"
            )
        counts[c] = _round(held.astype(float), mine, size)
        left = left - counts[c]
    return counts


def _divided(left: Ints, holds: Ints) -> Ints:
    """Rows [c, k]: those of each label, divided evenly among its holders."""
    turn = np.cumsum(holds, axis=0) - 1  # [c, k] the client's turn among the label's holders
    each, over = np.divmod(left, np.maximum(holds.sum(axis=0), 1))
    counts: Ints = holds * (each + (turn < over))
    return counts


def _round(wish: NDArray[np.float64], left: Ints, size: int) -> Ints:
    """``size`` rows over the classes [k], as near to the proportions ``wish`` as the rows that are ``left`` allow.

    By largest remainder; what a class cannot give comes from the others that are wished for, and then from any.
    ``left`` must hold ``size`` rows.
    """
    counts = np.zeros_like(left)
    while (missing := size - int(counts.sum())) > 0:
        weight = np.where(counts < left, wish, 0.0)
        if weight.sum() == 0:
            weight = (left - counts).astype(float)
        part = missing * (weight / weight.sum())
        give = np.floor(part).astype(np.int64)
        remainder = np.where(weight > 0, part - give, -1.0)
        give[np.argsort(-remainder, kind="stable")[: missing - int(give.sum())]] += 1
        counts = np.minimum(counts + give, left)
    return counts


def _deal(clients: int, labels: int, each: int, numbers: np.random.Generator) -> Ints:
    """Who holds which label [c, k], 0 or 1: each in turn takes the labels of fewest holders, ties at random."""
    holds = np.zeros((clients, labels), np.int64)
    for c in range(clients):
        holds[c, np.lexsort((numbers.random(labels), holds.sum(axis=0)))[:each]] = 1
    return holds


def _classes(values: Mapping[str, Sequence[str]], names: Sequence[str] = ()) -> Classes:
    names = names or sorted({value for found in values.values() for value in found})
    number = {name: k for k, name in enumerate(names)}
    return Classes(names, {split: np.array([number[v] for v in found], np.int64) for split, found in values.items()})


def _numbered(clients: int) -> Ids:
    return [(f"client-{c}", None) for c in range(clients)]


def _numbers(seed: int, *purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, "partition", *purpose))


def _slug(name: str) -> str:
    """``name`` as a folder name: runs of signs other than letters, digits, ``.``, ``_`` and ``-`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "client"
