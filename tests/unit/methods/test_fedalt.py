"""FedALT's two halves on made-up replies, and what it comes to where there is no rest of the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import short_runs
from coterie.methods.fedalt import OWN, REST, FedALT
from coterie.methods.findings import AggregationError, find
from coterie.methods.plan import MethodSettings, Plan
from coterie.nn.attach import attached
from coterie.requests import Train
from coterie.types import NO_EXPERT, ClientInfo, GateSpec, Key, Part, Reply
from halves import BASE, CLIENTS, Play
from workplaces import equal_bits

NAMES = [client.id for client in CLIENTS]


def play(head: Any = "personal") -> Play:
    return Play(FedALT(MethodSettings(), Plan(rank=2, alpha=4, dropout=0.1, rounds=3, head=head)))


def sent(replies: Mapping[str, Reply], client: str, part: Part = Part.B) -> Tensor:
    return replies[client].tensors[Key("q", OWN, part)]


def test_the_rest_of_the_world_is_the_unweighted_mean_of_the_others() -> None:
    over = play()
    replies = over.round()
    for client, bank in over.banks().items():
        for part in (Part.A, Part.B):
            mean = torch.stack([sent(replies, other, part) for other in NAMES if other != client]).mean(0)
            torch.testing.assert_close(bank.tensors[Key("q", REST, part)], mean)
            assert torch.equal(bank.tensors[Key("q", OWN, part)], sent(replies, client, part))


def test_own_lora_mixer_and_head_train_and_only_the_lora_is_sent() -> None:
    over, me = play(), NAMES[0]
    for _ in range(2):
        replies = over.round()
        (request,) = over.asked[me]
        assert isinstance(request, Train)
        assert request.bank.gate == GateSpec("softmax")
        assert {key.expert for key in request.bank.tensors if key.part is Part.A} == {OWN, REST}
        assert {key.expert for key in request.trainable} == {OWN, NO_EXPERT}
        assert {key.part for key in request.trainable} == {Part.A, Part.B, Part.ROUTER, Part.HEAD}
        assert {(key.expert, key.part) for key in replies[me].tensors} == {(OWN, Part.A), (OWN, Part.B)}
    mixer = Key("q", NO_EXPERT, Part.ROUTER)
    assert over.personal[me].tensors[mixer].shape == (2, 6)
    assert torch.equal(over.personal[me].tensors[mixer], over.banks()[me].tensors[mixer])


def test_training_goes_on_from_the_own_lora_and_not_from_an_average() -> None:
    over, me = play(), NAMES[1]
    first = over.round()
    over.round()
    (request,) = over.asked[me]
    assert isinstance(request, Train)
    assert torch.equal(request.bank.tensors[Key("q", OWN, Part.B)], sent(first, me))


def test_the_first_rest_of_the_world_has_no_effect_and_is_not_sent() -> None:
    over = play()
    assert over.method.configure(over.state, CLIENTS, 1)[NAMES[0]].tensors == {}
    tensors = over.banks()[NAMES[0]].tensors
    assert torch.equal(tensors[Key("q", REST, Part.A)], tensors[Key("q", OWN, Part.A)])
    assert not tensors[Key("q", REST, Part.B)].any()


def test_of_a_client_that_misses_a_round_the_others_average_what_it_sent_last() -> None:
    over = play()
    first = over.round()
    second = over.round(only=NAMES[:2])
    mean = (sent(second, NAMES[1]) + sent(first, NAMES[2]) + sent(first, NAMES[3])) / 3
    torch.testing.assert_close(over.banks()[NAMES[0]].tensors[Key("q", REST, Part.B)], mean)


def test_a_client_that_comes_late_receives_the_mean_of_all_others() -> None:
    over, late = play(), ClientInfo("late", 5, labels=("yes", "no"))
    over.round()
    ins = over.method.configure(over.state, [late], 2)["late"]
    bank = over.method.bank(ins, late, over.method.begin(BASE, late))
    everyone = over.method.experts(over.state)["everyone"]
    assert torch.equal(bank.tensors[Key("q", REST, Part.B)], everyone[Key("q", OWN, Part.B)])


def test_a_client_that_began_alone_uses_the_others_once_there_are_some() -> None:
    over, late = Play(FedALT(FedALT.Settings(), play().method.plan), CLIENTS[:1]), CLIENTS[1]
    over.round()
    assert not over.method.configure(over.state, CLIENTS[:1], 2)[CLIENTS[0].id].info["others"]
    over.clients[late.id] = late
    over.state = over.method.admit(over.state, CLIENTS[:2])
    replies = over.round()
    bank = over.banks()[CLIENTS[0].id]
    assert torch.equal(bank.tensors[Key("q", REST, Part.B)], replies[late.id].tensors[Key("q", OWN, Part.B)])


def test_shared_heads_travel_and_are_averaged_by_examples() -> None:
    over, key = play("shared"), Key("score.weight", NO_EXPERT, Part.HEAD)
    replies = over.round()
    members = [c for c in CLIENTS if c.labels == CLIENTS[0].labels]
    assert len(members) == 3
    total = sum(c.num_train for c in members)
    weighted = sum(c.num_train / total * replies[c.id].tensors[key] for c in members)
    torch.testing.assert_close(over.banks()[NAMES[0]].tensors[key], weighted)
    assert key not in over.personal[NAMES[0]].tensors


def test_the_aggregation_error_is_that_of_the_mean_over_all_clients() -> None:
    over = play()
    assert find(over.method.describe(over.state), AggregationError) == AggregationError(None)
    replies, difference, whole = over.round(), 0.0, 0.0
    for module in "qv":
        a, b = ([r.tensors[Key(module, OWN, part)] for r in replies.values()] for part in (Part.A, Part.B))
        exact = torch.stack([y @ x for x, y in zip(a, b, strict=True)]).mean(0)
        difference += float((exact - torch.stack(b).mean(0) @ torch.stack(a).mean(0)).square().sum())
        whole += float(exact.square().sum())
    found = find(over.method.describe(over.state), AggregationError)
    assert found is not None
    assert found.value == pytest.approx((difference / whole) ** 0.5, rel=1e-5)


# with a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_a_client_alone_is_local_bit_for_bit(head: str, tmp_path: Path) -> None:
    over = short_runs.clients("mood-0")
    alone = short_runs.run(short_runs.make("fedalt", head=head), over, tmp_path / "alone")
    local = short_runs.run(short_runs.make("local"), over, tmp_path / "local")
    assert alone.banks["mood-0"].gate == local.banks["mood-0"].gate == GateSpec()
    assert equal_bits(alone.banks["mood-0"].tensors, local.banks["mood-0"].tensors)


def test_a_mixer_that_weighs_both_alike_gives_half_of_the_own_lora_where_the_rest_has_no_effect(tmp_path: Path) -> None:
    ended = short_runs.run(short_runs.make("fedalt"), short_runs.clients("mood-0", "size-0"), tmp_path)
    bank, model = ended.banks["mood-0"], ended.engine.workplace.base.model
    halved = {
        key: torch.zeros_like(value)
        if key.part is Part.ROUTER or (key.part is Part.B and key.expert == REST)
        else value
        for key, value in bank.tensors.items()
    }
    own = {key: value for key, value in bank.tensors.items() if key.part is not Part.ROUTER and key.expert != REST}
    ways = [
        replace(bank, tensors=halved, scaling=2 * bank.scaling),
        replace(bank, tensors=own, gate=GateSpec()),
        bank,
    ]
    logits = []
    for way in ways:
        with torch.no_grad(), attached(model, way):
            logits.append(model(input_ids=torch.arange(5, 12).unsqueeze(0)).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=1e-5)
    assert float((logits[2] - logits[1]).abs().max()) > 1e-4, "as trained, the rest of the world has an effect"


def test_of_two_clients_with_equal_data_each_receives_the_other(tmp_path: Path) -> None:
    one = short_runs.clients("mood-0")[0]
    ended = short_runs.run(short_runs.make("fedalt"), [one, short_runs.twin(one, "twin")], tmp_path)
    for client, other in (("mood-0", "twin"), ("twin", "mood-0")):
        rest = {k._replace(expert=OWN): v for k, v in ended.banks[client].tensors.items() if k.expert == REST}
        assert equal_bits(rest, dict(ended.replies[other].tensors))
