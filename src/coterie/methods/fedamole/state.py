"""What FedAMoLE's server knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie.methods.parts import Heads, start_lora
from coterie.methods.plan import Plan
from coterie.types import BaseSpec, ClientId, Key, Part, Tensors


@dataclass(frozen=True)
class FedAMoLEState:
    """The server's state: every expert once, and who holds it.

    ``pool`` holds the experts 0..E-1, the shared expert and the projection of every module. By module: ``holds``
    [E, n] says which client (in the order of ``clients``) holds which expert; ``expert_embeddings`` [E, r] and
    ``token_embeddings`` [n, r] are the latest, 0 where there is none. Experts that look for clients like their holders
    have none of their own. ``clients`` are those of the start, by id, then those that came later, in the order in which
    they first replied. ``groups`` [n] are the numbers of the clients' groups, with ``clients_per_expert = "auto"`` and
    once there are any.
    """

    base: BaseSpec
    clients: tuple[ClientId, ...]
    pool: Tensors
    holds: Mapping[str, Tensor]
    expert_embeddings: Mapping[str, Tensor]
    token_embeddings: Mapping[str, Tensor]
    heads: Heads = field(default_factory=Heads)
    error: float = 0.0
    groups: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        """E, the number of experts in each module's pool."""
        return next(iter(self.expert_embeddings.values())).shape[0]

    @property
    def used(self) -> list[int]:
        """The numbers of the experts that some client holds in some module."""
        held = torch.stack([z.any(dim=1) for z in self.holds.values()]).any(dim=0)
        return [int(e) for e in held.nonzero().flatten()]


def start_expert(base: BaseSpec, plan: Plan, number: int) -> dict[Key, Tensor]:
    """An expert of every module's pool before it is trained."""
    return start_lora(base, plan, number, "expert", number)


def started_anew(state: FedAMoLEState, plan: Plan) -> FedAMoLEState:
    """``state`` with the experts that nobody holds as they were at the start.

    An expert that lost its first holder is what that one client trained, and would be exported as that.
    """
    idle = {
        (module, int(e))
        for module, z in state.holds.items()
        for e in (~z.any(dim=1)).nonzero().flatten()
        if state.pool[Key(module, int(e), Part.B)].any()
    }
    pool = dict(state.pool)
    for number in sorted({e for _, e in idle}):
        fresh = start_expert(state.base, plan, number)
        pool |= {key: tensor for key, tensor in fresh.items() if (key.module, number) in idle}
    return replace(state, pool=pool)


def with_late(state: FedAMoLEState, replies: Collection[ClientId]) -> FedAMoLEState:
    """``state`` with the clients that replied for the first time: without numbered experts, and embeddings of 0."""
    late = tuple(sorted(set(replies) - set(state.clients)))
    if not late:
        return state
    holds = {m: torch.cat([z, z.new_zeros(len(z), len(late))], dim=1) for m, z in state.holds.items()}
    tokens = {m: torch.cat([t, t.new_zeros(len(late), t.shape[1])]) for m, t in state.token_embeddings.items()}
    return replace(state, clients=state.clients + late, holds=holds, token_embeddings=tokens)
