"""FedDPA's two halves on made-up replies, and the two LoRAs and their weights on a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie.methods.feddpa import GLOBAL, LOCAL, FedDPA, FedDPASettings
from coterie.methods.findings import AggregationError, find
from coterie.methods.plan import Plan
from coterie.nn.attach import attached
from coterie.requests import Observe, Train
from coterie.types import NO_EXPERT, GateSpec, Key, Part
from halves import CLIENTS, Play, driven, moved, observed
from workplaces import equal_bits, largest_difference

NAMES = [client.id for client in CLIENTS]
ME = NAMES[0]
HEAD = Key("score.weight", NO_EXPERT, Part.HEAD)


def play(head: Any = "personal", **settings: Any) -> Play:
    return Play(FedDPA(FedDPASettings(**settings), Plan(rank=2, alpha=4, dropout=0.1, rounds=3, head=head)))


def asked(over: Play) -> tuple[Train, Train, Observe]:
    """The local training, the global one, the observation."""
    local, alone, rows = over.asked[ME]
    assert isinstance(local, Train)
    assert isinstance(alone, Train)
    assert isinstance(rows, Observe)
    return local, alone, rows


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_the_local_lora_trains_beside_the_frozen_global_one_and_the_global_one_alone(head: str) -> None:
    over = play(head)
    for _ in range(2):
        received = over.method.configure(over.state, CLIENTS, 1)[ME].tensors
        local, alone, _ = asked((over.round(), over)[1])
        assert {k.expert for k in local.trainable if k != HEAD} == {LOCAL}
        assert {k.expert for k in alone.trainable if k != HEAD} == {GLOBAL}
        assert (HEAD in local.trainable, HEAD in alone.trainable) == (head == "personal", head == "shared")
        assert HEAD in local.bank.tensors
        assert HEAD in alone.bank.tensors
        assert {k.expert for k in alone.bank.tensors} == {GLOBAL, NO_EXPERT}
        for module in "qv":
            key = Key(module, GLOBAL, Part.B)
            assert torch.equal(alone.bank.tensors[key], received[key])
        assert local.purpose != alone.purpose, "their batches are drawn apart"


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_the_mixture_weighs_the_two_by_1_minus_b_and_b(weight: float) -> None:
    over = play(local_weight=weight)
    over.round()
    received = over.method.configure(over.state, CLIENTS, 2)[ME].tensors
    before = over.personal[ME].tensors
    over.round()
    local, _, rows = asked(over)
    scale = over.method.plan.scaling
    for of, own in ((local.bank, before), (rows.bank, over.personal[ME].tensors)):
        for module in "qv":
            for tensors, expert, share in ((received, GLOBAL, 1 - weight), (own, LOCAL, weight)):
                a, b = (Key(module, expert, part) for part in (Part.A, Part.B))
                found = of.scaling * of.tensors[b] @ of.tensors[a]
                torch.testing.assert_close(found, share * scale * tensors[b] @ tensors[a])


def test_only_the_global_lora_is_sent_and_the_local_one_goes_on_at_home() -> None:
    over = play()
    sent = over.round()
    assert {k.expert for k in sent[ME].tensors} == {GLOBAL}
    kept = over.personal[ME].tensors
    over.round()
    local, _, _ = asked(over)
    for key in (k for k in kept if k.expert == LOCAL):
        assert torch.equal(local.bank.tensors[key], kept[key])
    assert torch.equal(local.bank.tensors[HEAD], kept[HEAD])


def test_both_are_used_with_the_references_that_the_client_observed() -> None:
    over = play(scale=0.7, instances=3)
    start = over.banks()[ME]
    assert start.gate == GateSpec()
    assert {k.expert for k in start.tensors} == {GLOBAL, NO_EXPERT}, "before it has trained, the global LoRA alone"
    over.round()
    _, _, rows = asked(over)
    assert (rows.split, rows.examples) == ("train", 3)
    bank = over.banks()[ME]
    assert bank.gate == GateSpec("similarity", {"scale": 0.7})
    assert {k.expert for k in bank.tensors if k.part is Part.A} == {GLOBAL, LOCAL}
    for key, direction in observed(rows, CLIENTS[0]).directions.items():
        assert torch.equal(bank.tensors[key._replace(part=Part.ROUTER)], direction.unsqueeze(0))


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_after_its_training_a_client_uses_both_with_the_global_one_as_it_trained_it(head: str) -> None:
    over = play(head)
    replies = over.round()
    _, alone, _ = asked(over)
    ins, own = over.method.configure(over.state, CLIENTS, 2)[ME], over.personal[ME]
    trained = replace(alone.bank, tensors={**alone.bank.tensors, **moved(alone, CLIENTS[0]).tensors})
    bank, requests = driven(over.method.after_training(ins, CLIENTS[0], own, trained), CLIENTS[0])
    received, key = over.method.bank(ins, CLIENTS[0], own), Key("q", GLOBAL, Part.B)
    assert not requests
    assert bank.gate == received.gate
    assert bank.tensors.keys() == received.tensors.keys()
    assert torch.equal(bank.tensors[key], replies[ME].tensors[key])
    assert not torch.equal(bank.tensors[key], received.tensors[key]), "which holds the others' training too"
    assert torch.equal(bank.tensors[HEAD], (trained if head == "shared" else own).tensors[HEAD])


def test_the_costs_of_both_trainings_are_reported() -> None:
    over = play()
    reply = over.round()[ME]
    counted = [moved(request, CLIENTS[0]) for request in asked(over)[:2]]
    assert reply.info["steps"] == sum(trained.steps for trained in counted)
    assert reply.info["tokens"] == sum(trained.tokens for trained in counted)
    assert reply.info["loss"] == counted[1].loss


def test_the_aggregation_error_is_known_after_a_round() -> None:
    over = play()
    assert find(over.method.describe(over.state), AggregationError) == AggregationError(None)
    over.round()
    found = find(over.method.describe(over.state), AggregationError)
    assert found is not None
    assert found.value is not None
    assert 0 < found.value < 2


# with a model --------------------------------------------------------------------------------------------------------


def test_the_global_lora_is_fedits_where_the_head_is_the_same(tmp_path: Path) -> None:
    """With shared heads the global side is FedIT's: it never sees the local one."""
    over = short_runs.clients("mood-0", "mood-1", "size-0")
    ended = short_runs.run(short_runs.make("feddpa", head="shared"), over, tmp_path / "feddpa")
    fedit = short_runs.run(short_runs.make("fedit", head="shared"), over, tmp_path / "fedit")
    assert equal_bits(ended.state.lora, fedit.state.lora)
    assert equal_bits(dict(ended.replies["size-0"].tensors), dict(fedit.replies["size-0"].tensors))


