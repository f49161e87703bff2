"""Centralised: who trains, on whose rows, through which head; and what it comes to on rows that one client has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import short_runs
import sites
from coterie.compute.client import LocalCompute
from coterie.compute.train import Training
from coterie.config.load import load_config
from coterie.data.rows import ClientData
from coterie.experiment import run
from coterie.methods.centralised import NOTE, Centralised
from coterie.methods.findings import Notes, find
from coterie.methods.plan import MethodSettings, Plan
from coterie.nn.attach import attached
from coterie.requests import Optim, Train
from coterie.runs.events import Event, RoundDone
from coterie.types import NO_EXPERT, Bank, CoterieError, Key, Part, Tensors
from halves import CLIENTS, Play
from workplaces import equal_bits, largest_difference

HEAD = "score.weight"


def play(**plan: Any) -> Play:
    return Play(Centralised(MethodSettings(), Plan(rank=2, alpha=4, dropout=0.1, rounds=3, **plan)))


def head(number: int = NO_EXPERT) -> Key:
    return Key(HEAD, number, Part.HEAD)


def test_one_client_trains_on_the_rows_of_all_and_the_others_do_nothing() -> None:
    over = play()
    replies = over.round()
    first, *others = (over.asked[client.id] for client in CLIENTS)
    (request,) = first
    assert isinstance(request, Train)
    assert request.rows_of == {"client-0": 0, "client-1": 0, "client-2": 0, "client-3": 1}
    assert request.trainable == request.bank.tensors.keys()
    assert {key.expert for key in request.bank.tensors if key.part is Part.HEAD} == {0, 1}
    assert others == [[], [], []]
    assert [len(reply.tensors) for reply in replies.values()][1:] == [0, 0, 0]
    assert equal_bits(over.state.tensors, replies["client-0"].tensors)


def test_everyone_is_sent_the_lora_and_has_the_head_of_its_label_space() -> None:
    over = play()
    start = over.banks()
    over.round()
    for client, bank in over.banks().items():
        number = int(client == "client-3")
        assert {key for key in bank.tensors if key.part is Part.HEAD} == {head()}
        assert torch.equal(bank.tensors[head()], over.state.tensors[head(number)])
        assert bank.tensors[head()].shape == (3 if number else 2, 6)
        assert not torch.equal(bank.tensors[head()], start[client].tensors[head()])
    assert {key.part for key in over.method.experts(over.state)["centralised"]} == {Part.A, Part.B}


def test_a_round_in_which_the_client_that_trains_fails_is_an_error() -> None:
    over = play()
    replies = over.round()
    with pytest.raises(CoterieError, match="round 2: client-0, which trains on all clients' rows, sent no valid reply"):
        over.method.aggregate(over.state, {c: r for c, r in replies.items() if c != "client-0"}, 2)


def test_more_than_ten_clients_train(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="centralised")
    for i in range(12):
        for split in ("train", "validation", "test"):
            rows = sites.classification_rows("mood", 16, f"{split} {i}")
            sites.write_rows(tmp_path / "many" / f"mood-{i:02d}" / f"{split}.jsonl", rows)
    config = load_config(path, ['data.folder="many"', "run.rounds=1"])
    heard: list[Event] = []
    run(config, tmp_path / "out", root=tmp_path, listen=heard.append)
    (done,) = [event for event in heard if isinstance(event, RoundDone)]
    assert not done.failed


def test_the_user_reads_what_it_is_and_a_part_of_the_clients_is_refused() -> None:
    over = play()
    assert find(over.method.describe(over.state), Notes) == Notes([NOTE])
    with pytest.raises(CoterieError, match=r"client-1 is not in round 2; set \[run\] cohort = 1"):
        over.method.configure(over.state, CLIENTS[:1], 2)


def test_a_run_of_which_a_part_trains_is_refused_before_it_begins(tmp_path: Path) -> None:
    config = load_config(sites.config(tmp_path, method="centralised", run="cohort = 0.5"))
    with pytest.raises(CoterieError, match=r"\[run\] cohort < 1 does not work with centralised: .*set cohort = 1"):
        run(config, tmp_path / "out", root=tmp_path)
    assert not (tmp_path / "out").exists()  # so a comparison of all methods leaves it out


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (3, 12)])
def test_a_round_has_the_steps_of_all_clients(steps: int, expected: int) -> None:
    over = play(optim=Optim(steps=steps))
    over.round()
    (request,) = over.asked["client-0"]
    assert isinstance(request, Train)
    assert request.optim.steps == expected


def test_sites_do_not_run_it(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="centralised")
    with pytest.raises(CoterieError, match=r"\[method\] centralised trains on all clients' rows in one place"):
        flower_sites.server_config(path)


# with a model --------------------------------------------------------------------------------------------------------


def union(clients: tuple[ClientData, ...], name: str) -> ClientData:
    """One client with the training rows of several, in the order of their ids."""
    ordered = sorted(clients, key=lambda client: client.info.id)
    rows = tuple(row for client in ordered for row in client.splits["train"])
    first = next(client for client in clients if client.info.id == name)
    info = replace(first.info, num_train=len(rows))
    return replace(first, info=info, splits={**first.splits, "train": rows})


@pytest.mark.parametrize("kind", ["classification", "generation", "multiple_choice"])
@pytest.mark.parametrize("names", [["mood-0"], ["mood-1", "mood-0", "mood-2"]])
def test_on_one_label_space_it_is_local_on_the_union_of_the_rows_bit_for_bit(
    names: list[str], kind: str, tmp_path: Path
) -> None:
    over = short_runs.clients(*names, kind=kind)
    ended = short_runs.run(short_runs.make("centralised"), over, tmp_path / "all", kind=kind)
    whole = (union(over, "mood-0"),)
    local = short_runs.run(short_runs.make("local"), whole, tmp_path / "one", kind=kind)
    for name in names:
        assert equal_bits(ended.tensors(name), local.tensors("mood-0"))


def test_one_client_is_local_with_the_same_steps(tmp_path: Path) -> None:
    optim = short_runs.OPTIM.model_copy(update={"steps": 3, "batch_size": 2})
    over = short_runs.clients("size-0")
    ended = short_runs.run(short_runs.make("centralised", optim=optim), over, tmp_path / "all")
    local = short_runs.run(short_runs.make("local", optim=optim), over, tmp_path / "one")
    assert ended.replies["size-0"].info["steps"] == 3
    assert equal_bits(ended.tensors("size-0"), local.tensors("size-0"))


def by_hand(training: Training, rate: float) -> dict[Key, torch.Tensor]:
    """Plain SGD over the training's own micro-batches, each with a bank of the LoRA and one head alone."""
    tensors, task = dict(training.request.bank.tensors), training.workplace.task
    for step, numbers in zip(training.steps, training.heads, strict=True):
        ((examples, number),) = zip(step, numbers, strict=True)
        own = {k: v for k, v in tensors.items() if k.part is not Part.HEAD or k.expert == number}
        with attached(training.workplace.base.model, replace(training.request.bank, tensors=own), own) as bank:
            batch = task.collate(examples)
            (task.loss(training.workplace.base.model(**batch.inputs).logits, batch) / batch.count).backward()
            grads = {key: parameter.grad for key, parameter in bank.parameters.items()}
        tensors |= {key: tensors[key] - rate * grad for key, grad in grads.items() if grad is not None}
    return tensors


