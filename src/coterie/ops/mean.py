"""Weighted means of keyed tensors, and the error of averaging A and B separately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


def mean(values: Sequence[Mapping[K, Tensor]], weights: Sequence[float]) -> dict[K, Tensor]:
    """The weighted mean of each key's tensors over ``values``, in the order given, with weights normalised once.

    Sums in float32 at least, returns the tensors' own dtype. Raises :class:`ValueError` where the mappings differ in
    keys or shapes, and for weights that are negative or do not sum to a positive number.
    """
    share = _shares(len(values), weights)
    keys = values[0].keys()
    if any(value.keys() != keys for value in values):
        raise ValueError("mean of mappings with different keys")
    return {key: _weighted([value[key] for value in values], share, str(key)) for key in keys}


def share_limit(weights: Sequence[float], share: float) -> float:
    """The limit on ``weights`` at which none of them has more than ``share`` of their sum.

    Where ``share`` is less than an equal one, the smallest weight: all become equal. Needs one weight or more.
    """
    rest, limit = sum(weights), math.inf
    for larger, weight in enumerate(sorted(weights, reverse=True)):
        limit = share * rest / (1 - share * larger) if share * larger < 1 else min(weights)
        if weight <= limit:
            break
        rest -= weight
    return max(limit, min(weights))


def _shares(count: int, weights: Sequence[float]) -> list[float]:
    total = float(sum(weights))
    if not count or count != len(weights) or not 0 < total < math.inf or min(weights) < 0:
        raise ValueError(f"mean of {count} values with weights {list(weights)}")
    return [w / total for w in weights]


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    if len({t.shape for t in tensors}) != 1:
        raise ValueError(f"mean of tensors with different shapes: {name} {[list(t.shape) for t in tensors]}")
    result = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        result.add_(tensor, alpha=weight)
    return result.to(tensors[0].dtype)


def aggregation_error(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    """``(||mean(BA) - mean(B) mean(A)||^2, ||mean(BA)||^2)`` of one module, Frobenius norms.

    Shapes: ``a[i]`` [r, d_in], ``b[i]`` [d_out, r]. Add the pairs up over modules, then divide and take the root
    (:func:`relative_error`). Computed from Gram matrices of the stacked factors: no [d_out, d_in] matrix is formed.
    Raises :class:`ValueError` as :func:`mean` does.
    """
    share = _shares(len(a), weights)
    a_mean = sum((w * t.double() for w, t in zip(share, a, strict=True)), torch.zeros(()))
    b_mean = sum((w * t.double() for w, t in zip(share, b, strict=True)), torch.zeros(()))
    left = torch.cat([w * t.double() for w, t in zip(share, b, strict=True)], dim=1)
    right = torch.cat([t.double() for t in a], dim=0)
    of_mean = squared_norm(left, right)
    of_difference = squared_norm(torch.cat([left, -b_mean], dim=1), torch.cat([right, a_mean], dim=0))
    return of_difference, of_mean


def relative_error(pairs: Sequence[tuple[float, float]]) -> float:
    """``||mean(BA) - mean(B) mean(A)|| / ||mean(BA)||`` over all modules, from :func:`aggregation_error`'s pairs."""
    whole = sum(of_mean for _, of_mean in pairs)
    return (sum(difference for difference, _ in pairs) / whole) ** 0.5 if whole > 0 else 0.0


def squared_norm(left: Tensor, right: Tensor) -> float:
    """``||left @ right||^2`` for left [o, n] and right [n, i], as tr((left^T left)(right right^T))."""
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
