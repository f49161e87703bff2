"""FDLoRA's two halves on made-up replies: its stages, the server's step, the search; and its sides with a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie.methods.fdlora import FDLoRA, FDLoRASettings
from coterie.methods.findings import AggregationError, find
from coterie.methods.plan import Plan
from coterie.requests import Score, Scored, Train
from coterie.types import NO_EXPERT, Bank, ClientInfo, Key, Part, Tensors
from halves import CLIENTS, Play, driven, moved
from workplaces import equal_bits, largest_difference

NAMES = [client.id for client in CLIENTS]
ME = NAMES[0]
A, B = Key("q", 0, Part.A), Key("q", 0, Part.B)
HEAD = Key("score.weight", NO_EXPERT, Part.HEAD)


def play(head: Any = "personal", **settings: Any) -> Play:
    return Play(FDLoRA(FDLoRASettings(**settings), Plan(rank=2, alpha=4, dropout=0.1, rounds=9, head=head)))


def trainings(over: Play, client: str = ME) -> list[Train]:
    requests = over.asked[client]
    assert all(isinstance(request, Train) for request in requests)
    return [request for request in requests if isinstance(request, Train)]


def weighed(over: Play, client: str, weights: tuple[float, float]) -> Tensors:
    """What the client would use with these weights of its personal and its global side."""
    ins = over.method.configure(over.state, CLIENTS, over.rnd + 1)[client]
    return dict(over.method._fused(ins, over.personal[client], weights).tensors)


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_stage_1_trains_the_personal_lora_alone_and_the_global_one_starts_as_the_mean(head: str) -> None:
    over = play(head)
    assert all(not bank.tensors[B].any() for bank in over.banks().values())
    replies = over.round()
    (request,) = trainings(over)
    assert request.trainable == request.bank.tensors.keys()
    torch.testing.assert_close(over.state.lora[B], torch.stack([r.tensors[B] for r in replies.values()]).mean(0))
    assert torch.equal(weighed(over, ME, (1.0, 0.0))[B], replies[ME].tensors[B])
    torch.testing.assert_close(weighed(over, ME, (0.0, 1.0))[B], over.state.lora[B])
    assert (HEAD in replies[ME].tensors) == (head == "shared")


def test_later_rounds_train_the_global_lora_and_leave_the_personal_one() -> None:
    over = play()
    over.round()
    before, received = dict(over.personal[ME].tensors), over.state.lora
    replies = over.round()
    (request,) = trainings(over)
    assert torch.equal(request.bank.tensors[B], received[B])
    assert torch.equal(weighed(over, ME, (1.0, 0.0))[B], before[B])
    torch.testing.assert_close(over.state.lora[B], torch.stack([r.tensors[B] for r in replies.values()]).mean(0))
    own, shared = (weighed(over, ME, w)[HEAD] for w in ((1.0, 0.0), (0.0, 1.0)))
    assert not torch.equal(own, shared), "each side has a head of its own"


def test_every_so_many_rounds_the_personal_side_becomes_the_trained_global_one() -> None:
    over = play(sync=3)
    over.round()
    first = weighed(over, ME, (1.0, 0.0))
    over.round()
    assert equal_bits(weighed(over, ME, (1.0, 0.0)), first)
    replies = over.round()
    synced = weighed(over, ME, (1.0, 0.0))
    assert torch.equal(synced[B], replies[ME].tensors[B])
    assert torch.equal(synced[HEAD], weighed(over, ME, (0.0, 1.0))[HEAD])
    never = play(sync=0)
    for _ in range(3):
        never.round()
    assert torch.equal(weighed(never, ME, (1.0, 0.0))[B], first[B])


def test_the_server_takes_torchs_step_of_sgd_with_nesterovs_momentum() -> None:
    over = play(outer_rate=0.3, outer_momentum=0.6)
    over.round()
    theta = torch.nn.Parameter(over.state.lora[B].clone())
    optimizer = torch.optim.SGD([theta], lr=0.3, momentum=0.6, nesterov=True)
    for _ in range(3):
        replies = over.round()
        theta.grad = theta.detach() - torch.stack([r.tensors[B] for r in replies.values()]).mean(0)
        optimizer.step()
        torch.testing.assert_close(over.state.lora[B], theta.detach())


def test_a_client_that_missed_stage_1_trains_both_sides_in_its_first_round() -> None:
    over = play()
    over.round(only=NAMES[1:])
    late = over.banks()[ME]
    torch.testing.assert_close(late.tensors[B], over.state.lora[B])
    received = over.state.lora
    replies = over.round()
    own, shared = trainings(over)
    assert not own.bank.tensors[B].any()
    assert torch.equal(shared.bank.tensors[B], received[B])
    assert own.purpose != shared.purpose
    assert torch.equal(shared.bank.tensors[HEAD], weighed(over, ME, (1.0, 0.0))[HEAD]), "its only head so far"
    assert not torch.equal(weighed(over, ME, (1.0, 0.0))[B], replies[ME].tensors[B])


def after_training(over: Play) -> tuple[Bank, Bank, int]:
    """What a client uses after its training, the bank that it trained last, and how often it scored."""
    request, ins = trainings(over)[-1], over.method.configure(over.state, CLIENTS, over.rnd + 1)[ME]
    trained = Bank(
        {**request.bank.tensors, **moved(request, CLIENTS[0]).tensors}, request.bank.gate, over.method.plan.scaling
    )
    bank, asked = driven(over.method.after_training(ins, CLIENTS[0], over.personal[ME], trained), CLIENTS[0])
    assert all(isinstance(request, Score) for request in asked)
    return bank, trained, len(asked)


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_after_its_training_a_client_fuses_its_sides_as_it_trained_them(head: str) -> None:
    over = play(head, search_steps=2, penalty=0)
    over.round()
    bank, personal, scored = after_training(over)
    assert (bank, scored) == (personal, 0), "there is one side so far"
    over.round()
    bank, shared, scored = after_training(over)
    assert scored == 2
    for key in (A, B, *([HEAD] if head == "personal" else [])):
        torch.testing.assert_close(bank.tensors[key], 0.5 * personal.tensors[key] + 0.5 * shared.tensors[key])
    assert not torch.equal(bank.tensors[B], weighed(over, ME, (0.5, 0.5))[B]), "which holds the others' training too"


def test_the_costs_of_both_trainings_of_a_late_client_are_reported() -> None:
    over = play()
    over.round(only=NAMES[1:])
    replies = over.round()
    steps = moved(trainings(over)[0], CLIENTS[0]).steps
    assert {client: reply.info["steps"] for client, reply in replies.items()} == {
        client: steps * (2 if client == ME else 1) for client in NAMES
    }


def test_the_fused_lora_is_made_factor_by_factor() -> None:
    over = play()
    over.round()
    over.round()
    own, shared, both = (weighed(over, ME, w) for w in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.9)))
    for key in both:
        torch.testing.assert_close(both[key], 0.3 * own[key] + 0.9 * shared[key])


def at(over: Play, bank: Bank) -> tuple[float, float]:
    """The weights that a bank of the search was made with."""
    own, shared = (weighed(over, ME, w)[A].flatten().double() for w in ((1.0, 0.0), (0.0, 1.0)))
    own, shared = own + 1e-9, shared + 1e-9
    found = torch.linalg.lstsq(torch.stack([own, shared], dim=1), bank.tensors[A].flatten().double()).solution
    return round(float(found[0]), 4), round(float(found[1]), 4)


def bowl(over: Play, w1: float, w2: float) -> Callable[[Score, ClientInfo], list[Scored]]:
    """As if the loss were least at these weights."""

    def score(request: Score, client: ClientInfo) -> list[Scored]:
        assert (request.split, request.examples) == ("train", over.method.settings.examples)
        return [Scored((at(over, b)[0] - w1) ** 2 + (at(over, b)[1] - w2) ** 2, {}, 9) for b in request.banks]

    return score


def searched(over: Play, score: Any) -> tuple[tuple[float, float], list[Score]]:
    ins = over.method.configure(over.state, CLIENTS, over.rnd + 1)[ME]
    bank, requests = driven(over.method.choose(ins, CLIENTS[0], over.personal[ME]), CLIENTS[0], score=score)
    assert all(isinstance(request, Score) for request in requests)
    return at(over, bank), [request for request in requests if isinstance(request, Score)]


def test_the_search_goes_to_the_least_loss() -> None:
    over = play(penalty=0, search_steps=12)
    over.round()
    over.round()
    weights, requests = searched(over, bowl(over, 1.2, -0.1))
    assert weights == pytest.approx((1.2, -0.1), abs=0.05)
    assert [len(request.banks) for request in requests] == [5] + [4] * 11
    assert [at(over, bank) for bank in requests[0].banks] == [
        (0.5, 0.5),
        (0.75, 0.5),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.5, 0.25),
    ]


def test_the_penalty_draws_the_weights_to_zero_and_without_steps_they_are_a_half() -> None:
    over = play(penalty=0.5, search_steps=12)
    over.round()
    over.round()
    weights, _ = searched(over, bowl(over, 1.2, 0.1))
    assert weights == pytest.approx((0.95, 0.0), abs=0.05)  # d/dw (w - 1.2)^2 + 0.5 w = 0 at 0.95
    still = play(search_steps=0)
    still.round()
    assert searched(still, bowl(still, 0, 0)) == ((0.5, 0.5), [])


def test_the_aggregation_error_is_known_after_a_round() -> None:
    over = play()
    assert find(over.method.describe(over.state), AggregationError) == AggregationError(None)
    assert over.method.experts(over.state) == {}
    over.round()
    error = find(over.method.describe(over.state), AggregationError)
    assert error is not None
    assert error.value is not None
    assert 0 < error.value < 2
    assert over.method.experts(over.state)["global"].keys() == over.state.lora.keys()


# with a model --------------------------------------------------------------------------------------------------------


def sides(ended: short_runs.Ended, client: str, weights: tuple[float, float]) -> Tensors:
    """What a client of a run would use with these weights."""
    after = ended.method.configure(ended.state, ended.engine.clients, 9)[client]
    personal = ended.engine.states.personal.load(client, 9)
    return dict(ended.method._fused(after, personal, weights).tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_all_the_weight_on_one_side_gives_that_side(head: str, tmp_path: Path) -> None:
    """The personal side is one round of local, bit for bit; the global one is FedIT, whose first round stage 1 is."""
    over = short_runs.clients("mood-0", "mood-1", "size-0")
    ended = short_runs.run(short_runs.make("fdlora", head=head), over, tmp_path / "fdlora", rounds=3)
    local = short_runs.run(short_runs.make("local"), over, tmp_path / "local", rounds=1)
    fedit = short_runs.run(short_runs.make("fedit", head=head), over, tmp_path / "fedit", rounds=3)
    for client in ("mood-0", "mood-1", "size-0"):
        assert equal_bits(sides(ended, client, (1.0, 0.0)), dict(local.tensors(client)))
        assert largest_difference(sides(ended, client, (0.0, 1.0)), dict(fedit.tensors(client))) < 1e-6


def test_what_a_client_evaluates_with_costs_no_more_than_the_start_of_the_search(tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "size-0")
    settings = {"penalty": 0.0, "examples": 0, "search_steps": 6}
    ended = short_runs.run(short_runs.make("fdlora", **settings), over, tmp_path)
    moved = 0
    for data in over:
        halves = Bank(sides(ended, data.info.id, (0.5, 0.5)), scaling=ended.method.plan.scaling)
        used = ended.banks[data.info.id]
        request = Score([used, halves], "train")
        chosen, start = short_runs.score(ended, data, request)
        assert chosen.loss <= start.loss
        moved += chosen.loss < start.loss
    assert moved
