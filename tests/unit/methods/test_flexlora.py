"""FlexLoRA's two halves without a model: the exact mean of the products, cut to each client's rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.methods.findings import AggregationError, Values
from coterie.methods.flexlora import FlexLoRA
from coterie.methods.plan import MethodSettings, Plan
from coterie.types import Part, Tensors
from halves import CLIENTS, Play, mean_of_products, parts, products, still

FULL = 8  # no product of BASE has a higher rank


def make(ranks: Any = (), head: Any = "personal", rank: int = 2) -> FlexLoRA:
    return FlexLoRA(MethodSettings(), Plan(rank=rank, ranks=ranks, alpha=4, head=head))


def scales(play: Play) -> dict[str, float]:
    """alpha / r of every client."""
    return {c: 4 / play.state.ranks.of(c) for c in play.clients}


def close(found: Tensors, scaling: float, expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    made = products(found, scaling)
    assert made.keys() == expected.keys()
    for module, product in made.items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=atol)


@pytest.mark.parametrize("ranks", [(FULL,), (1, 2, 4, FULL), (3, FULL)], ids=str)
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_at_full_rank_the_model_is_the_exact_mean_of_the_products(ranks: Any, head: Any) -> None:
    play = Play(make(ranks, head))
    for _ in range(3):
        replies = play.round()
        expected = mean_of_products(replies, scales(play))
        close(play.method.experts(play.state)["global"], play.method.plan.scaling, expected)
        cut = Values({"cut_error": pytest.approx(0.0, abs=1e-5)})
        assert play.method.describe(play.state) == [AggregationError(0.0), cut]


def test_a_client_gets_the_nearest_matrix_of_its_rank() -> None:
    play = Play(make((1, 2, 3, 5)))
    replies = play.round()
    whole = mean_of_products(replies, scales(play))
    for client, bank in play.banks().items():
        rank = play.state.ranks.of(client)
        assert bank.scaling == 4 / rank
        for module, product in products(bank.tensors, bank.scaling).items():
            u, s, vt = torch.linalg.svd(whole[module])
            nearest = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
            torch.testing.assert_close(product, nearest, rtol=0, atol=1e-5)


def test_the_error_of_the_cut_is_what_the_svd_leaves_out() -> None:
    play = Play(make((2,)))
    whole = mean_of_products(play.round(), scales(play))
    kept = products(play.state.lora, play.method.plan.scaling)
    lost = sum(float((whole[m] - kept[m]).square().sum()) for m in whole)
    total = sum(float(product.square().sum()) for product in whole.values())
    averaging, found = play.method.describe(play.state)
    assert averaging == AggregationError(0.0)
    assert found == Values({"cut_error": pytest.approx((lost / total) ** 0.5, rel=1e-5)})
    assert (lost / total) ** 0.5 > 0.1


def test_the_rule_sets_the_shapes_that_travel() -> None:
    play = Play(make({"client-1": 4, "client-3": 1}))
    for _ in range(2):
        replies = play.round()
        for client, rank in (("client-0", 2), ("client-1", 4), ("client-2", 2), ("client-3", 1)):
            assert {v.shape[0] for k, v in replies[client].tensors.items() if k.part is Part.A} == {rank}
            assert {v.shape[1] for k, v in replies[client].tensors.items() if k.part is Part.B} == {rank}
    assert {value.shape[0] for key, value in play.state.lora.items() if key.part is Part.A} == {4}


def test_all_clients_start_from_the_same_a_and_b_of_zero() -> None:
    play = Play(make((1, 2, 3, 5)))
    banks = play.banks()
    for key, value in banks["client-3"].tensors.items():
        if key.part is Part.B:
            assert not any(bank.tensors[key].any() for bank in banks.values())
        elif key.part is Part.A:
            for client, bank in banks.items():
                assert torch.equal(bank.tensors[key], value[: play.state.ranks.of(client)])


@pytest.mark.parametrize("ranks", [(), (2, 4)], ids=str)
def test_clients_that_do_not_move_leave_the_model_as_it_is(ranks: Any) -> None:
    """Where every client has the largest rank: a smaller one sends only its leading part back."""
    play = Play(make(ranks))
    play.round()
    before = products(play.state.lora)
    play.round(still, only=["client-1", "client-3"] if ranks else [])
    close(play.state.lora, 1.0, before)


def test_directions_that_no_client_of_a_round_has_can_still_learn() -> None:
    """A rank with A = 0 and B = 0 would have no gradient for ever."""
    play = Play(make((1, 2, 3, 5)))
    play.round(only=["client-0"])
    expected = mean_of_products({"client-0": play.round(only=["client-0"])["client-0"]}, {"client-0": 4.0})
    close(play.state.lora, play.method.plan.scaling, expected)
    for key, value in play.state.lora.items():
        if key.part is Part.A:
            assert bool((value.norm(dim=1) > 0.5).all())


def test_heads_are_shared_by_label_space_or_stay() -> None:
    for head, expected in (("personal", {Part.A, Part.B}), ("shared", {Part.A, Part.B, Part.HEAD})):
        play = Play(make((2, 3), head))
        replies = play.round()
        assert all(parts(reply.tensors) == expected for reply in replies.values())
        assert len(play.banks()) == len(CLIENTS)
