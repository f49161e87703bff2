"""FedLEASE's allocation: which clients form a cluster, by warm-up LoRAs, by representations or by a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from coterie.methods.fedlease.grounds import grounds_of
from coterie.methods.fedlease.representation import representation_of
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.parts import lora_of, part_of
from coterie.methods.plan import Plan
from coterie.ops.centred import centred_distances, gram, lora_gram
from coterie.ops.cluster import Array, Feature, cluster, lora_distances
from coterie.ops.nested import nested
from coterie.ops.streams import stream_seed
from coterie.types import ClientId, ClientInfo, CoterieError, Part, Tensors


@dataclass(frozen=True)
class Allocation:
    """Who is in which cluster, and what decided it. ``distances`` [n, n] are between the clients in ``order``.

    Every client trains one expert: the one of its cluster's number or, where clusters have several, that in ``own``.
    With ``distance = "auto"``, ``text_clusters[e]`` is the cluster of texts that expert e belongs to, and ``grounds``
    says how clusters by texts and by LoRAs were chosen.
    """

    clusters: Mapping[ClientId, int]
    silhouettes: Mapping[int, float]
    order: tuple[ClientId, ...]
    distances: Tensor
    text_clusters: tuple[int, ...] = ()
    grounds: str = ""
    own: Mapping[ClientId, int] = field(default_factory=dict)

    @property
    def num_clusters(self) -> int:
        return max(self.clusters.values()) + 1

    @property
    def num_experts(self) -> int:
        return max(self.experts.values()) + 1

    @property
    def experts(self) -> Mapping[ClientId, int]:
        """The expert that each client trains."""
        return self.own or self.clusters

    def members(self, expert: int) -> list[ClientId]:
        """The clients that train ``expert``."""
        return sorted(c for c, e in self.experts.items() if e == expert)

    def cluster_of(self, expert: int) -> int:
        """The cluster that ``expert`` belongs to."""
        return self.clusters[self.members(expert)[0]]

    def moved(self, experts: Mapping[ClientId, int]) -> Allocation:
        """The allocation with these clients at these experts, and in the clusters of these."""
        clusters = {**self.clusters, **{c: self.cluster_of(e) for c, e in experts.items()}}
        return replace(self, clusters=clusters, own={**self.own, **experts} if self.own else {})


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
    if settings.recluster_every and not settings.represents:
        raise CoterieError(
            '[method] recluster_every compares representations; set distance to "representation" or "auto", with '
            'allocation = "learned"'
        )
    if settings.download == "used" and settings.routing == "own":
        raise CoterieError(
            '[method] download = "used" chooses among the experts of others, which routing = "own" does not send; '
            "remove one of the two"
        )
    if (last := settings.clustered_after) >= plan.rounds:
        named = f"warmup_rounds = {last}" if last == settings.warmup_rounds else 'distance = "representation"'
        raise CoterieError(
            f"[method] {named} leaves no round for the experts; raise [run] rounds above {last} (now {plan.rounds})"
        )


def allocate(
    settings: FedLEASESettings,
    seed: int,
    warm: Mapping[ClientId, Tensors],
    groups: Mapping[ClientId, str],
    least: int = 1,
) -> Allocation:
    """Clusters of the clients in ``warm`` by what they sent, or, for a control, of all clients in ``groups``.

    LoRAs split a cluster of texts into parts of at least ``least`` clients.
    """
    order = tuple(sorted(warm))
    if settings.represents and settings.distance == "auto":
        return _by_texts_and_loras(settings, order, [warm[c] for c in order], least)
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
    return Allocation(given(settings, seed, groups), {}, order, torch.from_numpy(compared.distances))


def given(settings: FedLEASESettings, seed: int, groups: Mapping[ClientId, str]) -> dict[ClientId, int]:
    """The clusters of a control, which needs no LoRA: clients that missed the warm-up get one too."""
    names = _shuffled(sorted(groups), settings.most, seed) if settings.allocation == "random" else groups
    numbers = {name: e for e, name in enumerate(dict.fromkeys(names[c] for c in sorted(groups)))}
    return {c: numbers[names[c]] for c in sorted(groups)}


def _by_texts_and_loras(
    settings: FedLEASESettings, order: tuple[ClientId, ...], sent: Sequence[Tensors], least: int
) -> Allocation:
    texts = centred_distances(gram([representation_of(tensors) for tensors in sent]))
    loras = lora_gram(*_matrices(sent), "BA")
    made = nested(texts, loras, settings.most, exactly=settings.experts, linkage=settings.linkage, least=least)
    of_cluster = dict(zip(made.labels, made.texts, strict=True))
    return Allocation(
        dict(zip(order, made.labels, strict=True)),
        made.by_texts,
        order,
        torch.from_numpy(made.distances),
        tuple(of_cluster[e] for e in sorted(of_cluster)),
        grounds_of(made),
    )


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
    """The expert of ``allocation`` whose mean in ``starts`` is nearest to what each ``late`` client sent."""
    experts = range(allocation.num_experts)
    loras = [*(lora_of(starts, e, new=0) for e in experts), *late]
    if settings.represents:
        means = [representation_of(starts, e) for e in experts]
        inner = gram([*means, *(representation_of(tensors) for tensors in late)])
        joined = _nearest(_centred(inner, allocation, experts))
        if not allocation.text_clusters:
            return joined
        return [_nearest_lora(allocation, e, loras, number) for number, e in enumerate(joined)]
    a, b = _matrices(loras)
    if not settings.centre:
        return _nearest(lora_distances(a, b, feature=_feature(settings))[len(experts) :, : len(experts)])
    return _nearest(_centred(lora_gram(a, b, _feature(settings)), allocation, experts))


def drifted(
    settings: FedLEASESettings, starts: Tensors, allocation: Allocation, sent: Mapping[ClientId, Tensors]
) -> dict[ClientId, int]:
    """The clients whose representation, as now ``sent``, is nearer to another cluster's mean than to their own's.

    With their new expert's number. Clusters of the same texts do not count as others, and no expert loses its last
    client: it would have nobody to train it.
    """
    joined = nearest(settings, starts, allocation, list(sent.values()))
    left = {e: len(allocation.members(e)) for e in range(allocation.num_experts)}
    text = allocation.text_clusters or tuple(allocation.cluster_of(e) for e in left)
    moves: dict[ClientId, int] = {}
    for client, e in zip(sent, joined, strict=True):
        own = allocation.experts[client]
        if text[e] != text[own] and left[own] > 1:
            moves[client] = e
            left[own] -= 1
            left[e] += 1
    return moves


def _nearest_lora(allocation: Allocation, joined: int, loras: Sequence[Tensors], number: int) -> int:
    """Of the clusters with the same texts as ``joined``, the one whose LoRA is nearest to late client ``number``'s."""
    text = allocation.text_clusters
    experts = [e for e in range(len(text)) if text[e] == text[joined]]
    inner = lora_gram(*_matrices([*(loras[e] for e in experts), loras[len(text) + number]]), "BA")
    return experts[_nearest(_centred(inner, allocation, experts))[0]]


