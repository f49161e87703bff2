"""What FedLEASE's server keeps from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.download import Use
from coterie.methods.parts import Heads
from coterie.types import BaseSpec, ClientId, Reply, Tensors


@dataclass(frozen=True)
class FedLEASEState:
    """The server's state: the clusters, their experts, and a router for each.

    ``warm`` holds warm-up LoRAs until there are enough of them to cluster, ``starts`` their means by cluster.
    ``outlying`` names the clients whose warm-up LoRA resembled too few others to be clustered (``[robust]``).
    ``use`` says how much each client uses which expert, with ``download = "used"``.
    """

    base: BaseSpec
    groups: Mapping[ClientId, str]
    labels: Mapping[ClientId, tuple[str, ...]]
    warm: Mapping[ClientId, Reply] = field(default_factory=dict)
    allocation: Allocation | None = None
    starts: Tensors = field(default_factory=dict)
    experts: Tensors = field(default_factory=dict)
    routers: Mapping[int, Tensors] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    error: float = 0.0
    outlying: tuple[ClientId, ...] = ()
    use: Mapping[ClientId, Use] = field(default_factory=dict)

    def cluster_of(self, client: ClientId) -> int | None:
        """The cluster of ``client``; None before the clients are clustered, and for one that has not joined any."""
        return self.allocation.clusters.get(client) if self.allocation else None

    def expert_of(self, client: ClientId) -> int | None:
        """The expert that ``client`` trains; None as for :meth:`cluster_of`."""
        return self.allocation.experts.get(client) if self.allocation else None

    @property
    def num_experts(self) -> int:
        """The number of experts, 0 before the clients are clustered."""
        return self.allocation.num_experts if self.allocation else 0


def without_names(state: FedLEASEState) -> FedLEASEState:
    """What a newcomer needs of ``state``: numbers in place of the clients' names, and nothing else about clients.

    Their labels stay where they say which shared head is whose.
    """
    allocation = state.allocation
    if allocation is None:
        return FedLEASEState(state.base, {}, {})
    number = {client: f"client {i}" for i, client in enumerate(sorted(allocation.clusters))}  # no client's id: a space
    alias = Allocation(
        {number[c]: cluster for c, cluster in allocation.clusters.items()},
        {},
        (),
        torch.zeros(0, 0),
        allocation.text_clusters,
        own={number[c]: expert for c, expert in allocation.own.items()},
    )
    shared = bool(state.heads.values)
    return replace(
        state,
        groups={},
        labels={number[c]: labels for c, labels in state.labels.items() if shared and c in number},
        warm={},
        allocation=alias,
        heads=Heads(state.heads.values, {number[c]: name for c, name in state.heads.group.items() if c in number}),
        error=0.0,
        outlying=(),
        use={},
    )
