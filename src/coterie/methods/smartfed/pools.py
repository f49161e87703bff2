"""SmartFed and its pool: read and check it, number its experts, find it in what was sent."""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.adapters.pool import BOUND, Adapter, Pool, cut, match_modules, norms, out_of_line, put_back, read_pool
from coterie.methods.parts import lora_of
from coterie.methods.plan import Plan
from coterie.methods.privacy import sent_by_clients
from coterie.methods.smartfed.settings import ROUTER_OF, SmartFedSettings
from coterie.types import (
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    CoterieError,
    Instruction,
    Key,
    Part,
    PrivateError,
    Reply,
    Tensors,
)

WHOLE = (Part.ROUTER, Part.HEAD)  # parts that train wherever they are
_ROBUST_BOUND = 3.0  # times the median of the other adapters' norms, with [robust]


def pool_in(folder: str, name: str | None = None) -> Pool:
    """The pool in ``folder``. Raises :class:`CoterieError` if its SHA-256 is not ``name``."""
    if not folder:
        raise CoterieError(
            'SmartFed needs a pool: set [method] pool = "DIR", made by `coterie pool build DIR --adapters A B ...`'
        )
    pool = read_pool(Path(folder))
    if name not in (None, pool.name):
        raise PrivateError(
            f"the pool in {folder} is {pool.name[:12]}, but this run began with {str(name)[:12]}; restore that pool"
        )
    return pool


def check_settings(settings: SmartFedSettings, pool: Pool) -> None:
    """Raises :class:`CoterieError` for settings that do not suit the pool, or each other."""
    known = [adapter.name for adapter in pool.adapters]
    if unknown := sorted({*settings.train_experts} - {*known}):
        raise CoterieError(f"[method] train_experts: the pool has no adapter {unknown[0]!r}; it has {', '.join(known)}")
    if idle := settings.idle():
        raise CoterieError(
            f'[method] {idle} does nothing with router = "{settings.router}"; remove it, or set router = '
            f'"{ROUTER_OF[idle]}"'
        )
    if settings.floor > settings.active and not settings.routes_all:
        raise CoterieError(
            f"[method] floor = {settings.floor} is above active = {settings.active}, the mean over matrices; lower it"
        )
    if settings.router == "mixing" and (settings.whole or settings.sparse):
        unfit = 'granularity = "adapter"' if settings.whole else "sparse = true"
        raise CoterieError(
            f'[method] router = "mixing" needs all experts, of rank 1 each; remove {unfit}, or choose another router'
        )


def check_ranks(settings: SmartFedSettings, pool: Pool, out: Container[str]) -> None:
    """Raises :class:`CoterieError` if the router needs adapters of one rank, so that A x has one length, and has not.

    ``out``: the adapters that take no part.
    """
    if not settings.whole or settings.router != "response":
        return
    part = [adapter for adapter in pool.adapters if adapter.name not in out]
    for module in pool.modules:
        ranks = sorted({adapter.ranks[module] for adapter in part if module in adapter.ranks})
        if len(ranks) > 1:
            raise CoterieError(
                '[method] router = "response" with granularity = "adapter" needs adapters of one rank, and the pool '
                f'has {", ".join(map(str, ranks))} in {module}; set granularity = "rank", or another router'
            )


def left_out(settings: SmartFedSettings, pool: Pool, robust: bool) -> dict[str, str]:
    """The adapters that take no part because their norm is out of line with the others', and a note on each.

    ``robust``: a rule guards the run, so the default bound is closer. Raises :class:`CoterieError` for one that is to
    be trained.
    """
    bound = settings.pool_bound or (_ROBUST_BOUND if robust else BOUND)
    notes = {}
    for name, excess in out_of_line(norms(pool), bound).items():
        twice = "twice " if excess.module else ""
        why = f"{excess}, more than {excess.limit:g} ({twice}[method] pool_bound)"
        if name in settings.train_experts:
            raise CoterieError(
                f"[method] train_experts: the pool's adapter {name!r} is out of line: {why}; remove it, or raise "
                "pool_bound if you trust it"
            )
        notes[name] = (
            f"the pool's adapter {name!r} is left out: {why}. Check where it comes from; if you trust it, raise "
            "pool_bound"
        )
    return notes


def names_in(pool: Pool, base: BaseSpec) -> dict[str, str]:
    """The target of each of the pool's modules. Raises :class:`CoterieError` if the pool does not fit the run."""
    sizes = {t.name: (t.d_in, t.d_out) for t in base.targets}
    names = match_modules(pool, sizes)
    if lost := [m for m in pool.modules if m not in names]:
        leaves = sorted({m.rsplit(".", 1)[-1] for m in pool.modules})
        raise CoterieError(
            f"the pool adapts {lost[0]}, which is not a target of this run; set [lora] targets = {json.dumps(leaves)}"
        )
    for key, value in pool.tensors.items():
        d_in, d_out = sizes[names[key.module]]
        if value.shape[int(key.part is Part.A)] != (d_in if key.part is Part.A else d_out):
            raise CoterieError(
                f"the pool was built for another base: here {key.module} is a Linear of {d_in} to {d_out}"
            )
    return names


