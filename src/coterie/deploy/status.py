"""Adds up a journal: who took part in which round, why others did not, bytes and seconds per site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coterie.deploy.journal import read_journal
from coterie.files import write_json
from coterie.report.page import SITES
from coterie.types import ClientId, Json


@dataclass
class Site:
    """One site's part in the run so far. Bytes are as encoded; seconds are from a message to its answer."""

    state: str = "never seen"
    seen: float = 0.0
    rounds: list[int] = field(default_factory=list)
    failures: list[tuple[str, int, str]] = field(default_factory=list)  # kind, round, reason
    replies: dict[str, int] = field(default_factory=dict)
    late: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    site_seconds: float = 0.0


@dataclass
class Status:
    """A run so far."""

    phase: str = "not started"
    round: int = 0
    rounds: int = 0
    attempts: int = 0
    loss: float | None = None
    mean: Mapping[str, Json] = field(default_factory=dict)
    sites: dict[ClientId, Site] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def status_of(events: Iterable[Mapping[str, Json]]) -> Status:
    """The status after ``events``."""
    status = Status()
    for event in events:
        _add(status, event)
    return status


def _add(status: Status, event: Mapping[str, Json]) -> None:
    match event["event"]:
        case "attempt":
            status.attempts = event["attempt"]
            status.phase = "waiting for sites"
            for client in event["sites"]:
                status.sites.setdefault(client, Site())
        case "joined" | "back":
            site = status.sites.setdefault(event["client"], Site())
            site.state, site.seen = "connected", event["at"]
        case "ready":
            status.rounds, status.phase = event["rounds"], "running"
        case "resumed":
            status.round = event["round"]
        case "start":
            status.phase = f"round {event['round']}: training"
        case "exchange":
            _exchange(status.sites.setdefault(event["client"], Site()), event)
        case "late":
            status.sites.setdefault(event["client"], Site()).late += 1
            status.notes.append(event["text"])
        case "round":
            status.round, status.phase = event["round"], f"round {event['round']}: evaluation"
            losses = [e["loss"] for e in event["clients"].values() if e.get("loss") is not None]
            status.loss = sum(losses) / len(losses) if losses else None
            _count(status, event)
        case "unreadable":
            site = status.sites.setdefault(event["client"], Site())
            site.failures.append((event["kind"], event["round"], event["reason"]))
        case "evaluation":
            status.mean = event["mean"]
        case "refused":
            status.notes.append(f"node {event['node']} was refused: {event['reason']}")
        case "note":
            status.notes.append(event["text"])
        case "stopped":
            status.phase = f"stopped: {event['error']}"
        case "finished":
            status.phase = "finished"


def _exchange(site: Site, event: Mapping[str, Json]) -> None:
    kind, failed = event["kind"], event["failed"]
    site.bytes_down += event["bytes_down"]
    site.bytes_up += event["bytes_up"]
    if failed is None:
        site.replies[kind] = site.replies.get(kind, 0) + 1
        site.seconds += event["seconds"]
        site.site_seconds += event["site_seconds"] or 0.0
        site.state, site.seen = "connected", event["at"]
    else:
        site.state = failed
        site.failures.append((kind, event["round"], failed))


def _count(status: Status, event: Mapping[str, Json]) -> None:
    """Add a round's outcome, as the server judged it: a round that was done again counts once."""
    rnd, failed = event["round"], event["failed"]
    for client in event["clients"]:
        site = status.sites.setdefault(client, Site())
        site.rounds = [r for r in site.rounds if r < rnd]
        if client not in failed:
            site.rounds.append(rnd)
        elif ("train", rnd, failed[client]) not in site.failures:
            site.failures.append(("train", rnd, failed[client]))


def table_of(status: Status) -> dict[str, Json]:
    """What the report shows: a row per site, and notes."""
    sites = {
        client: {
            "took part in": spans(site.rounds),
            "missed": "; ".join(f"{kind} of round {rnd}: {reason}" for kind, rnd, reason in site.failures) or "-",
            "bytes_down": site.bytes_down,
            "bytes_up": site.bytes_up,
            "seconds": site.seconds,
            "seconds at work": site.site_seconds,
        }
        for client, site in sorted(status.sites.items())
    }
    return {"sites": sites, "starts of the server": status.attempts, "notes": status.notes}


def write_sites(folder: Path) -> None:
    """Write what the report shows of the network, from the journal so far."""
    write_json(folder / SITES, table_of(status_of(read_journal(folder))))


def spans(rounds: Iterable[int]) -> str:
    """Rounds in short: ``1-3, 5``."""
    runs: list[list[int]] = []  # first and last
    for rnd in sorted(rounds):
        if runs and rnd == runs[-1][1] + 1:
            runs[-1][1] = rnd
        else:
            runs.append([rnd, rnd])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"
