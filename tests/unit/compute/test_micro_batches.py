"""The micro-batches of a request: a client's own rows, or those of several through their heads."""

from __future__ import annotations

from dataclasses import replace

import pytest

import workplaces
from coterie.compute.micro_batches import examples_by_head, micro_batches
from coterie.data.examples import Example
from coterie.requests import HoldOut, Optim, Train
from coterie.types import Bank, CoterieError

OWN = Train(Bank({}), frozenset(), Optim())


def rows(number: int, length: int = 3) -> list[Example]:
    return [Example(tuple(range(length + i % 4)), label=i) for i in range(number)]


def test_without_others_rows_they_are_the_clients_own() -> None:
    workplace = workplaces.make_workplace()
    client = workplaces.client_of(workplace)
    assert examples_by_head(workplace, client, OWN) == {0: workplace.examples(client, "train")}


def test_rows_of_several_go_by_head_in_the_order_of_the_clients() -> None:
    workplace = workplaces.make_workplace()
    north, south, west = (workplaces.client_of(workplace, n, 3 + i) for i, n in enumerate(("north", "south", "west")))
    workplace.all_clients = {client.info.id: client for client in (west, south, north)}
    own = {client.info.id: workplace.examples(client, "train") for client in (north, south, west)}
    request = replace(OWN, rows_of={"west": 1, "south": 0, "north": 1})
    assert examples_by_head(workplace, south, request) == {1: own["north"] + own["west"], 0: own["south"]}
    held_out = replace(request, hold_out=HoldOut(0.3, 10))
    left = {n: workplace.divided(c, "train", HoldOut(0.3, 10))[0] for n, c in workplace.all_clients.items()}
    assert examples_by_head(workplace, south, held_out) == {1: left["north"] + left["west"], 0: left["south"]}
    with pytest.raises(CoterieError, match=r"client south .* 2 clients together, and those of east are not here"):
        examples_by_head(workplace, south, replace(OWN, rows_of={"south": 0, "east": 0}))


@pytest.mark.parametrize("heads", [{0: 7}, {0: 7, 1: 9, 2: 1}])
def test_every_row_comes_once_in_micro_batches_of_one_head(heads: dict[int, int]) -> None:
    examples = {head: rows(number) for head, number in heads.items()}
    made = micro_batches(examples, 4, 0, "batches", 1)
    assert all(0 < len(part) <= 4 for _, part in made)
    for head, of in examples.items():
        seen = [example.label for number, part in made if number == head for example in part]
        assert sorted(seen) == list(range(len(of)))
    assert micro_batches(examples, 4, 0, "batches", 1) == made
    assert micro_batches(examples, 4, 0, "batches", 2) != made


def test_heads_take_turns_at_random() -> None:
    orders = {tuple(head for head, _ in micro_batches({0: rows(16), 1: rows(16)}, 4, seed)) for seed in range(8)}
    assert len(orders) > 4
    assert all(sorted(order) == [0] * 4 + [1] * 4 for order in orders)
