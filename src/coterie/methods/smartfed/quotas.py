"""SmartFed's EEQA: what clients measure, what the server makes of it, and which adapters are hardly used.

The rules that turn importance into quotas are in :mod:`coterie.ops.quota`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from coterie.adapters.pool import Adapter
from coterie.methods.smartfed.pools import numbers
from coterie.ops.mixing import of_some
from coterie.requests import Observe, Observed, Program, Score
from coterie.types import NO_EXPERT, SHARED, Bank, Json, Key, Part

# a client -------------------------------------------------------------------------------------------------------------


def measure(
    bank: Bank, importance: str, examples: int, adapters: Mapping[str, Sequence[int]]
) -> Program[dict[str, Json]]:
    """What a client measures for EEQA: a number per matrix, and each adapter's share of the gates' weight.

    ``adapters`` holds the first number and the rank of each. It uses ``examples`` of the training rows, 0: all.
    """
    what = ("usage",) if importance == "ablation" else ("usage", importance)
    observed = yield Observe(bank, "train", what, examples=examples)
    modules = sorted(key.module for key in bank.tensors if key.part is Part.ROUTER)
    if importance == "ablation":
        banks = [bank, *(without(bank, module) for module in modules)]
        full, *rest = yield Score(banks, "train", examples=examples)
        measured = {m: max(0.0, scored.loss - full.loss) for m, scored in zip(modules, rest, strict=True)}
    else:
        measured = {m: observed.importance[importance].get(m, 0.0) for m in modules}
    return {"importance": measured, "use": use_of(bank, observed, adapters)}


def without(bank: Bank, module: str) -> Bank:
    """The bank without the pool's experts on one matrix. A fresh expert stays."""
    return replace(bank, tensors={k: v for k, v in bank.tensors.items() if k.module != module or k.expert == SHARED})


def use_of(bank: Bank, observed: Observed, adapters: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Each adapter's share of all routed weight, over all matrices."""
    sums = dict.fromkeys(adapters, 0.0)
    for usage in observed.usage.values():
        for number, weight in zip(usage.expert, usage.weight, strict=True):
            for name, (first, rank) in adapters.items():
                if first <= number < first + rank:
                    sums[name] += weight
    total = sum(sums.values())
    return {name: value / total if total else 0.0 for name, value in sums.items()}


# the server -----------------------------------------------------------------------------------------------------------


def mean_numbers(values: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """The weighted mean of each name's numbers."""
    total = sum(weights)
    return {n: sum(w * v[n] for v, w in zip(values, weights, strict=True)) / total for n in values[0]}


def starved(
    adapters: Sequence[Adapter], modules: Collection[str], use: Mapping[str, float], below: float, whole: bool
) -> list[str]:
    """The adapters whose share of the gates is below ``below`` times an even share, the least used first."""
    count = {a.name: sum(len(numbers([a], module, whole)) for module in modules) for a in adapters}
    share = {name: use.get(name, 0.0) * sum(count.values()) / n for name, n in count.items() if n}
    return sorted((name for name, value in share.items() if value < below), key=lambda name: share[name])


def rows_left(
    routers: Mapping[Key, Tensor],
    modules: Mapping[str, str],
    before: Sequence[Adapter],
    left: Sequence[Adapter],
    whole: bool,
    mixing: bool = False,
) -> dict[Key, Tensor]:
    """The routers with the rows of the adapters that are ``left``. A matrix that none of them adapts loses its router.

    ``modules`` names the target of each of the pool's modules. ``mixing``: of a router that mixes, columns go too.
    """
    kept = {}
    for module, target in modules.items():
        remaining = {*numbers(left, module, whole)}
        rows = [i for i, number in enumerate(numbers(before, module, whole)) if number in remaining]
        if rows:
            key = Key(target, NO_EXPERT, Part.ROUTER)
            kept[key] = of_some(routers[key], rows) if mixing else routers[key][rows]
    return kept
