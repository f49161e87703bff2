"""What a round's replies become before the method averages them: what most agree on, or sums that hide each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from coterie.engines.bounds import capped_examples
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


def with_shares(
    groups: Sequence[Group], replies: Mapping[ClientId, Reply], max_share: float | None
) -> tuple[dict[ClientId, Reply], dict[str, str]]:
    """``replies`` with the training examples that each counts for, and whose are fewer, to be said once."""
    examples = capped_examples(replies, max_share, [group.members for group in groups])
    total, once = sum(reply.num_examples for reply in replies.values()), {}
    for client in [c for c in replies if examples[c] < replies[c].num_examples]:
        subject = f"{client} has more than its share of the training examples"
        has, counts = replies[client].num_examples, examples[client] / sum(examples.values())
        once[subject] = (
            f"{subject}: {has / total:.0%} of the round's; {examples[client]} of its {has} count, which makes it "
            f"{counts:.0%} ([run] max_share)"
        )
    return {client: replace(reply, num_examples=examples[client]) for client, reply in replies.items()}, once