def test_with_all_the_weight_the_local_lora_is_local_for_a_round(tmp_path: Path) -> None:
    """b = 1: the global LoRA has no effect while the local one trains; only the draw of the batches differs."""
    over = short_runs.clients("mood-0", "size-0")
    one_step = {"dropout": 0.0, "optim": short_runs.OPTIM.model_copy(update={"batch_size": 10})}
    ended = short_runs.run(short_runs.make("feddpa", local_weight=1.0, **one_step), over, tmp_path / "feddpa", rounds=1)
    local = short_runs.run(short_runs.make("local", **one_step), over, tmp_path / "local", rounds=1)
    for client in ("mood-0", "size-0"):
        mine = {k._replace(expert=0): v for k, v in ended.tensors(client).items() if k.expert == LOCAL}
        alone = {k: v for k, v in local.tensors(client).items() if k.part is not Part.HEAD}
        assert largest_difference(mine, alone) < 1e-5


def test_rows_like_the_clients_own_take_more_of_the_local_lora(tmp_path: Path) -> None:
    ended = short_runs.run(short_runs.make("feddpa", instances=0), short_runs.clients("mood-0", "size-0"), tmp_path)
    model, bank = ended.engine.workplace.base.model, ended.banks["mood-0"]
    task, weights = ended.engine.workplace.task, {}
    for client in ended.engine.federation.clients:
        batch = task.collate(ended.engine.workplace.examples(client, "train"))
        with attached(model, bank) as handle, torch.no_grad():
            handle.now.usage, handle.now.mask = {}, batch.mask
            model(**batch.inputs)
            shares = [(use[0] / handle.now.seen[module])[1] for module, use in sorted(handle.now.usage.items())]
        weights[client.info.id] = torch.stack(shares)
    own, other = weights["mood-0"], weights["size-0"]
    assert ((own > 0) & (own < 0.5)).all()
    assert float((own - other).mean()) > 0


def test_without_weight_the_local_lora_has_no_effect(tmp_path: Path) -> None:
    ended = short_runs.run(short_runs.make("feddpa"), short_runs.clients("mood-0", "size-0"), tmp_path)
    bank, model = ended.banks["mood-0"], ended.engine.workplace.base.model
    apart = {k: -v if k.part is Part.ROUTER else v for k, v in bank.tensors.items()}  # rows unlike all that it knows
    alone = {k: v for k, v in bank.tensors.items() if k.expert != LOCAL and k.part is not Part.ROUTER}
    logits = []
    for way in (replace(bank, tensors=apart), replace(bank, tensors=alone, gate=GateSpec()), bank):
        with torch.no_grad(), attached(model, way):
            logits.append(model(input_ids=torch.arange(5, 12).unsqueeze(0)).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=1e-5)
    assert float((logits[2] - logits[1]).abs().max()) > 1e-4
