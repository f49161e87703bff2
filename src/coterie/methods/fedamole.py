"""FedAMoLE (arXiv 2411.19128, WWW 2026): experts of a pool choose the clients whose data fits them.

1. Every module has a pool of E experts, a shared expert and a token projection P. A client holds a few experts of
   each pool, different ones in every module:
   y = W0 x + s [B_s A_s x~ + sum_{e in top-k} w_e B_e A_e x~], w = softmax over the k largest of
   (A_e x . P x) / sqrt r (:func:`coterie.nn.gates.scaled_dot_product`).
2. Clients train all that they hold, with a load-balance loss beside the task's, on most of their rows. On the others
   they then measure t = mean_t P x and, for each of their experts, e = mean_t A_e x.
3. The server averages every expert and e over the expert's holders, shared expert and P over all clients.
4. Reverse selection (RSEA), each round but the last: prob_ec = softmax over clients of (e . t_c) / sqrt r; every expert
   picks ``clients_per_expert`` clients so that the sum of prob over the picks is largest and every client gets a
   number of experts within bounds (:mod:`coterie.ops.assign`). Round 1 starts from the same problem on random scores.

Differs from the published code (commit 41ebf75), whose behaviour ``examples/fedamole-published.toml`` restores: all
experts share one dropout mask (there, each has its own: ``dropout_masks = "per_expert"``); padding tokens count neither
in the load-balance loss nor in embeddings (there they do: ``padding = "counted"``); the best round is chosen on
validation data (there, on test data: not offered); the assignment is a linear program with the same optimum as SCIP's.
The code's noise on embeddings is left out: it bounds nothing (it clips one batch only, and has no accountant).
Ours: ``experts`` follows the number of clients unless set; a client that has not replied yet counts with the mean of
the others' token embeddings; an expert whose holders all missed a round is unchanged.
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

from coterie.methods.base import Method
from coterie.methods.findings import AggregationError, Assignment, ExpertPool, Finding
from coterie.methods.parts import (
    Heads,
    Shapes,
    lora_of,
    mean_heads,
    router_of,
    settle,
    shapes_of,
    start_heads,
    start_lora,
    start_router,
    weights_of,
    with_head,
)
from coterie.methods.plan import MethodSettings
from coterie.methods.robust import Group, grouped
from coterie.ops.assign import Limits, assign, check
from coterie.ops.mean import aggregation_error, mean, relative_error
from coterie.ops.streams import stream
from coterie.requests import Balance, ClientProgram, HoldOut, Observe, Train
from coterie.types import (
    NO_EXPERT,
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    CoterieError,
    GateSpec,
    Instruction,
    Json,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
)


class FedAMoLESettings(MethodSettings):
    """FedAMoLE's settings; the defaults are the paper's."""

    experts: int | None = Field(
        None, ge=1, description="experts in each module's pool; none: 3 per client, like the paper's 30 for 10"
    )
    clients_per_expert: int = Field(2, ge=1, description="clients that each expert picks")
    min_experts: int = Field(
        2, ge=1, description="the fewest experts of a client in a module, or top_k if that is larger"
    )
    max_experts: int = Field(8, ge=1, description="the most experts of a client in a module")
    top_k: int = Field(2, ge=1, description="experts per token, besides the shared one")
    assignment: Literal["dynamic", "static", "random", "homogeneous"] = Field(
        "dynamic",
        description="experts choose each round; at random, once; at random, each round; or like dynamic, with the "
        "same number of experts for every client",
    )
    balance: float = Field(1e-3, ge=0, description="weight of the load-balance loss")
    embedding_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training rows held out for the embeddings, in every mode"
    )
    embedding_rows: int = Field(200, ge=1, description="the most rows held out for the embeddings")
    weighting: Literal["uniform", "examples"] = Field("uniform", description="weights of all means over clients")
    dropout_masks: Literal["shared", "per_expert"] = Field(
        "shared", description="one dropout mask for all experts, or one for each (published code)"
    )
    padding: Literal["ignored", "counted"] = Field(
        "ignored", description="padding tokens in the load-balance loss and the embeddings (counted: published code)"
    )


@dataclass(frozen=True)
class FedAMoLEState:
    """The server's state: every expert once, and who holds it.

    ``pool`` holds the experts 0..E-1, the shared expert and the projection of every module. By module: ``holds``
    [E, n] says which client (in the order of ``clients``) holds which expert; ``expert_embeddings`` [E, r] and
    ``token_embeddings`` [n, r] are the latest, 0 where there is none yet.
    """

    base: BaseSpec
    clients: tuple[ClientId, ...]
    pool: Tensors
    holds: Mapping[str, Tensor]
    expert_embeddings: Mapping[str, Tensor]
    token_embeddings: Mapping[str, Tensor]
    heads: Heads = field(default_factory=Heads)
    error: float = 0.0


@dataclass(frozen=True)
class FedAMoLE(Method[FedAMoLEState]):
    """The method; see the module's docstring."""

    settings: FedAMoLESettings

    name = "fedamole"
    title = "FedAMoLE"
    paper = "arXiv 2411.19128 (WWW 2026)"
    summary = "experts of a pool choose the clients whose data fits them; architectures differ by client"
    evaluates = "trained"
    newcomers = "FedAMoLE's experts choose among the sites that take part from the start"
    Settings = FedAMoLESettings
    State = FedAMoLEState

    # server ------------------------------------------------------------------------------------------------------

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedAMoLEState:
        self._check(clients)
        number, rank = self._number(len(clients)), self.plan.rank
        pool = start_lora(base, self.plan, SHARED) | start_router(base, self.plan, rank)
        for e in range(number):
            pool |= start_lora(base, self.plan, e, "expert", e)
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
        return self._assign(state, self._random(state, 0))

    def configure(
        self, state: FedAMoLEState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        info = {"embed": self._embeds(rnd)}
        return {c.id: Instruction({**self._held(state, c.id), **state.heads.of(c.id)}, info) for c in clients}

    def expects(self, state: FedAMoLEState, me: ClientInfo, rnd: int) -> Shapes:
        held = self._held(state, me.id)
        embeddings = {
            key._replace(part=Part.EMBEDDING): (self.plan.rank,)
            for key in held
            if self._embeds(rnd) and (key.part is Part.ROUTER or (key.part is Part.A and key.expert != SHARED))
        }
        return shapes_of(held, state.heads.of(me.id)) | embeddings

    def groups(
        self, state: FedAMoLEState, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]
    ) -> Sequence[Group]:
        """All clients, with shared expert, projection and head; and the holders of each expert."""
        numbered = {key for reply in replies.values() for key in reply.tensors if key.expert >= 0}
        rest = {
            c: replace(r, tensors={k: v for k, v in r.tensors.items() if k.expert < 0 and k.part is not Part.EMBEDDING})
            for c, r in replies.items()
        }
        held = [Key(key.module, key.expert, Part.A) for key in sorted(numbered) if key.part is Part.A]
        return grouped(rest, dict.fromkeys(replies, ""), spaces) + [
            Group(
                tuple(c for c in sorted(replies) if a in replies[c].tensors),
                frozenset({a, a._replace(part=Part.B)}),
            )
            for a in held
        ]

    def aggregate(self, state: FedAMoLEState, replies: Mapping[ClientId, Reply], rnd: int) -> FedAMoLEState:
        weight = weights_of(replies, self.settings.weighting)
        state = replace(state, heads=mean_heads(state.heads, replies, weight), **self._average(state, replies, weight))
        if rnd >= self.plan.rounds or self.settings.assignment == "static":
            return state
        return self._assign(state, self._random(state, rnd) if self._at_random else self._affinity(state))

    def experts(self, state: FedAMoLEState) -> Mapping[str, Tensors]:
        number = len(next(iter(state.holds.values())))
        numbered = {f"expert-{e}": e for e in range(number)}
        return {name: lora_of(state.pool, e, new=0) for name, e in {**numbered, "shared": SHARED}.items()}

    def describe(self, state: FedAMoLEState) -> Sequence[Finding]:
        s = self.settings
        held = {
            module: {c: z[:, i].nonzero().flatten().tolist() for i, c in enumerate(state.clients)}
            for module, z in state.holds.items()
        }
        pool = ExpertPool(self._number(len(state.clients)), s.clients_per_expert, s.max_experts, s.assignment)
        return [Assignment(held, pool), AggregationError(state.error)]

    # client ------------------------------------------------------------------------------------------------------

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        s, bank = self.settings, self.bank(ins, me, personal)
        aside, counted = HoldOut(s.embedding_fraction, s.embedding_rows), s.padding == "counted"
        balance = Balance(s.balance, counted)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim, balance=balance, hold_out=aside)
        result = settle(self.plan, trained, me, personal, lora_of(bank.tensors) | router_of(bank.tensors))
        reply = replace(result.reply, info={**result.reply.info, "balance": trained.balance})
        if ins.info["embed"]:
            bank = replace(bank, tensors={**bank.tensors, **trained.tensors})
            observed = yield Observe(bank, "train", ("embeddings",), aside, counted)
            reply = replace(reply, tensors={**reply.tensors, **observed.embeddings})
        return replace(result, reply=reply)

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        tensors = with_head(lora_of(ins.tensors) | router_of(ins.tensors), ins, personal)
        gate = GateSpec("scaled_dot_product", {"k": self.settings.top_k})
        own_masks = self.settings.dropout_masks == "per_expert"
        return Bank(tensors, gate, self.plan.scaling, self.plan.dropout, own_masks)

    # steps of the server -----------------------------------------------------------------------------------------

    @property
    def _at_random(self) -> bool:
        return self.settings.assignment in ("static", "random")

    @property
    def _limits(self) -> Limits:
        s = self.settings
        least, named = max((s.top_k, "top_k"), (s.min_experts, "min_experts"), key=lambda pair: pair[0])
        return Limits(s.clients_per_expert, least, s.max_experts, s.assignment == "homogeneous", named)

    def _number(self, clients: int) -> int:
        return self.settings.experts or 3 * clients

    def _embeds(self, rnd: int) -> bool:
        """Whether the server needs embeddings after round ``rnd``: not for a random assignment, nor at the end."""
        return rnd < self.plan.rounds and not self._at_random

    def _check(self, clients: Sequence[ClientInfo]) -> None:
        s = self.settings
        check(self._number(len(clients)), len(clients), self._limits)
        aside = HoldOut(s.embedding_fraction, s.embedding_rows)
        for client in clients:
            if aside.count(client.num_train) >= client.num_train:
                raise CoterieError(
                    f"client {client.id} has {client.num_train} training row(s), and embedding_fraction = "
                    f"{s.embedding_fraction:g} holds all of them out; add rows, or lower embedding_fraction"
                )

    def _held(self, state: FedAMoLEState, client: ClientId) -> dict[Key, Tensor]:
        """The part of the pool that the client holds: the server's own tensors, not copies."""
        if client not in state.clients:
            raise CoterieError(
                f"{client} joined after the start, but FedAMoLE's experts choose only among the first clients; "
                "remove it from [federation] sites, or start a new run"
            )
        column = state.clients.index(client)
        held: dict[Key, Tensor] = {}
        for module, z in state.holds.items():
            numbers = [*z[:, column].nonzero().flatten().tolist(), SHARED]
            keys = [Key(module, e, part) for e in numbers for part in (Part.A, Part.B)]
            held |= {key: state.pool[key] for key in [*keys, Key(module, NO_EXPERT, Part.ROUTER)]}
        return held

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
                of_experts[key.module][key.expert] = mean([{embedding: e} for e in embeddings.values()], weights)[
                    embedding
                ]
            if key.part is Part.ROUTER:
                for c, t in embeddings.items():
                    of_clients[key.module][state.clients.index(c)] = t
        return {
            "pool": pool,
            "expert_embeddings": of_experts,
            "token_embeddings": of_clients,
            "error": relative_error(errors),
        }

    def _affinity(self, state: FedAMoLEState) -> NDArray[np.float64]:
        """prob [m, E, n]: softmax over clients of (e . t_c) / sqrt r."""
        pairs = [(state.expert_embeddings[t.name], _filled(state.token_embeddings[t.name])) for t in state.base.targets]
        scores = torch.stack([e.double() @ t.double().T for e, t in pairs]) * self.plan.rank**-0.5
        return np.asarray(scores.softmax(dim=-1).numpy())

    def _random(self, state: FedAMoLEState, rnd: int) -> NDArray[np.float64]:
        """prob [m, E, n] of random scores."""
        shape = len(state.base.targets), self._number(len(state.clients)), len(state.clients)
        scores = torch.randn(shape, generator=stream(self.plan.seed, "assignment", rnd), dtype=torch.float64)
        return np.asarray(scores.softmax(dim=-1).numpy())

    def _assign(self, state: FedAMoLEState, affinity: NDArray[np.float64]) -> FedAMoLEState:
        """The state with every expert at the clients that it picks by ``affinity`` [m, E, n]."""
        chosen = torch.from_numpy(assign(affinity, self._limits))
        return replace(state, holds={t.name: z.clone() for t, z in zip(state.base.targets, chosen, strict=True)})


def _filled(t: Tensor) -> Tensor:
    """Token embeddings [n, r]; a client without any gets the mean of the others."""
    known = t.any(dim=1, keepdim=True)
    return torch.where(known, t, t.sum(0) / known.sum().clamp(min=1))


METHOD = FedAMoLE