def _centred(inner: Array, allocation: Allocation, experts: Sequence[int]) -> Array:
    """The distances [late, experts] from inner products of the experts and the late clients, less the experts' mean."""
    sizes = np.array([len(allocation.members(e)) for e in experts], dtype=np.float64)
    weights = [*(sizes / sizes.sum()), *([0.0] * (len(inner) - len(experts)))]
    d: Array = centred_distances(inner, weights)[len(experts) :, : len(experts)]
    return d


def _nearest(d: Array) -> list[int]:
    return [int(e) for e in d.argmin(axis=1)]


def _feature(settings: FedLEASESettings) -> Feature:
    match settings.distance:
        case "A" | "B" | "BA" as feature:
            return feature
        case _:
            return "B"  # of a control, which does not send representations: only a picture shows its distances


def _matrices(sent: Sequence[Tensors]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The A and the B of each LoRA, by module."""
    a, b = ([list(dict(sorted(part_of(lora, part).items())).values()) for lora in sent] for part in (Part.A, Part.B))
    return a, b


def _shuffled(clients: Sequence[ClientId], most: int, seed: int) -> dict[ClientId, str]:
    """Clients in ``most`` clusters of equal size, give or take one, at random."""
    number = min(most, len(clients))
    shuffle = np.random.default_rng(stream_seed(seed, "allocation")).permutation(len(clients))
    return {client: str(position % number) for client, position in zip(clients, shuffle, strict=True)}
