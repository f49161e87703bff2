"""What SmartFed needs of a pool beside its own steps: the pool itself, names, and numbers of experts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from coterie.pool import Adapter, Pool, fit, read_pool
from coterie.types import BaseSpec, CoterieError, Key, Part


def pool_in(folder: str, name: str | None = None) -> Pool:
    """The pool in the settings' ``folder``. Raises :class:`CoterieError` where it is not the one called ``name``."""
    if not folder:
        raise CoterieError(
            'SmartFed needs a pool: set [method] pool = "DIR", made by `coterie pool build DIR --adapters A B ...`'
        )
    pool = read_pool(Path(folder))
    if name not in (None, pool.name):
        raise CoterieError(f"the pool in {folder} is {pool.name[:12]}, this run's is {str(name)[:12]}; put that back")
    return pool


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


def check_base(pool: Pool, names: Mapping[str, str], base: BaseSpec) -> tuple[str, ...]:
    """Notes on what cannot be checked. Raises :class:`CoterieError` where the base's weights are not the pool's base's.

    ``names`` is by :func:`names_in`.
    """
    here = {t.name: t.weights for t in base.targets}
    pairs = {module: (pool.weights.get(module, ""), here[names[module]]) for module in pool.modules}
    if others := [module for module, (built, now) in pairs.items() if built and now and built != now]:
        raise CoterieError(
            f"the pool was built for another base, {pool.base}: the weights of {others[0]} differ here "
            f"({len(others)} of {len(pairs)} matrices). Run with that base, or, if the adapters are right for this "
            "one too, build the pool again with --base"
        )
    if unknown := sum(not (built and now) for built, now in pairs.values()):
        return (
            f"the pool was built for {pool.base}; whether this run's base is the same cannot be told on {unknown} of "
            f"{len(pairs)} matrices: their weights are in no safetensors file here, or were in none where it was built",
        )
    return ()


def numbers(adapters: Iterable[Adapter], module: str, whole: bool) -> list[int]:
    """The numbers of the experts on one of the pool's modules, in order: the rows of its router.

    ``whole``: every adapter is one expert.
    """
    found = [range(a.first, a.first + (1 if whole else a.ranks[module])) for a in adapters if module in a.ranks]
    return [number for several in found for number in several]


def named_for(pool: Pool, names: Mapping[str, str], adapters: Iterable[Adapter]) -> dict[Key, Tensor]:
    """The pool's tensors of some adapters, under the targets' names."""
    firsts = {a.first for a in adapters}
    return {
        key._replace(module=names[key.module]): value
        for key, value in pool.tensors.items()
        if key.expert in firsts and key.module in names
    }
