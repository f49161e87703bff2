"""How certain a comparison of two methods is: paired intervals and tests over clients and seeds.

A table of differences d [s, c] holds, for each seed and client, the metric of one method less that of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
DRAWS = 10_000


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def bootstrap_interval(values: Array, confidence: float = 0.95, seed: int = 0) -> Interval:
    """A percentile interval of the mean of ``values`` [s, c]: clients are drawn with replacement, each with all seeds.

    The same clients are drawn in every seed, because what sets a client apart, such as its task, is the same in all of
    them. Seeds are few and are not resampled: the interval says how much the mean depends on the choice of clients.
    Raises :class:`ValueError` for an empty table and for values that are not finite.
    """
    by_client = _table(values).mean(axis=0)
    drawn = np.random.default_rng(seed).integers(len(by_client), size=(DRAWS, len(by_client)))
    low, high = np.quantile(by_client[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def seed_interval(means: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean over seeds; None for fewer than two."""
    if len(means) < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means)))
    middle = float(np.mean(means))
    return Interval(middle - half, middle + half)


def sign_flip_p(differences: Array, seed: int = 0) -> float:
    """The two-sided p-value of a permutation test that two methods are alike, from ``differences`` [s, c].

    Each client's mean difference over the seeds keeps or changes its sign, independently of the others. Every sign
    pattern is tried for up to 13 clients; above that, 10,000 are drawn. With n clients no p-value is below 2^(1-n).
    Raises as :func:`bootstrap_interval`.
    """
    by_client = _table(differences).mean(axis=0)
    if len(by_client) == 1:  # either sign is as far from zero
        return 1.0
    test = stats.permutation_test(
        (by_client,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWS,  # for up to 13 clients, all patterns: they are fewer
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(test.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the chance of one false claim among all of them stays below the level."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _table(values: Array) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"a table [seeds, clients] of finite values is needed, not one of shape {table.shape}")
    return table
