"""Quotas: how a budget of active experts is shared out over matrices by their importance (SmartFed's EEQA).

Every rule takes the matrices' importances [m] (not negative), their sizes N_m, the budget and the floor, and returns
quotas K_m with min(floor, N_m) <= K_m <= N_m and sum K_m = the budget (the sum of the sizes, where that is less).
Ties go to the matrix that comes first. These are reconstructions: the paper has the formulas, and
we have not been able to read them.
Every rule raises :class:`ValueError` for a budget that the floors exceed and for importances that are not numbers >= 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def proportional(importance: Sequence[float], sizes: Sequence[int], budget: int, floor: int) -> list[int]:
    """The floor, and the rest of the budget in proportion to importance, rounded by the largest remainder.

    What a matrix cannot take because it has no more experts goes to the others, in proportion again. A matrix of
    importance 0 keeps its floor unless all others are full; if all are 0, all count alike.
    """
    quotas, rest = _floors(importance, sizes, budget, floor)
    weight = _scaled(importance)
    while rest:
        room = [n - k for n, k in zip(sizes, quotas, strict=True)]
        weight = _among(weight, room)
        total = math.fsum(weight)
        share = [rest * w / total for w in weight]
        if full := [m for m, s in enumerate(share) if weight[m] and s >= room[m]]:
            for m in full:
                quotas[m], rest = sizes[m], rest - room[m]
            continue
        whole = [math.floor(s) for s in share]
        by_remainder = sorted(range(len(share)), key=lambda m: (whole[m] - share[m], m))
        left = rest - sum(whole)
        for m in range(len(share)):
            quotas[m] += whole[m]
        for m in by_remainder[:left]:
            quotas[m] += 1
        rest = 0
    return quotas


def greedy(importance: Sequence[float], sizes: Sequence[int], budget: int, floor: int) -> list[int]:
    """One expert at a time to the matrix that gains most: max of sum_m I_m (1 + 1/2 + ... + 1/K_m).

    The K-th expert of matrix m is worth I_m / K: each is worth less than the one before, so that taking the best one
    each time is optimal. Once no importance is left to gain, the smallest quota grows.
    """
    quotas, rest = _floors(importance, sizes, budget, floor)
    heap = [_offer(importance[m], quotas[m], m) for m in range(len(sizes)) if quotas[m] < sizes[m]]
    heapq.heapify(heap)
    for _ in range(rest):
        m = heapq.heappop(heap)[-1]
        quotas[m] += 1
        if quotas[m] < sizes[m]:
            heapq.heappush(heap, _offer(importance[m], quotas[m], m))
    return quotas


def uniform(importance: Sequence[float], sizes: Sequence[int], budget: int, floor: int) -> list[int]:
    """The same quota for every matrix, as far as its size allows, whatever its importance: EEQA turned off."""
    return greedy([0.0] * len(sizes), sizes, budget, floor)


RULES = {"proportional": proportional, "greedy": greedy, "uniform": uniform}


def _offer(importance: float, quota: int, m: int) -> tuple[float, int, int]:
    return -importance / (quota + 1), quota, m


def _floors(importance: Sequence[float], sizes: Sequence[int], budget: int, floor: int) -> tuple[list[int], int]:
    """Every matrix's floor, and what is left of the budget."""
    if len(importance) != len(sizes) or not all(math.isfinite(i) and i >= 0 for i in importance):
        raise ValueError(f"importances {list(importance)} for {len(sizes)} matrices; give one number >= 0 for each")
    quotas = [min(floor, n) for n in sizes]
    rest = min(budget, sum(sizes)) - sum(quotas)
    if rest < 0:
        raise ValueError(f"a budget of {budget} active experts is below the sum of the floors, {sum(quotas)}")
    return quotas, rest


def _scaled(importance: Sequence[float]) -> list[float]:
    """The importances with their largest as 1: no sum of them overflows."""
    top = max(importance, default=0.0)
    return [i / top if top else 0.0 for i in importance]


def _among(weight: Sequence[float], room: Sequence[int]) -> list[float]:
    """The weights of the matrices with room; all alike if those weigh nothing."""
    open_ = [w if r else 0.0 for w, r in zip(weight, room, strict=True)]
    return open_ if any(open_) else [1.0 if r else 0.0 for r in room]
