"""How much one client may weigh in a round: in bytes, in its update, and in its share of a mean.

What is out of line shows only beside others. With fewer than :data:`FEWEST` replies there is no telling which of them
is, and neither updates nor shares are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from torch import Tensor

from coterie.ops.mean import share_limit
from coterie.requests import Optim
from coterie.types import ClientId, Key, Part, Reply, Tensors

FEWEST = 3
_MOST_STEPS = 4.0  # times as large an update, at most, for more steps: they follow from rows, which are claimed
_FURTHEST = 2.0  # learning rates by the root of the steps; training has been seen to move numbers by .7 to .9
_INFO_BYTES = 2**21  # for a reply's info, beside its tensors
_KEY_BYTES = 400  # per tensor, beside its name: type, shape and place, twice
_FLOAT_BYTES = 4

Sizes = Mapping[Part, float]  # root mean square of an update, by the part of its tensors


def reply_limit(expected: Mapping[Key, tuple[int, ...]]) -> int:
    """The largest size, in bytes, of an encoded reply with the ``expected`` shapes (all float32)."""
    tensors = sum(_FLOAT_BYTES * math.prod(shape) for shape in expected.values())
    names = sum(_KEY_BYTES + 4 * len(str(key).encode()) for key in expected)
    return tensors + names + _INFO_BYTES


def update_sizes(reply: Reply, start: Tensors) -> Sizes:
    """The root mean square, over the values of a part, of the reply's tensors minus those that it started from.

    A tensor without a ``start`` counts as it is.
    """
    squares: dict[Part, float] = {}
    values: dict[Part, int] = {}
    for key, tensor in reply.tensors.items():
        squares[key.part] = squares.get(key.part, 0.0) + _squared_update(key, tensor, start)
        values[key.part] = values.get(key.part, 0) + tensor.numel()
    return {part: math.sqrt(squares[part] / values[part]) for part in squares if values[part]}


def _squared_update(key: Key, tensor: Tensor, start: Tensors) -> float:
    before = start.get(key)
    if before is None or before.shape != tensor.shape:
        return float(tensor.double().square().sum())
    return float((tensor.double() - before.double()).square().sum())


def usual_rate(optim: Optim, rnd: int) -> float:
    """How far AdamW moves a number in a step of round ``rnd``; 0 for SGD, whose steps are as long as its gradients."""
    return optim.learning_rate * optim.round_decay ** (rnd - 1) if optim.optimizer == "adamw" else 0.0


def large_updates(
    sizes: Mapping[ClientId, Sizes],
    steps: Mapping[ClientId, int],
    bound: float,
    rate: float = 0.0,
    factors: Mapping[Part, float] = {},
) -> dict[ClientId, str]:
    """Why clients are left out whose update is more than ``bound`` times the round's median, in any part.

    A client that takes more ``steps`` than the median client may move further, by their ratio: an adaptive optimiser
    moves a number about as far in each step. The ratio counts up to 4, because a client's rows are what it claims.

    Where most clients have stopped learning, the median says little about the others. So nobody is left out for an
    update of at most 2 ``rate`` sqrt(steps), as large as any that training makes (:func:`usual_rate`); ``factors``
    are those of parts that train faster or more slowly.
    """
    faults: dict[ClientId, str] = {}
    for part in Part:
        having = {client: of[part] for client, of in sizes.items() if part in of}
        middle = median(having.values()) if len(having) >= FEWEST else 0.0
        if not middle:
            continue
        usual = median(steps[client] for client in having)
        for client, size in having.items():
            longer = min(max(steps[client] / usual, 1.0), _MOST_STEPS)
            trained = (
                0.0 if part is Part.EMBEDDING else _FURTHEST * factors.get(part, 1.0) * rate * math.sqrt(longer * usual)
            )
            if size > max(bound * longer * middle, trained):
                more = f"; its steps allow {longer:.3g} times that" if longer > 1 else ""
                faults[client] = (
                    f"the update of {part.value} is {size / middle:.3g} times the round's median, more than "
                    f"{bound:.3g} ([run] update_bound{more})"
                )
    return faults


def usual_share(clients: int) -> float:
    """The largest share that one of ``clients`` has by default: twice an equal one, at least a third, at most half.

    With less than half, a client that turns its update round cannot stop the others. Few clients are rarely alike in
    size, so they may have half.
    """
    return min(0.5, max(1 / 3, 2 / clients))


def capped_examples(
    replies: Mapping[ClientId, Reply], share: float | None, groups: Sequence[Sequence[ClientId]] = ()
) -> dict[ClientId, int]:
    """The training examples that each reply counts for, so that none has more than ``share`` of all.

    Nor of those of any of the ``groups`` that it is averaged in. Where ``share`` is less than an equal one, all are
    equal. A client that several groups limit counts everywhere for the least. ``share`` None: :func:`usual_share`.
    """
    examples = {client: reply.num_examples for client, reply in replies.items()}
    if len(examples) < FEWEST:
        return examples
    together = [list(examples), *(group for group in groups if len(group) > 1)]
    before: dict[ClientId, int] = {}
    while examples != before:  # groups share clients: one limit leads to another, at most as many times as clients
        before = dict(examples)
        for group in together:
            limit = max(
                1, math.floor(share_limit([examples[c] for c in group], share or usual_share(len(group))) * (1 + 1e-12))
            )
            examples |= {client: min(examples[client], limit) for client in group}
    return examples
