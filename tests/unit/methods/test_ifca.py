"""IFCA's two halves on made-up losses, and what it comes to with one LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie.compute.client import LocalCompute
from coterie.engines.checks import fault_of
from coterie.methods.findings import AggregationError, Clusters, Notes, find
from coterie.methods.ifca import IFCA, NOTE, IFCASettings
from coterie.methods.plan import Plan
from coterie.requests import Score, Scored, Train
from coterie.types import NO_EXPERT, Bank, ClientInfo, Key, Part, Reply
from halves import CLIENTS, Play, alike
from workplaces import equal_bits

NAMES = [client.id for client in CLIENTS]
HEAD = Key("score.weight", NO_EXPERT, Part.HEAD)
B = Key("q", 0, Part.B)


def play(head: Any = "shared", clusters: int = 3, **settings: Any) -> Play:
    plan = Plan(rank=2, alpha=4, dropout=0.1, rounds=3, head=head)
    return Play(IFCA(IFCASettings(clusters=clusters, **settings), plan))


def taking(numbers: dict[str, int]) -> Callable[[Score, ClientInfo], list[Scored]]:
    """As if each client's rows fitted the LoRA of that number best."""

    def score(request: Score, client: ClientInfo) -> list[Scored]:
        return [Scored(float(k != numbers[client.id]), {}, 10) for k in range(len(request.banks))]

    return score


APART = {"client-0": 2, "client-1": 0, "client-2": 2, "client-3": 0}


def test_every_client_takes_the_lora_of_the_least_loss_and_trains_it_whole() -> None:
    over = play(examples=7)
    before = over.state
    over.round(score=taking(APART))
    for name in NAMES:
        compared, request = over.asked[name]
        assert isinstance(compared, Score)
        assert (compared.split, compared.examples, len(compared.banks)) == ("train", 7, 3)
        assert isinstance(request, Train)
        assert request.bank is compared.banks[APART[name]]
        assert request.trainable == request.bank.tensors.keys()
        for k, bank in enumerate(compared.banks):
            assert torch.equal(bank.tensors[B], before.loras[B._replace(expert=k)])
            assert torch.equal(bank.tensors[B._replace(part=Part.A)], before.loras[Key("q", k, Part.A)])
    assert over.state.members == APART
    assert over.personal[NAMES[0]].info["cluster"] == 2


def test_a_cluster_averages_its_members_by_examples_and_the_others_stay() -> None:
    over = play()
    before = over.state
    replies = over.round(score=taking(APART))
    for k in range(3):
        members = [c for c in CLIENTS if APART[c.id] == k]
        total = sum(c.num_train for c in members)
        expected = sum(c.num_train / total * replies[c.id].tensors[B] for c in members)
        found = over.state.loras[B._replace(expert=k)]
        if members:
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, before.loras[B._replace(expert=k)])
        assert torch.equal(over.method.experts(over.state)[f"expert-{k}"][B], found)


def test_clients_choose_again_before_they_evaluate() -> None:
    over = play()
    over.round(score=taking(APART))
    turned = {name: 2 - k for name, k in APART.items()}
    for name, bank in over.banks(taking(turned)).items():
        assert torch.equal(bank.tensors[B], over.state.loras[B._replace(expert=turned[name])])
    ins = over.method.configure(over.state, CLIENTS, 2)[NAMES[0]]
    last = over.method.bank(ins, CLIENTS[0], over.personal[NAMES[0]])
    assert torch.equal(last.tensors[B], over.state.loras[B._replace(expert=2)])


def test_a_shared_head_belongs_to_a_cluster_and_a_label_space() -> None:
    over = play()
    start = over.banks(taking(APART))
    replies = over.round(score=taking(APART))
    banks = over.banks(taking(APART))
    both = [c for c in CLIENTS if c.id in ("client-0", "client-2")]  # one cluster, one label space
    total = sum(c.num_train for c in both)
    mean = sum(c.num_train / total * replies[c.id].tensors[HEAD] for c in both)
    torch.testing.assert_close(banks["client-0"].tensors[HEAD], mean)
    assert torch.equal(banks["client-1"].tensors[HEAD], replies["client-1"].tensors[HEAD])
    assert torch.equal(banks["client-3"].tensors[HEAD], replies["client-3"].tensors[HEAD])
    unused = over.banks(taking(dict.fromkeys(NAMES, 1)))
    assert torch.equal(unused["client-0"].tensors[HEAD], start["client-0"].tensors[HEAD])
    assert all(key.part is not Part.HEAD for own in over.personal.values() for key in own.tensors)


