"""Every variant against the best other one, paired by seed and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coterie.comparison.record import Against, Figures, RunFigures
from coterie.comparison.variants import contenders
from coterie.ops.metrics import better
from coterie.ops.statistics import bootstrap_interval, holm, sign_flip_p

Table = NDArray[np.float64]
_LEVEL = 1e-9  # means of the same values differ in their last bits


def against_best(
    figures: Mapping[str, Figures], means: Mapping[str, float | None], best: str, metric: str
) -> dict[str, Figures]:
    """``figures``, each with its comparison with the best other variant: ``best``, and for ``best`` the second.

    Which is best goes by ``means``, on validation data, among the contenders. A variant without seeds and clients in
    common gets none.
    """
    rest = {variant: mean for variant, mean in contenders(means).items() if variant != best and mean is not None}
    second = None
    for variant, mean in rest.items():
        if second is None or better(metric, mean, rest[second]):
            second = variant
    if second is None:
        return dict(figures)
    found = {v: against(row, figures[best], best, metric) for v, row in figures.items() if v != best}
    found[best] = against(figures[best], figures[second], second, metric)
    # The best against the second and the second against the best are one test.
    p_values = {v: test.p for v, test in found.items() if test is not None and v != best}
    adjusted = holm(p_values)
    adjusted[best] = adjusted.get(second, 1.0)
    compared = {v: replace(test, p_holm=adjusted[v]) for v, test in found.items() if test is not None}
    return {v: replace(row, against=compared.get(v)) for v, row in figures.items()}


def against(row: Figures, other: Figures, name: str, metric: str) -> Against | None:
    """``row`` less ``other``, which is called ``name``, on the seeds and clients that both have; None without any.

    The p-value is not yet adjusted for several comparisons.
    """
    seeds = [seed for seed in row.seeds if seed in other.seeds]
    difference = _difference(row, other, seeds)
    if not difference.size:
        return None
    by_client = difference.mean(axis=0)
    gains = -by_client if better(metric, 0.0, 1.0) else by_client
    wins, losses = int((gains > _LEVEL).sum()), int((gains < -_LEVEL).sum())
    p = sign_flip_p(difference)
    interval = bootstrap_interval(difference)
    return Against(name, seeds, float(difference.mean()), interval, p, p, wins, losses, len(gains) - wins - losses)


def _difference(row: Figures, other: Figures, seeds: Sequence[int]) -> Table:
    mine, theirs = ([run for run in of.runs if run.seed in seeds] for of in (row, other))
    clients = [client for client in clients_of(mine) if client in clients_of(theirs)]
    return table_of(mine, clients) - table_of(theirs, clients)


def clients_of(runs: Sequence[RunFigures]) -> list[str]:
    """The clients that have a test value in all of ``runs``."""
    return [c for c in runs[0].clients if all(run.clients.get(c) is not None for run in runs)] if runs else []


def table_of(runs: Sequence[RunFigures], clients: Sequence[str] | None) -> Table:
    """The test values [seeds, clients], in the order of the seeds; by default of all clients that have them."""
    wanted = clients_of(runs) if clients is None else clients
    rows = [[run.clients[client] for client in wanted] for run in sorted(runs, key=lambda run: run.seed)]
    return np.array(rows, dtype=np.float64).reshape(len(runs), len(wanted))
