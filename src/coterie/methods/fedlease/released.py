"""What FedLEASE's clients send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from coterie.methods.fedlease.download import USE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.releases import SERVER, Release, head_release


def released(settings: FedLEASESettings, shared_heads: bool) -> tuple[Release, ...]:
    """The releases of a client: before the clusters are known, the server reads each client's by itself."""
    shared = shared_heads and settings.head == "trained"
    heads = [replace(head, first=settings.clustered_after) for head in head_release(shared)]
    return (*_before_clusters(settings), *_in_clusters(settings), *heads)


def _before_clusters(settings: FedLEASESettings) -> Iterator[Release]:
    clustered = settings.clustered_after
    representation = Release(
        "mean inputs of the targets over its rows",
        reads="each",
        to=SERVER,
        when=f"once, in round {clustered}",
        why="clients are clustered by them",
        instead='[method] distance = "B", or allocation = "oracle"',
        measured=True,
        first=clustered,
        last=clustered,
    )
    if settings.represents:
        yield representation
        if every := settings.recluster_every:
            yield replace(representation, when=f"every {every} rounds", first=every, every=every, last=0)
    learned = settings.allocation == "learned"
    yield Release(
        "A and B after the warm-up, and the head if heads are shared",
        reads="each" if learned else "sum",
        to="its cluster, and as an expert all clients",
        when=f"once, in round {clustered}",
        why="clients are clustered by them" if learned else "",
        instead='[method] allocation = "oracle"' if learned else "",
        first=clustered,
        last=clustered,
    )


def _in_clusters(settings: FedLEASESettings) -> Iterator[Release]:
    first, alone = settings.clustered_after + 1, settings.routing == "own"
    later = f"every round from {first} on"
    yield Release(
        "A and B of its cluster's expert", to="its cluster" if alone else "all clients", when=later, first=first
    )
    if settings.download == "used":
        yield Release(
            "the weight of each expert over its rows",
            "info",
            "each",
            SERVER,
            names=(USE,),
            why="a client is sent the experts that it uses",
            instead='[method] download = "all"',
        )
    if settings.router == "cluster" and not alone:
        yield Release("router", to="its cluster", when=later, instead='[method] router = "personal"', first=first)
