"""What FedAMoLE's server knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie.methods.parts import Heads
from coterie.types import BaseSpec, ClientId, Tensors


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


def with_late(state: FedAMoLEState, replies: Collection[ClientId]) -> FedAMoLEState:
    """``state`` with the clients that replied for the first time: without numbered experts, and embeddings of 0."""
    late = tuple(sorted(set(replies) - set(state.clients)))
    if not late:
        return state
    holds = {m: torch.cat([z, z.new_zeros(len(z), len(late))], dim=1) for m, z in state.holds.items()}
    tokens = {m: torch.cat([t, t.new_zeros(len(late), t.shape[1])]) for m, t in state.token_embeddings.items()}
    return replace(state, clients=state.clients + late, holds=holds, token_embeddings=tokens)