def test_a_personal_head_goes_with_every_lora_and_the_user_is_warned() -> None:
    over = play("personal")
    assert find(over.method.describe(over.state), Notes) == Notes([NOTE])
    replies = over.round(score=taking(APART))
    compared, _ = over.asked[NAMES[0]]
    assert isinstance(compared, Score)
    assert len({id(bank.tensors[HEAD]) for bank in compared.banks}) == 1
    assert HEAD not in replies[NAMES[0]].tensors
    assert HEAD in over.personal[NAMES[0]].tensors
    for quiet in (play("shared"), play("personal", clusters=1)):
        assert find(quiet.method.describe(quiet.state), Notes) is None


def test_a_tie_is_drawn_by_client() -> None:
    many = [ClientInfo(f"c{i}", 10, labels=("a", "b")) for i in range(60)]
    over = Play(IFCA(IFCASettings(clusters=3), Plan(rank=2, rounds=3)), many)
    over.round(score=alike)
    sizes = [list(over.state.members.values()).count(k) for k in range(3)]
    assert min(sizes) > 8
    again = Play(IFCA(IFCASettings(clusters=3), Plan(rank=2, rounds=3)), many[::-1])
    again.round(score=alike)
    assert again.state.members == over.state.members


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    def broken(request: Score, client: ClientInfo) -> list[Scored]:
        return [Scored(float("nan"), {}, 1), Scored(5.0, {}, 1), Scored(float("inf"), {}, 1)]

    over = play()
    over.round(score=broken)
    assert set(over.state.members.values()) == {1}


@pytest.mark.parametrize("cluster", [3, -1, 1.0, True, None])
def test_a_cluster_that_there_is_not_makes_a_reply_bad(cluster: Any) -> None:
    over, me = play(), CLIENTS[0]
    reply = over.round(score=taking(APART))[me.id]
    info = {**reply.info, "cluster": cluster}
    expected = over.method.expects(over.state, me, 2), 1e4, me.num_train
    bad = Reply(reply.tensors, reply.num_examples, info)
    assert fault_of(reply, *expected, over.method.expects_info(over.state, me, 2)) is None
    fault = fault_of(bad, *expected, over.method.expects_info(over.state, me, 2))
    assert fault is not None
    assert "cluster" in fault


def test_the_report_has_the_clusters_and_the_aggregation_error() -> None:
    over = play()
    assert find(over.method.describe(over.state), Clusters) is None
    over.round(score=taking(APART))
    assert find(over.method.describe(over.state), Clusters) == Clusters(APART)
    error = find(over.method.describe(over.state), AggregationError)
    assert error is not None
    assert error.value is not None
    assert 0 < error.value < 2


# with a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_with_one_lora_it_is_fedit_bit_for_bit(head: str, tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "mood-1", "size-0")
    ended = short_runs.run(short_runs.make("ifca", clusters=1, head=head), over, tmp_path / "ifca")
    fedit = short_runs.run(short_runs.make("fedit", head=head), over, tmp_path / "fedit")
    assert equal_bits(ended.state.loras, fedit.state.lora)
    assert ended.state.error == fedit.state.error
    for client in ("mood-0", "mood-1", "size-0"):
        assert equal_bits(dict(ended.tensors(client)), dict(fedit.tensors(client)))


def test_what_a_client_evaluates_with_has_the_least_loss_on_its_training_rows(tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "mood-1", "size-0", "size-1", "place-0")
    ended = short_runs.run(short_runs.make("ifca", clusters=3, head="shared"), over, tmp_path)
    assert len({*ended.state.members.values()}) > 1
    after, least = ended.method.configure(ended.state, ended.engine.clients, 3), []
    for data in over:
        ins, personal = after[data.info.id], ended.engine.states.personal.load(data.info.id, 2)
        request = next(ended.method.choose(ins, data.info, personal))
        losses = [scored.loss for scored in LocalCompute(ended.engine.workplace, data, 2).score(request)]
        best: Bank = request.banks[losses.index(min(losses))]
        assert equal_bits(dict(ended.tensors(data.info.id)), dict(best.tensors))
        least.append(losses.index(min(losses)))
    assert len({*least}) > 1


def test_clients_with_equal_data_end_with_equal_loras(tmp_path: Path) -> None:
    """They compare the same LoRAs on the same rows, whatever each was drawn to train first."""
    one, other = short_runs.clients("mood-0", "size-0")
    over = [one, short_runs.twin(one, "twin"), other]
    ended = short_runs.run(short_runs.make("ifca", clusters=2, head="shared"), over, tmp_path, rounds=3)
    assert equal_bits(dict(ended.tensors("mood-0")), dict(ended.tensors("twin")))
