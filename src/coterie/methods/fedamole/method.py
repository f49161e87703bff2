"""FedAMoLE's server and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.methods.base import Method, Onboarded, newcomers_own
from coterie.methods.fedamole.groups import groups_after, homes
from coterie.methods.fedamole.released import released
from coterie.methods.fedamole.selection import (
    Scores,
    affinity,
    at_random,
    best_for_one_more,
    by_group,
    knowingly,
    likeness,
    replied,
    running_mean,
    with_inertia,
    within_reach,
)
from coterie.methods.fedamole.settings import FedAMoLESettings
from coterie.methods.fedamole.state import FedAMoLEState, start_expert, started_anew, with_late
from coterie.methods.findings import AggregationError, Assignment, ExpertPool, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    label_space,
    lora_of,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_head,
    start_heads,
    start_lora,
    start_router,
    weights_of,
    with_head,
)
from coterie.methods.privacy import sent_by_clients
from coterie.methods.releases import Release
from coterie.methods.robust import Group, grouped
from coterie.ops.assign import Limits, assign, check
from coterie.ops.mean import aggregation_error, mean, relative_error
from coterie.ops.robust import shortened
from coterie.requests import Balance, ClientProgram, Program, Train
from coterie.types import (
    NO_EXPERT,
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    GateSpec,
    Instruction,
    Json,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
)

PATIENCE = 3  # the most rounds that experts wait for every client's first embeddings before they choose


@dataclass(frozen=True)
class FedAMoLE(Method[FedAMoLEState]):
    """The method; see :mod:`coterie.methods.fedamole`."""

    settings: FedAMoLESettings

    name = "fedamole"
    title = "FedAMoLE"
    paper = "arXiv 2411.19128 (WWW 2026)"
    summary = "experts of a pool choose the clients whose data fits them; architectures differ by client"
    evaluates = "trained"
    Settings = FedAMoLESettings
    State = FedAMoLEState
    Welcome = FedAMoLEState
    instructs_alike = False

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedAMoLEState:
        number, rank = self._number(len(clients)), self.plan.rank
        check(number, len(clients), self._limits)
        self.settings.check_rows(clients)
        pool = start_lora(base, self.plan, SHARED) | start_router(base, self.plan, rank)
        for e in range(number):
            pool |= start_expert(base, self.plan, e)
        modules = [target.name for target in base.targets]
        state = FedAMoLEState(
            base,
            tuple(sorted(c.id for c in clients)),
            pool,
            holds={},
            expert_embeddings={m: torch.zeros(number, rank) for m in modules},
            token_embeddings={m: torch.zeros(len(clients), rank) for m in modules},
            heads=start_heads(base, self.plan, clients),
        )
        random = self._random(state, 0)
        if self.settings.assignment == "oracle":
            random = by_group(random, sorted(clients, key=lambda c: c.id))
        return self._assign(state, random, self.settings.first_picks)

    def configure(
        self, state: FedAMoLEState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        info = {"embed": self._embeds(rnd)}
        return {c.id: Instruction({**self._part_of_pool(state, c.id), **state.heads.of(c.id)}, info) for c in clients}

    def expects(self, state: FedAMoLEState, me: ClientInfo, rnd: int) -> Shapes:
        part, s = self._part_of_pool(state, me.id), self.settings
        embeddings = {
            key._replace(part=Part.EMBEDDING): (self.plan.rank,)
            for key in part
            if self._embeds(rnd)
            and (key.part is Part.ROUTER or (s.of_experts and key.part is Part.A and key.expert != SHARED))
        }
        return shapes_of(part, state.heads.of(me.id)) | embeddings

    def releases(self) -> Sequence[Release]:
        return released(self.settings, self.plan.head == "shared")

    def groups(
        self, state: FedAMoLEState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        """All clients, with shared expert, projection and head; and the holders of each expert."""
        numbered = {key for reply in replies.values() for key in reply.tensors if key.expert >= 0}
        rest = {
            c: replace(r, tensors={k: v for k, v in r.tensors.items() if k.expert < 0 and k.part is not Part.EMBEDDING})
            for c, r in replies.items()
        }
        firsts = [Key(key.module, key.expert, Part.A) for key in sorted(numbered) if key.part is Part.A]
        return grouped(rest, dict.fromkeys(replies, ""), spaces) + [
            Group(
                tuple(c for c in sorted(replies) if a in replies[c].tensors),
                frozenset({a, a._replace(part=Part.B)}),
            )
            for a in firsts
        ]

    def aggregate(self, state: FedAMoLEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedAMoLEState:
        first = rnd == 1 or self._waits(state, rnd - 1)
        weight, state = weights_of(replies, self.settings.weighting), with_late(state, sent_by_clients(replies))
        known = replied(state.token_embeddings)
        state = replace(state, heads=mean_heads(state.heads, replies, weight), **self._average(state, replies, weight))
        if rnd >= self.plan.rounds or self.settings.assignment in ("static", "oracle"):
            return state
        if not self.settings.chooses:
            return self._assign(state, self._random(state, rnd))
        return state if self._waits(state, rnd) else self._chosen(state, known, first)

    def experts(self, state: FedAMoLEState) -> Mapping[str, Tensors]:
        numbered = {f"expert-{e}": e for e in state.used}
        return {name: lora_of(state.pool, e, new=0) for name, e in {**numbered, "shared": SHARED}.items()}

    def describe(self, state: FedAMoLEState) -> Sequence[Finding]:
        s = self.settings
        numbers = {m: [z[:, i].nonzero().flatten().tolist() for i in range(z.shape[1])] for m, z in state.holds.items()}
        assigned = {module: dict(zip(state.clients, of, strict=True)) for module, of in numbers.items()}
        each = None if s.by_group(self.plan.robust) else s.usual_picks
        pool = ExpertPool(state.num_experts, each, s.max_experts, s.assignment)
        return [Assignment(assigned, pool), AggregationError(state.error)]

    # client ------------------------------------------------------------------------------------------------------

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        s, bank = self.settings, self.bank(ins, me, personal)
        observe = s.observe(bank)
        embeds, embeddings = bool(ins.info["embed"]), {}
        if embeds and s.embed == "before":
            embeddings = (yield observe).embeddings
        aside = s.share if s.embed_rows == "held_out" else None
        balance = Balance(s.balance, observe.padding)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim, balance=balance, hold_out=aside)
        if embeds and s.embed == "after":
            after = replace(bank, tensors={**bank.tensors, **trained.tensors})
            embeddings = (yield replace(observe, bank=after)).embeddings
        result = settle(self.plan, trained, me, personal, lora_of(bank.tensors) | router_of(bank.tensors))
        tensors = {**result.reply.tensors, **embeddings}
        info = {**result.reply.info, "balance": trained.balance}
        return replace(result, reply=replace(result.reply, tensors=tensors, info=info))

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        tensors = with_head(lora_of(ins.tensors) | router_of(ins.tensors), ins, personal)
        gate = GateSpec("scaled_dot_product", {"k": self.settings.top_k})
        own_masks = self.settings.dropout_masks == "per_expert"
        return Bank(tensors, gate, self.plan.scaling, self.plan.dropout, own_masks)

    def welcome(self, state: FedAMoLEState, me: ClientInfo) -> FedAMoLEState:
        """The pool, all embeddings, who holds what, by number, and the shared head of its labels: no client's name."""
        head = state.heads.for_newcomer(me)
        heads = Heads({label_space(me): head}) if head else Heads()
        return replace(state, clients=tuple(str(i) for i in range(len(state.clients))), heads=heads, error=0.0)

    def onboard(self, welcome: FedAMoLEState, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """In every module the experts that the client's tokens fit best, as many as a client holds on average.

        The shared expert alone where clients have sent no embeddings: nothing says which experts fit.
        """
        received = self._part_of_pool(welcome, "new")  # the others are numbers
        personal = Personal(start_head(base, self.plan, me))
        if replied(welcome.token_embeddings).any():
            shared = self.bank(Instruction(received), me, personal)
            observed = yield replace(self.settings.observe(shared), hold_out=None, of_experts=False)
            received = self._part_of_pool(self._joined(welcome, "new", observed.embeddings), "new")
        received |= welcome.heads.for_newcomer(me)
        bank = self.bank(Instruction(received), me, personal)
        return Onboarded(bank, newcomers_own(bank))

    # steps of the server -----------------------------------------------------------------------------------------

    @property
    def _limits(self) -> Limits:
        s = self.settings
        least, named = max((s.top_k, "top_k"), (s.min_experts, "min_experts"), key=lambda pair: pair[0])
        return Limits(s.usual_picks, least, s.max_experts, s.assignment == "homogeneous", named)

    def _number(self, clients: int) -> int:
        return self.settings.experts or 3 * clients

    def _embeds(self, rnd: int) -> bool:
        """Whether the server needs embeddings after round ``rnd``: only where experts choose, and not at the end."""
        return rnd < self.plan.rounds and self.settings.chooses

    def _part_of_pool(self, state: FedAMoLEState, client: ClientId) -> dict[Key, Tensor]:
        """The part of the pool that the client holds: the server's own tensors, not copies.

        A client that has not replied yet, and was not there at the start, holds no numbered expert.
        """
        columns = [i for i, name in enumerate(state.clients) if name == client]
        chosen: dict[Key, Tensor] = {}
        for module, z in state.holds.items():
            numbers = [*z[:, columns].nonzero()[:, 0].tolist(), SHARED]
            keys = [Key(module, e, part) for e in numbers for part in (Part.A, Part.B)]
            chosen |= {key: state.pool[key] for key in [*keys, Key(module, NO_EXPERT, Part.ROUTER)]}
        return chosen

    def _average(
        self, state: FedAMoLEState, replies: Mapping[ClientId, Reply], weight: Mapping[ClientId, float]
    ) -> dict[str, Json]:
        """Every tensor of the pool, and every expert's embedding, as the mean over the holders that replied."""
        pool, errors = dict(state.pool), []
        of_experts = {module: e.clone() for module, e in state.expert_embeddings.items()}
        of_clients = {module: t.clone() for module, t in state.token_embeddings.items()}
        for key in state.pool:
            sent = {c: replies[c].tensors for c in weight if key in replies[c].tensors}
            weights = [weight[c] for c in sent]
            if not sent:
                continue
            pool |= mean([{key: tensors[key]} for tensors in sent.values()], weights)
            if key.part is Part.A:
                b = key._replace(part=Part.B)
                pairs = [(tensors[key], tensors[b]) for tensors in sent.values()]
                errors.append(aggregation_error([a for a, _ in pairs], [b for _, b in pairs], weights))
            embedding = key._replace(part=Part.EMBEDDING)
            embeddings = {c: tensors[embedding] for c, tensors in sent.items() if embedding in tensors}
            if key.part is Part.A and embeddings:
                new = mean([{embedding: e} for e in embeddings.values()], [weight[c] for c in embeddings])[embedding]
                of_expert = of_experts[key.module]
                of_expert[key.expert] = running_mean(of_expert[key.expert], new, self.settings.prototype_memory)
            if key.part is Part.ROUTER:
                for c, t in embeddings.items():
                    of_clients[key.module][state.clients.index(c)] = t
        return {
            "pool": pool,
            "expert_embeddings": of_experts,
            "token_embeddings": of_clients,
            "error": relative_error(errors),
        }

    def _waits(self, state: FedAMoLEState, rnd: int) -> bool:
        """Whether no expert chooses after round ``rnd`` yet: clients of the start have not replied, and may soon.

        Experts that look for clients like their holders have to know these; a wrong first choice would stay.
        """
        waits = self.settings.chooses and self.settings.prototype == "holders" and rnd <= PATIENCE
        return waits and not bool(replied(state.token_embeddings).all())

    def _chosen(self, state: FedAMoLEState, known: Tensor, first: bool) -> FedAMoLEState:
        """The state after the experts' choice: by their scores, and with a bonus for the clients that hold them.

        ``known`` [n]: which clients had embeddings before the round. ``first``: experts have their holders by chance,
        so there is no bonus.
        """
        modules, held, picks = [t.name for t in state.base.targets], dict(state.holds), None
        if self.settings.by_group(self.plan.robust):
            groups = groups_after(state.groups, self._tokens(state), known, state.num_experts, self._limits)
            if groups != state.groups:
                held, first = homes(held, state.groups, groups, self._limits), True
                state = replace(state, groups=groups)
            picks = np.stack([held[m].sum(dim=1).numpy() for m in modules])
        if self.settings.prototype == "holders" and not first:
            held = {m: knowingly(z, known) for m, z in held.items()}
        scores = self._scores(replace(state, holds=held))
        if not first:
            scores = with_inertia(scores, [held[m] for m in modules], self.settings.inertia)
        return started_anew(self._assign(state, scores, picks), self.plan)

    def _joined(self, state: FedAMoLEState, client: ClientId, embeddings: Tensors) -> FedAMoLEState:
        """The state with one more client, at the experts that fit these ``embeddings`` of its tokens best."""
        joined = with_late(state, [client])
        for module, t in joined.token_embeddings.items():
            t[-1] = embeddings[Key(module, NO_EXPERT, Part.EMBEDDING)]
        for target, scores in zip(state.base.targets, self._scores(joined), strict=True):
            best = best_for_one_more(state.holds[target.name], scores[:, -1], self._limits.min_experts)
            joined.holds[target.name][best, -1] = True
        return joined

    def _tokens(self, state: FedAMoLEState) -> list[Tensor]:
        """The clients' embeddings by module."""
        return [self._bounded(state.token_embeddings[t.name]) for t in state.base.targets]

    def _bounded(self, embeddings: Tensor) -> Tensor:
        """With ``[robust]`` none is longer than the module's median one: a long one decides for all experts."""
        return shortened(embeddings) if self.plan.robust.active else embeddings

    def _scores(self, state: FedAMoLEState) -> Scores:
        """How well each client fits each expert, [m, E, n]."""
        modules = [t.name for t in state.base.targets]
        if self.settings.prototype == "holders":
            return likeness([state.holds[m] for m in modules], self._tokens(state))
        return affinity([self._bounded(state.expert_embeddings[m]) for m in modules], self._tokens(state))

    def _random(self, state: FedAMoLEState, rnd: int) -> Scores:
        """Random scores [m, E, n]."""
        return at_random((len(state.base.targets), state.num_experts, len(state.clients)), self.plan.seed, rnd)

    def _assign(
        self, state: FedAMoLEState, scores: Scores, picks: int | NDArray[np.int_] | None = None
    ) -> FedAMoLEState:
        """The state with every expert at the clients that it picks by ``scores`` [m, E, n].

        ``picks``: how many, for each expert of each module [m, E] or for all; by default, as many as usual.
        """
        usual = picks if isinstance(picks, int) else self.settings.usual_picks
        limits = replace(self._limits, clients_per_expert=usual)
        limits = within_reach(limits, state.num_experts, len(state.clients))
        chosen = torch.from_numpy(assign(scores, limits, picks=None if isinstance(picks, int) else picks))
        return replace(state, holds={t.name: z.clone() for t, z in zip(state.base.targets, chosen, strict=True)})
