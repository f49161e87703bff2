"""A pool: existing LoRA adapters for one base, in one file. They are SmartFed's frozen experts.

``DIR/pool.safetensors`` holds A [r, d_in] and B [d_out, r] of every adapter on every module in float32, with the
adapter's scale folded into B, and a record of where each adapter came from. A pool's name is the SHA-256 of its
tensors. Modules have their names in the bare base (``AutoModel``), so that adapters for classification and for
generation fit in one pool. :mod:`coterie.adapters.read` builds pools.

Experts are numbered over the whole pool: an adapter of rank r has the r numbers from its ``first`` on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median_low

import torch
from torch import Tensor

from coterie.codec import CodecError, decode, encode
from coterie.files import write_atomic
from coterie.ops.mean import squared_norm
from coterie.types import CoterieError, Key, Part, PrivateError, Tensors

POOL_FILE = "pool.safetensors"
_FORMAT = 2
_LARGE = 10.0  # times the others' median


@dataclass(frozen=True)
class Adapter:
    """One adapter of a pool: its name, its experts' numbers, and where it came from.

    ``ranks`` is by module; a module whose rank is below ``rank`` leaves its last numbers unused. ``sha256`` is that of
    the adapter's weights file. ``left_out`` names modules of the adapter that the pool does not take (its head).
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

    ``weights`` has a digest of the base's weights by module, where known: see :mod:`coterie.nn.weights`.
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
    """Write ``pool`` to ``folder``. Raises :class:`CoterieError` if another pool is there."""
    path = folder / POOL_FILE
    if path.exists() and read_pool(folder).name != pool.name:
        raise CoterieError(f"{folder} already holds another pool; give another folder, or delete that pool")
    write_atomic(path, encode(pool))


def read_pool(folder: Path) -> Pool:
    """The pool in ``folder``. Raises :class:`PrivateError` if there is none or it is damaged."""
    path = folder / POOL_FILE
    try:
        stat = path.stat()
    except OSError as fault:
        raise PrivateError(
            f"no {POOL_FILE} in {folder}; build a pool with `coterie pool build {folder} --adapters ...`"
        ) from fault
    return _read(path, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Pool:
    try:
        pool = decode(Pool, path.read_bytes())
    except CodecError as fault:
        raise PrivateError(
            f"{path} is damaged or was written by another version of Coterie; build the pool again ({fault})"
        ) from fault
    if pool.format != _FORMAT:
        raise PrivateError(f"{path} has format {pool.format}, this Coterie reads {_FORMAT}; build the pool again")
    if pool.name != name_of(pool.tensors):
        raise PrivateError(f"{path} does not match its SHA-256; build the pool again")
    return pool


def norms(pool: Pool) -> dict[str, float]:
    """How much each adapter changes the base: the root mean square, over its modules, of ||B A|| (Frobenius)."""
    of_pool: dict[str, float] = {}
    for adapter in pool.adapters:
        pairs = [
            [pool.tensors[Key(m, adapter.first, part)].double() for part in (Part.B, Part.A)] for m in adapter.ranks
        ]
        of_pool[adapter.name] = (sum(squared_norm(b, a) for b, a in pairs) / len(pairs)) ** 0.5
    return of_pool


def out_of_line(of_pool: Mapping[str, float]) -> dict[str, float]:
    """The adapters whose norm is more than 10 times the median of the others', and how many times as large it is."""
    factors = {}
    for name, norm in of_pool.items():
        others = [other for each, other in of_pool.items() if each != name]
        middle = median_low(others) if others else norm
        if norm > _LARGE * middle:
            factors[name] = norm / middle if middle else math.inf
    return factors


def cut(tensors: Tensors) -> dict[Key, Tensor]:
    """Every expert of rank r as r experts of rank 1: A_i [1, d_in] and B_i [d_out, 1], sum_i B_i A_i = B A.

    Expert (module, e) becomes (module, e), ..., (module, e + r - 1). The pieces are views of the same storage.
    """
    pieces = {}
    for key, value in tensors.items():
        for i in range(value.shape[0 if key.part is Part.A else 1]):
            piece = value[i : i + 1] if key.part is Part.A else value[:, i : i + 1]
            pieces[key._replace(expert=key.expert + i)] = piece
    return pieces


def put_back(tensors: Tensors, ranks: Mapping[Key, int]) -> dict[Key, Tensor]:
    """The inverse of :func:`cut`: under each key of ``ranks``, that many rank-1 experts stacked again."""
    return {
        key: torch.cat([tensors[key._replace(expert=key.expert + i)] for i in range(r)], dim=int(key.part is Part.B))
        for key, r in ranks.items()
    }


def match_modules(pool: Pool, modules: Iterable[str]) -> dict[str, str]:
    """The name in ``modules`` of each of the pool's modules: the only one that ends in the pool's name."""
    names = list(modules)
    matches = {m: [n for n in names if n == m or n.endswith(f".{m}")] for m in pool.modules}
    return {m: same[0] for m, same in matches.items() if len(same) == 1}
