"""Centralised: one LoRA on the rows of all clients together. The upper reference, for simulations only.

    A, B, heads <- training on the union of all rows, each row through the head of its own label space

One client, the first by id, trains for all: its request names everyone's rows (``Train.rows_of``), which only a
simulation can answer. A micro-batch has rows of one label space; their order is random. As with any other method, a
round passes over every row ``[train] epochs`` times, or takes as many steps as all clients together, with a new
optimiser.

Ours: there is no paper. The heads belong to label spaces (clients with the same labels in the same order), whatever
``[task] head`` says; what clients are sent is what they evaluate with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.methods.base import Method
from coterie.methods.findings import Finding, Notes
from coterie.methods.parts import (
    Shapes,
    label_space,
    lora_of,
    numbered_head,
    one_head,
    shapes_of,
    start_head,
    start_lora,
    statistics,
)
from coterie.methods.releases import Release
from coterie.requests import ClientProgram, Optim, Train
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Personal,
    Reply,
    Tensors,
)

NOTE = (
    "centralised trains on the rows of all clients in one place, as no federation could: it is a reference for the "
    "other methods. The bytes that it counts are without those rows."
)


@dataclass(frozen=True)
class CentralisedState:
    """One LoRA, a head for each label space (numbered by its keys' expert), and each client's label space."""

    tensors: Tensors
    spaces: Mapping[ClientId, int]


@dataclass(frozen=True)
class Centralised(Method[CentralisedState]):
    """The method; see the module's docstring."""

    name = "centralised"
    title = "Centralised"
    paper = "-"
    summary = "one LoRA on all clients' rows together: an upper reference, in simulations only"
    no_rules = "nothing is averaged"
    newcomers = "centralised has joined all clients' rows from the start"
    needs_all_rows = True
    State = CentralisedState

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> CentralisedState:
        ordered = sorted(clients, key=lambda client: client.id)
        number = {space: i for i, space in enumerate(dict.fromkeys(map(label_space, ordered)))}
        tensors = start_lora(base, self.plan)
        for client in ordered:
            tensors |= numbered_head(start_head(base, self.plan, client), number[label_space(client)])
        return CentralisedState(tensors, {c.id: number[label_space(c)] for c in ordered})

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        return Personal()

    def configure(
        self, state: CentralisedState, clients: Sequence[ClientInfo], rnd: int
    ) -> Mapping[ClientId, Instruction]:
        if missing := sorted(state.spaces.keys() - {client.id for client in clients}):
            raise CoterieError(
                f"centralised needs the rows of all clients, but {missing[0]} is not in round {rnd}; "
                "set [run] cohort = 1"
            )
        return {c.id: self._instruction(state, c.id) for c in clients}

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        if "rows_of" not in ins.info:
            return ClientResult(Reply({}, me.num_train), personal)
        bank = Bank(ins.tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)
        rows_of = ins.info["rows_of"]
        trained = yield Train(bank, frozenset(bank.tensors), self._optim(len(rows_of)), rows_of=rows_of)
        return ClientResult(Reply(trained.tensors, me.num_train, statistics(trained)), personal)

    def expects(self, state: CentralisedState, me: ClientInfo, rnd: int) -> Shapes:
        return shapes_of(state.tensors) if me.id == _trains(state) else {}

    def releases(self) -> Sequence[Release]:
        why = "one client trains on the rows of all"
        return (Release("A, B and heads, trained on all rows", reads="each", why=why),)

    def aggregate(self, state: CentralisedState, replies: Mapping[ClientId, Reply], rnd: int) -> CentralisedState:
        trains = _trains(state)
        if trains not in replies:
            raise CoterieError(f"round {rnd}: {trains}, which trains on all clients' rows, sent no valid reply")
        return replace(state, tensors=replies[trains].tensors)

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        tensors = one_head(ins.tensors, ins.info["head"])
        return Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)

    def experts(self, state: CentralisedState) -> Mapping[str, Tensors]:
        return {"centralised": lora_of(state.tensors)}

    def describe(self, state: CentralisedState) -> Sequence[Finding]:
        return [Notes([NOTE])]

    def _instruction(self, state: CentralisedState, client: ClientId) -> Instruction:
        """The LoRA, all heads and the client's head; for the client that trains, everyone's heads."""
        rows_of = {"rows_of": dict(state.spaces)} if client == _trains(state) else {}
        return Instruction(state.tensors, {"head": state.spaces[client], **rows_of})

    def _optim(self, clients: int) -> Optim:
        """As many steps as all clients take in a round, where ``[train] steps`` sets each one's."""
        optim = self.plan.optim
        return optim.model_copy(update={"steps": optim.steps * clients})


def _trains(state: CentralisedState) -> ClientId:
    """The client that trains for all."""
    return min(state.spaces)


METHOD = Centralised
