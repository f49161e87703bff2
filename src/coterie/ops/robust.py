"""Averages that a minority of bad vectors cannot move far, and what is done to the vectors before them.

Most of these rules return a linear combination of the n vectors, whose coefficients depend on their inner products
alone. So each rule reads the vectors once, into a Gram matrix [n, n], and once more to add them up: nothing of the size
n x d x n is ever formed. The median and the trimmed mean go by coordinate, one tensor at a time.

Sources: trimmed mean and median, Yin et al. (arXiv 1803.01498); Krum and multi-Krum, Blanchard et al. (NeurIPS 2017);
geometric median by Weiszfeld's iteration, Pillutla et al. (arXiv 1912.13445); centered clipping, Karimireddy et al.
(arXiv 2012.10333); nearest neighbour mixing, Allouah et al. (arXiv 2302.01772).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
Rule = Literal["mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "centered_clipping"]
BY_COORDINATE = frozenset({"median", "trimmed_mean"})
_WEISZFELD = 64
_CLIPPINGS = 8


def gram(vectors: Sequence[Mapping[K, Tensor]]) -> Tensor:
    """The inner products [n, n] (float64) of ``vectors``, each the tensors of a mapping taken together.

    Raises :class:`ValueError` where the mappings differ in keys.
    """
    n = len(vectors)
    products = torch.zeros(n, n, dtype=torch.float64)
    if any(vector.keys() != vectors[0].keys() for vector in vectors):
        raise ValueError("inner products of vectors with different keys")
    for key in vectors[0] if n else ():
        rows = torch.stack([vector[key].detach().double().flatten() for vector in vectors])
        products += rows @ rows.T
    return products


def norms(products: Tensor) -> Tensor:
    """The vectors' norms [n]."""
    return products.diagonal().clamp_min(0).sqrt()


def distances(products: Tensor) -> Tensor:
    """The distances [n, n] between the vectors."""
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()


def limit(sizes: Tensor, quantile: float) -> float:
    """The largest of ``sizes`` [n] that is not above their ``quantile``: one of them, with no interpolation."""
    return float(sizes.double().quantile(quantile, interpolation="lower"))


def clipping(products: Tensor, quantile: float) -> Tensor:
    """The factors [n], at most 1, that shorten vectors longer than the ``quantile`` of all norms to that quantile."""
    sizes = norms(products)
    return torch.where(sizes > 0, limit(sizes, quantile) / sizes.clamp_min(1e-300), 1.0).clamp_max(1.0)


def neighbour_mixing(products: Tensor, attackers: int) -> Tensor:
    """NNM: the matrix [n, n] that replaces every vector with the mean of its n - ``attackers`` nearest, itself among
    them."""
    n = len(products)
    nearest = distances(products).argsort(dim=1, stable=True)[:, : n - attackers]
    return torch.zeros_like(products).scatter_(1, nearest, 1.0 / (n - attackers))


def combination(rule: Rule, products: Tensor, attackers: int) -> Tensor:
    """The coefficients [n] with which ``rule`` adds the vectors up, if ``attackers`` of them may be anything.

    Raises :class:`ValueError` for a rule that goes by coordinate, and where the attackers would be half or more.
    """
    n = len(products)
    check(n, attackers)
    match rule:
        case "mean":
            return torch.full((n,), 1.0 / n, dtype=torch.float64)
        case "krum":
            return torch.nn.functional.one_hot(krum_scores(products, attackers).argmin(), n).double()
        case "multi_krum":
            chosen = krum_scores(products, attackers).argsort(stable=True)[: n - attackers]
            return torch.zeros(n, dtype=torch.float64).index_fill_(0, chosen, 1.0 / (n - attackers))
        case "geometric_median":
            usual = float(norms(products).median())
            return geometric_median(products, 1e-6 * usual or 1.0, _WEISZFELD)
        case "centered_clipping":
            return centered_clipping(products, float(norms(products).median()), _CLIPPINGS)
        case _:
            raise ValueError(f"{rule} goes by coordinate; it has no coefficients")


def krum_scores(products: Tensor, attackers: int) -> Tensor:
    """Every vector's mean squared distance [n] to its n - ``attackers`` - 1 nearest others."""
    n = len(products)
    return distances(products).square().sort(dim=1).values[:, 1 : n - attackers].mean(dim=1)


