"""SmartFed (arXiv 2512.00902, ICML 2026): reuse LoRA modules that exist as rank-1 experts; train and send routers only.

1. Pool: every LoRA is cut along its rank; expert i of a matrix is B_i A_i x with A_i [1, d_in], B_i [d_out, 1]. Frozen;
   sent to a client once, then named by its SHA-256; sent again to one that says it has it no more.
2. MoRE: y = W0 x + sum_{i in top-K_m} g_i B_i A_i x with g from a router W [N_m, d_in] per matrix m and per token
   (:func:`coterie.nn.gates.top_k`).
3. Rounds: a client trains the routers and its head, and uploads them; the server averages them by examples.
4. EEQA: a budget of active experts over all matrices is shared out by importance, which clients measure every
   ``quota_interval`` rounds and upload as a number per matrix (:mod:`coterie.ops.quota`).

No code and no formulas of the gate's scale and of EEQA are published: ``gate_scale``, ``importance`` and ``quota`` are
reconstructions (docs/methods/smartfed.md says which line is whose).
Ours: a fresh expert beside the pool (``fresh_rank``), pool adapters that train (``train_experts``), adapters dropped
for lack of use (``drop_below``), whole adapters as experts (``granularity = "adapter"``, a control).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field
from torch import Tensor

from coterie.adapters.pool import Pool, fit, name_of
from coterie.methods.base import MethodSettings, Plan
from coterie.methods.findings import Adapter, Finding, Notes, Quotas
from coterie.methods.parts import (
    Heads,
    Shapes,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_heads,
    start_lora,
    with_head,
)
from coterie.methods.smartfed.pools import WHOLE, Sent, check_base, named_for, names_in, numbers, pool_in
from coterie.methods.smartfed.quotas import is_sound, mean_numbers, measure, rows_left, starved
from coterie.ops.mean import mean
from coterie.ops.quota import RULES
from coterie.ops.streams import kaiming_uniform, stream
from coterie.types import (
    NO_EXPERT,
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    ClientResult,
    CoterieError,
    GateSpec,
    Instruction,
    Json,
    Kept,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
    Train,
)


class SmartFedSettings(MethodSettings):
    """The settings of SmartFed; a relative ``pool`` starts at the config's folder."""

    pool: str = Field("", description="the pool's folder, made by `coterie pool build`; required")
    pool_at: Literal["server", "everywhere"] = Field(
        "server", description="server: sent with a client's first round; everywhere: every client has the folder"
    )
    granularity: Literal["rank", "adapter"] = Field(
        "rank", description="adapter: whole LoRAs are the experts, a gate for each (a control)"
    )
    active: int = Field(8, ge=1, description="active experts per matrix and token, on average: the budget of EEQA")
    floor: int = Field(2, ge=1, description="active experts that every matrix keeps; one alone cannot learn to route")
    gate_scale: Literal["active", "one"] = Field(
        "active", description="what the K weights of a token add up to: K or 1"
    )
    quota: Literal["proportional", "greedy", "uniform"] = Field(
        "proportional", description="how importance becomes quotas; uniform: no EEQA"
    )
    importance: Literal["first_order", "gate_mass", "ablation"] = Field(
        "first_order", description="what clients measure for EEQA"
    )
    per_active: bool = Field(
        True, description="share the budget out by importance per active expert, not by the matrix's sum"
    )
    quota_interval: int = Field(2, ge=1, description="rounds from one measurement to the next; the first is round 1")
    measure_examples: int = Field(64, ge=0, description="training examples that a measurement takes; 0: all")
    fresh_rank: int = Field(0, ge=0, description="rank of an expert beside the pool, trained and averaged as FedIT's")
    train_experts: tuple[str, ...] = Field((), description="adapters of the pool that train, travel and are averaged")
    drop_below: float = Field(
        0.0, ge=0, lt=1, description="drop an adapter whose share of the gates is below this part of an even share"
    )

    def located(self, root: Path) -> Self:
        return self.model_copy(update={"pool": str(root / Path(self.pool).expanduser())}) if self.pool else self


