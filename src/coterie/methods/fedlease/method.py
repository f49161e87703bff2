"""FedLEASE's server and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from coterie.methods.base import Method, Onboarded, newcomers_own
from coterie.methods.fedlease import allocation
from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.heads import averaged_heads, cluster_heads, moved_heads
from coterie.methods.fedlease.released import released
from coterie.methods.fedlease.representation import (
    mean_representations,
    representation_shapes,
    with_representation,
    without_experts,
    without_representation,
)
from coterie.methods.fedlease.routing import gate_of
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.findings import AggregationError, Clusters, Finding, Values
from coterie.methods.parts import (
    Heads,
    Shapes,
    head_of,
    head_shapes,
    label_space,
    lora_of,
    lora_shapes,
    mean_error,
    part_of,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_lora,
    start_router,
    statistics,
    weights_of,
    with_head,
)
from coterie.methods.releases import Release
from coterie.methods.robust import Group, aggregated, alone, grouped
from coterie.ops.mean import mean, relative_error
from coterie.requests import ClientProgram, Observe, Program, Train, Trained
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Json,
    Key,
    Part,
    Personal,
    Reply,
    Target,
    Tensors,
)


@dataclass(frozen=True)
class FedLEASEState:
    """The server's state: the clusters, and an expert and a router for each.

    ``warm`` holds warm-up LoRAs until there are enough of them to cluster, ``starts`` their means by cluster.
    ``outlying`` names the clients whose warm-up LoRA resembled too few others to be clustered (``[robust]``).
    """

    base: BaseSpec
    groups: Mapping[ClientId, str]
    labels: Mapping[ClientId, tuple[str, ...]]
    warm: Mapping[ClientId, Reply] = field(default_factory=dict)
    allocation: Allocation | None = None
    starts: Tensors = field(default_factory=dict)
    experts: Tensors = field(default_factory=dict)
    routers: Mapping[int, Tensors] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    error: float = 0.0
    outlying: tuple[ClientId, ...] = ()


@dataclass(frozen=True)
class FedLEASE(Method[FedLEASEState]):
    """The method; see :mod:`coterie.methods.fedlease`."""

    settings: FedLEASESettings

    name = "fedlease"
    title = "FedLEASE"
    paper = "arXiv 2509.15087 (NeurIPS 2025)"
    summary = "one LoRA expert per cluster of clients, adaptive top-M routing over all experts"
    Settings = FedLEASESettings
    State = FedLEASEState

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedLEASEState:
        allocation.check(self.settings, self.plan, clients)
        return FedLEASEState(base, {c.id: c.group or "" for c in clients}, {c.id: c.labels or () for c in clients})

    def configure(
        self, state: FedLEASEState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        return {c.id: self._instruction(state, c.id, rnd) for c in clients}

    def expects(self, state: FedLEASEState, me: ClientInfo, rnd: int) -> Shapes:
        travels = self.plan.head == "shared" and self.settings.head == "trained"
        head = head_shapes(state.base, me) if travels else {}
        own = self._cluster_of(state, me.id)
        if own is None:
            if rnd < self.settings.clustered_after:
                return {}
            representation = representation_shapes(state.base) if self.settings.represents else {}
            return lora_shapes(state.base, self.plan) | head | representation
        router = state.routers[own] if self.settings.router == "cluster" else {}
        again = representation_shapes(state.base) if self.settings.reclusters(rnd) else {}
        return lora_shapes(state.base, self.plan, own) | shapes_of(router) | head | again

    def releases(self) -> Sequence[Release]:
        return released(self.settings, self.plan.head == "shared")

    def groups(
        self, state: FedLEASEState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        """The clusters. :meth:`aggregate` groups warm-up LoRAs itself; secure sums need the groups of a control now."""
        given = allocation.given(self.settings, self.plan.seed, state.groups) if self.plan.secure.enabled else {}
        known = state.allocation.clusters if state.allocation else given
        cluster = {c: str(known[c]) for c in replies if c in known}
        return grouped(without_representation(replies), cluster, spaces, private=True)

    def aggregate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedLEASEState:
        if rnd < self.settings.clustered_after:
            return state
        replies = dict(sorted(replies.items()))
        if state.allocation is None:
            warm = {**state.warm, **replies}
            fit = self._without_outlying(state, warm)
            if len(fit) < self.settings.needed:
                return replace(state, warm=warm)
            return self._allocate(replace(state, warm={}, outlying=tuple(sorted(warm.keys() - fit.keys()))), fit)
        late = {c: r for c, r in replies.items() if self._cluster_of(state, c) is None}
        present = {c: r for c, r in replies.items() if c not in late}
        return self._recluster(self._add_late(self._average(state, present), late), present)

    def experts(self, state: FedLEASEState) -> Mapping[str, Tensors]:
        if state.allocation is None:
            return {}
        return {f"expert-{e}": lora_of(state.experts, e, new=0) for e in range(state.allocation.num_experts)}

    def describe(self, state: FedLEASEState) -> Sequence[Finding]:
        if state.allocation is None:
            return [Values({"phase": "warm-up"})]
        a = state.allocation
        clusters = Clusters(a.clusters, a.silhouettes, a.order, a.distances.tolist(), self.settings.linkage, a.grounds)
        withheld = allocation.withheld(self.plan.robust, a)
        kept_back = {"withheld_experts": withheld, "outlying_warm_up": list(state.outlying)}
        values = Values({"phase": "experts"} | {name: of for name, of in kept_back.items() if of})
        return [values, clusters, AggregationError(state.error)]

    # client ------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        purpose = (me.id,) if self.settings.start == "own" else ()
        return Personal({**start_lora(base, self.plan, 0, *purpose), **start_head(base, self.plan, me)})

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        representation: Tensors = {}
        if (self.settings.represents and ins.info.get("send")) or ins.info.get("represent"):
            rows = self.settings.distance_rows
            observed = yield Observe(without_experts(bank), "train", ("directions",), examples=rows)
            representation = observed.directions
        trainable = self._trainable(bank, ins.info.get("own", 0))
        trained = yield Train(bank, trainable, self.plan.optim)
        if ins.info["phase"] == "warm-up":
            return self._warmed_up(ins, me, personal, trained, representation)
        lora, router = lora_of(trained.tensors), router_of(trained.tensors)
        travels, stays = (lora, router) if self.settings.router == "personal" else (lora | router, {})
        kept = replace(personal, tensors=head_of(personal.tensors))
        return with_representation(settle(self.plan, trained, me, kept, travels, stays), representation)

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        scaling, dropout = self.plan.scaling, self.plan.dropout
        if ins.info["phase"] == "warm-up":
            return Bank(with_head(lora_of(personal.tensors), ins, personal), scaling=scaling, dropout=dropout)
        own = int(ins.info["own"])
        mine = {} if self.settings.routing == "own" else router_of(personal.tensors) or self._router(ins)
        if self.settings.expert_start == "own":
            mine |= lora_of(personal.tensors, 0, new=own)
        return Bank(with_head({**ins.tensors, **mine}, ins, personal), gate_of(self.settings, own), scaling, dropout)

    def onboard(self, state: FedLEASEState, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """A warm-up as in a round, then the nearest cluster's expert and router beside all other experts."""
        if state.allocation is None:
            raise CoterieError("fedlease has no clusters to join yet: the exported round is one of its warm-up")
        own = self.begin(base, me)
        personal = replace(own, tensors={**start_head(base, self.plan, me), **own.tensors})
        warm = yield from self.client(Instruction({}, {"phase": "warm-up", "send": True}), me, personal)
        known = replace(state, labels={**state.labels, me.id: me.labels or ()})
        joined = self._add_late(known, {me.id: warm.reply})
        bank = self.bank(self._instruction(joined, me.id, self.plan.rounds + 1), me, warm.personal)
        return Onboarded(bank, newcomers_own(bank))

    # steps of the server -----------------------------------------------------------------------------------------

    def _cluster_of(self, state: FedLEASEState, client: ClientId) -> int | None:
        return state.allocation.clusters.get(client) if state.allocation else None

    def _slots(self, experts: int) -> int:
        return 2 * experts - 1 if self.settings.routing == "adaptive" else experts

    def _instruction(self, state: FedLEASEState, client: ClientId, rnd: int) -> Instruction:
        own = self._cluster_of(state, client)
        if own is None:
            return Instruction({}, {"phase": "warm-up", "send": rnd >= self.settings.clustered_after})
        router = state.routers[own] if self.settings.router == "cluster" else {}
        experts = lora_of(state.experts, own) if self.settings.routing == "own" else self._sent_to(state, own)
        info: dict[str, Json] = {"phase": "experts", "own": own}
        info |= {"represent": True} if self.settings.reclusters(rnd) else {}
        return Instruction({**experts, **router, **state.heads.of(client)}, info)

    def _sent_to(self, state: FedLEASEState, own: int) -> Tensors:
        """All experts; those that are withheld from the cluster ``own`` at their start, where B = 0."""
        withheld = allocation.withheld(self.plan.robust, state.allocation)
        starts = {k: v for e in withheld if e != own for k, v in start_lora(state.base, self.plan, e).items()}
        return {**state.experts, **starts}

    def _warm_starts(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> dict[ClientId, Tensors]:
        infos = {c: ClientInfo(c, 0, labels=state.labels.get(c)) for c in replies}
        return {c: self.begin(state.base, infos[c]).tensors for c in replies}

    def _without_outlying(self, state: FedLEASEState, warm: Mapping[ClientId, Reply]) -> Mapping[ClientId, Reply]:
        """The warm-up LoRAs without those that resemble too few others; all of them without ``[robust]``."""
        if not self.plan.robust.active or self.settings.allocation != "learned":
            return warm
        out = alone(self.plan.robust, without_representation(warm), self._warm_starts(state, warm))
        return {c: reply for c, reply in warm.items() if c not in out}

    def _agreed(
        self, state: FedLEASEState, allocated: Allocation, replies: Mapping[ClientId, Reply]
    ) -> Mapping[ClientId, Reply]:
        """The warm-up LoRAs as the rule of ``[robust]`` aggregates them in each cluster."""
        if not self.plan.robust.active:
            return replies
        replies = without_representation(replies)
        spaces = {c: label_space(ClientInfo(c, 0, labels=state.labels.get(c))) for c in replies}
        groups = grouped(replies, {c: str(allocated.clusters[c]) for c in replies}, spaces, private=True)
        return aggregated(self.plan.robust, groups, replies, self._warm_starts(state, replies))[0]

    def _allocate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Cluster the clients that sent a warm-up LoRA, and start an expert, a router and heads for each cluster."""
        warm = {c: r.tensors for c, r in replies.items()}
        allocated = allocation.allocate(self.settings, self.plan.seed, warm, state.groups)
        replies = self._agreed(state, allocated, replies)
        number = allocated.num_experts
        routed = self.settings.routing != "own"
        router = start_router(state.base, self.plan, self._slots(number)) if routed else {}
        state = replace(
            state,
            allocation=allocated,
            experts={k: v for e in range(number) for k, v in start_lora(state.base, self.plan, e).items()},
            routers=dict.fromkeys(range(number), router),
            heads=averaged_heads(
                cluster_heads(state.base, self.plan, state.labels, allocated.clusters), replies, self.settings.weighting
            ),
        )
        sent = {c: Reply(lora_of(r.tensors, 0, new=allocated.clusters[c]), r.num_examples) for c, r in replies.items()}
        averaged = self._average(state, sent)
        started = state if self.settings.expert_start == "own" else averaged
        return replace(started, starts={**averaged.experts, **mean_representations(allocated.clusters, warm)})

    def _average(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Every cluster's expert, router and head as the mean over its members that replied; if none did, they stay."""
        assert state.allocation is not None
        weight = weights_of(replies, self.settings.weighting)
        experts, routers, errors = dict(state.experts), dict(state.routers), []
        for e in range(state.allocation.num_experts):
            members = [c for c in state.allocation.members(e) if c in replies]
            if not members:
                continue
            weights = [weight[c] for c in members]
            uploads = [lora_of(replies[c].tensors) for c in members]
            experts |= mean(uploads, weights)
            errors += mean_error(uploads, weights)
            sent = [router_of(replies[c].tensors) for c in members]
            routers[e] = mean(sent, weights) if all(sent) else routers[e]
        heads = averaged_heads(state.heads, replies, self.settings.weighting)
        return replace(state, experts=experts, routers=routers, heads=heads, error=relative_error(errors))

    def _add_late(self, state: FedLEASEState, late: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Clients that made up their warm-up join the cluster whose mean is nearest to what they sent."""
        if not late or state.allocation is None:
            return state
        sent = [reply.tensors for reply in late.values()]
        joined = allocation.nearest(self.settings, state.starts, state.allocation, sent)
        return self._move(state, dict(zip(late, joined, strict=True)), late)

    def _recluster(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Clients whose texts have come nearer to another cluster's move there; the experts stay as they are."""
        sent = {c: reply.tensors for c, reply in replies.items() if part_of(reply.tensors, Part.EMBEDDING)}
        if not sent or state.allocation is None:
            return state
        moves = allocation.drifted(self.settings, state.starts, state.allocation, sent)
        state = self._move(state, moves, replies)
        assert state.allocation is not None
        now = mean_representations(state.allocation.clusters, sent)
        return replace(state, starts={**state.starts, **now})

    def _move(
        self, state: FedLEASEState, moves: Mapping[ClientId, int], replies: Mapping[ClientId, Reply]
    ) -> FedLEASEState:
        """Clients in other clusters than before."""
        if not moves or state.allocation is None:
            return state
        clusters = {**state.allocation.clusters, **moves}
        regrouped = cluster_heads(state.base, self.plan, state.labels, clusters)
        heads = moved_heads(state.heads, regrouped, {c: replies[c] for c in moves}, self.settings.weighting)
        return replace(state, allocation=replace(state.allocation, clusters=clusters), heads=heads)

    # steps of the client -----------------------------------------------------------------------------------------

    def _router(self, ins: Instruction) -> dict[Key, Tensor]:
        """The router that the server sent, or the start of one that stays at home."""
        of_a = part_of(ins.tensors, Part.A)
        widths = {key.module: value.shape[1] for key, value in of_a.items()}
        experts = len(of_a) // len(widths)
        base = BaseSpec(tuple(Target(module, d_in, 0) for module, d_in in widths.items()))
        return router_of(ins.tensors) or start_router(base, self.plan, self._slots(experts))

    def _trainable(self, bank: Bank, own: int) -> frozenset[Key]:
        parts = (Part.ROUTER, Part.HEAD) if self.settings.head == "trained" else (Part.ROUTER,)
        return frozenset(key for key in bank.tensors if key.expert == own or key.part in parts)

    def _warmed_up(
        self, ins: Instruction, me: ClientInfo, personal: Personal, trained: Trained, representation: Tensors
    ) -> ClientResult:
        kept = replace(personal, tensors={**personal.tensors, **trained.tensors})
        if not ins.info["send"]:
            return ClientResult(Reply({}, me.num_train, statistics(trained)), kept)
        return with_representation(settle(self.plan, trained, me, kept, lora_of(trained.tensors)), representation)
