"""Adds up a journal: who took part in which round, why others did not, bytes and seconds per site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from coterie.deploy.events import (
    Exchanged,
    Finished,
    Joined,
    Late,
    Onboarded,
    Refused,
    ServerStarted,
    Stopped,
    Unreadable,
)
from coterie.deploy.journal import Entry, read_journal
from coterie.files import read_json_as, write_json
from coterie.ops.accounting import Spent
from coterie.report.read import SITES
from coterie.runs.events import (
    Evaluated,
    Event,
    Note,
    Ready,
    Resumed,
    RoundDone,
    RoundStart,
    Scores,
)
from coterie.runs.ledger import LEDGER, RESTORE
from coterie.types import ClientId, Json


@dataclass
class Site:
    """One site's part in the run so far. Bytes are as encoded; seconds are from a message to its answer.

    ``active``: the most experts per matrix that the site activates on average; None: as many as the run.
    """

    state: str = "never seen"
    seen: float = 0.0
    rounds: list[int] = field(default_factory=list)
    failures: list[tuple[str, int, str]] = field(default_factory=list)  # kind, round, reason
    replies: dict[str, int] = field(default_factory=dict)
    late: int = 0
    onboarded: int | None = None  # after the end, from this round's state
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    site_seconds: float = 0.0
    active: int | None = None


@dataclass
class Status:
    """A run so far. ``spent``: what it has spent in privacy; None without ``[privacy]``."""

    phase: str = "not started"
    round: int = 0
    rounds: int = 0
    attempts: int = 0
    loss: float | None = None
    spent: Spent | None = None
    mean: Scores = field(default_factory=dict)
    sites: dict[ClientId, Site] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_status(folder: Path) -> Status:
    """The status of the run in ``folder``: its journal, and the epsilon of its ledger.

    The ledger is written before anything leaves the server or, with noise at the clients, before they train. So it
    counts a round that was killed or failed, of which the journal has no end.

    Raises :class:`CoterieError` for a damaged journal or ledger.
    """
    status = status_of(read_journal(folder))
    _spend(status, _counted(folder / LEDGER))
    return status


def _counted(ledger: Path) -> Spent | None:
    """What a run has spent by its ``ledger``; None where it has none."""
    if not ledger.exists():
        return None
    return read_json_as(ledger, _COUNTED, RESTORE).spent


def status_of(entries: Iterable[Entry]) -> Status:
    """The status after the entries of a journal."""
    status = Status()
    for entry in entries:
        _add(status, entry.event, entry.at)
    return status


def _add(status: Status, event: Event, at: float) -> None:
    match event:
        case ServerStarted():
            status.attempts = event.attempt
            status.phase = "waiting for sites" if status.phase != "finished" else "finished; sites join"
            for client in event.sites:
                status.sites.setdefault(client, Site())
        case Joined():
            site = status.sites.setdefault(event.client, Site())
            site.state, site.seen, site.active = "connected", at, event.active
        case Ready():
            status.rounds, status.phase = event.rounds, "running"
        case Resumed():
            status.round = event.round
        case RoundStart():
            status.phase = f"round {event.round}: training"
        case Exchanged():
            _exchanged(status.sites.setdefault(event.client, Site()), event, at)
        case RoundDone():
            _round_done(status, event)
        case Unreadable():
            site = status.sites.setdefault(event.client, Site())
            site.failures.append((event.kind, event.round, event.reason))
        case Evaluated():
            status.mean = event.mean
        case Onboarded():
            status.sites.setdefault(event.client, Site()).onboarded = event.round
        case Stopped():
            status.phase = f"stopped: {event.error}"
        case Finished():
            status.phase = "finished"
        case _:
            _note(status, event)


def _note(status: Status, event: Event) -> None:
    match event:
        case Late():
            status.sites.setdefault(event.client, Site()).late += 1
            status.notes.append(event.text)
        case Refused():
            status.notes.append(f"node {event.node} was refused: {event.reason}")
        case Note():
            status.notes.append(event.text)


def _exchanged(site: Site, event: Exchanged, at: float) -> None:
    site.bytes_down += event.bytes_down
    site.bytes_up += event.bytes_up
    if event.failed is None:
        site.replies[event.kind] = site.replies.get(event.kind, 0) + 1
        site.seconds += event.seconds
        site.site_seconds += event.site_seconds or 0.0
        site.state, site.seen = "connected", at
    else:
        site.state = event.failed
        site.failures.append((event.kind, event.round, event.failed))


def _round_done(status: Status, event: RoundDone) -> None:
    """Add a round's outcome, as the server judged it: a repeated round counts once."""
    status.round, status.phase, status.loss = event.round, f"round {event.round}: evaluation", event.loss
    _spend(status, event.privacy)
    for client in event.clients:
        site = status.sites.setdefault(client, Site())
        site.rounds = [rnd for rnd in site.rounds if rnd < event.round]
        if client not in event.failed:
            site.rounds.append(event.round)
        elif (failure := ("train", event.round, event.failed[client])) not in site.failures:
            site.failures.append(failure)


def _spend(status: Status, spent: Spent | None) -> None:
    """Raise what a run has spent to ``spent``: it never falls."""
    if spent is not None and (status.spent is None or spent.epsilon > status.spent.epsilon):
        status.spent = spent


def table_of(status: Status) -> dict[str, Json]:
    """What the report shows: a row per site, and notes."""
    limited = any(site.active is not None for site in status.sites.values())
    sites = {
        client: {
            "took part in": took_part(site),
            "missed": "; ".join(f"{kind} of round {rnd}: {reason}" for kind, rnd, reason in site.failures) or "-",
            "bytes_down": site.bytes_down,
            "bytes_up": site.bytes_up,
            "seconds": site.seconds,
            "seconds at work": site.site_seconds,
            **({"active experts": site.active} if limited else {}),
        }
        for client, site in sorted(status.sites.items())
    }
    return {"sites": sites, "starts of the server": status.attempts, "notes": status.notes}


def took_part(site: Site) -> str:
    """The rounds that a site took part in, or the one after which it joined the finished run."""
    return spans(site.rounds) if site.onboarded is None else f"joined after {site.onboarded}"


def write_sites(folder: Path) -> None:
    """Write what the report shows of the network, from the journal so far."""
    write_json(folder / SITES, table_of(status_of(read_journal(folder))))


def spans(rounds: Iterable[int]) -> str:
    """Rounds in short form: ``1-3, 5``."""
    runs: list[list[int]] = []  # first and last
    for rnd in sorted(rounds):
        if runs and rnd == runs[-1][1] + 1:
            runs[-1][1] = rnd
        else:
            runs.append([rnd, rnd])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


@dataclass(frozen=True)
class _Counted:
    """The part of a ledger's file that a status shows."""

    spent: Spent


_COUNTED = TypeAdapter(_Counted)