def geometric_median(products: Tensor, least: float, steps: int) -> Tensor:
    """Coefficients [n] of the geometric median: ``steps`` of Weiszfeld's iteration from 0.

    Distances below ``least`` count as ``least``.
    """
    weights = torch.zeros(len(products), dtype=torch.float64)
    for _ in range(steps):
        inverse = 1.0 / _distances_to(products, weights).clamp_min(least)
        weights = inverse / inverse.sum()
    return weights


def centered_clipping(products: Tensor, radius: float, steps: int) -> Tensor:
    """Coefficients [n] of v after ``steps`` of v <- v + mean_i (x_i - v) min(1, ``radius`` / |x_i - v|), from 0."""
    weights = torch.zeros(len(products), dtype=torch.float64)
    for _ in range(steps):
        factors = (radius / _distances_to(products, weights).clamp_min(1e-300)).clamp_max(1.0)
        weights = weights * (1 - factors.mean()) + factors / len(products)
    return weights


def by_coordinate(rule: Rule, rows: Tensor, attackers: int) -> Tensor:
    """The median or trimmed mean [d] of ``rows`` [n, d]. The median of an even number is the mean of the middle two."""
    n = len(rows)
    check(n, attackers)
    cut = (n - 1) // 2 if rule == "median" else attackers
    return rows.sort(dim=0).values[cut : n - cut].mean(dim=0)


def combine(
    rule: Rule, vectors: Sequence[Mapping[K, Tensor]], mixing: Tensor, products: Tensor, attackers: int
) -> dict[K, Tensor]:
    """``rule`` over the vectors ``mixing`` [n, n] @ ``vectors``, in their own dtype.

    ``products`` are the inner products of ``vectors`` as they are.
    """
    if rule not in BY_COORDINATE:
        weights = combination(rule, mixing @ products @ mixing.T, attackers) @ mixing
        return {key: weighted([vector[key] for vector in vectors], weights) for key in vectors[0]}
    plain = bool(torch.equal(mixing, torch.eye(len(vectors), dtype=mixing.dtype)))
    result = {}
    for key, first in vectors[0].items():
        rows = torch.stack([vector[key].flatten() for vector in vectors])
        rows = rows if plain else mixing.to(rows.dtype) @ rows
        result[key] = by_coordinate(rule, rows, attackers).view_as(first).to(first.dtype)
    return result


def weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum of ``tensors`` with ``weights`` [n]. One with the weight 0 is not read."""
    result = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        if weight:
            result.add_(tensor, alpha=weight)
    return result.to(tensors[0].dtype)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """By coordinate, the smaller of two updates where their signs agree, else 0: the median of both and of none."""
    return torch.where(first.sign() == second.sign(), first.sign() * torch.minimum(first.abs(), second.abs()), 0.0)


def shortened(rows: Tensor) -> Tensor:
    """``rows`` [n, d], those that are longer than the median row shortened to it. Rows of 0 are not counted.

    The median of an even number is the lower of the middle two.
    """
    sizes = rows.norm(dim=1)
    known = sizes[sizes > 0]
    if not len(known):
        return rows
    factors: Tensor = (known.median() / sizes.clamp_min(1e-30)).clamp_max(1.0)
    return rows * factors[:, None]


def capped(numbers: Sequence[Mapping[K, float]], times: float) -> list[dict[K, float]]:
    """``numbers``, each scaled down where its sum is more than ``times`` the median sum.

    As they are where there are fewer than three, or where the median sum is 0. No number may be below 0.
    """
    sums = [math.fsum(each.values()) for each in numbers]
    most = times * median(sums) if len(sums) >= 3 else 0.0
    factors = [most / total if 0 < most < total else 1.0 for total in sums]
    return [{name: f * value for name, value in each.items()} for each, f in zip(numbers, factors, strict=True)]


def check(vectors: int, attackers: int) -> None:
    """Raises :class:`ValueError` where half of the ``vectors`` or more would be ``attackers``': nothing can be told."""
    if not 0 <= 2 * attackers < vectors:
        raise ValueError(f"{attackers} attackers of {vectors}: no rule can tell which of them are right")


def _distances_to(products: Tensor, weights: Tensor) -> Tensor:
    """The distance [n] of every vector to the combination of all with ``weights`` [n]."""
    to = products @ weights
    return (products.diagonal() - 2 * to + weights @ to).clamp_min(0).sqrt()
