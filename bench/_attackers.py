"""What a bad client of bench/attacks.py sends in place of its honest update, and the engine in which it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.engines.base import Delivery, Stream
from coterie.ops.streams import stream
from coterie.types import ClientId, ClientInfo, Instruction, Key, Reply, Tensors

CLAIMED = 10**9  # rows
CLAIMING = ("rows of 10^9", "x50, rows of 10^9")  # attacks

Updates = Mapping[ClientId, Tensors]
Attack = Callable[[Tensors, Updates, torch.Generator, int], Tensors]  # own update, the honest ones, draw, round


def times(factor: float) -> Attack:
    return lambda own, honest, draw, rnd: {key: factor * value for key, value in own.items()}


def noise(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Three times the norm of its own update, tensor by tensor, in a random direction."""
    made = {key: torch.randn(value.shape, generator=draw) for key, value in sorted(own.items())}
    return {key: 3 * own[key].norm() / value.norm() * value for key, value in made.items()}


def little(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """A little is enough (arXiv 1902.06156): the honest mean less 1.5 standard deviations, by coordinate."""
    return {key: x.mean(0) - 1.5 * x.std(0, correction=0) for key, x in _stacked(own, honest).items()}


def inner_product(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Inner-product manipulation (arXiv 1903.03936): minus four times the honest mean."""
    return {key: -4 * x.mean(0) for key, x in _stacked(own, honest).items()}


def lying(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Honest in the first round, in which FedLEASE clusters; then minus five times its update."""
    return own if rnd == 1 else times(-5.0)(own, honest, draw, rnd)


def little_member(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Honest in the first round, in which FedLEASE clusters; then a little is enough, from inside an honest cluster."""
    return own if rnd == 1 else little(own, honest, draw, rnd)


def _stacked(own: Tensors, honest: Updates) -> dict[Key, Tensor]:
    """Of each tensor that the attacker sends, what the honest clients send; its own where nobody else does."""
    sent = {key: [update[key] for update in honest.values() if key in update] for key in own}
    return {key: torch.stack(values or [own[key]]) for key, values in sent.items()}


ATTACKS: dict[str, Attack] = {
    "inner product": inner_product,
    "sign flip": times(-1.0),
    "a little is enough": little,
    "lying member": lying,
    "a little, as a member": little_member,
    "noise": noise,
    "poisoned adapter": times(1.0),  # of the pool, see make_pools; the attackers send nothing of their own
    "adapter within the bound": times(1.0),  # the same, as strong as SmartFed's pool_bound lets it be
    "rows of 10^9": times(-1.0),
    "flipped labels": times(1.0),  # its rows are wrong, see rows_of
    "sign flip x50": times(-50.0),
    "x50, rows of 10^9": times(-50.0),
}


@dataclass(frozen=True)
class Hostile:
    """An engine whose ``attackers`` change what they reply. All else is the engine's."""

    engine: Any
    attackers: tuple[ClientId, ...]
    attack: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        claimed = {"num_train": CLAIMED} if self.attack in CLAIMING else {}
        return tuple(replace(c, **claimed) if c.id in self.attackers else c for c in self.engine.clients)

    def train(
        self, method: Any, instructions: Mapping[ClientId, Instruction], rnd: int, limits: Any
    ) -> Stream[Delivery]:
        came = dict(self.engine.train(method, instructions, rnd, limits))
        infos = {client.id: client for client in self.clients}
        starts, updates = {}, {}
        for client, delivery in came.items():
            reply = delivery.reply
            assert reply is not None, delivery.error
            own = {**method.begin(self.spec, infos[client]).tensors, **instructions[client].tensors}
            starts[client] = {key: own[key] for key in reply.tensors if key in own}
            updates[client] = {k: v - starts[client][k] if k in starts[client] else v for k, v in reply.tensors.items()}
        honest = {client: update for client, update in updates.items() if client not in self.attackers}
        for client, delivery in sorted(came.items()):
            if client in self.attackers and delivery.reply is not None:
                draw = stream(0, "attack", rnd, client)
                moved = ATTACKS[self.attack](updates[client], honest, draw, rnd)
                tensors = {k: starts[client][k] + v if k in starts[client] else v for k, v in moved.items()}
                rows = CLAIMED if self.attack in CLAIMING else delivery.reply.num_examples
                delivery = replace(delivery, reply=Reply(tensors, rows, delivery.reply.info))
            yield client, delivery
