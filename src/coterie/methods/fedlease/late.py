"""Which cluster a client joins that came too late to be clustered with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import mode

from coterie.methods.fedlease.allocation import Allocation, nearest
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.parts import part_of
from coterie.types import ClientId, Part, Tensors


def placed(
    settings: FedLEASESettings,
    starts: Tensors,
    allocation: Allocation,
    groups: Mapping[ClientId, str],
    late: Mapping[ClientId, Tensors],
) -> dict[ClientId, int]:
    """The expert that each client in ``late``, by what it sent, trains from now on.

    A learned allocation has the one whose mean in ``starts`` is nearest. The controls need no LoRA, which secure sums
    hide: known ``groups`` have their cluster, and what is random the smallest.
    """
    if settings.allocation == "learned":
        joined = nearest(settings, starts, allocation, list(late.values()))
        return dict(zip(late, joined, strict=True))
    experts: dict[ClientId, int] = {}
    for client in sorted(late):
        now = allocation.moved(experts)
        cluster = _of_group(now, groups, client)
        if settings.allocation == "oracle" and cluster is None and _trained(late[client]):
            (experts[client],) = nearest(settings, starts, allocation, [late[client]])
        else:
            experts[client] = _smallest(now, cluster if settings.allocation == "oracle" else None)
    return experts


def _of_group(allocation: Allocation, groups: Mapping[ClientId, str], client: ClientId) -> int | None:
    """The cluster of most of the client's group; None if the group is not known, or has none."""
    group = groups.get(client)
    of = [cluster for c, cluster in allocation.clusters.items() if group and groups.get(c) == group]
    return mode(of) if of else None


def _smallest(allocation: Allocation, cluster: int | None) -> int:
    """The expert with the fewest clients of ``cluster``, or of the cluster with the fewest."""
    if cluster is None:
        sizes = Counter(allocation.clusters.values())
        cluster = min(sizes, key=lambda k: (sizes[k], k))
    experts = [e for e in range(allocation.num_experts) if allocation.cluster_of(e) == cluster]
    return min(experts, key=lambda e: (len(allocation.members(e)), e))


def _trained(lora: Tensors) -> bool:
    """Whether B is more than its start: in a round in which no secure sum has a client's LoRA, it stays that."""
    return any(bool(b.any()) for b in part_of(lora, Part.B).values())
