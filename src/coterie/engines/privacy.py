"""What a client takes out of a reply, or adds to it, before it is sent, and how its training hides its rows.

See :mod:`coterie.methods.privacy` and :mod:`coterie.methods.row_privacy`.
"""

from __future__ import annotations

from coterie.methods.base import Method
from coterie.methods.privacy import client_multiplier, private_reply
from coterie.methods.row_privacy import RowPrivacy, measures_in, row_multiplier
from coterie.ops.noise import SecureNoise, noise_from
from coterie.types import BaseSpec, ClientInfo, Instruction, Reply


def hidden(method: Method, spec: BaseSpec, me: ClientInfo, ins: Instruction, reply: Reply, rnd: int) -> Reply:
    """``reply`` as ``[privacy]`` lets it leave the client; as it is without."""
    settings = method.plan.privacy
    if not settings.active:
        return reply
    releases = method.releases()
    kept = [name for of in releases if of.carried == "info" and not of.of_rows for name in of.names]
    if not settings.by_client:
        return private_reply(settings, 0.0, reply, {}, SecureNoise(), kept)
    multiplier = client_multiplier(settings, releases, method.plan.rounds)
    noise = noise_from(settings.noise_source, method.plan.seed)
    start = method.started_from(spec, None, me, ins, reply)
    return private_reply(settings, multiplier, reply, start, noise, kept, rnd, me.id)


def row_privacy(method: Method, me: ClientInfo, rnd: int) -> RowPrivacy | None:
    """How the client's training of round ``rnd`` hides its rows; None where that is not what is protected.

    Its noise comes from a key of its own, which nobody keeps: a round that is done again has other noise.
    """
    settings, plan = method.plan.privacy, method.plan
    if not settings.by_row:
        return None
    releases = method.releases()
    multiplier = row_multiplier(settings, plan.optim, me.num_train, plan.rounds, releases)
    noise = noise_from(settings.noise_source, plan.seed)
    measures = measures_in(releases, rnd, plan.rounds)
    return RowPrivacy(settings.clip, multiplier, noise, plan.optim, me.num_train, settings.embedding_clip, measures)
