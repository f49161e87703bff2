"""FedLEASE's allocation: which clients form a cluster, by warm-up LoRAs, by representations or by a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.methods.fedlease.representation import representation_of
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.parts import lora_of, part_of
from coterie.methods.plan import Plan
from coterie.ops.centred import centred_distances, gram, lora_gram
from coterie.ops.cluster import Array, Feature, cluster, lora_distances
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
    """Clusters of the clients in ``warm`` by what they sent, or, for a control, of all clients in ``groups``."""
    order = tuple(sorted(warm))
    compared = compare(settings, [warm[c] for c in order])
    if settings.allocation == "learned":
        clustering = cluster(
            compared.distances,
            settings.most,
            min_clusters=settings.experts or settings.min_experts,
            threshold=settings.one_cluster_below,
            linkage=settings.linkage,
            judged_by=compared.judged_by,
        )
        clusters = dict(zip(order, map(int, clustering.labels), strict=True))
        return Allocation(clusters, clustering.silhouettes, order, torch.from_numpy(compared.distances))
    # A control needs no LoRA: clients that missed the warm-up get a cluster too.
    names = _shuffled(sorted(groups), settings.most, seed) if settings.allocation == "random" else groups
    numbers = {name: e for e, name in enumerate(dict.fromkeys(names[c] for c in sorted(groups)))}
    return Allocation({c: numbers[names[c]] for c in sorted(groups)}, {}, order, torch.from_numpy(compared.distances))


@dataclass(frozen=True)
class Compared:
    """The distances [n, n] of clients, and those whose silhouette says how many clusters there are (None: the same)."""

    distances: Array
    judged_by: Array | None = None


def compare(settings: FedLEASESettings, sent: Sequence[Tensors]) -> Compared:
    """The distances of clients by what each ``sent``, a LoRA of one expert or a representation, as the settings say."""
    if settings.represents:
        return Compared(centred_distances(gram([representation_of(tensors) for tensors in sent])))
    a, b = _matrices(sent)
    feature = _feature(settings)
    plain = lora_distances(a, b, feature=feature)
    if not settings.centre:
        return Compared(plain)
    # Among centred clients the largest group is nearest to the mean, so their silhouettes join the smaller groups.
    return Compared(centred_distances(lora_gram(a, b, feature)), plain)


def nearest(settings: FedLEASESettings, starts: Tensors, allocation: Allocation, late: Sequence[Tensors]) -> list[int]:
    """The cluster of ``allocation`` whose mean in ``starts`` is nearest to what each ``late`` client sent."""
    number = allocation.num_experts
    if settings.represents:
        means = [representation_of(starts, e) for e in range(number)]
        inner = gram([*means, *(representation_of(tensors) for tensors in late)])
    else:
        a, b = _matrices([*(lora_of(starts, e, new=0) for e in range(number)), *late])
        if not settings.centre:
            return _nearest(lora_distances(a, b, feature=_feature(settings)), number)
        inner = lora_gram(a, b, _feature(settings))
    sizes = np.array([len(allocation.members(e)) for e in range(number)], dtype=np.float64)
    return _nearest(centred_distances(inner, [*(sizes / sizes.sum()), *([0.0] * len(late))]), number)


def _nearest(d: Array, number: int) -> list[int]:
    return [int(e) for e in d[number:, :number].argmin(axis=1)]


def _feature(settings: FedLEASESettings) -> Feature:
    return "B" if settings.distance == "representation" else settings.distance  # a control's, for its picture


def _matrices(sent: Sequence[Tensors]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The A and the B of each LoRA, by module."""
    a, b = ([list(dict(sorted(part_of(lora, part).items())).values()) for lora in sent] for part in (Part.A, Part.B))
    return a, b


def _shuffled(clients: Sequence[ClientId], most: int, seed: int) -> dict[ClientId, str]:
    """Clients in ``most`` clusters of equal size, give or take one, at random."""
    number = min(most, len(clients))
    shuffle = np.random.default_rng(stream_seed(seed, "allocation")).permutation(len(clients))
    return {client: str(position % number) for client, position in zip(clients, shuffle, strict=True)}