def check_base(pool: Pool, names: Mapping[str, str], base: BaseSpec) -> tuple[str, ...]:
    """Notes on what cannot be checked. Raises :class:`CoterieError` if the pool was built for other weights.

    ``names`` comes from :func:`names_in`.
    """
    here = {t.name: t.weights for t in base.targets}
    pairs = {module: (pool.weights.get(module, ""), here[names[module]]) for module in pool.modules}
    if others := [module for module, (built, now) in pairs.items() if built and now and built != now]:
        raise CoterieError(
            f"the pool was built for another base, {pool.base}: the weights of {others[0]} differ here "
            f"({len(others)} of {len(pairs)} matrices). Run with that base, or, if the adapters suit this one too, "
            "build the pool again with --base"
        )
    if unknown := sum(not (built and now) for built, now in pairs.values()):
        return (
            f"the pool was built for {pool.base}; on {unknown} of {len(pairs)} matrices it was not checked that "
            "this run's base is the same: their weights are not in safetensors files here, or were not at the build",
        )
    return ()


def numbers(adapters: Iterable[Adapter], module: str, whole: bool) -> list[int]:
    """The numbers of the experts on one of the pool's modules, in order: the rows of its router.

    ``whole``: every adapter is one expert.
    """
    ranges = [range(a.first, a.first + (1 if whole else a.ranks[module])) for a in adapters if module in a.ranks]
    return [number for several in ranges for number in several]


def sizes_of(
    settings: SmartFedSettings, pool: Pool, names: Mapping[str, str], out: Collection[str], base: BaseSpec
) -> dict[str, tuple[int, int]]:
    """The number of experts and d_in of every target that an adapter adapts, without the adapters ``out``."""
    width, used = {t.name: t.d_in for t in base.targets}, [a for a in pool.adapters if a.name not in out]
    experts = {names[module]: len(numbers(used, module, settings.whole)) for module in pool.modules}
    return {target: (n, width[target]) for target, n in experts.items() if n}


def named_for(pool: Pool, names: Mapping[str, str], adapters: Iterable[Adapter]) -> dict[Key, Tensor]:
    """The pool's tensors of ``adapters``, under the names of the targets."""
    firsts = {a.first for a in adapters}
    return {
        key._replace(module=names[key.module]): value
        for key, value in pool.tensors.items()
        if key.expert in firsts and key.module in names
    }


def frozen_of(
    settings: SmartFedSettings, pool: Pool, routers: Iterable[Key], dropped: Iterable[str] = ()
) -> dict[Key, Tensor]:
    """The pool's tensors that are sent once: those of adapters that neither train nor were dropped."""
    names, others = match_modules(pool, [key.module for key in routers]), {*settings.train_experts, *dropped}
    return named_for(pool, names, [a for a in pool.adapters if a.name not in others])


def lacks_pool(reply: Reply) -> bool:
    """Whether the client lacked the pool, and so trained nothing."""
    return reply.info.get("lacks_pool") is True


def holders_after(before: Iterable[ClientId], replies: Mapping[ClientId, Reply]) -> tuple[ClientId, ...]:
    """Who has the pool after a round: those from ``before`` and those that replied, except who says to lack it."""
    lacking = {client for client, reply in replies.items() if lacks_pool(reply)}
    return tuple(sorted({*before, *sent_by_clients(replies)} - lacking))


def taking_part(plan: Plan, replies: Mapping[ClientId, Reply]) -> dict[ClientId, Reply]:
    """The replies that are averaged: not those of clients that lacked the pool.

    Where the server adds noise, those too: what they sent is their start, an update of 0, and without them the average
    would show who took part.
    """
    return {c: reply for c, reply in replies.items() if plan.privacy.by_server or not lacks_pool(reply)}


@dataclass(frozen=True)
class Sent:
    """The pool's experts in an instruction: adapters in ``train`` are sent every round, the others once.

    ``whole``: every adapter is one expert, uncut.
    """

    ins: Instruction
    train: tuple[str, ...]
    whole: bool

    @property
    def training(self) -> dict[Key, Tensor]:
        """The adapters that train, as they travel."""
        return {key: value for key, value in lora_of(self.ins.tensors).items() if key.expert in self._firsts}

    @property
    def frozen(self) -> dict[Key, Tensor]:
        """The adapters that do not train; empty in rounds that only name them."""
        others = {SHARED, *self._firsts}
        return {key: value for key, value in lora_of(self.ins.tensors).items() if key.expert not in others}

    def cut(self, pool: Tensors) -> dict[Key, Tensor]:
        """The experts of the adapters in ``pool`` that were not dropped."""
        active = {first for first, _ in self.ins.info["adapters"].values()}
        left = {key: value for key, value in pool.items() if key.expert in active}
        return left if self.whole else cut(left)

    def stacked(self, bank: Bank) -> dict[Key, Tensor]:
        """The adapters of ``bank`` that train, as they travel: stacked again, with the bank's scale in B."""
        like = {key: 1 if self.whole else v.shape[int(key.part is Part.B)] for key, v in self.training.items()}
        stacked = put_back(bank.tensors, like)
        return {key: value * bank.scaling if key.part is Part.B else value for key, value in stacked.items()}

    def trainable(self, bank: Bank) -> frozenset[Key]:
        """Routers, head, the fresh expert, and the experts of the adapters that train."""
        trains = {SHARED}
        for first, rank in self._firsts.items():
            trains |= {*range(first, first + rank)}
        return frozenset(key for key in bank.tensors if key.part in WHOLE or key.expert in trains)

    @property
    def _firsts(self) -> dict[int, int]:
        """The first number and the rank of each adapter that trains."""
        adapters = self.ins.info["adapters"]
        return {adapters[name][0]: adapters[name][1] for name in self.train}
