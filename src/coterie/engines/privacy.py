"""What a client takes out of a reply, or adds to it, before it is sent: see :mod:`coterie.methods.privacy`."""

from __future__ import annotations

from coterie.methods.base import Method
from coterie.methods.privacy import client_multiplier, private_reply
from coterie.ops.noise import SecureNoise, SeededNoise
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
    noise = SeededNoise(method.plan.seed) if settings.noise_source == "seeded" else SecureNoise()
    start = method.started_from(spec, None, me, ins, reply)
    return private_reply(settings, multiplier, reply, start, noise, kept, rnd, me.id)
