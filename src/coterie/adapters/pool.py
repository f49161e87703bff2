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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from coterie.codec import CodecError, decode, encode
from coterie.files import write_atomic
from coterie.ops.mean import squared_norm
from coterie.types import CoterieError, Key, Part, PrivateError, Tensors

POOL_FILE = "pool.safetensors"
_FORMAT = 2
BOUND = 10.0  # times the others' median: an adapter with a larger norm is out of line
_ON_ONE = 2.0  # times that bound, on one module: norms differ from module to module


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
    """Write ``pool`` to ``folder``. Raises :class:`CoterieError` if another pool is there, or one that is damaged."""
    path = folder / POOL_FILE
    if path.exists() and read_pool(folder).name != pool.name:
        raise CoterieError(f"{folder} already holds another pool; give another folder, or delete that pool")
    write_atomic(path, encode(pool))


def read_pool(folder: Path) -> Pool:
    """The pool in ``folder``. Raises :class:`PrivateError` if there is none or it is damaged.

    That includes a record that does not fit the tensors, and values that are not finite: the SHA-256 shows neither.
    """
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
            f"{path} is damaged or was written by another version of Coterie ({fault}); {_again(path)}"
        ) from fault
    if pool.format != _FORMAT:
        raise PrivateError(f"{path} has format {pool.format}, this Coterie reads {_FORMAT}; {_again(path)}")
    if pool.name != name_of(pool.tensors):
        raise PrivateError(f"{path} does not match its SHA-256; {_again(path)}")
    if why := _fault_of_record(pool.adapters) or _fault_of_tensors(pool):
        raise PrivateError(f"{path} {why}; {_again(path)}")
    return pool


def _again(path: Path) -> str:
    """What to do about a pool that cannot be read. Nothing replaces it: another version may read it."""
    return f"delete that file, and build the pool again with `coterie pool build {path.parent} ...`"


def _fault_of_record(adapters: Sequence[Adapter]) -> str:
    """Why no pool can have this record of its adapters, or ""."""
    if not adapters:
        return "has no adapters"
    if len({adapter.name for adapter in adapters}) < len(adapters):
        return "has two adapters of one name"
    end = 0
    for adapter in sorted(adapters, key=lambda adapter: adapter.first):
        ranks = adapter.ranks.values()
        if not ranks or min(ranks) < 1 or max(ranks) != adapter.rank:
            return f"does not give adapter {adapter.name!r} its ranks by module, from 1 to {adapter.rank}"
        if adapter.first < end:
            return f"gives adapter {adapter.name!r} the number {adapter.first}, which is below 0 or another adapter's"
        end = adapter.first + adapter.rank
    return ""


def _fault_of_tensors(pool: Pool) -> str:
    """Where the tensors differ from the record of the adapters, or are not numbers; else ""."""
    ranks = {
        Key(module, adapter.first, part): rank
        for adapter in pool.adapters
        for module, rank in adapter.ranks.items()
        for part in (Part.A, Part.B)
    }
    if differ := sorted(ranks.keys() ^ pool.tensors.keys()):
        have = "lacks the tensor" if differ[0] in ranks else "has, without a record of it, the tensor"
        return f"{have} {differ[0]}"
    for key, value in pool.tensors.items():
        if value.ndim != 2 or value.shape[0 if key.part is Part.A else 1] != ranks[key]:
            return f"records rank {ranks[key]} for {key}, whose shape is {list(value.shape)}"
        if not bool(torch.isfinite(value).all()):
            return f"has values in {key} that are not finite"
    return ""


@dataclass(frozen=True)
class Excess:
    """How far an adapter is out of line: ``times`` what is usual, which is more than ``limit``.

    It is its norm over all its modules, or on ``module``.
    """

    times: float
    limit: float
    module: str = ""

    def __str__(self) -> str:
        where = f"on {self.module}" if self.module else "over its matrices"
        return f"its norm (of B A, {where}) is {self.times:.3g} times the others' median"


def norms(pool: Pool) -> dict[str, dict[str, float]]:
    """How much each adapter changes the base, by module: the larger of ||B A|| (Frobenius) and of the root of
    sum_i ||B_i||^2 ||A_i||^2 over its experts of rank 1, because gates may choose one of two that cancel."""
    of_pool: dict[str, dict[str, float]] = {}
    for adapter in pool.adapters:
        of_pool[adapter.name] = {}
        for module in adapter.ranks:
            b, a = (pool.tensors[Key(module, adapter.first, part)].double() for part in (Part.B, Part.A))
            apart = float(b.square().sum(0) @ a.square().sum(1))
            of_pool[adapter.name][module] = max(squared_norm(b, a), apart) ** 0.5
    return of_pool


def total(by_module: Mapping[str, float]) -> float:
    """The root mean square of an adapter's norms over its modules."""
    return math.sqrt(sum(norm**2 for norm in by_module.values()) / len(by_module))


def out_of_line(of_pool: Mapping[str, Mapping[str, float]], bound: float = BOUND) -> dict[str, Excess]:
    """The adapters whose norm is more than ``bound`` times the median of the others', the most extreme first.

    Or on one module more than twice that, where what is usual is the larger of the others' median there and of their
    median over all modules. Adapters of norm 0 say nothing of what is usual. Half of the adapters at most are named.
    """
    found = {name: excess for name in of_pool if (excess := _excess(name, of_pool, bound))}
    ranked = sorted(found, key=lambda name: (-found[name].times / found[name].limit, name))
    return {name: found[name] for name in ranked[: len(of_pool) // 2]}


def _excess(name: str, of_pool: Mapping[str, Mapping[str, float]], bound: float) -> Excess | None:
    """How far an adapter is out of line: over all modules, or else on the one where that is most."""
    others = [by_module for other, by_module in of_pool.items() if other != name and total(by_module) > 0]
    if not others:
        return None
    usual = median(map(total, others))
    if (times := total(of_pool[name]) / usual) > bound:
        return Excess(times, bound)
    here = []
    for module, norm in of_pool[name].items():
        there = [by_module[module] for by_module in others if module in by_module]
        here.append(Excess(norm / max(usual, median(there) if there else 0.0), _ON_ONE * bound, module))
    worst = max(here, key=lambda excess: excess.times)
    return worst if worst.times > worst.limit else None


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
