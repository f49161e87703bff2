"""Local: every client fine-tunes one LoRA on its own data, and nothing but metrics travels. The lower reference.

Where clients have ranks of their own (``[lora] ranks``), the server tells each client its rank, and the client starts
from the first rows of one A of the largest rank, as with the other methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.methods.base import Method
from coterie.methods.parts import Shapes, head_of, lora_of, start_head, start_lora, statistics
from coterie.methods.ranks import Ranks, first_ranks, rank_of, start_ranks
from coterie.methods.releases import Release
from coterie.requests import ClientProgram, Train
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, ClientResult, Instruction, Personal, Reply


@dataclass(frozen=True)
class LocalState:
    """The clients' ranks: the server keeps nothing else."""

    ranks: Ranks


@dataclass(frozen=True)
class Local(Method[LocalState]):
    """Every client alone: A, B and the head are personal."""

    name = "local"
    title = "Local"
    paper = "-"
    summary = "every client alone"
    no_rules = "nothing is averaged"
    mixed_ranks = True
    State = LocalState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> LocalState:
        start_lora(base, self.plan)  # raises for a base without targets
        return LocalState(start_ranks(self.plan, clients))

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        """A of the largest rank: :meth:`bank` takes the client's own."""
        largest = replace(self.plan, rank=self.plan.max_rank)
        return Personal({**start_lora(base, largest), **start_head(base, self.plan, me)})

    def configure(self, state: LocalState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        ranks = {c.id: {"rank": state.ranks.of(c.id)} if self.plan.ranks else {} for c in clients}
        return {client: Instruction({}, info) for client, info in ranks.items()}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank = self.bank(ins, me, personal)
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim)
        return ClientResult(Reply({}, me.num_train, statistics(trained)), Personal(trained.tensors))

    def expects(self, state: LocalState, me: ClientInfo, rnd: int) -> Shapes:
        return {}

    def releases(self) -> Sequence[Release]:
        return ()

    def aggregate(self, state: LocalState, replies: Mapping[ClientId, Reply], rnd: int) -> LocalState:
        return state

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        lora = first_ranks(lora_of(personal.tensors), int(ins.info.get("rank", self.plan.rank)))
        scaling = self.plan.alpha / rank_of(lora)
        return Bank({**lora, **head_of(personal.tensors)}, scaling=scaling, dropout=self.plan.dropout)


METHOD = Local
