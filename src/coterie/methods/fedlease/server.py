"""What FedLEASE's server does: from replies to clusters, to each cluster's expert, router and head, to instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from coterie.methods.fedlease import allocation
from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.dealing import dealt
from coterie.methods.fedlease.download import reported, wanted
from coterie.methods.fedlease.grounds import of_some
from coterie.methods.fedlease.heads import averaged_heads, cluster_heads, moved_heads
from coterie.methods.fedlease.late import placed
from coterie.methods.fedlease.representation import mean_representations, without_representation
from coterie.methods.fedlease.routing import slots_of
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.findings import Clusters
from coterie.methods.parts import (
    label_space,
    lora_of,
    mean_error,
    part_of,
    router_of,
    start_head,
    start_lora,
    start_router,
    weights_of,
)
from coterie.methods.plan import Plan
from coterie.methods.robust import Group, aggregated, alone, grouped
from coterie.ops.mean import mean, relative_error
from coterie.types import BaseSpec, ClientId, ClientInfo, Instruction, Json, Key, Part, Reply, Tensors


def warm_start(settings: FedLEASESettings, plan: Plan, base: BaseSpec, me: ClientInfo) -> dict[Key, Tensor]:
    """The LoRA, as expert 0, and the head that a client starts its warm-up from."""
    purpose = (me.id,) if settings.start == "own" else ()
    return {**start_lora(base, plan, 0, *purpose), **start_head(base, plan, me)}


@dataclass(frozen=True)
class Server:
    """The steps of the server, by these settings. Every step takes a state and returns the next."""

    settings: FedLEASESettings
    plan: Plan

    def aggregate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedLEASEState:
        """The state after round ``rnd``."""
        if rnd < self.settings.clustered_after:
            return state
        replies = dict(sorted(replies.items()))
        if state.allocation is None:
            warm = {**state.warm, **replies}
            known = self._known(state, warm)
            fit = self._without_outlying(state, known)
            if len(fit) < self.settings.needed:
                return replace(state, warm=warm)
            outlying = tuple(sorted(known.keys() - fit.keys()))
            state = self._allocate(replace(state, warm={}, outlying=outlying), fit)
            return self.add_late(state, {c: reply for c, reply in warm.items() if c not in known})
        late = {c: r for c, r in replies.items() if state.cluster_of(c) is None}
        present = {c: r for c, r in replies.items() if c not in late}
        state = self._with_use(self._average(state, present), present, rnd)
        return self._recluster(self.add_late(state, late), present)

    def groups(
        self, state: FedLEASEState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        """The clients of an expert, and those of a cluster. Before there are any, :meth:`aggregate` groups them.

        Secure sums, which are opened before that, and noise at the server, which is added before that, need the
        clusters of a control from the start.
        """
        if state.allocation is not None:
            return _grouped(state.allocation, replies, spaces)
        early = self.plan.secure.enabled or self.plan.privacy.by_server
        control = early and self.settings.allocation != "learned"
        given = allocation.given(self.settings, self.plan.seed, state.groups) if control else {}
        cluster = {c: str(given[c]) for c in replies if c in given}
        return grouped(without_representation(replies), cluster, spaces, private=True)

    def instruction(self, state: FedLEASEState, client: ClientId, rnd: int) -> Instruction:
        """What ``client`` is sent for round ``rnd``."""
        own, cluster, number = state.expert_of(client), state.cluster_of(client), state.num_experts
        if own is None or cluster is None:
            return Instruction({}, {"phase": "warm-up", "send": rnd >= self.settings.clustered_after})
        router = state.routers[cluster] if self.settings.router == "cluster" else {}
        numbers = [own] if self.settings.routing == "own" else self._sent(state, client, rnd)
        experts = {key: v for key, v in self._visible_to(state, own).items() if key.expert in numbers}
        info: dict[str, Json] = {"phase": "experts", "own": own}
        info |= {"experts": number} if self.settings.download == "used" and number > 1 else {}
        info |= {"represent": True} if self.settings.reclusters(rnd) else {}
        return Instruction({**experts, **router, **state.heads.of(client)}, info)

    def withheld(self, state: FedLEASEState) -> list[int]:
        """The experts of too few clients to be sent to others (``[robust] min_group``)."""
        if state.allocation is None or not self.plan.robust.active:
            return []
        least, number = self.plan.robust.min_group, state.allocation.num_experts
        return [e for e in range(number) if len(state.allocation.members(e)) < least]

    def _sent(self, state: FedLEASEState, client: ClientId, rnd: int) -> list[int]:
        """The numbers of the experts that ``client`` is sent in round ``rnd``."""
        own = state.expert_of(client)
        assert own is not None
        return wanted(self.settings, state.use.get(client), own, rnd, state.num_experts)

    def _with_use(self, state: FedLEASEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedLEASEState:
        """The state with what clients of clusters reported of their use of the experts in round ``rnd``."""
        if self.settings.download == "all":
            return state
        use = {client: of for client, of in state.use.items() if client not in replies}
        for client, reply in replies.items():
            all_sent = len(self._sent(state, client, rnd)) == state.num_experts
            if report := reported(state.use.get(client), reply, rnd, all_sent):
                use[client] = report
        return replace(state, use=dict(sorted(use.items())))

    def _visible_to(self, state: FedLEASEState, own: int) -> Tensors:
        """All experts; those that are withheld from the clients of expert ``own`` at their start, where B = 0."""
        withheld = [e for e in self.withheld(state) if e != own]
        starts = {k: v for e in withheld for k, v in start_lora(state.base, self.plan, e).items()}
        return {**state.experts, **starts}

    def _warm_starts(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> dict[ClientId, Tensors]:
        infos = {c: ClientInfo(c, 0, labels=state.labels.get(c)) for c in replies}
        return {c: warm_start(self.settings, self.plan, state.base, infos[c]) for c in replies}

    def _known(self, state: FedLEASEState, warm: Mapping[ClientId, Reply]) -> Mapping[ClientId, Reply]:
        """The warm-up LoRAs of the clients that will be clustered: a control takes those whose group is known."""
        learned = self.settings.allocation == "learned"
        return {c: reply for c, reply in warm.items() if learned or c in state.groups}

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
        groups = _grouped(allocated, replies, spaces)
        return aggregated(self.plan.robust, groups, replies, self._warm_starts(state, replies))[0]

    def _allocate(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Cluster the clients that sent a warm-up LoRA, and start experts, a router and heads for each cluster."""
        warm = {c: r.tensors for c, r in replies.items()}
        robust = self.plan.robust
        least = robust.min_group if robust.active else 1  # a group without a majority would be at a bad member's mercy
        allocated = allocation.allocate(self.settings, self.plan.seed, warm, state.groups, least)
        allocated = self._with_grounds(state, allocated)
        allocated = dealt(self.settings, allocated, {c: r.num_examples for c, r in replies.items()})
        replies = self._agreed(state, allocated, replies)
        number = allocated.num_experts
        routed = self.settings.routing != "own"
        router = start_router(state.base, self.plan, slots_of(self.settings, number)) if routed else {}
        state = replace(
            state,
            allocation=allocated,
            experts={k: v for e in range(number) for k, v in start_lora(state.base, self.plan, e).items()},
            routers=dict.fromkeys(range(allocated.num_clusters), router),
            heads=averaged_heads(
                cluster_heads(state.base, self.plan, state.labels, allocated.clusters), replies, self.settings.weighting
            ),
        )
        sent = {c: Reply(lora_of(r.tensors, 0, new=allocated.experts[c]), r.num_examples) for c, r in replies.items()}
        averaged = self._average(state, sent)
        started = state if self.settings.expert_start == "own" else averaged
        return replace(started, starts={**averaged.experts, **mean_representations(allocated.experts, warm)})

    def _with_grounds(self, state: FedLEASEState, allocated: Allocation) -> Allocation:
        """``allocated``, which says so where it was learned from fewer clients than there are."""
        sent, there = len(allocated.order) + len(state.outlying), len(state.groups)
        if self.settings.allocation != "learned" or sent >= there:
            return allocated
        choice = allocated.grounds or Clusters(allocated.clusters, allocated.silhouettes).choice
        return replace(allocated, grounds=of_some(choice, sent, there))

    def _average(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Every expert as the mean over its clients that replied, every router and head as that over its cluster's.

        Where none replied, they stay.
        """
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
        for k in routers:
            members = [c for c in replies if state.cluster_of(c) == k]
            sent = [router_of(replies[c].tensors) for c in members]
            if sent and all(sent):
                routers[k] = mean(sent, [weight[c] for c in members])
        heads = averaged_heads(state.heads, replies, self.settings.weighting)
        return replace(state, experts=experts, routers=routers, heads=heads, error=relative_error(errors))

    def add_late(self, state: FedLEASEState, late: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Clients that made up their warm-up join a cluster, and one of its experts (:mod:`.late`)."""
        if not late or state.allocation is None:
            return state
        sent = {c: reply.tensors for c, reply in late.items()}
        return self._move(state, placed(self.settings, state.starts, state.allocation, state.groups, sent), late)

    def _recluster(self, state: FedLEASEState, replies: Mapping[ClientId, Reply]) -> FedLEASEState:
        """Clients whose texts have come nearer to another cluster's move there; the experts stay as they are."""
        sent = {c: reply.tensors for c, reply in replies.items() if part_of(reply.tensors, Part.EMBEDDING)}
        if not sent or state.allocation is None:
            return state
        moves = allocation.drifted(self.settings, state.starts, state.allocation, sent)
        state = self._move(state, moves, replies)
        assert state.allocation is not None
        now = mean_representations(state.allocation.experts, sent)
        return replace(state, starts={**state.starts, **now})

    def _move(
        self, state: FedLEASEState, moves: Mapping[ClientId, int], replies: Mapping[ClientId, Reply]
    ) -> FedLEASEState:
        """Clients with other experts than before, and in the clusters of these."""
        if not moves or state.allocation is None:
            return state
        moved = state.allocation.moved(moves)
        regrouped = cluster_heads(state.base, self.plan, state.labels, moved.clusters)
        heads = moved_heads(state.heads, regrouped, {c: replies[c] for c in moves}, self.settings.weighting)
        use = {client: of for client, of in state.use.items() if client not in moves}
        return replace(state, allocation=moved, heads=heads, use=use)


def _grouped(allocated: Allocation, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]) -> list[Group]:
    """What is averaged together: of a cluster with one expert everything, else experts by their clients, the rest
    by cluster."""
    sent = without_representation(replies)
    own, cluster = ({c: str(of[c]) for c in replies if c in of} for of in (allocated.experts, allocated.clusters))
    if not allocated.own:
        return grouped(sent, cluster, spaces, private=True)
    loras = {c: replace(reply, tensors=lora_of(reply.tensors)) for c, reply in sent.items()}
    rest = {c: replace(reply, tensors=part_of(reply.tensors, Part.ROUTER, Part.HEAD)) for c, reply in sent.items()}
    return [*grouped(loras, own, spaces, private=True), *grouped(rest, cluster, spaces, private=True)]
