"""Clients with different ranks (``[lora] ranks``): who has which, and LoRAs on one common scale.

A client whose LoRA has rank r uses it with the scale alpha / r. The server keeps every LoRA on the scale of the plan,
s = alpha / rank, by putting the difference into B: (alpha / r) B A = s (rank / r B) A. Where r is the plan's rank, B
stays as it is, bit for bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from coterie.methods.plan import Plan
from coterie.types import ClientId, ClientInfo, CoterieError, Key, Part, Tensors


@dataclass(frozen=True)
class Ranks:
    """Each client's rank; ``later`` is that of a client that joins after the start."""

    by_client: Mapping[ClientId, int]
    later: int

    def of(self, client: ClientId) -> int:
        return self.by_client.get(client, self.later)

    @property
    def largest(self) -> int:
        return max([self.later, *self.by_client.values()])


def start_ranks(plan: Plan, clients: Sequence[ClientInfo]) -> Ranks:
    """The ranks of ``clients`` by ``[lora] ranks``: by name, or a list that is repeated over the sorted names.

    A client that the mapping does not name has the plan's rank. A client that joins later has it too, or the largest
    rank of the others if that is smaller. Raises :class:`CoterieError` for a name that is not a client's.
    """
    names, rule = sorted(client.id for client in clients), plan.ranks
    if isinstance(rule, Mapping):
        if unknown := sorted(rule.keys() - {*names}):
            near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.0)
            raise CoterieError(f"[lora] ranks: there is no client {unknown[0]!r}; did you mean {near[0]!r}?")
        by_client = {name: rule.get(name, plan.rank) for name in names}
    else:
        by_client = {name: (rule or (plan.rank,))[i % len(rule or (0,))] for i, name in enumerate(names)}
    return Ranks(by_client, min([plan.rank, max(by_client.values(), default=plan.rank)]))


def rank_of(lora: Tensors) -> int:
    """The rank of a LoRA: the rows of its A, the same in every module."""
    return next(int(value.shape[0]) for key, value in lora.items() if key.part is Part.A)


def on_server(lora: Tensors, plan: Plan) -> dict[Key, Tensor]:
    """A client's LoRA on the server's scale: B is multiplied by rank / r."""
    return rescaled(lora, plan.rank / rank_of(lora))


def at_client(lora: Tensors, plan: Plan, rank: int) -> dict[Key, Tensor]:
    """The first ``rank`` ranks of a LoRA of the server, on the scale alpha / ``rank``."""
    return rescaled(first_ranks(lora, rank), rank / plan.rank)


def rescaled(tensors: Tensors, factor: float) -> dict[Key, Tensor]:
    """``tensors`` with every B multiplied by ``factor``."""
    return {key: value * factor if key.part is Part.B else value for key, value in tensors.items()}


def first_ranks(lora: Tensors, rank: int) -> dict[Key, Tensor]:
    """The first ``rank`` ranks of a LoRA, on its own scale: A[:rank] and B[:, :rank]."""
    return {key: value[:, :rank] if key.part is Part.B else value[:rank] for key, value in lora.items()}


def padded_to(lora: Tensors, rank: int) -> dict[Key, Tensor]:
    """A LoRA of rank r with rank - r rows of zeros under A and as many columns of zeros beside B."""
    lacks = rank - rank_of(lora)
    sides = {Part.A: (0, 0, 0, lacks), Part.B: (0, lacks)}
    return {key: functional.pad(value, sides[key.part]) for key, value in lora.items()}
