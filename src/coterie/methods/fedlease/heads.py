"""FedLEASE's shared heads: one for each cluster and label space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from coterie.methods.parts import Heads, head_of, mean_heads, start_heads, weights_of
from coterie.methods.plan import Plan
from coterie.types import BaseSpec, ClientId, ClientInfo, Reply

Weighting = Literal["uniform", "examples"]


def cluster_heads(
    base: BaseSpec, plan: Plan, labels: Mapping[ClientId, tuple[str, ...]], clusters: Mapping[ClientId, int]
) -> Heads:
    """Shared heads by cluster and label space, at their start; none if the base has none, or they are personal.

    ``labels`` need an entry for every client in ``clusters`` only where there are shared heads.
    """
    if plan.head == "personal" or not base.head:
        return Heads()
    infos = [ClientInfo(c, 0, labels=labels[c]) for c in clusters]
    by_space = start_heads(base, plan, infos)
    group = {c: f"{clusters[c]}:{space}" for c, space in by_space.group.items()}
    return Heads({group[c]: by_space.of(c) for c in group}, group)


def averaged_heads(heads: Heads, replies: Mapping[ClientId, Reply], weighting: Weighting) -> Heads:
    """Every head as the mean over the clients of its group that sent one."""
    sent = {c: r for c, r in replies.items() if head_of(r.tensors)}
    return mean_heads(heads, sent, weights_of(sent, weighting))


def moved_heads(old: Heads, regrouped: Heads, moved: Mapping[ClientId, Reply], weighting: Weighting) -> Heads:
    """The heads after clients ``moved`` to other clusters, whose groups are those of ``regrouped``.

    A group that there was keeps its head; a new one starts from the mean of its clients' heads.
    """
    new = {name: value for name, value in regrouped.values.items() if name not in old.values}
    started = averaged_heads(Heads(new, regrouped.group), moved, weighting)
    return Heads({**old.values, **started.values}, regrouped.group)
