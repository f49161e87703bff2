"""The head of a message to a site: what the message is for, checked before anything else is done with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from coterie.data.clients import SAFE_ID
from coterie.flower.message import KINDS
from coterie.secure.steps import STEPS
from coterie.types import ClientId, CoterieError, ExportedAs, Json

_TYPES: dict[str, type] = {
    "kind": str,
    "client": str,
    "round": int,
    "run": str,
    "attempt": int,
    "since": int,
    "keep": int,
    "kept_rounds": list,
    "terms": dict,
}
_SPLITS = ("validation", "test")  # that a server may have scored
MOST = 1000  # rounds in a list
_MAX = 10**6  # a site's files of states have six digits


@dataclass(frozen=True)
class Head:
    """See :meth:`coterie.deploy.agreement.Agreement.message`. ``splits`` and ``usage`` are for evaluation,
    ``export`` for the bank that the site writes, ``step`` for a secure sum; ``starts``: earlier attempts, and
    the round that each went back to."""

    kind: str
    client: ClientId
    rnd: int
    run: str
    attempt: int
    since: int
    keep: int
    kept_rounds: tuple[int, ...]
    terms: Mapping[str, Json]
    splits: tuple[str, ...] = ()
    usage: bool = False
    export: ExportedAs = "last"
    step: str = ""
    starts: tuple[tuple[int, int], ...] = ()


def read_head(head: Mapping[str, Json]) -> Head:
    """The head of a message. Raises :class:`CoterieError` if it is not valid."""
    kind, splits, export = head.get("kind"), head.get("splits", []), head.get("export", "last")
    if kind not in KINDS:
        raise CoterieError(f"this site does not know the kind {str(kind)[:80]!r}; install the same version of coterie")
    for name, wanted in _TYPES.items():
        if type(head.get(name)) is not wanted:
            raise CoterieError(f"the message's {name} is not of the type {wanted.__name__}")
        if wanted is int and not 0 <= head[name] < _MAX:
            raise CoterieError(f"the message's {name} is {head[name]}; it must be at least 0 and below {_MAX}")
    if not isinstance(splits, list) or not all(split in _SPLITS for split in splits):
        raise CoterieError(
            f"the message's splits are not among {', '.join(_SPLITS)}: a site scores no other rows for a server, "
            "because the loss of training rows says whether a text is among them"
        )
    if export not in ("best", "last"):
        raise CoterieError("the message's export is neither best nor last")
    if not SAFE_ID.fullmatch(head["run"]):
        raise CoterieError("the message's run is not a valid folder name")
    if not _are_rounds(head["kept_rounds"]):
        raise CoterieError(f"the message's kept_rounds is not a list of at most {MOST} rounds")
    if (step := head.get("step", "")) not in ("", *STEPS):
        raise CoterieError(f"the message's step is not one of {', '.join(STEPS)}")
    values = {name: head[name] for name in _TYPES if name not in ("round", "kept_rounds")}
    return Head(
        **values,
        rnd=head["round"],
        kept_rounds=tuple(head["kept_rounds"]),
        splits=tuple(splits),
        usage=bool(head.get("usage")),
        export=export,
        step=step,
        starts=_starts(head),
    )


def _starts(head: Mapping[str, Json]) -> tuple[tuple[int, int], ...]:
    starts = head.get("starts", [])  # an older server does not say them
    if not isinstance(starts, list) or not all(_are_rounds(start, 2) and len(start) == 2 for start in starts):
        raise CoterieError("the message's starts are not pairs of an attempt and a round")
    if len(starts) > MOST:
        raise CoterieError(f"the message has more than {MOST} starts")
    return tuple((attempt, rnd) for attempt, rnd in starts)


def _are_rounds(value: Json, most: int = MOST) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < _MAX for n in value)


def digest_of(terms: Mapping[str, object]) -> str:
    """SHA-256 of the terms, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()
