"""What ``[privacy]`` is refused with: settings under which it would only look private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from coterie.methods.base import Method
from coterie.methods.releases import Release, each_of
from coterie.types import CoterieError


def check_privacy(method: Method, samples: bool, export: Literal["best", "last"]) -> None:
    """Raise :class:`CoterieError` for a run whose ``[privacy]`` would not hold, with the setting that fixes it.

    ``samples``: whether a round has only some of the clients.
    """
    settings = method.plan.privacy
    if not settings.active:
        return
    for fault in _faults(method, samples):
        raise CoterieError(f"[privacy] does not work with {method.name} here: {fault}")
    if settings.metrics == "unprotected" and export == "best":
        raise CoterieError(
            '[privacy] metrics = "unprotected" would choose the round to export by metrics without noise; set [run] '
            'export = "last"'
        )


def _faults(method: Method, samples: bool) -> Iterator[str]:
    settings, releases = method.plan.privacy, method.releases()
    if not any(release.carried == "tensors" for release in releases):
        yield "it sends no tensors, so there is nothing to add noise to; leave [privacy] out"
    if method.no_rules:
        yield f"its server takes no clipped mean: {method.no_rules}; choose another method, such as fedit"
    for release in each_of(releases):
        if release.carried == "info" and release.of_rows:
            yield f"each client sends {release.what} as it is, because {release.why}; set {release.instead}"
    if getattr(method.settings, "weighting", "uniform") == "examples":
        yield (
            "the noise is for means in which all clients weigh the same, and here a client with more rows weighs more; "
            'set [method] weighting = "uniform"'
        )
    if method.plan.robust.active and settings.by_server:
        yield 'the rules of [robust] change what the noise is for; set noise_at = "client", or leave [robust] out'
    if method.plan.secure.enabled:
        yield "its noise does not go together with secure aggregation yet; leave [secure_aggregation] out, or [privacy]"
    by_client = [release for release in each_of(releases) if release.carried == "tensors"]
    if samples and settings.by_server and by_client:
        yield _sampled(by_client[0])


def _sampled(release: Release) -> str:
    other = f", or {release.instead}" if release.instead else ""
    return (
        f"the server reads {release.what} of each client by itself, so it shows who was drawn; set [run] cohort = 1 "
        f'and sampling = "fixed"{other}'
    )