@dataclass(frozen=True)
class SmartFedState:
    """The server's state. The pool is not in it, only its name: its tensors are read from the pool's folder.

    ``quotas`` and ``importance`` are by matrix, ``use`` by adapter: its share of the gates' weight. ``trained`` holds
    the adapters that train, each as in the pool; ``fresh`` the expert beside the pool. ``holders`` have the pool.
    """

    pool: str
    routers: Tensors
    heads: Heads
    fresh: Tensors
    trained: Tensors
    quotas: Mapping[str, int] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    use: Mapping[str, float] = field(default_factory=dict)
    measured_by: tuple[ClientId, ...] = ()
    dropped: tuple[str, ...] = ()
    holders: tuple[ClientId, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SmartFed:
    """The method; see the module's text."""

    settings: SmartFedSettings
    plan: Plan

    name = "smartfed"
    title = "SmartFed"
    paper = "arXiv 2512.00902 (ICML 2026)"
    summary = "existing LoRAs cut into rank-1 experts; routers train, with an elastic quota per matrix"
    evaluates = "received"
    newcomers = ""
    Settings = SmartFedSettings
    State = SmartFedState

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> SmartFedState:
        pool = self._pool()
        self._check(pool)
        names = names_in(pool, base)
        width = {t.name: t.d_in for t in base.targets}
        shape = {names[m]: (len(numbers(pool.adapters, m, self._whole)), width[names[m]]) for m in pool.modules}
        routers = {
            _router(m): kaiming_uniform(of, stream(self.plan.seed, "router", m)) for m, of in sorted(shape.items())
        }
        fresh = start_lora(base, replace(self.plan, rank=self.settings.fresh_rank or 1), SHARED)
        state = SmartFedState(
            pool=pool.name,
            routers=routers,
            heads=start_heads(base, self.plan, clients),
            fresh=fresh if self.settings.fresh_rank else {},
            trained=named_for(pool, names, [a for a in pool.adapters if a.name in self.settings.train_experts]),
            notes=check_base(pool, names, base),
        )
        return replace(state, quotas=self._quotas(state, "uniform"))

    def configure(
        self, state: SmartFedState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        pool = self._pool(state.pool)
        info: dict[str, Json] = {
            "pool": state.pool,
            "adapters": {a.name: [a.first, a.rank] for a in pool.adapters if a.name not in state.dropped},
            "quotas": dict(state.quotas),
            "measure": (rnd - 1) % self.settings.quota_interval == 0,
        }
        without = frozenset(state.holders) if self.settings.pool_at == "server" else frozenset(c.id for c in clients)
        frozen = self._frozen(pool, state.routers)
        return {
            c.id: Instruction(
                {**_travels(state), **state.heads.of(c.id), **({} if c.id in without else frozen)},
                {**info, "sent": c.id not in without},
            )
            for c in clients
        }

    def expects(self, state: SmartFedState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(_travels(state), state.heads.of(me.id))

    def aggregate(self, state: SmartFedState, replies: Mapping[ClientId, Reply], rnd: int) -> SmartFedState:
        lacking = {c for c in replies if replies[c].info.get("lacks_pool") is True}
        state = replace(state, holders=tuple(c for c in state.holders if c not in lacking))
        replies = {c: reply for c, reply in replies.items() if c not in lacking}
        return self._average(state, replies) if replies else state

    def _average(self, state: SmartFedState, replies: Mapping[ClientId, Reply]) -> SmartFedState:
        weight = {c: float(replies[c].num_examples) for c in sorted(replies)}
        keys = _travels(state).keys()
        merged = mean([{key: replies[c].tensors[key] for key in keys} for c in weight], list(weight.values()))
        state = replace(
            state,
            routers={key: merged[key] for key in state.routers},
            fresh={key: merged[key] for key in state.fresh},
            trained={key: merged[key] for key in state.trained},
            heads=mean_heads(state.heads, replies, weight),
            holders=tuple(sorted({*state.holders, *replies})),
        )
        adapters = {a.name for a in self._pool(state.pool).adapters} - {*state.dropped}
        modules = {key.module for key in state.routers}
        sound = {c: replies[c].info for c in weight if is_sound(replies[c].info, modules, adapters)}
        return self._eeqa(state, sound, weight) if sound else state

    def experts(self, state: SmartFedState) -> Mapping[str, Tensors]:
        return {"fresh": {key._replace(expert=0): value for key, value in state.fresh.items()}} if state.fresh else {}

    def describe(self, state: SmartFedState) -> Sequence[Finding]:
        quotas = Quotas(
            {a.name: Adapter(a.first, a.rank) for a in self._pool(state.pool).adapters},
            {key.module: len(value) for key, value in state.routers.items()},
            state.quotas,
            state.importance,
            state.measured_by,
            state.use,
            state.dropped,
            state.pool,
        )
        return [quotas, Notes(state.notes)]

    # client ------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal(start_head(base, self.plan, me) if self.plan.head == "personal" else {})

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        sent = self._sent(ins)
        if ins.info["sent"]:  # keep the pool: later instructions only name it
            frozen = sent.frozen
            about = {**personal.info, "pool": ins.info["pool"]}
            personal = Personal(personal.tensors, about, Kept(name_of(frozen), frozen))
        elif self._lacks_pool(ins, personal):  # what was sent goes back untrained: the server leaves it out
            return ClientResult(Reply(ins.tensors, me.num_train, {"lacks_pool": True}), personal)
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, sent.trainable(bank), self.plan.optim)
        after = replace(bank, tensors={**bank.tensors, **trained.tensors})
        own = {key: v for key, v in trained.tensors.items() if key.part in WHOLE or key.expert == SHARED}
        own |= sent.stacked(after)
        travels = [key for key in own if key.part is not Part.HEAD]
        result = settle(self.plan, replace(trained, tensors=own), me, personal, travels)
        if not ins.info["measure"]:
            return result
        found = yield from measure(
            after, self.settings.importance, self.settings.measure_examples, ins.info["adapters"]
        )
        return replace(result, reply=replace(result.reply, info={**result.reply.info, **found}))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """The pool's experts and the fresh one. Where there is one, s is its scale, and divides the pool's B again."""
        sent, s = self._sent(ins), self.plan.scaling if self.settings.fresh_rank else 1.0
        pool = sent.cut({**self._pool_of(ins, me, personal), **sent.training})
        experts = {key: v / s if key.part is Part.B else v for key, v in pool.items()}
        fresh = {key: value for key, value in ins.tensors.items() if key.expert == SHARED}
        quotas = {module: {"k": k} for module, k in ins.info["quotas"].items()}
        gate = GateSpec("top_k", {"k": self.settings.active, "scale": self.settings.gate_scale}, quotas)
        tensors = with_head({**experts, **fresh, **router_of(ins.tensors)}, ins, personal)
        return Bank(tensors, gate, s, self.plan.dropout)

    # steps of the server -----------------------------------------------------------------------------------------

    def _pool(self, name: str | None = None) -> Pool:
        return pool_in(self.settings.pool, name)

    def _check(self, pool: Pool) -> None:
        s, known = self.settings, [a.name for a in pool.adapters]
        if unknown := sorted({*s.train_experts} - {*known}):
            raise CoterieError(f"[method] train_experts: no {unknown[0]!r} in the pool; it has {', '.join(known)}")
        if s.floor > s.active:
            raise CoterieError(f"[method] floor = {s.floor} is above active = {s.active}; the floors spend the budget")

    def _quotas(self, state: SmartFedState, rule: str) -> dict[str, int]:
        sizes = {key.module: len(value) for key, value in sorted(state.routers.items())}
        importance = [state.importance.get(module, 0.0) for module in sizes]
        quotas = RULES[rule](importance, list(sizes.values()), self.settings.active * len(sizes), self.settings.floor)
        return dict(zip(sizes, quotas, strict=True))

    def _eeqa(
        self, state: SmartFedState, infos: Mapping[ClientId, Mapping[str, Json]], weight: Mapping[ClientId, float]
    ) -> SmartFedState:
        """Importance and use as the clients' means by examples, starved adapters dropped, the quotas anew."""
        weights = [weight[c] for c in infos]
        importance, use = (mean_numbers([i[what] for i in infos.values()], weights) for what in ("importance", "use"))
        if self.settings.per_active:
            importance = {module: value / state.quotas[module] for module, value in importance.items()}
        state = self._drop(replace(state, importance=importance, use=use, measured_by=tuple(sorted(infos))))
        return replace(state, quotas=self._quotas(state, self.settings.quota))

    def _drop(self, state: SmartFedState) -> SmartFedState:
        """Leave out the adapters that the gates hardly use, and their rows of the routers. One always stays."""
        pool, whole, below = self._pool(state.pool), self._whole, self.settings.drop_below
        here = [a for a in pool.adapters if a.name not in state.dropped]
        modules = fit(pool, [key.module for key in state.routers])
        starving = starved(here, modules, state.use, below, whole)
        gone = [name for name in starving if name not in self.settings.train_experts][: len(here) - 1]
        left = [a for a in here if a.name not in gone]
        routers = rows_left(state.routers, modules, here, left, whole)
        return replace(state, routers=routers, dropped=(*state.dropped, *gone)) if gone else state

    def _frozen(self, pool: Pool, routers: Iterable[Key]) -> dict[Key, Tensor]:
        names = fit(pool, [key.module for key in routers])
        return named_for(pool, names, [a for a in pool.adapters if a.name not in self.settings.train_experts])

    # steps of the client -----------------------------------------------------------------------------------------

    @property
    def _whole(self) -> bool:
        return self.settings.granularity == "adapter"

    def _sent(self, ins: Instruction) -> Sent:
        return Sent(ins, self.settings.train_experts, self._whole)

    def _pool_of(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Tensors:
        """The frozen experts: sent just now, or from the client's own folder, or kept from an earlier round."""
        if ins.info["sent"]:
            return self._sent(ins).frozen
        if self.settings.pool_at == "everywhere":
            return self._frozen(self._pool(ins.info["pool"]), router_of(ins.tensors))
        if personal.kept is None or self._lacks_pool(ins, personal):
            raise CoterieError(
                f"client {me.id} was sent the pool {ins.info['pool'][:12]} and has it no more; it is sent again after "
                "the next round that the client takes part in"
            )
        return personal.kept.tensors

    def _lacks_pool(self, ins: Instruction, personal: Personal) -> bool:
        """Whether the pool that the server only names is not here: the client's personal state was lost."""
        here = personal.kept is not None and personal.info.get("pool") == ins.info["pool"]
        return self.settings.pool_at == "server" and not here


def _router(module: str) -> Key:
    return Key(module, NO_EXPERT, Part.ROUTER)


def _travels(state: SmartFedState) -> dict[Key, Tensor]:
    return {**state.routers, **state.fresh, **state.trained}


METHOD = SmartFed
