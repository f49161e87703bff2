"""HetLoRA's two halves without a model: padding, norms as weights, truncation, and ranks that are pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.methods.fedit import FedIT
from coterie.methods.findings import AggregationError, Values, find
from coterie.methods.hetlora import HetLoRA, HetLoRASettings
from coterie.methods.parts import lora_of
from coterie.methods.plan import MethodSettings, Plan
from coterie.ops.mean import mean
from coterie.requests import LastRanks, Train, Trained
from coterie.types import ClientInfo, Key, Part, Reply
from halves import Play, moved, products, still

KEYS = [Key(module, 0, part) for module in "qv" for part in (Part.A, Part.B)]


def make(ranks: Any = (), head: Any = "personal", rank: int = 2, **settings: Any) -> HetLoRA:
    plan = Plan(rank=rank, ranks=ranks, alpha=4, head=head)
    return HetLoRA(HetLoRASettings(**{"prune": 1.0, **settings}), plan)


def norm_of(reply: Reply, rank: int) -> float:
    """||s B A|| over both modules."""
    return sum(float(p.square().sum()) for p in products(reply.tensors, 4 / rank).values()) ** 0.5


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_with_one_rank_and_weights_by_rows_it_is_fedit_bit_for_bit(head: Any) -> None:
    play = Play(make((2, 2), head, weighting="examples"))
    plain = Play(FedIT(MethodSettings(), Plan(rank=2, alpha=4, head=head)))
    for _ in range(3):
        play.round()
        plain.round()
        assert play.state.lora.keys() == plain.state.lora.keys()
        assert all(torch.equal(value, plain.state.lora[key]) for key, value in play.state.lora.items())
        assert find(play.method.describe(play.state), AggregationError) == AggregationError(plain.state.error)
    assert str(play.state.heads) == str(plain.state.heads)


def test_with_one_rank_it_is_the_mean_weighted_by_norms() -> None:
    play = Play(make())
    replies = play.round()
    norms = [norm_of(reply, 2) for reply in replies.values()]
    assert max(norms) > 1.1 * min(norms)
    loras = [{key: reply.tensors[key] for key in KEYS} for reply in replies.values()]
    for key, value in mean(loras, norms).items():
        torch.testing.assert_close(play.state.lora[key], value)


def test_no_client_of_three_weighs_more_than_half_however_large_its_product_is() -> None:
    play = Play(make())
    replies = play.round(still)
    lora = {c: lora_of(r.tensors) for c, r in replies.items()}
    ones = {c: {key: torch.ones_like(value) for key, value in of.items()} for c, of in lora.items()}
    first = next(iter(ones))
    ones[first] = {key: value * 100 for key, value in ones[first].items()}
    weights = play.method._weights(ones, replies)
    assert max(weights) / sum(weights) == pytest.approx(0.5)


def test_where_one_product_of_three_is_not_zero_all_weigh_the_same() -> None:
    play = Play(make())
    replies = play.round(still)
    zero = {c: {key: torch.zeros_like(value) for key, value in lora_of(r.tensors).items()} for c, r in replies.items()}
    first = next(iter(zero))
    loras = {**zero, first: {key: torch.ones_like(value) for key, value in zero[first].items()}}
    assert play.method._weights(loras, replies) == play.method._weights(zero, replies) == [1.0] * len(zero)


def test_padded_means_on_one_scale_and_the_first_ranks_back() -> None:
    ranks = (1, 2, 4, 3)
    play = Play(make(ranks))
    replies = play.round()
    norms = [norm_of(reply, rank) for reply, rank in zip(replies.values(), ranks, strict=True)]
    expected = {key: torch.zeros_like(value) for key, value in play.state.lora.items()}
    for reply, rank, norm in zip(replies.values(), ranks, norms, strict=True):
        for key in KEYS:
            share = norm / sum(norms)
            if key.part is Part.A:
                expected[key][:rank] += share * reply.tensors[key]
            else:
                expected[key][:, :rank] += share * reply.tensors[key] * 2 / rank  # alpha / r over alpha / 2
    for key in KEYS:
        torch.testing.assert_close(play.state.lora[key], expected[key])
    for bank, rank in zip(play.banks().values(), ranks, strict=True):
        assert bank.scaling == 4 / rank
        for module, product in products(bank.tensors, bank.scaling).items():
            a, b = (expected[Key(module, 0, part)].double() for part in (Part.A, Part.B))
            torch.testing.assert_close(product, 2.0 * b[:, :rank] @ a[:rank], rtol=1e-5, atol=1e-6)


def test_ranks_that_no_client_of_a_round_has_stay_as_they_are() -> None:
    play = Play(make((1, 2, 4, 3)))
    play.round()
    before = play.state.lora
    play.round(only=["client-0", "client-1"])
    for key in KEYS:
        now, then = play.state.lora[key], before[key]
        rest, first = (
            ((now[2:], then[2:]), (now[:2], then[:2]))
            if key.part is Part.A
            else ((now[:, 2:], then[:, 2:]), (now[:, :2], then[:, :2]))
        )
        assert torch.equal(*rest)
        assert not torch.equal(*first)


def shrinking(last: float) -> Any:
    """As if trained: B moves, then the last third of the ranks of A and B is multiplied by ``last``."""

    def train(request: Train, client: ClientInfo) -> Trained:
        done = moved(request, client)
        tensors = dict(done.tensors)
        for key in KEYS:
            start = request.bank.tensors[key] if request.bank.tensors[Key("q", 0, Part.B)].any() else tensors[key]
            kept = 2 * min(start.shape) // 3
            tensors[key] = start.clone()
            (tensors[key][kept:] if key.part is Part.A else tensors[key][:, kept:]).mul_(last)
        return Trained(tensors, 1.0, client.num_train, 100, 5)

    return train


def ranks_now(play: Play) -> list[int]:
    assert find(play.method.describe(play.state), Values) == Values({"ranks": dict(play.state.ranks.by_client)})
    return [play.state.ranks.of(c) for c in play.clients]


def test_a_client_whose_last_ranks_shrink_keeps_the_first_ones() -> None:
    """In the first round B starts at zero, so nothing shrinks."""
    play = Play(make((6, 3, 4), rank=3, prune=0.7))
    play.round(shrinking(0.5))
    assert ranks_now(play) == [6, 3, 4, 6]
    play.round(shrinking(1.5))
    assert ranks_now(play) == [6, 3, 4, 6]
    play.round(shrinking(0.5), only=["client-0", "client-1"])
    assert ranks_now(play) == [4, 2, 4, 6]
    assert play.state.ranks.largest == 6
    replies = play.round(shrinking(0.5))
    assert [replies[c].tensors[KEYS[0]].shape[0] for c in play.clients] == [4, 2, 4, 6]
    assert ranks_now(play) == [2, 1, 2, 4]
    assert {value.shape[0] for key, value in play.state.lora.items() if key.part is Part.A} == {4}
    for _ in range(4):
        play.round(shrinking(0.5))
    assert ranks_now(play) == [1, 1, 1, 1]
    assert play.state.ranks.of("a newcomer") == 1


def test_what_is_pruned_is_not_averaged() -> None:
    play = Play(make((3,), rank=3, prune=0.7, weighting="examples"))
    play.round()
    before = {key: value.clone() for key, value in play.state.lora.items()}
    play.round(shrinking(0.1), only=["client-0"])
    for key in KEYS:
        now, then = (t.T if key.part is Part.B else t for t in (play.state.lora[key], before[key]))
        torch.testing.assert_close(now[:2], then[:2])
        assert torch.equal(now[2:], then[2:]), "no other client's ranks above are touched"


@pytest.mark.parametrize(("prune", "expected"), [(1.0, {}), (0.7, {6: 4, 3: 2}), (0.99, {6: 5, 3: 2})])
def test_the_last_ranks_are_penalised_where_there_are_any(prune: float, expected: dict[int, int]) -> None:
    play = Play(make((6, 3, 1), rank=3, prune=prune, penalty=0.2))
    play.round()
    for client, (request,) in play.asked.items():
        assert isinstance(request, Train)
        kept = expected.get(play.state.ranks.of(client))
        assert request.last_ranks == (None if kept is None else LastRanks(0.2, kept))


def test_clients_that_do_not_move_leave_the_model_as_it_is() -> None:
    """Also in the first round, where every product is zero and no norm says who weighs how much."""
    play = Play(make((1, 3)))
    for train in (still, moved, still):
        before: dict[Key, Tensor] = dict(play.state.lora)
        play.round(train, only=["client-1", "client-3"])
        if train is still:
            for key in KEYS:
                torch.testing.assert_close(play.state.lora[key], before[key])
