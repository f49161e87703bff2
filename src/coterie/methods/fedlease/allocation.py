"""FedLEASE's allocation: which clients form a cluster, by their warm-up LoRAs or by a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.parts import part_of
from coterie.methods.plan import Plan
from coterie.ops.cluster import Feature, cluster, lora_distances
from coterie.ops.streams import stream_seed
from coterie.types import ClientId, ClientInfo, CoterieError, Part, Tensors


@dataclass(frozen=True)
class Allocation:
    """Who is in which cluster, and what decided it. ``distances`` [n, n] are between the clients in ``order``."""

    clusters: Mapping[ClientId, int]
    silhouettes: Mapping[int, float]
    order: tuple[ClientId, ...]
    distances: Tensor

    @property
    def num_experts(self) -> int:
        return max(self.clusters.values()) + 1

    def members(self, expert: int) -> list[ClientId]:
        return sorted(c for c, e in self.clusters.items() if e == expert)


def check(settings: FedLEASESettings, plan: Plan, clients: Sequence[ClientInfo]) -> None:
    """Raise :class:`CoterieError` for settings that cannot work with these clients and this number of rounds."""
    n, wanted = len(clients), settings.experts or settings.max_experts or 0
    if wanted > n:
        raise CoterieError(
            f"[method] needs {wanted} clusters, but there are {n} clients; set experts or max_experts to at most {n}"
        )
    if n < settings.needed:
        fix = "1 or 2" if n > 1 else "1"
        raise CoterieError(f"a silhouette needs at least 3 clients, but there are {n}; set [method] experts to {fix}")
    if settings.allocation == "oracle" and any(c.group is None for c in clients):
        raise CoterieError('allocation = "oracle" needs a group for every client; set it in [data]')
    if settings.warmup_rounds >= plan.rounds:
        raise CoterieError(
            f"[method] warmup_rounds = {settings.warmup_rounds} leaves no round for the experts; "
            f"raise [run] rounds above it (now {plan.rounds})"
        )


def allocate(
    settings: FedLEASESettings, seed: int, warm: Mapping[ClientId, Tensors], groups: Mapping[ClientId, str]
) -> Allocation:
    """Clusters of the clients in ``warm`` by their warm-up LoRAs, or, for a control, of all clients in ``groups``."""
    order = tuple(sorted(warm))
    d = distances([warm[c] for c in order], settings.distance)
    if settings.allocation == "learned":
        least = settings.experts or settings.min_experts
        clustering = cluster(
            d, settings.most, min_clusters=least, threshold=settings.one_cluster_below, linkage=settings.linkage
        )
        clusters = dict(zip(order, map(int, clustering.labels), strict=True))
        return Allocation(clusters, clustering.silhouettes, order, torch.from_numpy(d))
    # A control needs no LoRA: clients that missed the warm-up get a cluster too.
    names = _shuffled(sorted(groups), settings.most, seed) if settings.allocation == "random" else groups
    numbers = {name: e for e, name in enumerate(dict.fromkeys(names[c] for c in sorted(groups)))}
    return Allocation({c: numbers[names[c]] for c in sorted(groups)}, {}, order, torch.from_numpy(d))


def distances(loras: Sequence[Tensors], feature: Feature) -> NDArray[np.float64]:
    """d [n, n] between LoRAs of one expert each; ``feature`` is A, B or BA."""
    a, b = ([list(dict(sorted(part_of(lora, part).items())).values()) for lora in loras] for part in (Part.A, Part.B))
    return lora_distances(a, b, feature=feature)


def nearest(settings: FedLEASESettings, starts: Sequence[Tensors], late: Sequence[Tensors]) -> list[int]:
    """The number of the start that is nearest to each late client's warm-up LoRA."""
    away = distances([*starts, *late], settings.distance)[len(starts) :, : len(starts)]
    return [int(e) for e in away.argmin(axis=1)]


def _shuffled(clients: Sequence[ClientId], most: int, seed: int) -> dict[ClientId, str]:
    """Clients in ``most`` clusters of equal size, give or take one, at random."""
    number = min(most, len(clients))
    shuffle = np.random.default_rng(stream_seed(seed, "allocation")).permutation(len(clients))
    return {client: str(position % number) for client, position in zip(clients, shuffle, strict=True)}
