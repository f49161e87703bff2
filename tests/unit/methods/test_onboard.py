"""A client that was not there joins every method after its last round, with the server's experts as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie.artifacts.onboard import join
from coterie.compute.client import LocalCompute
from coterie.methods.base import drive
from coterie.methods.parts import head_of
from coterie.methods.registry import methods
from coterie.requests import Observe
from coterie.types import SHARED, CoterieError, Part

SETTINGS = {"fedlease": {"warmup_rounds": 1}, "fedamole": {"experts": 6}}
THERE = ("mood-0", "size-0", "place-0", "mood-1")
JOINABLE = sorted(set(methods()) - {"smartfed", "centralised"})


def ended(name: str, folder: Path, head: str = "personal", **settings: Any) -> short_runs.Ended:
    torch.set_num_threads(1)
    rounds, there = {"fedlease": (2, THERE), "fedamole": (2, THERE[:2])}.get(name, (1, THERE[:2]))
    method = short_runs.make(name, rounds=rounds, head=head, **{**SETTINGS.get(name, {}), **settings})
    return short_runs.run(method, short_runs.clients(*there), folder, rounds=rounds)


@pytest.mark.parametrize("name", JOINABLE)
def test_a_newcomer_joins_with_the_experts_frozen(name: str, tmp_path: Path) -> None:
    run = ended(name, tmp_path)
    (new,) = short_runs.clients("size-1")
    joined = join(run.method, run.state, LocalCompute(run.engine.workplace, new, 3), epochs=1)
    assert joined.client == "size-1"
    assert joined.before.keys() == joined.after.keys() >= {"loss", "accuracy"}
    assert joined.before["loss"] != joined.after["loss"]
    head = {key: value for key, value in joined.bank.tensors.items() if key.part is Part.HEAD}
    assert {value.shape[0] for value in head.values()} == {3}  # the job's labels
    assert joined.trained >= len(head)
    if name in ("fedlease", "fedamole", "fedit", "ifca"):
        known = {
            tuple(value.flatten().tolist())
            for expert in run.method.experts(run.state).values()
            for key, value in expert.items()
        }
        own = [value for key, value in joined.bank.tensors.items() if key.part in (Part.A, Part.B)]
        assert own
        assert {tuple(value.flatten().tolist()) for value in own} <= known


@pytest.mark.parametrize(
    ("name", "client", "known"),
    [
        *((name, "mood-1", True) for name in ("fedit", "fedamole", "ifca")),
        ("fedlease", "size-1", True),
        ("fedit", "place-0", False),  # nobody there has its labels
    ],
)
def test_a_newcomer_starts_with_the_shared_head_of_its_labels(
    name: str, client: str, known: bool, tmp_path: Path
) -> None:
    run = ended(name, tmp_path, head="shared")
    (new,) = short_runs.clients(client)
    welcome, compute = run.method.welcome(run.state, new.info), LocalCompute(run.engine.workplace, new, 3)
    found = drive(run.method.onboard(welcome, run.engine.spec, new.info), compute)
    head = head_of(found.bank.tensors)
    assert head
    assert head.keys() <= found.trainable
    shared = [all(torch.equal(value, of[key]) for key, value in head.items()) for of in run.state.heads.values.values()]
    assert any(shared) == known


@pytest.mark.parametrize(
    ("name", "trains"),
    [
        ("ffa_lora", {Part.HEAD}),
        ("fedsa_lora", {Part.B, Part.HEAD}),
        ("feddpa", {Part.A, Part.B, Part.HEAD}),
        ("local", {Part.A, Part.B, Part.HEAD}),
    ],
)
def test_what_stays_on_a_client_in_the_method_trains_on_a_newcomer(
    name: str, trains: set[Part], tmp_path: Path
) -> None:
    run = ended(name, tmp_path)
    (new,) = short_runs.clients("size-1")
    welcome, compute = run.method.welcome(run.state, new.info), LocalCompute(run.engine.workplace, new, 3)
    found = drive(run.method.onboard(welcome, run.engine.spec, new.info), compute)
    assert {key.part for key in found.trainable} == trains
    assert found.trainable <= found.bank.tensors.keys()
    sent = {key for key in welcome.tensors if key.part in (Part.A, Part.B)}
    assert not sent & found.trainable, "what the server sent is frozen"


def test_fedlease_finds_the_cluster_of_clients_with_the_same_rows(tmp_path: Path) -> None:
    run = ended("fedlease", tmp_path)
    for client in short_runs.clients("mood-0", "size-0"):  # in round 1, so its warm-up is the one that it sent
        joined = join(run.method, run.state, LocalCompute(run.engine.workplace, client, 1), epochs=1)
        assert joined.bank.gate.options["own"] == run.state.allocation.clusters[client.info.id]


@pytest.mark.parametrize("name", ["fedlease", "fedit"])
def test_a_newcomers_learning_rate_is_not_what_the_runs_has_decayed_to(name: str, tmp_path: Path) -> None:
    run = ended(name, tmp_path)
    (new,) = short_runs.clients("size-1")
    made = []
    for decay in (1.0, 0.1):
        plan = replace(run.method.plan, optim=run.method.plan.optim.model_copy(update={"round_decay": decay}))
        compute = LocalCompute(run.engine.workplace, new, 3)
        made.append(join(replace(run.method, plan=plan), run.state, compute, epochs=1).bank)
    assert made[0].tensors.keys() == made[1].tensors.keys()
    assert all(torch.equal(value, made[1].tensors[key]) for key, value in made[0].tensors.items())


def test_fedamole_gives_a_newcomer_as_many_experts_as_others_have(tmp_path: Path) -> None:
    run = ended("fedamole", tmp_path)
    (new,) = short_runs.clients("size-1")
    joined = join(run.method, run.state, LocalCompute(run.engine.workplace, new, 3), epochs=1)
    for module, z in run.state.holds.items():
        held = {key.expert for key in joined.bank.tensors if key.module == module and key.part is Part.A}
        assert len(held - {-2}) == round(float(z.sum()) / 2)


@pytest.mark.parametrize("assignment", ["static", "random", "oracle"])
def test_a_newcomer_gets_the_shared_expert_alone_where_no_tokens_were_measured(assignment: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    there = [replace(c, info=replace(c.info, group="a")) for c in short_runs.clients(*THERE[:2])]
    method = short_runs.make("fedamole", rounds=2, experts=6, assignment=assignment)
    run = short_runs.run(method, there, tmp_path, rounds=2)
    (new,) = short_runs.clients("size-1")
    joined = join(method, run.state, LocalCompute(run.engine.workplace, new, 3), epochs=1)
    assert {key.expert for key in joined.bank.tensors if key.part in (Part.A, Part.B)} == {SHARED}
    assert joined.before["loss"] != joined.after["loss"]


@pytest.mark.parametrize("padding", ["ignored", "counted"])
def test_a_newcomers_embeddings_are_measured_as_the_others_are(padding: str, tmp_path: Path) -> None:
    run = ended("fedamole", tmp_path, padding=padding, embed_rows="training")
    (new,) = short_runs.clients("size-1")
    welcome = run.method.welcome(run.state, new.info)
    request = next(run.method.onboard(welcome, run.engine.spec, new.info))
    assert isinstance(request, Observe)
    assert request.padding == (padding == "counted")
    assert request.hold_out is None
    assert not request.of_experts


def test_a_method_that_no_client_can_join_says_so(tmp_path: Path) -> None:
    run = ended("centralised", tmp_path)
    (new,) = short_runs.clients("size-1")
    with pytest.raises(CoterieError, match=r"centralised takes no client after the start: .* all clients' rows"):
        join(run.method, run.state, LocalCompute(run.engine.workplace, new, 3), epochs=1)