def test_of_two_label_spaces_every_row_trains_the_lora_and_its_own_head(tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "size-0", "mood-1")
    optim = Optim(
        optimizer="sgd", learning_rate=0.1, schedule="constant", weight_decay=0, clip=0, batch_size=4, epochs=2
    )
    ended = short_runs.run(short_runs.make("centralised", dropout=0.0, optim=optim), over, tmp_path, rounds=1)
    method, workplace = ended.method, ended.engine.workplace
    start = method.init(ended.engine.spec, ended.engine.clients)
    assert start.spaces == {"mood-0": 0, "mood-1": 0, "size-0": 1}
    bank = Bank(start.tensors, scaling=method.plan.scaling)
    request = Train(bank, frozenset(bank.tensors), optim, rows_of=start.spaces)
    training = Training(workplace, over[0], 1, request)
    sizes = [(number, len(examples)) for (examples,), (number,) in zip(training.steps, training.heads, strict=True)]
    assert sum(size for number, size in sizes if number == 0) == 2 * 20
    assert sum(size for number, size in sizes if number == 1) == 2 * 10
    assert [number for number, _ in sizes] != sorted(number for number, _ in sizes), "the label spaces take turns"
    expected: Tensors = by_hand(training, 0.1)
    assert largest_difference(dict(ended.state.tensors), expected) < 1e-5
    assert all(not torch.equal(expected[key], start.tensors[key]) for key in expected)


def test_what_a_client_trained_last_has_its_own_head(tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "size-0")
    ended = short_runs.run(short_runs.make("centralised"), over, tmp_path, rounds=1)
    ins = ended.method.configure(ended.state, ended.engine.clients, 2)["mood-0"]
    compute = LocalCompute(ended.engine.workplace, over[0], 2)
    request = next(ended.method.client(ins, over[0].info, ended.engine.states.personal.load("mood-0", 1)))
    compute.train(request)
    assert compute.trained is not None
    heads = {key: len(value) for key, value in compute.trained.tensors.items() if key.part is Part.HEAD}
    assert set(heads.values()) == {2}
    assert {key.expert for key in heads} == {NO_EXPERT}


def test_without_the_others_rows_it_says_so(tmp_path: Path) -> None:
    over = short_runs.clients("mood-0", "size-0")
    ended = short_runs.run(short_runs.make("centralised"), over, tmp_path, rounds=1)
    request = Train(Bank(ended.state.tensors), frozenset(), Optim(), rows_of={"mood-0": 0, "size-0": 1})
    alone = replace(ended.engine.workplace, all_clients={})
    with pytest.raises(
        CoterieError, match=r"client mood-0 is to train on the rows of 2 clients .* mood-0 are not here"
    ):
        LocalCompute(alone, over[0], 1).train(request)
