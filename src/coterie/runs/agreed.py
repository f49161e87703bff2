"""What a round's replies become before the method averages them: what most agree on, or sums that hide each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.methods.robust import Group, RobustSettings, Weighed, aggregated
from coterie.methods.secure import Sum
from coterie.types import ClientId, Reply, Tensors


@dataclass(frozen=True)
class Agreed:
    """The replies that a method averages, and why others are left out.

    ``weighed``: what a rule made of each update; ``sums``: what became of each group's secure sum. ``notes`` are for
    the user; those of ``once``, by how they begin, are said once in a run.
    """

    replies: dict[ClientId, Reply]
    failed: Mapping[ClientId, str] = field(default_factory=dict)
    weighed: Mapping[ClientId, Weighed] | None = None
    sums: Mapping[str, Sum] | None = None
    notes: Sequence[str] = ()
    once: Mapping[str, str] = field(default_factory=dict)


def by_rule(
    settings: RobustSettings,
    groups: Sequence[Group],
    replies: Mapping[ClientId, Reply],
    starts: Mapping[ClientId, Tensors],
) -> Agreed:
    """``replies`` after the rule of ``[robust]``, and who points away from what their group agrees on."""
    agreed, weighed = aggregated(settings, groups, replies, starts)
    once = {}
    for client in sorted(c for c in weighed if weighed[c].outlying):
        subject = f"{client}'s update points away from what its group agrees on"
        once[subject] = f"{subject}: {weighed[client]} ([robust] rule = {settings.rule!r})"
    return Agreed(agreed, weighed=weighed, once=once)
