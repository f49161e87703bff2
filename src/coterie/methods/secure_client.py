"""A client's side of secure aggregation: its update, its vector for a sum, and the sessions that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose

import numpy as np

from coterie.methods.releases import Release
from coterie.methods.secure import SecureAggregationSettings, bound_of, in_the_clear, layout_of, weighs
from coterie.methods.secure_start import Begun
from coterie.methods.sum_noise import SumNoise
from coterie.secure import fixed_point
from coterie.secure.fixed_point import Integers
from coterie.secure.session import SecureSumError, Session
from coterie.types import ClientId, Reply, Tensors

_CALCULATED = 1e-6  # relative: each side calculates the noise by itself
_STEPS = 4.0  # of the grid, which the largest value of an update has to move a sum by


@dataclass(frozen=True)
class Update:
    """A client's update of a round, in float64, shortened as one vector; and the examples that it may count for."""

    tensors: Tensors
    examples: int
    shortened: bool


def update_of(reply: Reply, start: Tensors, clip: float, noise: SumNoise | None = None) -> Update:
    """What ``reply`` changes beside ``start``, at most ``clip`` long, or as long as where it gets ``noise``.

    Whether it was shortened is not said then. Raises :class:`SecureSumError` if it is not finite.
    """
    if noise:
        return Update(noise.update(reply, start), reply.num_examples, shortened=False)
    moved = {k: v.double() - start[k].double() if k in start else v.double() for k, v in reply.tensors.items()}
    norm = float(sum(float(value.square().sum()) for value in moved.values())) ** 0.5
    if not norm < float("inf"):
        raise SecureSumError("the update has values that are not finite")
    factor = min(1.0, clip / norm) if norm else 1.0
    tensors = {key: value * factor for key, value in moved.items()} if factor < 1 else moved
    return Update(tensors, reply.num_examples, factor < 1)


def vector_of(update: Update, client: ClientId, session: Session, noise: SumNoise | None = None) -> Integers:
    """A client's vector for ``session``, with its part of the ``noise``.

    Raises :class:`SecureSumError` if the session is not about its update, or its weights and grid would round the
    update away, which leaves the sum to the other members.
    """
    share = weighs(session.most_examples, update.examples) / session.total
    mine = {}
    for key, shape in layout_of(session):
        value = update.tensors.get(key)
        if value is None or tuple(value.shape) != shape:
            raise SecureSumError(f"the session wants {key} of the shape {list(shape)}, which this client does not have")
        mine[key] = value
    if not 0 < share <= 1:
        raise SecureSumError(
            f"the session gives this client a weight of {share:g}, which must be above 0 and at most 1"
        )
    bound, bits = session.bound, session.bits
    beside = fixed_point.encode(np.array([share, float(update.shortened)]) * bound, bound, bits)
    if noise:
        return np.concatenate([noise.encoded(client, mine, share, session), beside])
    values = share * np.concatenate([value.flatten().numpy() for value in mine.values()])
    steps = float(np.abs(values).max(initial=0.0)) * 2.0 ** (bits - 1) / bound
    if 0 < steps < _STEPS:
        raise SecureSumError(
            f"with its weight of {share:.3g}, this client's update is {steps:.2g} steps of the grid at most, and "
            f"{_STEPS:g} are needed; raise [secure_aggregation] bits, or lower clip"
        )
    return np.concatenate([fixed_point.encode(values.clip(-bound, bound), bound, bits), beside])


def check_session(
    settings: SecureAggregationSettings,
    session: Session,
    run: str,
    rnd: int,
    uniform: bool,
    begun: Begun,
    noise: SumNoise | None = None,
) -> None:
    """Raises :class:`SecureSumError` at a client for a session of another run, round, setting, weighting or start."""
    wanted = (settings.bits, settings.threshold, settings.min_group, settings.neighbours)
    bound = bound_of(settings, noise, len(session.members))
    if (session.bits, session.threshold, session.min_group, session.neighbours) != wanted or not isclose(
        session.bound, bound, rel_tol=_CALCULATED if noise else 0.0
    ):
        raise SecureSumError("the session has other settings than [secure_aggregation] of the run")
    if (session.run, session.rnd) != (run, rnd):
        raise SecureSumError(f"the session is of round {session.rnd} of another run or attempt, not of round {rnd}")
    if uniform != (session.most_examples == 0) or (uniform and session.total != len(session.members)):
        raise SecureSumError("the session weighs clients in another way than the method does")
    if not uniform and session.total > len(session.members) * session.most_examples * (1 + _CALCULATED):
        raise SecureSumError(
            f"the session's weights are divided by {session.total:g}, and its {len(session.members)} sites have at "
            f"most {session.most_examples} examples each"
        )
    if session.start != tuple(begun.of(key) for key, _ in layout_of(session)):
        raise SecureSumError("the session's sites start from other values than this site was sent")
    if session.instruction != begun.instruction:
        raise SecureSumError("the session's sites were sent another instruction than this site")


def without_statistics(reply: Reply, releases: Sequence[Release]) -> Reply:
    """``reply`` with nothing in ``info`` but what the server needs of each client."""
    kept = in_the_clear(releases)
    return replace(reply, info={name: value for name, value in reply.info.items() if name in kept})
