"""A client that was not there joins a run that has finished, with the experts frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coterie.compute.client import LocalCompute
from coterie.methods.base import Method, Onboarded, drive
from coterie.ops.metrics import Metrics
from coterie.requests import Score, Train
from coterie.types import Bank, ClientId

EPOCHS = 10  # over the client's training rows, by default


@dataclass(frozen=True)
class Joined:
    """A client that joined: its bank, and what it scores on its test rows before and after its router and head train.

    ``number`` of its tensors were trained; where there are none, ``after`` is ``before``. Without test rows both are
    empty.
    """

    client: ClientId
    bank: Bank
    before: Metrics
    after: Metrics
    trained: int


def join(method: Method, state: object, compute: LocalCompute, epochs: int) -> Joined:
    """Find the client's experts, train its router and head, and score it before and after.

    The learning rate is that of a first round: the client is new, whatever the run's rates have decayed to.
    """
    method = replace(method, plan=replace(method.plan, optim=method.plan.optim.model_copy(update={"round_decay": 1.0})))
    spec, me = compute.workplace.base.spec, compute.client.info
    found: Onboarded = drive(method.onboard(state, spec, me), compute)
    before = _score(compute, found.bank)
    bank = found.bank
    if found.trainable:
        optim = method.plan.optim.model_copy(update={"epochs": epochs, "steps": 0})
        trained = compute.train(Train(bank, found.trainable, optim, purpose="onboard"))
        bank = replace(bank, tensors={**bank.tensors, **trained.tensors})
    return Joined(me.id, bank, before, _score(compute, bank), len(found.trainable))


def _score(compute: LocalCompute, bank: Bank) -> Metrics:
    if not compute.client.splits["test"]:
        return {}
    (scored,) = compute.score(Score([bank], "test"))
    return {"loss": scored.loss, **scored.metrics}
