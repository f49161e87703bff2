"""FedAMoLE with ``clients_per_expert = "auto"``: an expert picks as many clients as are alike. E experts, n clients.

The paper's number is the same for all experts, whatever the clients are. Where four have one task, an expert at two of
them learns from half of its rows; where all have one task, from a fifth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from coterie.methods.fedamole.selection import alike, replied
from coterie.ops.assign import Limits
from coterie.ops.cluster import Array, cluster

# Above this silhouette clients have different tasks. Measured in round 1: .57 and more with four domains of one dataset
# and .87 with four tasks, at most .39 where all clients have one (six seeds, nine runs).
APART = 0.45


def for_groups(holds: Mapping[str, Tensor], clients: Mapping[str, Tensor], limits: Limits) -> dict[str, Tensor]:
    """Whom the experts of each module are for, [E, n] bool: every expert for a group of clients, or for nobody.

    ``holds`` [E, n] and the embeddings ``clients`` [n, r] are by module. Each group has so many experts that a client
    holds as many as if each expert picked the usual number of clients.
    """
    experts, n = next(iter(holds.values())).shape
    each = round(experts * limits.clients_per_expert / n)
    each = max(1, min(max(each, limits.min_experts), limits.max_experts, experts))
    groups = groups_of(alike(list(clients.values())), replied(clients), max(1, experts // each))
    return {module: at_home(z, groups, each) for module, z in holds.items()}


def groups_of(likeness: Array, known: Tensor, most: int) -> list[int]:
    """The number of each client's group, at most ``most`` of them, by how alike they are: ``likeness`` [n, n].

    That is the cut of the tree with the largest silhouette, as in FedLEASE, or one group where none is above
    :data:`APART`. Clients that are not ``known`` [n] yet join the largest group.
    """
    numbers = known.nonzero().flatten().tolist()
    labels = [0] * len(numbers)
    if len(numbers) > 2:
        distances = 1 - likeness[np.ix_(numbers, numbers)]
        np.fill_diagonal(distances, 0)
        labels = list(cluster(distances, most, min_clusters=1, threshold=APART).labels)
    largest = max(sorted(set(labels)), key=labels.count, default=0)
    by_number = dict(zip(numbers, labels, strict=True))
    return [by_number.get(i, largest) for i in range(len(likeness))]


def at_home(holds: Tensor, groups: Sequence[int], each: int) -> Tensor:
    """Whom each expert is for, [E, n] bool: a group of clients. ``each`` experts per group; the rest are for nobody.

    An expert is for the group of most of its holders, ``holds`` [E, n], the first experts first. Where a group has too
    few, experts that no group needs are for it too.
    """
    members = torch.stack([torch.tensor(groups) == g for g in range(max(groups) + 1)])
    nearest = (holds.double() @ members.double().T).argmax(dim=1).tolist()
    chosen: list[list[int]] = [[] for _ in members]
    for e, g in enumerate(nearest):
        if len(chosen[g]) < each:
            chosen[g].append(e)
    left = iter(sorted(set(range(len(holds))).difference(*chosen)))
    homes = torch.zeros_like(holds)
    for of_group, who in zip(chosen, members, strict=True):
        of_group += islice(left, each - len(of_group))
        homes[of_group] = who
    return homes
