"""What shared forward passes are expected to gain on a processor: fewer passes, against rows padded to a common length.

Each client draws the order of its batches by itself, so in a shared pass a short batch meets long ones:

    tokens of a pass = clients * rows * E[longest],   E[longest] = sum over t >= 0 of 1 - prod_c P(length_c <= t)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from coterie.engines.grouping import Load, grouped

# A pass costs as much as its tokens and this many more (packaged encoder, one thread; docs/performance-batched.md).
PASS_TOKENS = {"bfloat16": 60, "float32": 20}
LEAST = 1.1  # less is within what two runs of the same work differ by
_CHUNK = 4  # batches are of similar length within chunks of so many: coterie.data.examples.batches


def batch_lengths(lengths: Sequence[int], size: int) -> list[int]:
    """The longest rows of a client's batches of ``size``, as :func:`coterie.data.examples.batches` makes them; of many
    chunks, those of a typical one."""
    ordered = sorted(lengths)
    if len(ordered) <= _CHUNK * size:
        return [ordered[min(stop, len(ordered)) - 1] for stop in range(size, len(ordered) + size, size)]
    rank = len(ordered) / (_CHUNK * size + 1)  # between two rows of a chunk, in order
    return [ordered[min(round(rank * size * part), len(ordered) - 1)] for part in range(1, _CHUNK + 1)]


def expected_gain(loads: Sequence[Load], lengths: Mapping[int, Sequence[int]], size: int, per_pass: float) -> float:
    """How many times as long the clients take alone as in groups of ``size``. ``lengths`` are of each one's batches."""
    below = {number: _at_most(of, max(map(max, lengths.values()))) for number, of in lengths.items()}
    alone = sum(_cost([load], below, per_pass) for load in loads)
    return alone / sum(_cost(group, below, per_pass) for group in grouped(loads, size))


def best_gain(
    loads: Sequence[Load], lengths: Mapping[int, Sequence[int]], most: int, per_pass: float
) -> tuple[int, float]:
    """Of the group sizes 2, 4, 8 ... and ``most`` (at least 2) the one that gains most, and its gain."""
    sizes = sorted({most, *(2**i for i in range(1, most.bit_length()) if 2**i < most)})
    gains = {size: expected_gain(loads, lengths, size, per_pass) for size in sizes}
    return max(gains.items(), key=lambda gain: gain[1])


def _at_most(lengths: Sequence[int], longest: int) -> NDArray[np.float64]:
    """[longest]: the share of the lengths that are at most 0, 1, 2 ... tokens."""
    return np.searchsorted(np.sort(lengths), np.arange(longest), side="right") / len(lengths)


def _cost(group: Sequence[Load], below: Mapping[int, NDArray[np.float64]], per_pass: float) -> float:
    """As :func:`coterie.engines.grouping.cost`, with the padding of batches that meet at random."""
    total = 0.0
    for start, stop in pairwise(sorted({0} | {load.passes for load in group})):
        active = [load for load in group if load.passes > start]
        longest = float((1 - np.prod([below[load.number] for load in active], axis=0)).sum())
        total += (stop - start) * (len(active) * max(load.rows for load in active) * longest + per_pass)
    return total
