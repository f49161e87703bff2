"""FedLEASE (arXiv 2509.15087, NeurIPS 2025): one LoRA expert per cluster of clients, and adaptive top-M routing.

1. Warm-up: every client trains one LoRA on its own data; nothing is averaged. All start from the same A.
2. Allocation: d(i, j) = mean over modules of 1 - cos(B_i, B_j); average linkage; the number of clusters M by
   silhouette; expert e starts as the mean of its members' A and of their B.
3. Rounds: a client trains its cluster's expert, the router and the head; the other experts are frozen. The server
   averages expert and router over the cluster; all experts go to everyone, a router to its cluster.
   y = W0 x + s sum_e g_e B_e A_e x, with g from the M largest of 2M-1 slots (:func:`coterie.nn.gates.slot_top_k`).

Differs from the paper: slots are ordered experts first, own last (a permutation of the router's rows).
Differs from the published code (commit cf18cd6), whose ways ``examples/fedlease-published.toml`` restores: experts
start as the cluster means (there, each client from its own warm-up LoRA, the other experts at B = 0:
``expert_start = "own"``); the head is trained (there, frozen at its random start: ``head = "frozen"``); all clients
start from one A by the run's seed (there, by an accident of random state).
Ours: a client that missed the warm-up makes it up in the next round it takes part in and joins the nearest cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from coterie.methods.base import MethodSettings, Plan
from coterie.methods.findings import AggregationError, Clusters, Finding, Values
from coterie.methods.parts import (
    Heads,
    Shapes,
    head_of,
    head_shapes,
    lora_of,
    lora_shapes,
    mean_error,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_heads,
    start_lora,
    start_router,
    statistics,
    with_head,
)
from coterie.ops import cluster
from coterie.ops.mean import mean, relative_error
from coterie.ops.streams import stream_seed
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    ClientResult,
    CoterieError,
    GateSpec,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
    Target,
    Tensors,
    Train,
    Trained,
)


class FedLEASESettings(MethodSettings):
    """FedLEASE's settings; the defaults are the paper's."""

    warmup_rounds: int = Field(5, ge=1, description="rounds of local training before the clients are clustered")
    max_experts: int | None = Field(
        None, ge=2, description="the most clusters that the silhouette may choose; none: 4, or one less than clients"
    )
    min_experts: int = Field(2, ge=1, le=2, description="1: also allow one cluster, when no silhouette is high enough")
    one_cluster_below: float = Field(0.1, description="min_experts = 1: one cluster if every silhouette is below this")
    experts: int = Field(0, ge=0, description="a fixed number of clusters; 0: chosen by silhouette")
    linkage: Literal["average", "complete", "single"] = Field("average", description="linkage of the clustering")
    distance: Literal["B", "A", "BA"] = Field("B", description="the matrices whose cosine distance is clustered")
    allocation: Literal["learned", "oracle", "random"] = Field(
        "learned", description="clusters by distance, by the clients' known groups, or at random (controls)"
    )
    expert_start: Literal["cluster_mean", "own"] = Field(
        "cluster_mean", description="experts start as the cluster's mean, or each client from its own warm-up LoRA"
    )
    routing: Literal["adaptive", "top_k", "dense"] = Field(
        "adaptive", description="adaptive top-M over 2M-1 slots, or plain top-k or softmax over M (controls)"
    )
    top_k: int = Field(2, ge=1, description='experts per token with routing = "top_k"')
    weighting: Literal["uniform", "examples"] = Field("uniform", description="weights of the means inside a cluster")
    router: Literal["cluster", "personal"] = Field("cluster", description="average routers in a cluster, or keep them")
    head: Literal["trained", "frozen"] = Field("trained", description="train the head, or leave it at its start")


@dataclass(frozen=True)
class Allocation:
    """Who is in which cluster, and what that was decided on. ``distances`` [n, n] follows ``order``."""

    clusters: Mapping[ClientId, int]
    silhouettes: Mapping[int, float]
    order: tuple[ClientId, ...]
    distances: Tensor

    @property
    def num_experts(self) -> int:
        return max(self.clusters.values()) + 1

    def members(self, expert: int) -> list[ClientId]:
        return sorted(c for c, e in self.clusters.items() if e == expert)


@dataclass(frozen=True)
class FedLEASEState:
    """The server's state: the clusters, the experts and a router for each.

    ``warm`` holds warm-up LoRAs until there are enough of them to cluster, ``starts`` the clusters' means of them.
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


