"""FedEx-LoRA's two halves without a model: mean A, mean B, and a residual that makes their product exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.methods.fedex_lora import FedExLoRA
from coterie.methods.fedit import FedIT
from coterie.methods.findings import AggregationError, Values, find
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.products import FoldingSettings
from coterie.requests import Train
from coterie.types import FOLDED, ClientInfo, Part, Reply
from halves import BASE, Play, mean_of_products, products, still


def make(head: Any = "personal", folded_rank: int = 0) -> FedExLoRA:
    return FedExLoRA(FoldingSettings(folded_rank=folded_rank), Plan(rank=2, alpha=4, head=head))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for module, product in found.items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=atol)


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_each_round_ends_with_the_exact_mean_of_what_the_clients_have(head: Any) -> None:
    """Each client has what was folded before, and its own product beside it."""
    play = Play(make(head))
    for _ in range(4):
        before = products(play.state.folded, 2.0)
        replies = play.round()
        mean = mean_of_products(replies, dict.fromkeys(replies, 2.0))
        expected = {module: product + before.get(module, 0) for module, product in mean.items()}
        close(products(play.method.experts(play.state)["global"], 2.0), expected)
        for bank in play.banks().values():
            assert bank.scaling == 2.0
            close(products(bank.tensors, 2.0), expected)


def test_a_and_b_are_those_of_fedit_and_the_error_is_what_the_residual_makes_good() -> None:
    play, plain = Play(make()), Play(FedIT(MethodSettings(), Plan(rank=2, alpha=4)))
    replies = play.round()
    plain.round()
    assert all(torch.equal(value, plain.state.lora[key]) for key, value in play.state.lora.items())
    mean = mean_of_products(replies, dict.fromkeys(replies, 2.0))
    left = products(play.state.folded, 2.0)
    ratio = sum(float(p.square().sum()) for p in left.values()) / sum(float(p.square().sum()) for p in mean.values())
    error = find(play.method.describe(play.state), AggregationError)
    assert error == AggregationError(pytest.approx(ratio**0.5, rel=1e-5))
    assert error == find(plain.method.describe(plain.state), AggregationError)
    assert ratio**0.5 > 0.1


def test_the_rank_grows_by_the_clients_up_to_that_of_the_matrices() -> None:
    play = Play(make())
    assert play.method.describe(play.state)[1:] == [Values({"folded_rank": 0})]
    for only, rank in ((["client-0"], 2), (["client-1", "client-2"], 6), ([], 7)):
        play.round(only=only)
        assert play.method.describe(play.state)[1:] == [Values({"folded_rank": rank})]
    assert {k.module: v.shape[0] for k, v in play.state.folded.items() if k.part is Part.A} == {"q": 5, "v": 7}


def test_the_residual_is_frozen_and_stays_on_the_server() -> None:
    play = Play(make())
    for _ in range(2):
        replies = play.round()
        assert all({key.expert for key in reply.tensors} == {0} for reply in replies.values())
    for (request,) in play.asked.values():
        assert isinstance(request, Train)
        assert {key.expert for key in request.bank.tensors if key.part is Part.A} == {0, FOLDED}
        assert FOLDED not in {key.expert for key in request.trainable}


def test_a_bound_on_the_rank_keeps_the_nearest_matrix() -> None:
    exact, cut = Play(make()), Play(make(folded_rank=2))
    exact.round()
    cut.round()
    whole = products(exact.state.folded)
    for module, product in products(cut.state.folded).items():
        u, s, vt = torch.linalg.svd(whole[module])
        torch.testing.assert_close(product, u[:, :2] @ torch.diag(s[:2]) @ vt[:2], rtol=0, atol=1e-5)
        assert s[2] > 1e-2


def test_clients_that_do_not_move_leave_the_model_as_it_is() -> None:
    play = Play(make())
    play.round()
    before = products(play.method.experts(play.state)["global"])
    play.round(still)
    close(products(play.method.experts(play.state)["global"]), before)


def test_clients_with_equal_data_are_one_client_and_leave_no_residual() -> None:
    alone = Play(make(), [ClientInfo("a", 10, labels=("yes", "no"))])
    reply = alone.round()["a"]
    twins = make()
    state = twins.init(BASE, [ClientInfo(c, 10, labels=("yes", "no")) for c in "ab"])
    state = twins.aggregate(state, {"a": Reply(reply.tensors, 10), "b": Reply(reply.tensors, 25)}, 1)
    close(products(twins.experts(state)["global"]), products(alone.method.experts(alone.state)["global"]))
    assert all(float(product.abs().max()) < 1e-6 for product in products(state.folded).values())
