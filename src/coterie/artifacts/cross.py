"""``coterie evaluate --cross``: every client's model on every client's test rows, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.comparison.cross import Cross, evaluate_cross, read_cross
from coterie.comparison.tables import number
from coterie.report import plots
from coterie.report.page import PICTURE_FOLDER
from coterie.report.plots import cross_map
from coterie.report.tables import MISSING, words
from coterie.runs.summary import SUMMARY, read_summary
from coterie.types import CoterieError

PICTURE = "cross.png"


@dataclass(frozen=True)
class CrossTable:
    """A metric of every client's model (rows) on every client's test rows (columns); ``-`` for other labels."""

    metric: str
    clients: Sequence[str]
    cells: Sequence[Sequence[str]]
    picture: Path


def cross_table(folder: Path, metric: str = "") -> CrossTable:
    """The table of the finished run in ``folder``, and its picture in ``pictures/cross.png``.

    ``metric`` is by default what validation chose by. What was scored once is read from ``cross.json``.
    Raises :class:`CoterieError` for a run that has not finished, for a metric that no model has, and as
    :func:`evaluate_cross` does.
    """
    if not (folder / SUMMARY).is_file():
        raise CoterieError(f"{folder} holds no finished run (no {SUMMARY}); give the folder of one")
    cross = read_cross(folder) or evaluate_cross(folder, {})
    metric = metric or read_summary(folder / SUMMARY).primary
    clients = sorted(cross.metrics, key=plots.natural)
    known = sorted({name for on in cross.metrics.values() for of in on.values() for name in of})
    if metric not in known:
        raise CoterieError(f"no model has the metric {metric!r}; the metrics are {', '.join(known)}")
    values = [[_value(cross, of, on, metric) for on in clients] for of in clients]
    cells = [[MISSING if value is None else number(value, metric) for value in row] for row in values]
    table = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    path = folder / PICTURE_FOLDER / PICTURE
    plots.png(cross_map(clients, table, cells, label=words(metric)), path)
    return CrossTable(metric, clients, cells, path)


def _value(cross: Cross, of: str, on: str, metric: str) -> float | None:
    return cross.metrics[of].get(on, {}).get(metric)
