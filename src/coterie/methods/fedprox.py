"""FedProx (arXiv 1812.06127, MLSys 2020), on a LoRA: FedIT whose clients are pulled towards what the server sent.

Client i minimises F_i(w) + mu/2 ||w - w_0||^2 (equation 2 of the paper), where w_0 is what it received this round: A, B
and the head if it is shared. The server averages as FedIT does: A <- sum p_i A_i, B <- sum p_i B_i, p_i = n_i / sum n.
With mu = 0 this is FedIT, bit for bit.

Differs from the paper: it is about whole models; here the pull is on A and on B, not on their product. Clients that are
slow do all of their steps: [train] is the same for all, and partial work does not occur. A personal head is not pulled,
because no other client has it.
Differs from the published code (commit d2a4501): that takes plain steps of SGD with the pull's gradient mu (w - w_0);
here any optimiser of [train] takes the gradient of both terms, and [train] clip bounds it. The paper's mu is one of
0.001, 0.01, 0.1 and 1, chosen by dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from coterie.methods.base import Method
from coterie.methods.fedit import FedIT, FedITState
from coterie.methods.findings import Finding
from coterie.methods.parts import Shapes, lora_of, settle
from coterie.methods.plan import MethodSettings
from coterie.requests import ClientProgram, Proximal, Train
from coterie.types import BaseSpec, ClientId, ClientInfo, Instruction, Personal, Reply, Tensors


class FedProxSettings(MethodSettings):
    """FedProx's settings."""

    mu: float = Field(0.01, ge=0, description="weight of the pull towards what the server sent; 0: FedIT")


@dataclass(frozen=True)
class FedProx(Method[FedITState]):
    """Client i minimises F_i(w) + mu/2 ||w - w_0||^2. All else is FedIT's."""

    settings: FedProxSettings

    name = "fedprox"
    title = "FedProx"
    paper = "arXiv 1812.06127 (MLSys 2020)"
    summary = "averages A and B; clients are pulled towards what they received"
    Settings = FedProxSettings
    State = FedITState

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        bank, mu = self.bank(ins, me, personal), self.settings.mu
        pull = Proximal(mu, frozenset(ins.tensors)) if mu else None
        trained = yield Train(bank, frozenset(bank.tensors), self.plan.optim, proximal=pull)
        return settle(self.plan, trained, me, personal, travels=lora_of(bank.tensors))

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> FedITState:
        return self._fedit.init(base, clients)

    def configure(self, state: FedITState, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        return self._fedit.configure(state, clients, rnd)

    def expects(self, state: FedITState, me: ClientInfo, rnd: int) -> Shapes:
        return self._fedit.expects(state, me, rnd)

    def aggregate(self, state: FedITState, replies: Mapping[ClientId, Reply], rnd: int) -> FedITState:
        return self._fedit.aggregate(state, replies, rnd)

    def experts(self, state: FedITState) -> Mapping[str, Tensors]:
        return self._fedit.experts(state)

    def describe(self, state: FedITState) -> Sequence[Finding]:
        return self._fedit.describe(state)

    @property
    def _fedit(self) -> FedIT:
        return FedIT(MethodSettings(), self.plan)


METHOD = FedProx
