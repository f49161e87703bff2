"""What ``[privacy]`` is refused with: settings under which it would only look private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from coterie.methods.base import Method
from coterie.methods.privacy import PrivacySettings
from coterie.methods.releases import Release, each_of
from coterie.methods.secure import SecureAggregationSettings
from coterie.methods.sum_noise import MOST_BITS
from coterie.types import CoterieError


def check_privacy(method: Method, samples: bool, export: Literal["best", "last"]) -> None:
    """Raise :class:`CoterieError` for a run whose ``[privacy]`` would not hold, with the setting that fixes it.

    ``samples``: whether a round has only some of the clients.
    """
    settings = method.plan.privacy
    if not settings.active:
        return
    for fault in (_by_row if settings.by_row else _faults)(method, samples):
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
    yield from _in_sums(settings, method.plan.secure)
    by_client = [release for release in each_of(releases) if release.carried == "tensors"]
    if samples and settings.by_server and by_client:
        yield _sampled(by_client[0])


def _in_sums(settings: PrivacySettings, secure: SecureAggregationSettings) -> Iterator[str]:
    """What keeps the noise of ``noise_at = "sum"`` out of the sums, or sums without it in the server's hands."""
    if secure.enabled and settings.by_server:
        yield (
            'the server would learn sums before they have noise; set noise_at = "sum", or leave [secure_aggregation] '
            "out"
        )
    if not settings.by_sum:
        return
    if not secure.enabled:
        yield (
            'with noise_at = "sum" each client adds a part of the noise, which hides nothing by itself; set '
            "[secure_aggregation] enabled = true"
        )
    most = 2 * secure.threshold - 1
    if settings.colluding > most + 1e-9:
        yield (
            f"secure sums protect from fewer than {most:.3g} of their clients (2 * threshold - 1), and colluding is "
            f"{settings.colluding:.3g}; lower it, or raise [secure_aggregation] threshold"
        )
    if secure.bits > MOST_BITS:
        yield f"the noise is no finer than {MOST_BITS} bits; set [secure_aggregation] bits = {MOST_BITS} or less"


def _by_row(method: Method, samples: bool) -> Iterator[str]:
    """What keeps ``unit = "example"`` from covering all that leaves a client."""
    releases, plan = method.releases(), method.plan
    if not any(release.carried == "tensors" for release in releases):
        yield "it sends no tensors, so there is nothing to hide; leave [privacy] out"
    if method.needs_all_rows:
        yield "it trains on all clients' rows in one place; choose another method, such as fedit"
    if method.beyond_training:
        yield f"its clients {method.beyond_training}, which would have no noise; choose another method, such as fedit"
    for release in releases:
        measured = release.measured or (release.carried == "info" and release.reads == "each")
        if release.of_rows and measured and not release.mean_of_rows:
            how = f"set {release.instead}" if release.instead else "choose another method, such as fedit"
            yield f"each client sends {release.what}, which is measured and not trained; {how}"
    if getattr(method.settings, "weighting", "uniform") == "examples":
        yield 'it would weigh clients by their rows, whose count it does not get; set [method] weighting = "uniform"'
    if getattr(method.settings, "balance", 0):
        yield "its load-balance loss mixes the rows of a batch; set [method] balance = 0"
    if getattr(method.settings, "embed_rows", "all") == "held_out":
        yield 'the noise is for training on all rows, and it sets some aside; set [method] embed_rows = "all"'
    if plan.dropout:
        yield "dropout of a row goes by its place in the batch, and so by the other rows; set [lora] dropout = 0"
    if plan.optim.packing:
        yield "packing puts rows together; set [train] packing = false"


def check_training(by_row: bool, checkpointing: bool, objective: str) -> None:
    """Raise :class:`CoterieError` for settings of a run with which the gradients of rows cannot be cut one by one."""
    faults = {
        "layers that run again count twice; set [model] gradient_checkpointing = false": checkpointing,
        'it trains on rows and not on pairs; set [task] objective = "likelihood"': objective == "dpo",
    }
    for why, wrong in faults.items():
        if by_row and wrong:
            raise CoterieError(f'[privacy] unit = "example" does not work here: {why}')


def _sampled(release: Release) -> str:
    other = f", or {release.instead}" if release.instead else ""
    return (
        f"the server reads {release.what} of each client by itself, so it shows who was drawn; set [run] cohort = 1 "
        f'and sampling = "fixed"{other}'
    )
