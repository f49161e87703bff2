"""Random pools for the tests, written without PEFT."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import tiny
from coterie.adapters.pool import Adapter, Pool, name_of, write_pool
from coterie.ops.streams import stream
from coterie.types import Key, Part, Target


def made(over: Sequence[Target], ranks: Mapping[str, int], *, prefix: str = "bert.", scale: float = 0.3) -> Pool:
    """A pool of adapters of the given ranks on all of ``over``, whose names lose ``prefix``."""
    tensors: dict[Key, Tensor] = {}
    adapters, first = [], 0
    for name, rank in ranks.items():
        modules = {t.name.removeprefix(prefix): t for t in over}
        for module, target in modules.items():
            for part, shape in ((Part.A, (rank, target.d_in)), (Part.B, (target.d_out, rank))):
                tensors[Key(module, first, part)] = scale * torch.randn(shape, generator=stream(0, name, module, part))
        ranks_here = dict.fromkeys(modules, rank)
        adapters.append(Adapter(name, first, rank, ranks_here, f"made/{name}", "0" * 64, "tiny"))
        first += rank
    tensors = dict(sorted(tensors.items()))
    return Pool("tiny", tuple(adapters), tensors, name_of(tensors))


@cache
def for_tiny(arch: str = "bert", *, poisoned: bool = False) -> str:
    """The folder of a pool for a tiny model: adapters ``one`` of rank 3 and ``two`` of rank 2.

    ``poisoned``: between them ``bad`` of rank 4, turned round and 50 times as strong.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    kind = "classification" if arch in tiny.ENCODERS else "generation"
    prefix = {"bert": "bert.", "roberta": "roberta.", "gpt2": "transformer."}.get(arch, "model.")
    ranks = {"one": 3, "bad": 4, "two": 2} if poisoned else {"one": 3, "two": 2}
    pool = made(tiny.targets(tiny.model(arch, kind)), ranks, prefix=prefix)
    write_pool(folder, stronger(pool, "bad", -50.0) if poisoned else pool)
    return str(folder)


def stronger(pool: Pool, adapter: str, times: float) -> Pool:
    """The pool with the B of an adapter multiplied."""
    first = next(a.first for a in pool.adapters if a.name == adapter)
    tensors = {k: v * times if (k.expert, k.part) == (first, Part.B) else v for k, v in pool.tensors.items()}
    return replace(pool, tensors=tensors, name=name_of(tensors))
