"""Whether a run goes as it should: enough replies in a round, and losses that a model can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coterie.runs.events import Evaluated
from coterie.types import ClientId

_NOT_FINITE = "not finite"  # in every text on training that diverged, a client's own and the server's
_WORST_LOSS = 20.0  # nats per row or token: guessing costs the logarithm of the vocabulary, 12.5 for the largest
_SHOWN = 3  # clients that a text names


def quorum_fault(rnd: int, replies: int, cohort: int, failed: Mapping[ClientId, str], needed: int) -> str | None:
    """Why a round cannot be averaged, or None: of ``cohort`` clients, ``replies`` replies can be used."""
    if replies >= needed:
        return None
    reasons = "; ".join(named(client, reason) for client, reason in list(failed.items())[:_SHOWN])
    diverged = sum(_NOT_FINITE in reason for reason in failed.values())
    if 2 * diverged > len(failed):
        return (
            f"round {rnd}: training diverged at {diverged} of {cohort} clients, which leaves {replies} replies, and "
            f"the quorum is {needed}; lower [train] learning_rate. {reasons}"
        )
    return (
        f"round {rnd}: {replies} of {cohort} clients sent a usable reply, but the quorum is {needed} ([run] "
        f"quorum). {reasons}"
    )


def loss_note(evaluated: Sequence[Evaluated]) -> str | None:
    """A warning where the last one of ``evaluated`` is the first with a loss that is worse than any guess."""
    if not evaluated or any(map(_absurd, evaluated[:-1])):
        return None
    bad = _absurd(evaluated[-1])
    if not bad:
        return None
    worst = ", ".join(f"{client} {split} {value:,.0f}" for client, split, value in bad[:_SHOWN])
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return (
        f"round {evaluated[-1].round} has losses that are worse than any guess ({worst}{more}): training diverges; "
        "lower [train] learning_rate"
    )


def named(client: ClientId, fault: str) -> str:
    """``fault`` with the name of its client before it, once."""
    return fault if fault.startswith(f"client {client}") else f"{client}: {fault}"


def _absurd(event: Evaluated) -> list[tuple[ClientId, str, float]]:
    """(client, split, loss) of every loss that is not finite or beyond all reason, the largest first."""
    losses = [
        (client, split, math.inf if loss is None or math.isnan(loss) else loss)
        for client, splits in event.clients.items()
        for split, metrics in splits.items()
        if "loss" in metrics
        for loss in [metrics["loss"]]
    ]
    return sorted((entry for entry in losses if entry[2] > _WORST_LOSS), key=lambda entry: -entry[2])
