"""How a site introduces itself, and whether it may take part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from coterie.data.clients import SAFE_ID
from coterie.deploy.agreement import Agreement
from coterie.deploy.base_digest import base_digest
from coterie.engines.checks import site_fault
from coterie.methods.parts import label_space
from coterie.text import plain_text
from coterie.types import BaseSpec, ClientId, ClientInfo

_MAX_VERSIONS = 50


@dataclass(frozen=True)
class Hello:
    """A site's introduction: what the server may know about it, and what has to match."""

    info: ClientInfo
    spec: BaseSpec
    terms: str  # SHA-256 of the terms that it agreed to
    base: str  # SHA-256 of the base's files (files_digest)
    versions: Mapping[str, str | None]


def refusal(hello: Hello, agreement: Agreement, key: str, others: Mapping[ClientId, Hello]) -> str | None:
    """Why the site may not take part, or None if it may.

    ``key`` is the SHA-256 of the key that its node connected with; ``others`` are the introductions that this one has
    to match, including the site's own earlier one.
    """
    return (
        _malformed(hello)
        or _not_invited(hello.info.id, agreement, key)
        or _other_letters(hello.info.id, {*others, *agreement.sites})
        or _other_terms(hello, agreement)
        or _too_many_rows(hello.info, agreement.max_rows)
        or _other_rows(hello, others)
        or _other_labels(hello.info, agreement, others)
        or _other_base(hello, agreement.base, others)
        or _without_protection(hello.info, agreement, others)
    )


def plain_versions(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """The versions of its libraries that a site reports, safe to show."""
    some = list(versions.items())[:_MAX_VERSIONS]
    return {plain_text(name, 50): version and plain_text(version, 50) for name, version in some}


def _malformed(hello: Hello) -> str | None:
    client = hello.info.id
    if not SAFE_ID.fullmatch(client):
        return f"the client id {plain_text(client, 100)!r} is not a valid folder name"
    if not SAFE_ID.fullmatch(hello.base):
        return f"{client} reports a base hash that is not a SHA-256"
    if fault := site_fault(hello.info, hello.spec):
        return f"{client} reports inconsistent facts: {fault}"
    return None


def _not_invited(client: ClientId, agreement: Agreement, key: str) -> str | None:
    if agreement.finished and client not in agreement.sites:
        return (
            f"the run is finished, and only {', '.join(agreement.sites)} can join it now; {client} is not among these"
        )
    if agreement.closed and client not in agreement.sites:
        return f"{client} did not take part from the start, and {agreement.closed}"
    if agreement.sites and client not in agreement.sites:
        return f"{client} is not among [federation] sites"
    if agreement.keys and agreement.keys.get(key) != client:
        return f"the node calls itself {client}, but its key belongs to {agreement.keys.get(key, 'an unknown site')}"
    return None


def _other_letters(client: ClientId, others: Collection[ClientId]) -> str | None:
    """Two ids that differ only in capital letters would share a folder on some disks."""
    alike = next((other for other in others if other != client and other.lower() == client.lower()), None)
    return f"{client} and {alike} differ only in capital letters; rename one of these sites" if alike else None


def _other_terms(hello: Hello, agreement: Agreement) -> str | None:
    if hello.terms == agreement.digest:
        return None
    return (
        f"{hello.info.id} read the terms differently from how they were sent; install the same version of coterie there"
    )


def _too_many_rows(info: ClientInfo, most: int) -> str | None:
    for split, rows in (("training", info.num_train), ("validation", info.num_validation), ("test", info.num_test)):
        if rows > most:
            return f"{info.id} reports {rows} {split} rows, more than {most} ([federation] max_rows)"
    return None


def _other_rows(hello: Hello, others: Mapping[ClientId, Hello]) -> str | None:
    """What a site may change is how many experts it activates: its next instruction follows that."""
    client = hello.info.id
    if client not in others or hello.info == replace(others[client].info, active=hello.info.active):
        return None
    return f"the rows or labels of {client} have changed since the run began; restore them, or start a new run"


def _other_labels(info: ClientInfo, agreement: Agreement, others: Mapping[ClientId, Hello]) -> str | None:
    """A shared head has an output for each label of its clients, in their order."""
    if not agreement.spaces or info.id in others or label_space(info) in agreement.spaces:
        return None
    shared = " or ".join(plain_text(space, 200) for space in agreement.spaces)
    return (
        f"{info.id} came after the start, and its labels {plain_text(label_space(info), 200)} have no head in this run "
        f'([task] head = "shared"); those of the run are {shared}. If its labels are among these, list them all in '
        "its [data] labels, in that order; else let it join after the end with --onboard, or start a run with personal "
        "heads"
    )


def _other_base(hello: Hello, agreed: str, others: Mapping[ClientId, Hello]) -> str | None:
    client, mine = hello.info.id, base_digest(hello.base, hello.spec)
    if agreed and mine != agreed:
        return (
            f"{client} has another base ({mine[:12]}, not the run's {agreed[:12]}); use the same model files there and "
            "restart `coterie join`; if all sites differ, correct the server's [model] path or [federation] base"
        )
    for wanted, whose in {h.base: c for c, h in sorted(others.items(), reverse=True)}.items():
        if hello.base != wanted:
            return (
                f"{client} has another base ({hello.base[:12]}, not {wanted[:12]} as {whose}); use the same model "
                "files at both, and restart `coterie join` where they were wrong"
            )
    if others and hello.spec != next(iter(others.values())).spec:
        return f"the base of {hello.info.id} has different targets"
    return None


def _without_protection(info: ClientInfo, agreement: Agreement, others: Mapping[ClientId, Hello]) -> str | None:
    """A site that has taken part is spared: its rows are what the run began with."""
    fault = agreement.unprotected(info) if info.id not in others else None
    return f"{info.id} stays out of this run: {fault}" if fault else None