@dataclass(frozen=True)
class FedLEASE:
    """The method; see the module's text."""

    settings: FedLEASESettings
    plan: Plan

    name = "fedlease"
    title = "FedLEASE"
    paper = "arXiv 2509.15087 (NeurIPS 2025)"
    summary = "one LoRA expert per cluster of clients, adaptive top-M routing over all experts"
    evaluates = "received"
    newcomers = ""
    Settings = FedLEASESettings
    State = FedLEASEState

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedLEASEState:
        self._check(clients)
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
            sends = rnd >= self.settings.warmup_rounds
            return lora_shapes(state.base, self.plan) | head if sends else {}
        router = state.routers[own] if self.settings.router == "cluster" else {}
        return lora_shapes(state.base, self.plan, own) | shapes_of(router) | head

    def aggregate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedLEASEState:
        if rnd < self.settings.warmup_rounds:
            return state
        replies = dict(sorted(replies.items()))
        if state.allocation is None:
            warm = {**state.warm, **replies}
            enough = len(warm) >= self._needed()
            return self._allocate(replace(state, warm={}), warm) if enough else replace(state, warm=warm)
        late = {c: r for c, r in replies.items() if self._cluster_of(state, c) is None}
        return self._place(self._average(state, {c: r for c, r in replies.items() if c not in late}), late)

    def experts(self, state: FedLEASEState) -> Mapping[str, Tensors]:
        if state.allocation is None:
            return {}
        return {f"expert-{e}": lora_of(state.experts, e, new=0) for e in range(state.allocation.num_experts)}

    def describe(self, state: FedLEASEState) -> Sequence[Finding]:
        if state.allocation is None:
            return [Values({"phase": "warm-up"})]
        found = state.allocation
        clusters = Clusters(found.clusters, found.silhouettes, found.order, found.distances.tolist())
        return [Values({"phase": "experts"}), clusters, AggregationError(state.error)]

    # client ------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal({**start_lora(base, self.plan), **start_head(base, self.plan, me)})

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trainable = self._trainable(bank, ins.info.get("own", 0))
        trained = yield Train(bank, trainable, self.plan.optim)
        if ins.info["phase"] == "warm-up":
            return self._warmed_up(ins, me, personal, trained)
        lora, router = lora_of(trained.tensors), router_of(trained.tensors)
        travels, stays = (lora, router) if self.settings.router == "personal" else (lora | router, {})
        return settle(self.plan, trained, me, replace(personal, tensors=head_of(personal.tensors) | stays), travels)

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        scaling, dropout = self.plan.scaling, self.plan.dropout
        if ins.info["phase"] == "warm-up":
            return Bank(with_head(lora_of(personal.tensors), ins, personal), scaling=scaling, dropout=dropout)
        own = int(ins.info["own"])
        mine = router_of(personal.tensors) or self._router(ins)
        if self.settings.expert_start == "own":
            mine |= lora_of(personal.tensors, 0, new=own)
        return Bank(with_head({**ins.tensors, **mine}, ins, personal), self._gate(own), scaling, dropout)

    # steps of the server -----------------------------------------------------------------------------------------

    def _check(self, clients: Sequence[ClientInfo]) -> None:
        s, n = self.settings, len(clients)
        asked = s.experts or s.max_experts or 0
        if asked > n:
            raise CoterieError(
                f"[method] asks for {asked} clusters of {n} clients; set experts or max_experts to at most {n}"
            )
        if n < self._needed():
            fix = "1 or 2" if n > 1 else "1"
            raise CoterieError(f"a silhouette needs at least 3 clients, here are {n}; set [method] experts to {fix}")
        if s.allocation == "oracle" and any(c.group is None for c in clients):
            raise CoterieError('allocation = "oracle" needs a group for every client; set it in [data]')
        if s.warmup_rounds >= self.plan.rounds:
            raise CoterieError(
                f"[method] warmup_rounds = {s.warmup_rounds} leaves no round for the experts; "
                f"set rounds above it (now {self.plan.rounds})"
            )

    def _cluster_of(self, state: FedLEASEState, client: ClientId) -> int | None:
        return state.allocation.clusters.get(client) if state.allocation else None

    def _needed(self) -> int:
        """How many warm-up LoRAs the allocation takes; with fewer the warm-up goes on."""
        learned = self.settings.allocation == "learned"
        return (self.settings.experts or 3) if learned else 1

    def _slots(self, experts: int) -> int:
        return 2 * experts - 1 if self.settings.routing == "adaptive" else experts

    def _instruction(self, state: FedLEASEState, client: ClientId, rnd: int) -> Instruction:
        own = self._cluster_of(state, client)
        if own is None:
            return Instruction({}, {"phase": "warm-up", "send": rnd >= self.settings.warmup_rounds})
        router = state.routers[own] if self.settings.router == "cluster" else {}
        return Instruction({**state.experts, **router, **state.heads.of(client)}, {"phase": "experts", "own": own})

    def _allocate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """The clusters of the clients that sent a warm-up LoRA, and experts, routers and heads started on them."""
        allocation = self._clusters(state, {c: lora_of(r.tensors) for c, r in replies.items()})
        number = allocation.num_experts
        router = start_router(state.base, self.plan, self._slots(number))
        state = replace(
            state,
            allocation=allocation,
            experts={k: v for e in range(number) for k, v in start_lora(state.base, self.plan, e).items()},
            routers=dict.fromkeys(range(number), router),
            heads=self._mean_heads(self._cluster_heads(state, allocation), replies),
        )
        sent = {c: Reply(lora_of(r.tensors, 0, new=allocation.clusters[c]), r.num_examples) for c, r in replies.items()}
        averaged = self._average(state, sent)
        started = state if self.settings.expert_start == "own" else averaged
        return replace(started, starts=averaged.experts)

    def _clusters(self, state: FedLEASEState, warm: Mapping[ClientId, Tensors]) -> Allocation:
        s, order = self.settings, tuple(sorted(warm))
        d = self._distances(state.base, [warm[c] for c in order])
        if s.allocation == "learned":
            most, least = (s.experts, s.experts) if s.experts else (s.max_experts or 4, s.min_experts)
            found = cluster.cluster(d, most, min_clusters=least, threshold=s.one_cluster_below, linkage=s.linkage)
            clusters = dict(zip(order, map(int, found.labels), strict=True))
            return Allocation(clusters, found.silhouettes, order, torch.from_numpy(d))
        everyone = sorted(state.groups)  # the controls need no LoRA: clients that missed the warm-up are placed too
        names = [state.groups[c] for c in everyone]
        if s.allocation == "random":
            number = min(s.experts or s.max_experts or 4, len(everyone))
            shuffle = np.random.default_rng(stream_seed(self.plan.seed, "allocation")).permutation(len(everyone))
            names = [str(position % number) for position in shuffle]
        numbers = {name: e for e, name in enumerate(dict.fromkeys(names))}
        placed = {c: numbers[n] for c, n in zip(everyone, names, strict=True)}
        return Allocation(placed, {}, order, torch.from_numpy(d))

    def _distances(self, base: BaseSpec, loras: Sequence[Tensors]) -> NDArray[np.float64]:
        """d [n, n] between LoRAs, each with expert number 0."""
        a, b = ([[lora[Key(t.name, 0, part)] for t in base.targets] for lora in loras] for part in (Part.A, Part.B))
        return cluster.lora_distances(a, b, feature=self.settings.distance)

    def _average(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Expert, router and head of every cluster as the mean over its members that replied; others stay."""
        assert state.allocation is not None
        weight = self._weight(replies)
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
        heads = self._mean_heads(state.heads, replies)
        return replace(state, experts=experts, routers=routers, heads=heads, error=relative_error(errors))

    def _place(self, state: FedLEASEState, late: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Clients that made up their warm-up join the cluster whose mean warm-up LoRA is nearest."""
        if not late or state.allocation is None:
            return state
        number = state.allocation.num_experts
        starts = [lora_of(state.starts, e, new=0) for e in range(number)]
        away = self._distances(state.base, [*starts, *(lora_of(r.tensors) for r in late.values())])[number:, :number]
        nearest = dict(zip(late, map(int, away.argmin(axis=1)), strict=True))
        allocation = replace(state.allocation, clusters={**state.allocation.clusters, **nearest})
        heads, old = self._cluster_heads(state, allocation), state.heads.values
        new = Heads({name: value for name, value in heads.values.items() if name not in old}, heads.group)
        values = {**old, **self._mean_heads(new, late).values}
        return replace(state, allocation=allocation, heads=Heads(values, heads.group))

    def _cluster_heads(self, state: FedLEASEState, allocation: Allocation) -> Heads:
        """Shared heads by cluster and label space, at their start; none where the plan keeps heads personal."""
        if self.plan.head == "personal":
            return Heads()  # a site that joined after the start has no entry in state.labels
        infos = [ClientInfo(c, 0, labels=state.labels[c]) for c in allocation.clusters]
        by_space = start_heads(state.base, self.plan, infos)
        group = {c: f"{allocation.clusters[c]}:{space}" for c, space in by_space.group.items()}
        return Heads({group[c]: by_space.of(c) for c in group}, group)

    def _mean_heads(self, heads: Heads, replies: Mapping[ClientId, Reply]) -> Heads:
        sent = {c: r for c, r in replies.items() if head_of(r.tensors)}
        return mean_heads(heads, sent, self._weight(sent))

    def _weight(self, replies: Mapping[ClientId, Reply]) -> dict[ClientId, float]:
        by_examples = self.settings.weighting == "examples"
        return {c: float(r.num_examples) if by_examples else 1.0 for c, r in replies.items()}

    # steps of the client -----------------------------------------------------------------------------------------

    def _router(self, ins: Instruction) -> dict[Key, Tensor]:
        """The router that the server sent, or the start of one that stays personal."""
        widths = {key.module: value.shape[1] for key, value in ins.tensors.items() if key.part is Part.A}
        experts = sum(key.part is Part.A for key in ins.tensors) // len(widths)
        base = BaseSpec(tuple(Target(module, d_in, 0) for module, d_in in widths.items()))
        return router_of(ins.tensors) or start_router(base, self.plan, self._slots(experts))

    def _gate(self, own: int) -> GateSpec:
        match self.settings.routing:
            case "adaptive":
                return GateSpec("slot_top_k", {"own": own})
            case "top_k":
                return GateSpec("top_k", {"k": self.settings.top_k})
            case "dense":
                return GateSpec("softmax")

    def _trainable(self, bank: Bank, own: int) -> frozenset[Key]:
        parts = {Part.ROUTER, Part.HEAD} if self.settings.head == "trained" else {Part.ROUTER}
        return frozenset(key for key in bank.tensors if key.expert == own or key.part in parts)

    def _warmed_up(self, ins: Instruction, me: ClientInfo, personal: Personal, trained: Trained) -> ClientResult:
        kept = replace(personal, tensors={**personal.tensors, **trained.tensors})
        if not ins.info["send"]:
            return ClientResult(Reply({}, me.num_train, statistics(trained)), kept)
        return settle(self.plan, trained, me, kept, lora_of(trained.tensors))


METHOD = FedLEASE
