"""A client that was not there joins a run that has finished, with the experts frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coterie.compute.client import LocalCompute
from coterie.methods.base import Compute, Method, Onboarded, drive
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
    """As :func:`join_with`, of a method's ``state`` after the last round.

    Raises :class:`CoterieError` where no client can join.
    """
    return join_with(method, method.welcome(state, compute.client.info), compute, epochs)


def join_with(
    method: Method,
    welcome: object,
    local: LocalCompute,
    epochs: int,
    guarded: Callable[[LocalCompute], Compute] = lambda compute: compute,
) -> Joined:
    """Find the client's experts by the method's ``welcome``, train its router and head, score it before and after.

    ``guarded`` wraps the compute, as a site's policy does. The learning rate is that of a first round: the client is
    new, whatever the run's rates have decayed to.
    """
    method = replace(method, plan=replace(method.plan, optim=method.plan.optim.model_copy(update={"round_decay": 1.0})))
    spec, me, compute = local.workplace.base.spec, local.client.info, guarded(local)
    found: Onboarded = drive(method.onboard(welcome, spec, me), compute)
    tested = bool(local.client.splits["test"])
    before = _score(compute, found.bank) if tested else {}
    bank = found.bank
    if found.trainable:
        optim = method.plan.optim.model_copy(update={"epochs": epochs, "steps": 0})
        trained = compute.train(Train(bank, found.trainable, optim, purpose="onboard", rates=found.rates))
        bank = replace(bank, tensors={**bank.tensors, **trained.tensors})
    return Joined(me.id, bank, before, _score(compute, bank) if tested else {}, len(found.trainable))


def _score(compute: Compute, bank: Bank) -> Metrics:
    (scored,) = compute.score(Score([bank], "test"))
    return {"loss": scored.loss, **scored.metrics}
