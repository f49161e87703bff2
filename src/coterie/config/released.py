"""What each method releases, to whom, protected how in each mode: from the declarations that the modes use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from coterie.config.privacy import check_privacy
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import methods
from coterie.methods.releases import COMMON, Release
from coterie.methods.robust import RobustSettings
from coterie.methods.secure import SecureAggregationSettings, refusal
from coterie.types import CoterieError, Json

HEAD = (
    "method",
    "what a client sends",
    "who receives it",
    "when",
    "none",
    "robust",
    "DP at the server",
    "DP at the client",
    "DP of each row",
    "secure aggregation",
    "DP with secure aggregation",
)
INTRO = (
    "What every client sends with each method's default settings, and with heads shared. By default heads are "
    "personal and not sent: then the rows `head` do not apply. A row that belongs to another setting names it. What "
    "each release can give away is in [messages.md](../messages.md), and what a federation may claim in each mode in "
    "[SECURITY.md](../../SECURITY.md).",
    "`refused`: the run does not start. Where another setting lets it start, the cell names the setting, and what "
    "becomes of the release then. Secure sums need at least three clients in every group, whatever the method.",
)
CLEAR, REFUSED, NOT_SENT = "in the clear", "refused", "not sent"
_SERVER = PrivacySettings(unit="client", clip=1.0, noise_multiplier=1.0)
_MODES = {
    "robust": Plan(head="shared", robust=RobustSettings(rule="median")),
    "server": Plan(head="shared", privacy=_SERVER),
    "client": Plan(head="shared", privacy=_SERVER.model_copy(update={"noise_at": "client"})),
    "row": Plan(head="shared", dropout=0.0, privacy=_SERVER.model_copy(update={"unit": "example"})),
    "secure": Plan(head="shared", secure=SecureAggregationSettings(enabled=True)),
    "both": Plan(
        head="shared",
        privacy=_SERVER.model_copy(update={"noise_at": "sum"}),
        secure=SecureAggregationSettings(enabled=True),
    ),
}


# Settings of a method with which it runs in a mode that refuses its default settings; the first that does is named.
_OTHERWISE: Mapping[str, Sequence[Mapping[str, Json]]] = {
    "fedlease": ({"distance": "B"}, {"allocation": "oracle"}),
    "fedamole": ({"balance": 0}, {"assignment": "static", "clients_per_expert": 3}),
}
# Settings with which a client sends something more.
_BESIDE: Mapping[str, Mapping[str, Json]] = {"fedlease": {"download": "used"}, "smartfed": {"fresh_rank": 4}}


def table() -> list[tuple[str, ...]]:
    """A row for every release of every method, under :data:`HEAD`: see :data:`INTRO`."""
    rows = [row for kind in methods().values() for row in rows_of(kind)]
    return rows + [("every method", *_about(of), *(_protected(of, mode) for mode in _MODES)) for of in COMMON]


def rows_of(kind: type[Method]) -> Iterator[tuple[str, ...]]:
    """The rows of one method: of its default settings, and what it sends beside with others."""
    usual = _made(kind, {}).releases()
    for release in usual:
        yield (kind.name, *_about(release), *(_cell(kind, {}, release, mode) for mode in _MODES))
    beside = _BESIDE.get(kind.name, {})
    for release in _made(kind, beside).releases():
        if release.what not in {of.what for of in usual}:
            cells = (_cell(kind, beside, release, mode) for mode in _MODES)
            yield (kind.name, *_about(replace(release, what=f"{release.what}, with `{_text(beside)}`")), *cells)


def _cell(kind: type[Method], settings: Mapping[str, Json], release: Release, mode: str) -> str:
    """How a method with ``settings`` protects a release in a mode, or that it is refused, and what it runs with."""
    if not refusal_in(_made(kind, settings, mode), mode):
        return _protected(release, mode)
    for other in _OTHERWISE.get(kind.name, ()):
        method = _made(kind, {**settings, **other}, mode)
        if not refusal_in(method, mode):
            there = next((of for of in method.releases() if of.what == release.what), None)
            return f"{REFUSED}; with `{_text(other)}`: {_protected(there, mode) if there else NOT_SENT}"
    return REFUSED


def _made(kind: type[Method], settings: Mapping[str, Json], mode: str = "") -> Method:
    return kind(kind.Settings.model_validate(settings), _MODES[mode] if mode else Plan(head="shared"))


def _text(settings: Mapping[str, Json]) -> str:
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())


def refusal_in(method: Method, mode: str) -> str:
    """Why ``method`` is refused in a mode, "" if it is not: as a config with that mode is."""
    try:
        check_privacy(method, False, "last")
    except CoterieError as fault:
        return str(fault)
    if mode == "robust":
        return method.no_rules
    return refusal(method.plan.secure, method.releases(), method.plan.robust.active) or ""


def _about(release: Release) -> tuple[str, ...]:
    return (release.what, release.to, release.when, CLEAR)


def _protected(release: Release, mode: str) -> str:
    """How a release is protected in a mode in which the method runs."""
    if release.carried in ("joining", "failure") or not release.of_rows:
        return CLEAR
    if release.carried == "bank":
        return NOT_SENT if mode in ("client", "row", "both") else "in the clear, if the site allows it"
    if mode in ("server", "client", "row", "both"):
        return _with_noise(release, mode)
    if release.carried == "count":
        return "in the clear; rules count all alike" if mode == "robust" else CLEAR
    if mode == "secure" and release.carried == "info" and release.reads == "nothing":
        return NOT_SENT
    if release.carried != "tensors":
        return CLEAR
    if mode == "robust":
        each = CLEAR if release.measured else "in the clear; outliers left out"
        return "in the clear; averaged by the rule" if release.reads == "sum" else each
    return "only a group's sum"


def _with_noise(release: Release, mode: str) -> str:
    if release.carried != "tensors":
        return NOT_SENT
    if mode == "both":
        return "cut; only a group's sum, with noise"
    if mode == "row":
        return "cut by row; noise in their mean" if release.mean_of_rows else "noise in every step of its training"
    if mode == "client":
        return "cut, with the client's own noise"
    return "cut; noise in the group's sum" if release.reads == "sum" else "cut; noise in each client's own"
