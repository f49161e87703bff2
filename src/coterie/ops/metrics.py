"""Metrics of predictions, and their summary over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.types import ClientId, Number

Metrics = Mapping[str, Number]


def classification_metrics(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1 over the labels that occur, and Matthews' correlation, all as fractions."""
    right = sum(t == p for t, p in zip(truth, predicted, strict=True))
    labels, codes = np.unique([*truth, *predicted], return_inverse=True)
    counts = np.zeros((len(labels), len(labels)))  # [true label, predicted label]
    np.add.at(counts, (codes[: len(truth)], codes[len(truth) :]), 1)
    true, guessed = counts.sum(axis=1), counts.sum(axis=0)
    return {
        "accuracy": right / len(truth),
        "macro_f1": float(np.mean(2 * counts.diagonal() / (true + guessed))),
        "matthews": _matthews(counts.trace(), true, guessed),
    }


def _matthews(right: float, true: NDArray[np.float64], guessed: NDArray[np.float64]) -> float:
    """Matthews' correlation for k labels (Gorodkin, 2004), from the rows of each; 0 where one side has one label."""
    rows = true.sum()
    variances = (rows**2 - guessed @ guessed) * (rows**2 - true @ true)
    return float((right * rows - true @ guessed) / np.sqrt(variances)) if variances else 0.0


def confusion(truth: Sequence[int], predicted: Sequence[int], labels: int) -> list[list[int]]:
    """How many rows of each label (first index) were predicted as each label (second), of ``labels`` labels."""
    counts = np.zeros((labels, labels), dtype=int)
    np.add.at(counts, (np.asarray(truth, int), np.asarray(predicted, int)), 1)
    rows: list[list[int]] = counts.tolist()
    return rows


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 15) -> float:
    """The expected calibration error (Guo et al., 2017, arXiv 1706.04599): sum_b n_b / n |accuracy_b - confidence_b|.

    Bin b of ``bins`` has the n_b predictions whose probability is in ((b - 1) / bins, b / bins]. 0 is best, at most 1.
    """
    sure, hits = np.asarray(confidence, float), np.asarray(right, float)
    which = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, hits - sure, minlength=bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(sure))


def perplexity(loss: float) -> float:
    """exp of the mean loss per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def mean_metrics(by_client: Mapping[ClientId, Metrics]) -> dict[str, float]:
    """The unweighted mean over clients of every metric that all of them have."""
    if not by_client:
        return {}
    rows = list(by_client.values())
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in shared}


def better(metric: str, value: float, than: float) -> bool:
    """Whether ``value`` is better than ``than``: lower for losses and perplexity, higher for the rest; NaN is worst."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if metric in ("loss", "perplexity") else value > than


def worst_client(metric: str, by_client: Mapping[ClientId, Metrics]) -> tuple[ClientId, float] | None:
    """The client with the worst value; on a tie, the first by name."""
    values = [(c, by_client[c][metric]) for c in sorted(by_client) if metric in by_client[c]]
    worst = None
    for client, value in values:
        if worst is None or better(metric, worst[1], value):
            worst = client, value
    return worst


def percentiles(metric: str, by_client: Mapping[ClientId, Metrics]) -> dict[str, float]:
    """The 10th, 25th, 50th, 75th and 90th percentile over clients."""
    values = [row[metric] for row in by_client.values() if metric in row]
    return {f"p{p}": float(np.percentile(values, p)) for p in (10, 25, 50, 75, 90)} if values else {}
