"""What each method releases, to whom, protected how in each mode: from the declarations that the modes use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coterie.config.privacy import check_privacy
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import methods
from coterie.methods.releases import COMMON, Release
from coterie.methods.robust import RobustSettings
from coterie.methods.secure import SecureAggregationSettings, refusal
from coterie.types import CoterieError

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


def table() -> list[tuple[str, ...]]:
    """A row for every release of every method with default settings and shared heads, under :data:`HEAD`."""
    rows = [row for kind in methods().values() for row in rows_of(kind)]
    common = dict.fromkeys(_MODES, "")
    return rows + [("every method", *_texts(release, common)) for release in COMMON]


def rows_of(kind: type[Method]) -> Iterator[tuple[str, ...]]:
    """The rows of one method."""
    settings = kind.Settings()
    refused = {mode: refusal_in(kind(settings, plan), mode) for mode, plan in _MODES.items()}
    for release in kind(settings, Plan(head="shared")).releases():
        yield (kind.name, *_texts(release, refused))


def refusal_in(method: Method, mode: str) -> str:
    """Why ``method`` is refused in a mode, "" if it is not: as a config with that mode is."""
    try:
        check_privacy(method, False, "last")
    except CoterieError as fault:
        return str(fault)
    if mode == "robust":
        return method.no_rules
    return refusal(method.plan.secure, method.releases(), method.plan.robust.active) or ""


def _texts(release: Release, refused: dict[str, str]) -> Sequence[str]:
    modes = [REFUSED if refused[mode] else _protected(release, mode) for mode in _MODES]
    return (release.what, release.to, release.when, CLEAR, *modes)


def _protected(release: Release, mode: str) -> str:
    """How a release is protected in a mode in which the method runs."""
    if release.carried == "joining" or not release.of_rows:
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
