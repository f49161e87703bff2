"""How many clients an expert of FedAMoLE picks by default: as many as are alike. E experts, n clients.

In the paper every expert picks the same number (``clients_per_expert = 2``). An expert at two of four clients with one
task learns from half of the task's rows; at two of ten, from a fifth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from coterie.methods.fedamole.selection import alike
from coterie.ops.assign import Limits
from coterie.ops.cluster import Array, cluster

# Above this silhouette clients have different tasks; few clients have a higher one by chance. What was measured is in
# docs/decisions/0046-experts-for-groups.md.
APART, APART_IF_FEW, FEW = 0.45, 0.55, 9


def groups_after(
    groups: tuple[int, ...], clients: Sequence[Tensor], before: Tensor, experts: int, limits: Limits
) -> tuple[int, ...]:
    """The number of each client's group after a round: ``groups``, made at first, with the clients that are new.

    ``clients`` [n, r] are their embeddings by module; ``before`` [n] says who had any before the round.
    """
    likeness, known = alike(clients), torch.stack([t.any(dim=1) for t in clients]).any(dim=0)
    if groups:
        return join_groups(groups, likeness, known, known & ~before)
    return make_groups(likeness, known, max(1, experts // limits.min_experts))


def make_groups(likeness: Array, known: Tensor, most: int) -> tuple[int, ...]:
    """The number of each client's group, at most ``most`` of them, by how alike they are: ``likeness`` [n, n].

    That is the cut of the tree with the largest silhouette, as in FedLEASE, or one group where none is above the limit:
    :data:`APART`, or :data:`APART_IF_FEW` for fewer than :data:`FEW` clients. Clients that are not ``known`` [n] yet
    join the largest group.
    """
    numbers = known.nonzero().flatten().tolist()
    labels = [0] * len(numbers)
    if len(numbers) > 2:
        distances = 1 - likeness[np.ix_(numbers, numbers)]
        np.fill_diagonal(distances, 0)
        limit = APART if len(numbers) >= FEW else APART_IF_FEW
        labels = list(cluster(distances, most, min_clusters=1, threshold=limit).labels)
    largest = max(sorted(set(labels)), key=labels.count, default=0)
    by_number = dict(zip(numbers, labels, strict=True))
    return tuple(by_number.get(i, largest) for i in range(len(likeness)))


def join_groups(groups: Sequence[int], likeness: Array, known: Tensor, new: Tensor) -> tuple[int, ...]:
    """``groups`` with the ``new`` clients [n], each in the group whose ``known`` clients [n] it is most like.

    Nobody else moves: a new client's embeddings passed through other experts than those of the others.
    """
    members = {g: [i for i, of in enumerate(groups) if of == g and known[i] and not new[i]] for g in set(groups)}
    joined = [*groups, *[0] * (len(likeness) - len(groups))]
    for i in new.nonzero().flatten().tolist():
        joined[i] = max(
            sorted(g for g in members if members[g]), key=lambda g: likeness[i, members[g]].mean(), default=0
        )
    return tuple(joined)


def for_groups(holds: Mapping[str, Tensor], groups: Sequence[int], each: int) -> dict[str, Tensor]:
    """Whom the experts of each module are for, [E, n] bool, from ``holds`` [E, n]: a group of clients, or nobody.

    Each group has ``each`` experts. An expert is for the group of most of its holders, the first experts first. Where a
    group has too few, experts that no group needs are for it too.
    """
    members = torch.stack([torch.tensor(groups) == g for g in range(max(groups) + 1)])
    return {module: _for_groups(z, members, each) for module, z in holds.items()}


def homes(
    holds: Mapping[str, Tensor], before: Sequence[int], groups: Sequence[int], limits: Limits
) -> dict[str, Tensor]:
    """Whom the experts are for when ``groups`` are made, or one has a new client: by module [E, n] bool.

    Where there were groups ``before``, each keeps as many experts as it has.
    """
    if before:
        each = max(int(z.sum(dim=0).max()) for z in holds.values())
    else:
        each = experts_each(len(next(iter(holds.values()))), groups, limits)
    return for_groups(holds, groups, each)


def experts_each(experts: int, groups: Sequence[int], limits: Limits) -> int:
    """How many experts each client holds: as many as if each expert picked the usual number of clients, within limits.

    Many ``groups`` have fewer each, so that the experts go round.
    """
    usual = round(experts * limits.clients_per_expert / len(groups))
    most = min(limits.max_experts, experts // (max(groups) + 1))
    return max(1, min(max(usual, limits.min_experts), most))


def _for_groups(holds: Tensor, members: Tensor, each: int) -> Tensor:
    held = holds.any(dim=1).tolist()
    nearest = (holds.double() @ members.double().T).argmax(dim=1).tolist()
    chosen: list[list[int]] = [[] for _ in members]
    for e, g in enumerate(nearest):
        if held[e] and len(chosen[g]) < each:
            chosen[g].append(e)
    left = iter(sorted(set(range(len(holds))).difference(*chosen)))
    homes = torch.zeros_like(holds)
    for of_group, who in zip(chosen, members, strict=True):
        of_group += islice(left, each - len(of_group))
        homes[of_group] = who
    return homes
