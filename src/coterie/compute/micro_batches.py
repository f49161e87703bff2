"""The rows that a request trains on, in micro-batches: a client's own, or those of many clients together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from coterie.compute.workplace import Workplace
from coterie.data.examples import Example, batches
from coterie.data.rows import ClientData
from coterie.ops.streams import stream
from coterie.requests import Train
from coterie.types import CoterieError

MicroBatch = tuple[int, list[Example]]  # the number of the head that they go through, and the examples


def examples_by_head(workplace: Workplace, client: ClientData, request: Train) -> dict[int, list[Example]]:
    """The examples to train on, by the number of their head, in the order of the clients' ids.

    Raises :class:`CoterieError` for a client whose rows are not on this machine.
    """
    if not request.rows_of:
        return {0: _examples(workplace, client, request)}
    if missing := sorted(request.rows_of.keys() - workplace.all_clients.keys()):
        raise CoterieError(
            f"client {client.info.id} is to train on the rows of {len(request.rows_of)} clients together, and those of "
            f"{missing[0]} are not here: only a simulation can do that; use `coterie run`"
        )
    examples: dict[int, list[Example]] = {}
    for name, head in sorted(request.rows_of.items()):
        examples.setdefault(head, []).extend(_examples(workplace, workplace.all_clients[name], request))
    return examples


def micro_batches(examples: Mapping[int, list[Example]], size: int, seed: int, *purpose: str | int) -> list[MicroBatch]:
    """Every example once, in random micro-batches of one head each, in a random order."""
    if len(examples) == 1:
        return [(head, part) for head, of in examples.items() for part in batches(of, size, stream(seed, *purpose))]
    made = [(head, part) for head, of in examples.items() for part in batches(of, size, stream(seed, *purpose, head))]
    return [made[i] for i in torch.randperm(len(made), generator=stream(seed, *purpose, "heads")).tolist()]


def _examples(workplace: Workplace, client: ClientData, request: Train) -> list[Example]:
    if request.hold_out:
        return workplace.divided(client, "train", request.hold_out)[0]
    return workplace.examples(client, "train")
