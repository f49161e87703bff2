"""Rows of a batch packed into fewer rows, with hardly any padding.

Positions start anew at each packed row, and attention does not cross rows: transformers builds the block-diagonal mask,
or cuts the row for variable-length attention, where it gets positions and no attention mask. The last token of a packed
row predicts nothing, as in a batch of padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coterie.data.examples import IGNORE, Batch


def packed(batch: Batch, pad: int) -> Batch:
    """A padded ``batch`` of a decoder with its rows packed into rows of the longest one's length.

    The same tokens have labels. ``pad`` is the token at the ends of rows that are not full.
    """
    lengths = batch.mask.sum(1).tolist()
    rows = first_fit(lengths, max(lengths))
    ids = torch.full((len(rows), max(lengths)), pad)
    labels, positions, segments = torch.full_like(ids, IGNORE), torch.zeros_like(ids), torch.zeros_like(ids)
    for row, members in enumerate(rows):
        start = 0
        for number, at in enumerate(members, start=1):
            here = slice(start, start := start + lengths[at])
            own = batch.mask[at].bool()
            ids[row, here] = batch.inputs["input_ids"][at, own]
            labels[row, here] = batch.labels[at, own]
            labels[row, here.start] = IGNORE  # the token before it is another row's
            positions[row, here] = torch.arange(lengths[at])
            segments[row, here] = number
    return Batch({"input_ids": ids, "position_ids": positions}, labels, batch.count, segments=segments)


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The items by number in bins of ``size``: the longest first, each into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, left in enumerate(room) if left >= lengths[item]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(size)
        bins[at].append(item)
        room[at] -= lengths[item]
    return bins
