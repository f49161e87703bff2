"""FLoRA's two halves without a model: the exact sum of the clients' products, folded round by round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.methods.findings import AggregationError, Values
from coterie.methods.flora import FLoRA
from coterie.methods.parts import start_lora
from coterie.methods.plan import Plan
from coterie.methods.products import FoldingSettings
from coterie.requests import Train
from coterie.types import FOLDED, Key, Part
from halves import BASE, CLIENTS, Play, mean_of_products, products, still


def make(ranks: Any = (), head: Any = "personal", folded_rank: int = 0) -> FLoRA:
    return FLoRA(FoldingSettings(folded_rank=folded_rank), Plan(rank=2, ranks=ranks, alpha=4, head=head))


def scales(play: Play) -> dict[str, float]:
    return {c: 4 / play.state.ranks.of(c) for c in play.clients}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for module, product in found.items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=atol)


@pytest.mark.parametrize("ranks", [(), (1, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_the_model_is_the_sum_over_rounds_of_the_exact_mean_of_the_products(ranks: Any, head: Any) -> None:
    """Also once the rank has reached that of the matrices, and factors are made anew."""
    play = Play(make(ranks, head))
    expected: dict[str, Tensor] = {}
    for rnd in range(1, 5):
        mean = mean_of_products(play.round(), scales(play))
        expected = {module: product + expected.get(module, 0) for module, product in mean.items()}
        close(products(play.method.experts(play.state)["global"], play.method.plan.scaling), expected)
        for bank in play.banks().values():
            close(products(bank.tensors, bank.scaling), expected)
        stacked = rnd * (8 if not ranks else 10)
        sizes = {key.module: value.shape[0] for key, value in play.state.folded.items() if key.part is Part.A}
        assert sizes == {"q": min(5, stacked), "v": min(7, stacked)}
        assert play.method.describe(play.state) == [AggregationError(0.0), Values({"folded_rank": min(7, stacked)})]


def test_every_round_starts_from_a_fresh_lora_beside_a_frozen_sum() -> None:
    play = Play(make((1, 3)))
    starts: list[Tensor] = []
    for _ in range(3):
        before = play.state.folded
        play.round()
        for client, (request,) in play.asked.items():
            assert isinstance(request, Train)
            bank, rank = request.bank, play.state.ranks.of(client)
            assert bank.scaling == 4 / rank
            assert {key.expert for key in request.trainable if key.part is not Part.HEAD} == {0}
            fresh = {key: value for key, value in bank.tensors.items() if key.expert == 0}
            assert all(value.any() == (key.part is Part.A) for key, value in fresh.items())
            assert {value.shape[0] for key, value in fresh.items() if key.part is Part.A} == {rank}
            frozen = {key: value for key, value in bank.tensors.items() if key.expert == FOLDED}
            assert frozen.keys() == before.keys()
            close(products(frozen, bank.scaling), products(before, play.method.plan.scaling))
        one, other = (play.asked[c][0].bank.tensors[Key("q", 0, Part.A)] for c in ("client-0", "client-2"))
        assert torch.equal(one, other), "clients of one rank start from one A"
        assert not any(torch.equal(one, earlier) for earlier in starts)
        starts.append(one)
    assert torch.equal(starts[0], start_lora(BASE, Plan(rank=1))[Key("q", 0, Part.A)])


def test_a_bound_on_the_rank_keeps_the_nearest_matrix() -> None:
    exact, cut = Play(make()), Play(make(folded_rank=3))
    exact.round()
    cut.round()
    whole = products(exact.state.folded)
    for module, product in products(cut.state.folded).items():
        u, s, vt = torch.linalg.svd(whole[module])
        torch.testing.assert_close(product, u[:, :3] @ torch.diag(s[:3]) @ vt[:3], rtol=0, atol=1e-5)
        assert s[3] > 1e-2
    for _ in range(2):
        cut.round()
        assert {v.shape[0] for k, v in cut.state.folded.items() if k.part is Part.A} == {3}


def test_clients_that_do_not_move_leave_the_model_as_it_is() -> None:
    play = Play(make((1, 2)))
    play.round()
    before = products(play.state.folded)
    play.round(still)
    close(products(play.state.folded), before)


def test_a_client_that_lost_its_state_or_missed_rounds_has_the_whole_sum() -> None:
    play = Play(make())
    play.round()
    play.round(only=["client-0", "client-1"])
    del play.personal["client-0"]
    banks = play.banks()
    for client in ("client-0", "client-2", "client-3"):
        close(products(banks[client].tensors), products(play.state.folded))
    play.round()


def test_before_the_first_round_there_is_only_the_head() -> None:
    play = Play(make())
    assert all({key.part for key in bank.tensors} == {Part.HEAD} for bank in play.banks().values())
    assert play.method.experts(play.state) == {}
    assert len(play.banks()) == len(CLIENTS)
