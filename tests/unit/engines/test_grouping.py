"""Which clients share passes: alike ones, always the same, and spread evenly over devices."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data.rows import ClientData
from coterie.engines.grouping import PASS, Load, cost, evaluation_load, grouped, schedule, training_load
from coterie.requests import Optim
from coterie.types import CoterieError
from workplaces import client_of, make_workplace

LOADS = st.lists(
    st.builds(Load, st.just(0), st.integers(0, 40), st.integers(0, 16), st.floats(0, 128, allow_nan=False)), max_size=20
).map(lambda found: [Load(i, one.passes, one.rows, one.tokens) for i, one in enumerate(found)])


@given(LOADS, st.integers(1, 6), st.integers(1, 4))
def test_everyone_is_in_one_group_and_every_group_on_one_workplace(
    loads: list[Load], size: int, workplaces: int
) -> None:
    groups = grouped(loads, size)
    assert sorted(one.number for group in groups for one in group) == list(range(len(loads)))
    assert all(1 <= len(group) <= size for group in groups)
    assert [cost(group) for group in groups] == sorted(map(cost, groups), reverse=True)
    assert grouped(loads[::-1], size) == groups, "whatever the order that they come in"
    shares = schedule(groups, workplaces)
    assert sorted(number for share in shares for number in share) == list(range(len(groups)))
    assert all(share == sorted(share) for share in shares), "the most expensive first"
    total = sum(map(cost, groups))
    busiest = max((sum(cost(groups[i]) for i in share) for share in shares), default=0.0)
    assert busiest <= total / workplaces + (cost(groups[0]) if groups else 0) + 1e-6


def test_cost_counts_padding_and_the_passes_that_are_left_to_some() -> None:
    assert cost([Load(0, 3, 4, 10)]) == 3 * (4 * 10 + PASS)
    assert cost([Load(0, 3, 4, 10), Load(1, 1, 2, 30)]) == (2 * 4 * 30 + PASS) + 2 * (4 * 10 + PASS)
    assert cost([Load(0, 0, 0, 0.0)]) == 0


def test_clients_with_rows_of_a_length_share_passes() -> None:
    draw = random.Random(0)
    loads = [Load(i, 4, 8, draw.choice([10.0, 60.0, 120.0]) + draw.random()) for i in range(24)]
    groups = grouped(loads, 4)
    spans = [max(one.tokens for one in group) - min(one.tokens for one in group) for group in groups]
    assert sum(span > 50 for span in spans) <= 2, "at most where one length goes over into the next"
    in_turn = [loads[i : i + 4] for i in range(0, 24, 4)]
    assert sum(map(cost, groups)) < 0.8 * sum(map(cost, in_turn))


def test_clients_with_as_many_passes_share_them() -> None:
    loads = [Load(i, 1 + 9 * (i % 2), 8, 20.0) for i in range(8)]
    assert [{one.passes for one in group} for group in grouped(loads, 4)] == [{10}, {1}]


@pytest.mark.parametrize(("how", "passes"), [({"epochs": 2}, 6), ({"steps": 5}, 5), ({"steps": 2, "accumulate": 4}, 8)])
def test_what_training_takes(how: dict[str, int], passes: int) -> None:
    optim = Optim(batch_size=3, **how)
    workplace = make_workplace()
    client = client_of(workplace)
    lengths = sorted(workplace.lengths(client, "train"), reverse=True)
    assert len(lengths) == 8
    assert training_load(workplace, optim)(7, client) == Load(7, passes, 3, (lengths[0] + lengths[3] + lengths[6]) / 3)


def test_what_evaluation_takes() -> None:
    workplace = make_workplace()
    client = client_of(workplace)
    ends = [sorted(workplace.lengths(client, split), reverse=True) for split in ("validation", "test")]
    assert [len(lengths) for lengths in ends] == [4, 5]
    tokens = ((ends[0][0] + ends[0][3]) / 2 + (ends[1][0] + ends[1][3]) / 2) / 2
    assert evaluation_load(workplace, ("validation", "test"), 3)(2, client) == Load(2, 4, 3, tokens)
    nobody = ClientData(replace(client.info, id="nobody"), {})
    assert evaluation_load(workplace, ("validation", "test"), 3)(2, nobody) == Load(2, 0, 0, 0.0)


def test_a_client_with_a_row_that_cannot_be_encoded_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    client = client_of(workplace)

    def broken(*_: object) -> None:
        raise CoterieError("two candidates have the same tokens")

    monkeypatch.setattr(type(workplace.task), "encode", broken)
    assert training_load(workplace, Optim())(0, client) == Load(0, 0, 0, 0.0)


@pytest.mark.parametrize("few", [2, 8])
def test_of_several_orders_the_cheapest_is_taken(few: int) -> None:
    """Alike in passes, or alike in length: what costs less depends on which of the two differs more."""
    loads = [Load(0, few, 4, 100), Load(1, 8, 4, 10), Load(2, few, 4, 10), Load(3, 8, 4, 100)]
    by_length, by_passes = [[3, 0], [1, 2]], [[3, 1], [0, 2]]
    costs = [sum(cost([loads[number] for number in group]) for group in groups) for groups in (by_length, by_passes)]
    assert costs[0] < costs[1]
    made = [{one.number for one in group} for group in grouped(loads, 2)]
    assert made == [{0, 3}, {1, 2}]
