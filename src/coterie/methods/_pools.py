"""What SmartFed needs of a pool beside its own steps: names, numbers of experts, and the clients' measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from coterie.pool import Adapter, Pool, fit
from coterie.types import SHARED, Bank, BaseSpec, CoterieError, Json, Key, Observed, Part


def names_in(pool: Pool, base: BaseSpec) -> dict[str, str]:
    """The target of each of the pool's modules. Raises :class:`CoterieError` where pool and run do not fit."""
    sizes = {t.name: (t.d_in, t.d_out) for t in base.targets}
    names = fit(pool, sizes)
    if lost := [m for m in pool.modules if m not in names]:
        leaves = sorted({m.rsplit(".", 1)[-1] for m in pool.modules})
        raise CoterieError(
            f"the pool adapts {lost[0]}, which is no target of this run; set [lora] targets = {json.dumps(leaves)}"
        )
    for key, value in pool.tensors.items():
        d_in, d_out = sizes[names[key.module]]
        if value.shape[int(key.part is Part.A)] != (d_in if key.part is Part.A else d_out):
            raise CoterieError(f"the pool is for another base: {key.module} is a Linear of {d_in} to {d_out} here")
    return names


def numbers(adapters: Iterable[Adapter], module: str, whole: bool) -> list[int]:
    """The numbers of the experts on one of the pool's modules, in order: the rows of its router.

    ``whole``: every adapter is one expert.
    """
    found = [range(a.first, a.first + (1 if whole else a.ranks[module])) for a in adapters if module in a.ranks]
    return [number for several in found for number in several]


def starved(
    adapters: Sequence[Adapter], modules: Collection[str], use: Mapping[str, float], below: float, whole: bool
) -> list[str]:
    """The adapters whose share of the gates is less than ``below`` times an even share, the least used first."""
    count = {a.name: sum(len(numbers([a], module, whole)) for module in modules) for a in adapters}
    share = {name: use.get(name, 0.0) * sum(count.values()) / n for name, n in count.items() if n}
    return sorted((name for name, value in share.items() if value < below), key=lambda name: share[name])


def mean_numbers(values: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """The weighted mean of each name's numbers."""
    total = sum(weights)
    return {n: sum(w * v[n] for v, w in zip(values, weights, strict=True)) / total for n in values[0]}


def named_for(pool: Pool, names: Mapping[str, str], adapters: Iterable[Adapter]) -> dict[Key, Tensor]:
    """The pool's tensors of some adapters, under the targets' names."""
    firsts = {a.first for a in adapters}
    return {
        key._replace(module=names[key.module]): value
        for key, value in pool.tensors.items()
        if key.expert in firsts and key.module in names
    }


def is_sound(info: Mapping[str, Json], modules: set[str], adapters: set[str]) -> bool:
    """Whether a reply's statistics can count: a number of at least 0 for every matrix, and for every adapter."""
    importance, use = info.get("importance"), info.get("use")
    if not isinstance(importance, dict) or not isinstance(use, dict):
        return False
    numbers = (*importance.values(), *use.values())
    good = all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 for value in numbers)
    return good and importance.keys() == modules and use.keys() == adapters


def without(bank: Bank, module: str) -> Bank:
    """The bank without the pool's experts on one matrix; a fresh one stays."""
    return replace(bank, tensors={k: v for k, v in bank.tensors.items() if k.module != module or k.expert == SHARED})


def use_of(bank: Bank, observed: Observed, adapters: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Each adapter's share of all routed weight, over all matrices."""
    sums = dict.fromkeys(adapters, 0.0)
    for usage in observed.usage.values():
        for number, weight in zip(usage["expert"], usage["weight"], strict=True):
            for name, (first, rank) in adapters.items():
                if first <= number < first + rank:
                    sums[name] += weight
    total = sum(sums.values())
    return {name: value / total if total else 0.0 for name, value in sums.items()}
