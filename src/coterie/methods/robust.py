"""Robust aggregation: what the clients of a group sent is replaced by what most of them agree on, before any average.

A group is the clients whose tensors one average takes in: a cluster, the holders of an expert, or all. Its rule works
on updates (what a client sent less what it started from), each as one vector: A, B, router and shared head together, so
that an attack on A and on B apart counts once. Every member's tensors are then replaced with the start plus the rule's
result, and any mean over the group is that result. So no method needs to know of rules, and all follow them.

A group of two has no majority. Its update is what both agree on, by coordinate
(:func:`coterie.ops.robust.agreement`). Of a group of one, nothing can be said: what it sent is used if nobody else
receives it, else the group keeps what it has. A client whose update points away from the result of the largest group
that it is in takes no part in groups that are smaller than ``min_group``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from coterie.ops.robust import Rule, agreement, clipping, combine, gram, neighbour_mixing, norms
from coterie.types import ClientId, Key, Part, Reply, Section, Tensors

ALIKE = 0.25  # a client resembles others if its cosine with them is this part of the median client's, or more
MAJORITY = 3  # members: with fewer, nobody can say who is out of line


class RobustSettings(Section):
    """How the server averages if some clients may send anything; the defaults average as the method does."""

    rule: Rule = Field(
        "mean",
        description="mean: the method's own average; or a rule that a minority of bad updates cannot move far: median, "
        "trimmed_mean, geometric_median, krum, multi_krum or centered_clipping. Rules weigh all clients alike",
    )
    clip: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="before the rule: shorten updates that are longer than this quantile of the group's norms to it, "
        "0.5: the median; 0: none",
    )
    nnm: bool = Field(
        False,
        description="before the rule: replace each update with the mean of its nearest (nearest neighbour mixing)",
    )
    attackers: float = Field(
        0.25,
        ge=0,
        description="how many clients may be bad: below 1 the share of a group, rounded up; from 1 on their number in "
        "the federation. Never more than the largest minority of a group",
    )
    min_group: int = Field(
        3,
        ge=1,
        description="fewest clients that an expert needs before the server sends it to clients outside their group; "
        "fedlease splits no cluster of texts by LoRAs into parts of fewer",
    )

    @field_validator("attackers")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a share below 1, or a whole number of clients")
        return value

    @property
    def active(self) -> bool:
        """Whether anything differs from the method's own average."""
        return self.rule != "mean" or self.clip > 0 or self.nnm

    def attackers_of(self, members: int) -> int:
        """The number of attackers assumed in a group: always a minority."""
        assumed = self.attackers if self.attackers >= 1 else math.ceil(self.attackers * members - 1e-9)
        return min(int(assumed), max(members - 1, 0) // 2)


@dataclass(frozen=True)
class Group:
    """Clients whose tensors of these ``keys`` are averaged together.

    ``private``: only they receive the average, as long as they are fewer than ``min_group``.
    """

    members: tuple[ClientId, ...]
    keys: frozenset[Key]
    private: bool = False


@dataclass(frozen=True)
class Weighed:
    """What a rule made of a client's update, in the largest group that it is in.

    ``norm``: times the group's median. ``clipped``: the factor it was shortened by, 1 if it was not. ``cosine``: with
    the rule's result, negative if it points away. ``outlying``: whether it takes no part in groups without a majority.
    """

    norm: float
    clipped: float
    cosine: float
    outlying: bool

    def __str__(self) -> str:
        text = f"{self.norm:.3g} times the median norm, cosine {self.cosine:.2f} with the result"
        return f"{text}, shortened to {self.clipped:.0%}" if self.clipped < 1 else text


def grouped(
    replies: Mapping[ClientId, Reply],
    cluster: Mapping[ClientId, str],
    spaces: Mapping[ClientId, str],
    private: bool = False,
) -> list[Group]:
    """A group for the clients of each ``cluster``, and for their shared heads by label space (``spaces``).

    Where all clients of a cluster have one label space, their heads belong to the cluster's vector.
    """
    groups = []
    for name in sorted(set(cluster.values())):
        members = tuple(c for c in sorted(replies) if cluster.get(c) == name)
        if not members:
            continue
        keys = frozenset(replies[members[0]].tensors)
        heads = frozenset(key for key in keys if key.part is Part.HEAD)
        by_space = {s: tuple(c for c in members if spaces[c] == s) for s in sorted({spaces[c] for c in members})}
        if len(by_space) == 1 or not heads:
            groups.append(Group(members, keys, private))
            continue
        groups.append(Group(members, keys - heads, private))
        for same in by_space.values():
            own = frozenset(key for key in replies[same[0]].tensors if key.part is Part.HEAD)
            groups.append(Group(same, own, private))
    return [group for group in groups if group.keys]


def aggregated(
    settings: RobustSettings,
    groups: Iterable[Group],
    replies: Mapping[ClientId, Reply],
    starts: Mapping[ClientId, Tensors],
) -> tuple[dict[ClientId, Reply], dict[ClientId, Weighed]]:
    """``replies`` with what each group agrees on, and what the rule made of every client.

    ``starts`` are the tensors that the clients started from; a tensor without one started from 0.
    """
    changed: dict[ClientId, dict[Key, Tensor]] = {c: dict(reply.tensors) for c, reply in replies.items()}
    weighed: dict[ClientId, Weighed] = {}
    for group in sorted(groups, key=lambda group: (-len(group.members), group.members)):
        out = {c for c in group.members if c in weighed and weighed[c].outlying}
        members = [c for c in group.members if c not in out or len(group.members) >= settings.min_group]
        updates = [_update(replies[c].tensors, starts[c], group.keys) for c in members]
        if len(members) >= MAJORITY:
            results, seen = _by_rule(settings, updates)
            weighed = {**dict(zip(members, seen, strict=True)), **weighed}
        else:
            results = [_without_majority(updates, group)] * len(members)
        of = dict(zip(members, results, strict=True))
        nothing = {key: torch.zeros_like(replies[group.members[0]].tensors[key]) for key in group.keys}
        for client in group.members:
            update = of.get(client, results[0] if results else nothing)
            changed[client] |= _moved(starts[client], update)
    return {c: replace(reply, tensors=changed[c]) for c, reply in replies.items()}, weighed


def alone(
    settings: RobustSettings, replies: Mapping[ClientId, Reply], starts: Mapping[ClientId, Tensors]
) -> set[ClientId]:
    """The clients whose update resembles too few others to be grouped with any: see :data:`ALIKE`.

    As many attackers as are assumed could resemble each other; so one more than these must be similar, by cosine.
    """
    clients = sorted(replies)
    if len(clients) < MAJORITY:
        return set()
    keys = frozenset(key for key in replies[clients[0]].tensors if key.part is not Part.HEAD)
    products = gram([_update(replies[c].tensors, starts[c], keys) for c in clients])
    sizes = norms(products).clamp_min(1e-300)
    cosines = (products / sizes[:, None] / sizes[None, :]).fill_diagonal_(-1)
    others = min(max(settings.attackers_of(len(clients)), 1), len(clients) - 1)
    nearest = cosines.sort(dim=1, descending=True).values[:, others - 1]
    least = ALIKE * float(nearest.median())
    return {c for c, cosine in zip(clients, nearest.tolist(), strict=True) if cosine < max(least, 0.0)}


def _by_rule(
    settings: RobustSettings, updates: Sequence[Mapping[Key, Tensor]]
) -> tuple[list[dict[Key, Tensor]], list[Weighed]]:
    """The update of every member after the rule, and what the rule made of it."""
    n, attackers = len(updates), settings.attackers_of(len(updates))
    products = gram(updates)
    sizes = norms(products)
    factors = clipping(products, settings.clip) if settings.clip else torch.ones_like(sizes)
    mixing = factors.diag()
    if settings.nnm:
        mixing = neighbour_mixing(mixing @ products @ mixing, attackers) @ mixing
    if settings.rule == "mean":
        results = [combine("mean", updates, row.expand(n, n), products, 0) for row in mixing]
        whole = combine("mean", updates, mixing, products, 0)
    else:
        whole = combine(settings.rule, updates, mixing, products, attackers)
        results = [whole] * n
    usual = float(sizes.median())
    along = gram([whole, *updates])[0]
    cosines = along[1:] / (along[0].clamp_min(0).sqrt() * sizes).clamp_min(1e-300)
    seen = [
        Weighed(float(size) / usual if usual else 1.0, float(factor), float(cosine), bool(cosine < 0))
        for size, factor, cosine in zip(sizes, factors, cosines, strict=True)
    ]
    return results, seen


def _without_majority(updates: Sequence[Mapping[Key, Tensor]], group: Group) -> dict[Key, Tensor]:
    """The update of a group of two clients or fewer, see the module's docstring."""
    if len(updates) == 2:
        return {key: agreement(updates[0][key], updates[1][key]) for key in group.keys}
    if len(updates) == 1 and group.private:
        return dict(updates[0])
    return {key: torch.zeros_like(value) for key, value in updates[0].items()} if updates else {}


def _update(tensors: Tensors, start: Tensors, keys: frozenset[Key]) -> dict[Key, Tensor]:
    return {key: tensors[key] - start[key] if key in start else tensors[key] for key in sorted(keys)}


def _moved(start: Tensors, update: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    return {key: start[key] + value if key in start else value for key, value in update.items()}
