"""A pool: LoRA modules that exist already, for one base, as one file; SmartFed's frozen experts.

``DIR/pool.safetensors`` holds A [r, d_in] and B [d_out, r] of every adapter on every module, with the adapter's own
scale folded into B, in float32, and a record of where each came from. A pool is named by the SHA-256 of its tensors.
Modules are named as the bare base names them (``AutoModel``): adapters made for classification and for generation fit
in one pool. :mod:`coterie.adapters.read` builds pools.

Experts are numbered over the whole pool: adapter a of rank r owns the numbers from its ``first`` on, r of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from coterie.codec import CodecError, decode, encode
from coterie.files import write_atomic
from coterie.types import CoterieError, Key, Part, PrivateError, Tensors

POOL_FILE = "pool.safetensors"
_FORMAT = 2


@dataclass(frozen=True)
class Adapter:
    """One adapter of a pool: its name, its experts' numbers, and where it came from.

    ``ranks`` is by module; a module whose rank is below ``rank`` leaves its last numbers unused. ``sha256`` is of the
    adapter's weights file. ``left_out`` names what the adapter had beside its LoRA (a classification head).
    """

    name: str
    first: int
    rank: int
    ranks: Mapping[str, int]
    source: str
    sha256: str
    base: str
    licence: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def experts(self) -> range:
        return range(self.first, self.first + self.rank)


@dataclass(frozen=True)
class Pool:
    """``tensors`` has the keys (module, the adapter's ``first``, A or B).

    ``weights`` tells the base's weights from others', by module, where they are known: see coterie.nn.weights.
    """

    base: str
    adapters: tuple[Adapter, ...]
    tensors: Tensors
    name: str
    weights: Mapping[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted({key.module for key in self.tensors}))

    def size(self, module: str) -> int:
        """N of a module: the sum of the adapters' ranks there."""
        return sum(adapter.ranks.get(module, 0) for adapter in self.adapters)


def name_of(tensors: Tensors) -> str:
    """The SHA-256 that names a pool of these tensors."""
    return hashlib.sha256(encode(dict(sorted(tensors.items())))).hexdigest()


def write_pool(folder: Path, pool: Pool) -> None:
    """Write ``pool`` to ``folder``. Raises :class:`CoterieError` where another pool is."""
    path = folder / POOL_FILE
    if path.exists() and read_pool(folder).name != pool.name:
        raise CoterieError(f"{folder} holds another pool; name another folder, or remove that one")
    write_atomic(path, encode(pool))


def read_pool(folder: Path) -> Pool:
    """The pool in ``folder``. Raises :class:`PrivateError` where there is none, or a damaged one."""
    path = folder / POOL_FILE
    try:
        stat = path.stat()
    except OSError as fault:
        raise PrivateError(
            f"no pool at {folder}: it has no {POOL_FILE}; make one with `coterie pool build {folder} --adapters ...`"
        ) from fault
    return _read(path, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Pool:
    try:
        pool = decode(Pool, path.read_bytes())
    except CodecError as fault:
        raise PrivateError(
            f"{path} is damaged, or another version of Coterie wrote it; build the pool again ({fault})"
        ) from fault
    if pool.format != _FORMAT:
        raise PrivateError(f"{path} has format {pool.format}, this Coterie reads {_FORMAT}; build the pool again")
    if pool.name != name_of(pool.tensors):
        raise PrivateError(f"{path} is not the pool that it is named for; build the pool again")
    return pool


def cut(tensors: Tensors) -> dict[Key, Tensor]:
    """Every expert of rank r as r experts of rank 1: A_i [1, d_in] and B_i [d_out, 1], sum_i B_i A_i = B A.

    Expert (module, e) becomes (module, e), ..., (module, e + r - 1); views of the same storage.
    """
    found = {}
    for key, value in tensors.items():
        for i in range(value.shape[0 if key.part is Part.A else 1]):
            piece = value[i : i + 1] if key.part is Part.A else value[:, i : i + 1]
            found[key._replace(expert=key.expert + i)] = piece
    return found


def put_back(tensors: Tensors, ranks: Mapping[Key, int]) -> dict[Key, Tensor]:
    """The experts of :func:`cut` stacked again: under each key of ``ranks``, as many as it says."""
    return {
        key: torch.cat([tensors[key._replace(expert=key.expert + i)] for i in range(r)], dim=int(key.part is Part.B))
        for key, r in ranks.items()
    }


def fit(pool: Pool, modules: Iterable[str]) -> dict[str, str]:
    """By the pool's module: the one of ``modules`` that it is. That is the only one whose name ends in the pool's."""
    names = list(modules)
    matches = {m: [n for n in names if n == m or n.endswith(f".{m}")] for m in pool.modules}
    return {m: found[0] for m, found in matches.items() if len(found) == 1}
