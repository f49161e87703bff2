"""Counts the rows of validation and test that are training rows too: what is measured on them says little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from coterie.data.rows import SPLITS, ChatRow, ChoiceRow, ClientData, PreferenceRow, PromptRow, Row, TextRow
from coterie.types import ClientId

Counts = Mapping[ClientId, Mapping[str, int]]  # by client: the rows of each kind of duplicate, where there are any
_MOST = 5  # clients that a text names


def duplicates_of(clients: Sequence[ClientData]) -> Counts:
    """By client: its rows of validation and test that occur, character by character, elsewhere.

    The kinds are ``test in train`` (of the same client), ``test in validation``, ``test in others' train``,
    ``validation in train`` and ``validation in others' train``. A row counts once in each. Labels are not compared.
    """
    holders: Counter[object] = Counter()  # how many clients train on a row
    for client in clients:
        holders.update({_key(row) for row in client.splits["train"]})
    by_client: dict[ClientId, dict[str, int]] = {}
    for client in clients:
        own = {split: {_key(row) for row in client.splits[split]} for split in SPLITS}
        counts: Counter[str] = Counter()
        for split in ("test", "validation"):
            for key in map(_key, client.splits[split]):
                counts[f"{split} in train"] += key in own["train"]
                counts[f"{split} in others' train"] += holders[key] > (key in own["train"])
                counts["test in validation"] += split == "test" and key in own["validation"]
        if some := {kind: count for kind, count in sorted(counts.items()) if count}:
            by_client[client.info.id] = some
    return by_client


def totals(counts: Counts) -> dict[str, int]:
    """The sums over clients."""
    total: Counter[str] = Counter()
    for row in counts.values():
        total.update(row)
    return dict(sorted(total.items()))


def duplicates_text(counts: Counts) -> str:
    """How many rows of which kind, and at which clients most."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in totals(counts).items())
    most = sorted(counts, key=lambda client: (-sum(counts[client].values()), client))
    named = ", ".join(most[:_MOST]) + (f" and {len(most) - _MOST} more clients" if len(most) > _MOST else "")
    return f"rows to measure on that are elsewhere too: {kinds} (at {named})"


def _key(row: Row) -> object:
    match row:
        case TextRow():
            return row.text, row.text_pair
        case PromptRow():
            return row.prompt, row.completion
        case ChatRow():
            return row.turns
        case PreferenceRow():
            return _key(row.chosen), _key(row.rejected)
        case ChoiceRow():
            return row.prompt, row.choices
