"""SmartFed's server and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from coterie.adapters.pool import Pool, match_modules, name_of
from coterie.methods.base import Method, Onboarded
from coterie.methods.findings import Adapter, AggregationError, Finding, Notes, Quotas
from coterie.methods.parts import (
    Heads,
    Shapes,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    weights_of,
    with_head,
)
from coterie.methods.privacy import sent_by_clients
from coterie.methods.releases import Release
from coterie.methods.robust import Group, grouped
from coterie.methods.smartfed.averaging import error_of, routers_apart
from coterie.methods.smartfed.budgets import (
    BUDGET,
    active_fault,
    budget_of,
    budgets_of,
    check_budgets,
    present,
    quotas_of,
    reported,
)
from coterie.methods.smartfed.pools import (
    WHOLE,
    Sent,
    check_base,
    check_ranks,
    check_settings,
    frozen_of,
    holders_after,
    left_out,
    named_for,
    names_in,
    pool_in,
    sizes_of,
    taking_part,
)
from coterie.methods.smartfed.quotas import mean_numbers, measure, rows_left, starved
from coterie.methods.smartfed.released import released
from coterie.methods.smartfed.routers import comparable, gate_of, start_routers
from coterie.methods.smartfed.settings import DECAYED, SmartFedSettings
from coterie.ops.mean import mean
from coterie.ops.robust import capped
from coterie.requests import ClientProgram, Program, Train
from coterie.types import (
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Json,
    Kept,
    Key,
    Part,
    Personal,
    Range,
    Reply,
    Tensors,
)

MOST = 10.0  # times the clients' median: what one client's importance counts for at most, over all matrices


@dataclass(frozen=True)
class SmartFedState:
    """The server's state. Of the pool it has only the name; the tensors are read from the pool's folder.

    ``quotas`` and ``importance`` are by matrix, ``use`` by adapter: its share of the gates' weight. ``trained`` holds
    the adapters that train, each as in the pool; ``fresh`` is the expert beside the pool. ``holders`` have the pool.
    ``budgets`` are those of clients whose budget of active experts is not the run's. ``error`` is that of averaging A
    and B of ``fresh`` and ``trained`` separately.
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
    budgets: Mapping[ClientId, int] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class SmartFed(Method[SmartFedState]):
    """The method; see :mod:`coterie.methods.smartfed`."""

    settings: SmartFedSettings

    name = "smartfed"
    title = "SmartFed"
    paper = "arXiv 2512.00902 (ICML 2026)"
    summary = "existing LoRAs cut into rank-1 experts; only a router over them trains"
    Settings = SmartFedSettings
    State = SmartFedState
    instructs_alike = False
    usage = ("importance", "use")
    beyond_training = "measure the importance of adapters on their rows"

    @property
    def max_rank(self) -> int:
        return max(self.plan.max_rank, self.settings.fresh_rank)

    def active_fault(self) -> str:
        return active_fault(self.settings)

    def fastest(self, rnd: int) -> Mapping[Part, float]:
        return self.settings.fastest(rnd, self.plan.optim.learning_rate)

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> SmartFedState:
        pool = self._pool()
        check_settings(self.settings, pool)
        check_budgets(self.settings, clients)
        names, out = names_in(pool, base), left_out(self.settings, pool, self.plan.robust.active)
        check_ranks(self.settings, pool, out)
        fresh = start_lora(base, replace(self.plan, rank=self.settings.fresh_rank or 1), SHARED)
        state = SmartFedState(
            pool=pool.name,
            routers=start_routers(self.settings, self.plan.seed, sizes_of(self.settings, pool, names, out, base)),
            heads=start_heads(base, self.plan, clients),
            fresh=fresh if self.settings.fresh_rank else {},
            trained=named_for(pool, names, [a for a in pool.adapters if a.name in self.settings.train_experts]),
            dropped=tuple(out),
            notes=(*check_base(pool, names, base), *out.values()),
            budgets=budgets_of(self.settings, clients),
        )
        return replace(state, quotas=quotas_of(self.settings, state.routers, {}))

    def admit(self, state: SmartFedState, clients: Sequence[ClientInfo]) -> SmartFedState:
        """As any method; and the budgets of clients that have left are forgotten."""
        state, budgets = super().admit(state, clients), present(state.budgets, clients)
        return state if budgets == state.budgets else replace(state, budgets=budgets)

    def configure(
        self, state: SmartFedState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        pool = self._pool(state.pool)
        info: dict[str, Json] = {
            "pool": state.pool,
            "adapters": {a.name: [a.first, a.rank] for a in pool.adapters if a.name not in state.dropped},
            "measure": (rnd - 1) % self.settings.quota_interval == 0,
            **self.settings.decayed(rnd),
        }
        without = frozenset(state.holders) if self.settings.pool_at == "server" else frozenset(c.id for c in clients)
        frozen = frozen_of(self.settings, pool, state.routers, state.dropped)
        return {
            c.id: Instruction(
                {**_travels(state), **state.heads.of(c.id), **({} if c.id in without else frozen)},
                {**info, **self._budgeted(state, c), "sent": c.id not in without},
            )
            for c in clients
        }

    def expects(self, state: SmartFedState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(_travels(state), state.heads.of(me.id))

    def expects_info(self, state: SmartFedState, me: ClientInfo, rnd: int) -> Mapping[str, Range]:
        """Importance by matrix and use by adapter; optional, because a site may keep them to itself. And its budget."""
        adapters = {a.name for a in self._pool(state.pool).adapters} - {*state.dropped}
        budget = budget_of(self.settings, me)
        return ({} if budget is None else {BUDGET: Range(budget, budget, whole=True)}) | {
            "importance": Range(names=frozenset(key.module for key in state.routers), optional=True),
            "use": Range(names=frozenset(adapters), optional=True),
        }

    def releases(self) -> Sequence[Release]:
        return released(self.settings, self.plan.head == "shared")

    def groups(
        self, state: SmartFedState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        made = grouped(replies, dict.fromkeys(taking_part(self.plan, replies), ""), spaces)
        return routers_apart(made) if self.plan.robust.active and self.settings.router != "paper" else made

    def aggregate(self, state: SmartFedState, replies: Mapping[ClientId, Reply], rnd: int) -> SmartFedState:
        state = replace(state, holders=holders_after(state.holders, replies))
        replies = taking_part(self.plan, replies)
        return self._average(state, replies) if replies else state

    def _average(self, state: SmartFedState, replies: Mapping[ClientId, Reply]) -> SmartFedState:
        weight, keys = weights_of(replies), _travels(state).keys()
        uploads, weights = [{key: replies[c].tensors[key] for key in keys} for c in weight], list(weight.values())
        merged = mean(uploads, weights)
        state = replace(
            state,
            routers={key: merged[key] for key in state.routers},
            fresh={key: merged[key] for key in state.fresh},
            trained={key: merged[key] for key in state.trained},
            heads=mean_heads(state.heads, replies, weight),
            budgets=reported(state.budgets, sent_by_clients(replies)),
            error=error_of(uploads, weights, self.plan.scaling),
        )
        measured = {c: replies[c].info for c in weight if {"importance", "use"} <= replies[c].info.keys()}
        return self._eeqa(state, measured, weight) if measured else state

    def experts(self, state: SmartFedState) -> Mapping[str, Tensors]:
        return {"fresh": {key._replace(expert=0): value for key, value in state.fresh.items()}} if state.fresh else {}

    def describe(self, state: SmartFedState) -> Sequence[Finding]:
        adapters = {a.name: Adapter(a.first, a.rank) for a in self._pool(state.pool).adapters}
        sizes = {key.module: len(value) for key, value in state.routers.items()}
        measured = (state.importance, state.measured_by, state.use)
        quotas = Quotas(adapters, sizes, state.quotas, *measured, state.dropped, state.pool, state.budgets)
        error = [AggregationError(state.error)] if state.fresh or state.trained else []
        return [quotas, *error, Notes(state.notes)]

    # client ------------------------------------------------------------------------------------------------------

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        sent, budget = self._sent(ins), {BUDGET: ins.info[BUDGET]} if BUDGET in ins.info else {}
        if ins.info["sent"]:  # store the pool: later instructions only name it
            frozen = sent.frozen
            about = {**personal.info, "pool": ins.info["pool"]}
            personal = Personal(personal.tensors, about, Kept(name_of(frozen), frozen))
        elif self._lacks_pool(ins, personal):  # it returns the tensors untrained, and the server ignores them
            return ClientResult(Reply(ins.tensors, me.num_train, {**budget, "lacks_pool": True}), personal)
        bank = self.bank(ins, me, personal)
        trainable = sent.trainable(bank)
        rates = self.settings.rates(trainable, ins.info.get(DECAYED, 1.0), self.plan.optim.learning_rate)
        trained = yield Train(bank, trainable, self.plan.optim, rates=rates)
        after = replace(bank, tensors={**bank.tensors, **trained.tensors})
        own = {key: v for key, v in trained.tensors.items() if key.part in WHOLE or key.expert == SHARED}
        own |= sent.stacked(after)
        travels = [key for key in own if key.part is not Part.HEAD]
        result = settle(self.plan, replace(trained, tensors=own), me, personal, travels)
        info: dict[str, Json] = {**result.reply.info, **budget}
        if ins.info["measure"]:
            info |= yield from measure(
                after, self.settings.importance, self.settings.measure_examples, ins.info["adapters"]
            )
        return replace(result, reply=replace(result.reply, info=info))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """The pool's experts and the fresh one. If there is one, s is its scale, and the pool's B is divided by s."""
        sent, s = self._sent(ins), self.plan.scaling if self.settings.fresh_rank else 1.0
        pool = sent.cut({**self._pool_of(ins, me, personal), **sent.training})
        if self.settings.router in ("mixing", "response"):
            pool = comparable(pool, sent.cut(sent.training))
        experts = {key: v / s if key.part is Part.B else v for key, v in pool.items()}
        fresh = {key: value for key, value in ins.tensors.items() if key.expert == SHARED}
        tensors = with_head({**experts, **fresh, **router_of(ins.tensors)}, ins, personal)
        return Bank(tensors, gate_of(self.settings, ins.info["quotas"]), s, self.plan.dropout)

    def onboard(self, welcome: Instruction, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """As any method, with the learning rates of a first round."""
        found = yield from super().onboard(welcome, base, me)
        return replace(found, rates=self.settings.rates(found.trainable, 1.0, self.plan.optim.learning_rate))

    # steps of the server -----------------------------------------------------------------------------------------

    def _pool(self, name: str | None = None) -> Pool:
        return pool_in(self.settings.pool, name)

    def _budgeted(self, state: SmartFedState, client: ClientInfo) -> dict[str, Json]:
        """The quotas of one client: the run's, or by the same rule and importance those of its own budget."""
        budget = budget_of(self.settings, client)
        return {"quotas": self._quotas(state, budget)} | ({} if budget is None else {BUDGET: budget})

    def _quotas(self, state: SmartFedState, budget: int | None) -> dict[str, int]:
        return {**state.quotas} if budget is None else quotas_of(self.settings, state.routers, state.importance, budget)

    def _eeqa(
        self, state: SmartFedState, infos: Mapping[ClientId, Mapping[str, Json]], weight: Mapping[ClientId, float]
    ) -> SmartFedState:
        """Importance and use as the clients' means by examples; starved adapters are dropped, quotas computed again.

        Of three clients or more, none has more importance in all than :data:`MOST` times the clients' median, with
        ``[robust]`` no more than the median, and none more use.
        """
        weights, most = [weight[c] for c in infos], 1.0 if self.plan.robust.active else MOST
        importance = mean_numbers(
            capped([self._as_all(state, c, i["importance"]) for c, i in infos.items()], most), weights
        )
        use = mean_numbers(capped([i["use"] for i in infos.values()], 1.01), weights)  # shares: they sum to 1
        if self.settings.per_active:
            importance = {module: value / state.quotas[module] for module, value in importance.items()}
        state = self._drop(replace(state, importance=importance, use=use, measured_by=tuple(sorted(infos))))
        return replace(state, quotas=quotas_of(self.settings, state.routers, state.importance))

    def _as_all(self, state: SmartFedState, client: ClientId, measured: Mapping[str, float]) -> Mapping[str, float]:
        """A client's importance as with the run's quotas: the sum over a matrix grows with its active experts."""
        if client not in state.budgets or not self.settings.per_active:
            return measured
        own = self._quotas(state, state.budgets[client])
        return {module: value * state.quotas[module] / own[module] for module, value in measured.items()}

    def _drop(self, state: SmartFedState) -> SmartFedState:
        """Drop the adapters that the gates hardly use, with their rows of the routers. At least one stays."""
        pool, whole, below = self._pool(state.pool), self.settings.whole, self.settings.drop_below
        active = [a for a in pool.adapters if a.name not in state.dropped]
        modules = match_modules(pool, [key.module for key in state.routers])
        starving = starved(active, modules, state.use, below, whole)
        dropped = [name for name in starving if name not in self.settings.train_experts][: len(active) - 1]
        left = [a for a in active if a.name not in dropped]
        routers = rows_left(state.routers, modules, active, left, whole, self.settings.router == "mixing")
        return replace(state, routers=routers, dropped=(*state.dropped, *dropped)) if dropped else state

    # steps of the client -----------------------------------------------------------------------------------------

    def _sent(self, ins: Instruction) -> Sent:
        return Sent(ins, self.settings.train_experts, self.settings.whole)

    def _pool_of(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Tensors:
        """The frozen experts: sent in this round, read from the client's own folder, or stored in an earlier round."""
        if ins.info["sent"]:
            return self._sent(ins).frozen
        if self.settings.pool_at == "everywhere":
            return frozen_of(self.settings, self._pool(ins.info["pool"]), router_of(ins.tensors))
        if personal.kept is None or self._lacks_pool(ins, personal):
            raise CoterieError(
                f"client {me.id} has lost the pool {ins.info['pool'][:12]}; the server sends it again after the next "
                "round in which the client takes part"
            )
        return personal.kept.tensors

    def _lacks_pool(self, ins: Instruction, personal: Personal) -> bool:
        """Whether the client lost its personal state, and with it the pool that the server only names."""
        stored = personal.kept is not None and personal.info.get("pool") == ins.info["pool"]
        return self.settings.pool_at == "server" and not stored


def _travels(state: SmartFedState) -> dict[Key, Tensor]:
    return {**state.routers, **state.fresh, **state.trained}
