"""FedLEASE's server and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from coterie.methods.base import Method, Onboarded, newcomers_own
from coterie.methods.fedlease import allocation
from coterie.methods.fedlease.download import (
    USE,
    kept_copies,
    measured,
    num_experts,
    own_lora,
    stand_ins,
    use_range,
    with_own_lora,
)
from coterie.methods.fedlease.released import released
from coterie.methods.fedlease.representation import (
    representation_shapes,
    with_representation,
    without_experts,
)
from coterie.methods.fedlease.routing import gate_of, slots_of
from coterie.methods.fedlease.server import Server, warm_start
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState, without_names
from coterie.methods.findings import AggregationError, Clusters, Finding, Values
from coterie.methods.parts import (
    Shapes,
    head_shapes,
    lora_of,
    lora_shapes,
    part_of,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_router,
    statistics,
    with_head,
)
from coterie.methods.releases import Release
from coterie.methods.robust import Group
from coterie.requests import ClientProgram, Observe, Program, Train, Trained
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Key,
    Part,
    Personal,
    Range,
    Reply,
    Target,
    Tensors,
)


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
    Welcome = FedLEASEState
    instructs_alike = False
    usage = (USE,)

    @property
    def _server(self) -> Server:
        return Server(self.settings, self.plan)

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedLEASEState:
        allocation.check(self.settings, self.plan, clients)
        return FedLEASEState(base, {c.id: c.group or "" for c in clients}, {c.id: c.labels or () for c in clients})

    def admit(self, state: FedLEASEState, clients: Sequence[ClientInfo]) -> FedLEASEState:
        """With the groups of late clients, which place them in a control, and their labels, where heads are shared.

        A client without a group is nobody's in a control by groups; it joins the nearest cluster.
        """
        named = [c for c in clients if c.group is not None or self.settings.allocation != "oracle"]
        groups = {c.id: c.group or "" for c in named if c.id not in state.groups}
        labels = {c.id: c.labels or () for c in clients if c.id not in state.labels and self.plan.head == "shared"}
        if not groups and not labels:
            return state
        return replace(state, groups={**state.groups, **groups}, labels={**state.labels, **labels})

    def configure(
        self, state: FedLEASEState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        return {c.id: self._server.instruction(state, c.id, rnd) for c in clients}

    def expects(self, state: FedLEASEState, me: ClientInfo, rnd: int) -> Shapes:
        travels = self.plan.head == "shared" and self.settings.head == "trained"
        head = head_shapes(state.base, me) if travels else {}
        own, cluster = state.expert_of(me.id), state.cluster_of(me.id)
        if own is None or cluster is None:
            if rnd < self.settings.clustered_after:
                return {}
            representation = representation_shapes(state.base) if self.settings.represents else {}
            return lora_shapes(state.base, self.plan) | head | representation
        router = state.routers[cluster] if self.settings.router == "cluster" else {}
        again = representation_shapes(state.base) if self.settings.reclusters(rnd) else {}
        return lora_shapes(state.base, self.plan, own) | shapes_of(router) | head | again

    def expects_info(self, state: FedLEASEState, me: ClientInfo, rnd: int) -> Mapping[str, Range]:
        """How much the client uses each expert, with ``download = "used"``."""
        reports = self.settings.download == "used" and state.cluster_of(me.id) is not None
        return use_range(state.num_experts) if reports else {}

    def releases(self) -> Sequence[Release]:
        return released(self.settings, self.plan.head == "shared")

    def groups(
        self, state: FedLEASEState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        return self._server.groups(state, replies, spaces)

    def aggregate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedLEASEState:
        return self._server.aggregate(state, replies, rnd)

    def experts(self, state: FedLEASEState) -> Mapping[str, Tensors]:
        if state.allocation is None:
            return {}
        return {f"expert-{e}": lora_of(state.experts, e, new=0) for e in range(state.allocation.num_experts)}

    def describe(self, state: FedLEASEState) -> Sequence[Finding]:
        if state.allocation is None:
            return [Values({"phase": "warm-up"})]
        a = state.allocation
        clusters = Clusters(a.clusters, a.silhouettes, a.order, a.distances.tolist(), self.settings.linkage, a.grounds)
        kept_back = {"withheld_experts": self._server.withheld(state), "outlying_warm_up": list(state.outlying)}
        several = {"own_experts": dict(a.own)} if a.own else {}
        values = Values({"phase": "experts"} | several | {name: of for name, of in kept_back.items() if of})
        return [values, clusters, AggregationError(state.error)]

    # client ------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal(warm_start(self.settings, self.plan, base, me))

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
        # Its reply may not count, so it keeps its LoRA until it is sent an expert that is trained.
        kept = with_own_lora(personal, lora if self._starts_own(ins) else {}, int(ins.info["own"]))
        use: dict[str, dict[str, float]] = {}
        if "experts" in ins.info:
            use = yield from measured(ins, personal, replace(bank, tensors={**bank.tensors, **trained.tensors}))
            kept = kept_copies(ins, kept, bank)
        result = with_representation(settle(self.plan, trained, me, kept, travels, stays), representation)
        return replace(result, reply=replace(result.reply, info={**result.reply.info, **use}))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        scaling, dropout = self.plan.scaling, self.plan.dropout
        if ins.info["phase"] == "warm-up":
            return Bank(with_head(lora_of(personal.tensors), ins, personal), scaling=scaling, dropout=dropout)
        own = int(ins.info["own"])
        mine = {} if self.settings.routing == "own" else router_of(personal.tensors) or self._router(ins)
        mine |= own_lora(personal, own) if self._starts_own(ins) else {}
        experts = {**ins.tensors, **stand_ins(ins, personal, self.plan)}
        return Bank(with_head({**experts, **mine}, ins, personal), gate_of(self.settings, own), scaling, dropout)

    def welcome(self, state: FedLEASEState, me: ClientInfo) -> FedLEASEState:
        """The experts, the routers, the means of the clusters' warm-ups, and how many clients each expert has."""
        if state.allocation is None:
            raise CoterieError("fedlease has no clusters to join yet: the exported round is one of its warm-up")
        return without_names(state)

    def onboard(self, welcome: FedLEASEState, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """A warm-up as in a round, then the nearest cluster's expert and router beside all other experts."""
        own = self.begin(base, me)
        personal = replace(own, tensors={**start_head(base, self.plan, me), **own.tensors})
        warm = yield from self.client(Instruction({}, {"phase": "warm-up", "send": True}), me, personal)
        known = replace(welcome, labels={**welcome.labels, me.id: me.labels or ()})
        joined = self._server.add_late(known, {me.id: warm.reply})
        bank = self.bank(self._server.instruction(joined, me.id, self.plan.rounds + 1), me, warm.personal)
        return Onboarded(bank, newcomers_own(bank))

    # steps of the client -----------------------------------------------------------------------------------------

    def _router(self, ins: Instruction) -> dict[Key, Tensor]:
        """The router that the server sent, or the start of one that stays at home."""
        of_a = part_of(ins.tensors, Part.A)
        widths = {key.module: value.shape[1] for key, value in of_a.items()}
        base = BaseSpec(tuple(Target(module, d_in, 0) for module, d_in in widths.items()))
        return router_of(ins.tensors) or start_router(base, self.plan, slots_of(self.settings, num_experts(ins)))

    def _starts_own(self, ins: Instruction) -> bool:
        """Whether the client uses a LoRA of its own, because nobody's training of its expert has counted yet."""
        return self.settings.expert_start == "own" and _untrained(ins.tensors, int(ins.info["own"]))

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


def _untrained(experts: Tensors, number: int) -> bool:
    """Whether nobody has trained an expert yet: B = 0."""
    return not any(bool(b.any()) for key, b in part_of(experts, Part.B).items() if key.expert == number)
