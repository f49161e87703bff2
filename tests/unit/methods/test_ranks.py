"""Who has which rank, and LoRAs on the server's scale and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie import codec
from coterie.methods.parts import head_of, lora_of, start_lora
from coterie.methods.plan import Plan
from coterie.methods.ranks import Ranks, at_client, first_ranks, on_server, padded_to, rank_of, start_ranks
from coterie.methods.registry import method_named, methods
from coterie.types import ClientInfo, CoterieError, Part
from halves import BASE, CLIENTS, Play, products

NAMES = [c.id for c in CLIENTS]


def lora(rank: int) -> Any:
    made = start_lora(BASE, Plan(rank=rank))
    return {key: torch.randn(value.shape) if key.part is Part.B else value for key, value in made.items()}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ((), [6, 6, 6, 6]),
        ((3,), [3, 3, 3, 3]),
        ((2, 4, 8), [2, 4, 8, 2]),
        ({"client-2": 5, "client-0": 1}, [1, 6, 5, 6]),
    ],
    ids=str,
)
def test_ranks_by_name_and_by_a_list_over_the_sorted_names(rule: Any, expected: list[int]) -> None:
    found = start_ranks(Plan(rank=6, ranks=rule), CLIENTS[::-1])
    assert [found.of(name) for name in NAMES] == expected
    assert found.largest == max(expected)
    assert found.of("a newcomer") == min(6, max(expected))


def test_the_rank_of_nobody_is_refused() -> None:
    with pytest.raises(CoterieError, match=r"\[lora\] ranks: there is no client 'clint-1'; did you mean 'client-1'\?"):
        start_ranks(Plan(ranks={"clint-1": 4, "client-0": 2}), CLIENTS)


def test_a_newcomer_is_no_larger_than_the_largest() -> None:
    assert Ranks({"a": 2, "b": 4}, 3).largest == 4
    assert start_ranks(Plan(rank=8, ranks=(2, 4)), CLIENTS).later == 4
    assert start_ranks(Plan(rank=8), []).of("a") == 8


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_servers_scale_changes_no_product(rank: int) -> None:
    plan, made = Plan(rank=4, alpha=6.0), lora(rank)
    there = on_server(made, plan)
    for module, product in products(made, plan.alpha / rank).items():
        torch.testing.assert_close(products(there, plan.scaling)[module], product, rtol=1e-6, atol=1e-6)
    back = at_client(there, plan, rank)
    assert all(torch.allclose(back[key], value) for key, value in made.items())


def test_with_the_plans_rank_every_bit_stays() -> None:
    plan, made = Plan(rank=3, alpha=7.0), lora(3)
    assert all(torch.equal(value, made[key]) for key, value in on_server(made, plan).items())
    assert all(torch.equal(value, made[key]) for key, value in at_client(made, plan, 3).items())


def test_fewer_ranks_and_more() -> None:
    made = lora(3)
    assert rank_of(made) == 3
    wide = padded_to(made, 5)
    assert rank_of(wide) == 5
    assert {key: value.shape for key, value in wide.items()} == {key: value.shape for key, value in lora(5).items()}
    for module, product in products(made).items():
        torch.testing.assert_close(products(wide)[module], product)
    assert all(torch.equal(value, made[key]) for key, value in first_ranks(wide, 3).items())
    assert lora_of(made) == made


def test_names_are_sorted_as_text() -> None:
    clients = [ClientInfo(f"c{i}", 1) for i in range(11)]
    assert start_ranks(Plan(ranks=(1, 2)), clients).of("c10") == 1  # c0, c1, c10, c2: the third


# the methods that allow them -----------------------------------------------------------------------------------------

MIXED = sorted(name for name, kind in methods().items() if kind.mixed_ranks)


def played(name: str, head: Any, rank: int, ranks: Any) -> Play:
    kind = method_named(name)
    play = Play(kind(kind.Settings(), Plan(rank=rank, ranks=ranks, alpha=4, head=head, rounds=3)))
    for _ in range(2):
        play.round()
    return play


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("name", MIXED)
def test_equal_ranks_are_one_rank(name: str, head: str) -> None:
    """Bit for bit where it is the plan's; with another one on the server's scale, the clients use the same products."""
    assert {"flexlora", "hetlora", "flora", "local"} <= {*MIXED}
    plain = played(name, head, 2, ())
    for ranks in ((2,), {client.id: 2 for client in CLIENTS}):
        equal = played(name, head, 2, ranks)
        assert codec.encode(equal.state) == codec.encode(plain.state)
        assert codec.encode(equal.personal) == codec.encode(plain.personal)
    banks, others = plain.banks(), played(name, head, 5, (2,)).banks()
    for client, bank in banks.items():
        found, expected = (products(of.tensors, of.scaling) for of in (others[client], bank))
        for module, product in expected.items():
            torch.testing.assert_close(found[module], product, rtol=0, atol=1e-5)
        for key, value in head_of(bank.tensors).items():
            torch.testing.assert_close(others[client].tensors[key], value)
