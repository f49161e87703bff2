"""How many rows of each class each client gets: the arithmetic of the partitions.

Axes: ``c`` client, ``k`` class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.data.parse import listing
from coterie.types import CoterieError

Ints = NDArray[np.int64]
PerClient = Mapping[str, int]  # split -> rows per client; 0: all


@dataclass(frozen=True)
class Classes:
    """Names of classes, and per split the class of each row [n], as the number of its name."""

    names: Sequence[str]
    of: Mapping[str, Ints]

    def held(self, split: str) -> Ints:
        """The number of rows in each class [k]."""
        return np.bincount(self.of[split], minlength=len(self.names))


def classes_of(values: Mapping[str, Sequence[str]], names: Sequence[str] = ()) -> Classes:
    """A class for each value; ``values`` has one per row of each split. ``names`` orders them; empty: sorted."""
    names = names or sorted({value for each in values.values() for value in each})
    number = {name: k for k, name in enumerate(names)}
    return Classes(names, {split: np.array([number[v] for v in each], np.int64) for split, each in values.items()})


def per_class(classes: Classes, chosen: Sequence[int], clients: int, per_client: PerClient) -> dict[str, Ints]:
    """Rows [c, k] where ``clients`` clients divide each chosen class among themselves."""
    counts = {split: np.zeros((len(chosen) * clients, len(classes.names)), np.int64) for split in classes.of}
    for split, count in counts.items():
        held = classes.held(split)
        for i, k in enumerate(chosen):
            of = f" of {classes.names[k]!r}" if classes.names[k] else ""
            count[i * clients : (i + 1) * clients, k] = client_sizes(split, int(held[k]), clients, per_client, of)
    return counts


def stratified(classes: Classes, labels: Classes, counts: Mapping[str, Ints]) -> tuple[Classes, dict[str, Ints]]:
    """``counts`` [c, k] of rows by class, divided over the labels of each class: classes and rows [c, k * label].

    The labels of a class get rows in the proportions in which they occur there.
    """
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
            rows[c, k] = apportion(wish[k], left[k], int(count[c, k]))
            left[k] -= rows[c, k]
        divided[split] = rows.reshape(len(count), -1)
    return fine, divided


def client_sizes(split: str, available: int, clients: int, per_client: PerClient, of: str = "") -> Ints:
    """Rows of each client [c]: the number wanted, or an even share of all. Raises :class:`CoterieError` for too few."""
    wanted = per_client.get(split, 0) or int(split == "train")
    if wanted * clients > available:
        cut = f", or raise data.{split}_fraction" if split != "train" and not available else ""
        raise CoterieError(
            f"{clients} client(s) with {wanted} {split} row(s) each need {wanted * clients}{of}, but there are "
            f"{available}; lower data.{split}_rows or data.partition.clients{cut}"
        )
    if per_client.get(split, 0):
        return np.full(clients, wanted, np.int64)
    return np.array([available // clients + (c < available % clients) for c in range(clients)], np.int64)


def even_over_held(classes: Classes, split: str, holds: Ints, size: int) -> Ints:
    """Rows [c, k]: ``size`` for each client, evenly over its labels. Raises :class:`CoterieError` for too few rows."""
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
        counts[c] = apportion(held.astype(float), mine, size)
        left = left - counts[c]
    return counts


def divided(left: Ints, holds: Ints) -> Ints:
    """Rows [c, k]: those of each label, divided evenly among its holders."""
    turn = np.cumsum(holds, axis=0) - 1  # [c, k] the client's turn among the label's holders
    each, over = np.divmod(left, np.maximum(holds.sum(axis=0), 1))
    counts: Ints = holds * (each + (turn < over))
    return counts


def apportion(wish: NDArray[np.float64], left: Ints, size: int) -> Ints:
    """``size`` rows over the classes [k], as near to the proportions ``wish`` as the rows that are ``left`` allow.

    By largest remainder. Rows that a class lacks come from the other classes in ``wish``, then from any class.
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


def assign_labels(clients: int, labels: int, each: int, numbers: np.random.Generator) -> Ints:
    """Which client holds which label [c, k], 0 or 1: each takes the labels with the fewest holders, ties at random."""
    holds = np.zeros((clients, labels), np.int64)
    for c in range(clients):
        holds[c, np.lexsort((numbers.random(labels), holds.sum(axis=0)))[:each]] = 1
    return holds
