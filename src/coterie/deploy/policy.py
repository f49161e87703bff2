"""What a site agreed to, enforced at the site: methods, settings, optimiser steps, and the parts that it sends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coterie.compute.client import LocalCompute
from coterie.config.deployment import Policy, SiteIdentity
from coterie.config.sections import Config
from coterie.engines.client import Guard
from coterie.methods.base import Method
from coterie.requests import Observe, Observed, Score, Scored, Train, Trained
from coterie.runs.folder import plain
from coterie.types import FOLDED, CoterieError, Instruction, Part, Reply


def check_policy(policy: Policy, config: Config, method: Method) -> None:
    """Raises :class:`CoterieError` for what this site did not agree to in the server's config."""
    name = config.method_name
    if policy.methods and name not in policy.methods:
        raise CoterieError(f"this site does not run {name}, only {', '.join(policy.methods)} ([policy] methods)")
    for what, value, limit in (
        ("rank", method.max_rank, policy.max_rank),
        ("rounds", config.run.rounds, policy.max_rounds),
    ):
        if value > limit:
            raise CoterieError(f"this site allows {what} up to {limit}, but the run has {value} ([policy] max_{what})")
    settings = plain(config)
    for key, wanted in policy.settings.items():
        actual: object = settings
        for part in key.split("."):
            actual = actual.get(part) if isinstance(actual, dict) else None
        if actual not in (wanted if isinstance(wanted, list) else [wanted]):
            raise CoterieError(f"this site requires {key} = {wanted!r}, but the run has {actual!r} ([policy] settings)")


def check_active(site: SiteIdentity, method: Method) -> None:
    """Raises :class:`CoterieError` if this site wants fewer active experts than the run, and the method has no such."""
    if site.active is not None and (fault := method.active_fault()):
        raise CoterieError(f"[site] active = {site.active} at {site.id}: {fault}")


def check_ranks(policy: Policy, ins: Instruction) -> None:
    """Raises :class:`CoterieError` if an expert that was sent, or an adapter of a pool, has too high a rank.

    The folded expert, which stands for a change of the base, may have as many ranks as the base's matrix.
    """
    for key, value in ins.tensors.items():
        if key.part in (Part.A, Part.B):
            rank, side = value.shape[:: 1 if key.part is Part.A else -1] if value.ndim == 2 else (math.inf, 0)
            limit = side if key.expert == FOLDED else policy.max_rank
            if rank > limit:
                raise CoterieError(f"{key} has rank {rank}, but this site allows at most {limit} ([policy] max_rank)")


def check_upload(policy: Policy, reply: Reply) -> None:
    """Raises :class:`CoterieError` if ``reply`` holds a part that this site keeps to itself."""
    kept = sorted({key.part.value for key in reply.tensors} - {part.value for part in policy.upload})
    if kept:
        raise CoterieError(f"this site does not send {', '.join(kept)} ([policy] upload)")


def without_usage(policy: Policy, method: Method, reply: Reply) -> Reply:
    """``reply`` without how the rows use the experts, if the site keeps that to itself."""
    if policy.upload_usage:
        return reply
    return replace(reply, info={name: value for name, value in reply.info.items() if name not in method.usage})


def guard_of(policy: Policy, method: Method, wording: Callable[[Exception], str]) -> Guard:
    """What ``policy`` allows in a round: ranks, steps, what leaves this site.

    ``wording`` gives the text about a fault that is sent to the server.
    """

    def release(reply: Reply) -> Reply:
        check_upload(policy, reply)
        return without_usage(policy, method, reply)

    return Guard(
        admit=lambda ins: check_ranks(policy, ins),
        compute=lambda compute: BoundedCompute(compute, policy.max_steps),
        release=release,
        wording=wording,
    )


@dataclass(frozen=True)
class BoundedCompute:
    """A client's compute with a bound on the optimiser steps of its round, which it counts before it trains."""

    inner: LocalCompute
    bound: int
    taken: list[int] = field(default_factory=list)

    def train(self, request: Train) -> Trained:
        steps = request.optim.steps_on(len(self.inner.workplace.examples(self.inner.client, "train")))
        if sum(self.taken) + steps > self.bound:
            raise CoterieError(
                f"round {self.inner.rnd} would take {sum(self.taken) + steps} steps here, but this site allows "
                f"{self.bound} ([policy] max_steps)"
            )
        self.taken.append(steps)
        return self.inner.train(request)

    def score(self, request: Score) -> list[Scored]:
        return self.inner.score(request)

    def observe(self, request: Observe) -> Observed:
        return self.inner.observe(request)
