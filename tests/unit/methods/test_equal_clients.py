"""Clients with equal data are one client: what every method averages on the server is then what each of them sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pools
from coterie.adapters.pool import write_pool
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from coterie.ops.streams import stream
from coterie.requests import ExpertUse, Observe, Observed, Score, Scored, Train, Trained
from coterie.types import NO_EXPERT, ClientInfo, Key, Part
from halves import BASE, Play

ROUNDS = 3
CLIENTS = [ClientInfo(name, rows, labels=("yes", "no")) for name, rows in (("a", 10), ("b", 25), ("c", 4))]
NOTHING_AVERAGED = {"local", "centralised"}  # one keeps everything, the other trains one LoRA on all rows
FEWEST = {"fedalt": 2}  # a client that is alone has no mean of the others beside it
SETTINGS: dict[str, dict[str, Any]] = {
    "fdlora": {"sync": 3, "outer_momentum": 0.5},
    "fedlease": {"experts": 1, "warmup_rounds": 1},
    "fedamole": {"experts": 3, "assignment": "random"},
    "ifca": {"clusters": 2},
    "smartfed": {"active": 3, "fresh_rank": 2, "train_experts": ("two",)},
}


def alike(request: Train, client: ClientInfo) -> Trained:
    """As if trained: every tensor moves the same way for all clients."""
    moved = {
        key: request.bank.tensors[key]
        + 0.3 * torch.randn(request.bank.tensors[key].shape, generator=stream(3, str(key)))
        for key in sorted(request.trainable)
    }
    return Trained(moved, 1.0, client.num_train, 100, 5)


def first_best(request: Score, client: ClientInfo) -> list[Scored]:
    return [Scored(float(number), {}, client.num_train) for number in range(len(request.banks))]


def the_same(request: Observe, client: ClientInfo) -> Observed:
    """As if all clients' rows had the same directions, and used all of a pool's experts in all modules alike."""
    widths = {key.module: value.shape[1] for key, value in request.bank.tensors.items() if key.part is Part.A}
    usage = {}
    for module in widths:
        numbers = sorted(k.expert for k in request.bank.tensors if k.module == module and k.part is Part.A)
        usage[module] = ExpertUse([1.0] * len(numbers), [1.0] * len(numbers), numbers)
    directions = {
        Key(module, NO_EXPERT, Part.EMBEDDING): torch.rand(width, generator=stream(4, module))
        for module, width in widths.items()
    }
    importance = {what: dict.fromkeys(widths, 1.0) for what in request.what}
    return Observed(usage, 10, directions=directions, importance=importance)


def effects(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The product B A of every expert, whose factors may differ, and all other tensors as they are."""
    found: dict[Key, Tensor] = {}
    for key, value in tensors.items():
        if key.part is Part.A:
            found[key] = tensors[key._replace(part=Part.B)].double() @ value.double()
        elif key.part is not Part.B:
            found[key] = value.double()
    return found


def close(found: Mapping[Key, Tensor], expected: Mapping[Key, Tensor]) -> None:
    made, wanted = effects(found), effects(expected)
    assert made.keys() == wanted.keys()
    for key, value in made.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-6)


def played(name: str, clients: int, head: Any, folder: Path) -> Play:
    own = SETTINGS.get(name, {})
    if name == "smartfed":
        own = {**own, "pool": str(folder)}
    if name == "fedamole":
        own = {**own, "clients_per_expert": clients}  # every expert is at every client
    kind = method_named(name)
    play = Play(kind(kind.Settings(**own), Plan(rank=2, alpha=4, head=head, rounds=9)), CLIENTS[:clients])
    for _ in range(ROUNDS):
        play.round(alike, score=first_best, observe=the_same)
    return play


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("name", sorted(methods().keys() - NOTHING_AVERAGED))
def test_clients_with_equal_data_are_one_client_whatever_their_weights(name: str, head: str, tmp_path: Path) -> None:
    if name == "smartfed":
        write_pool(tmp_path, pools.made(BASE.targets, {"one": 3, "two": 2}, prefix=""))
    fewest = FEWEST.get(name, 1)
    few, more = (played(name, clients, head, tmp_path) for clients in (fewest, fewest + 1))
    expected = few.banks(first_best)["a"]
    assert any(value.abs().max() > 0.1 for key, value in effects(expected.tensors).items() if key.part is Part.A)
    for bank in more.banks(first_best).values():
        assert bank.scaling == expected.scaling
        close(bank.tensors, expected.tensors)
    experts = few.method.experts(few.state)
    assert experts or name == "fedsa_lora"  # B stays with the clients
    found = more.method.experts(more.state)
    assert found.keys() == experts.keys()
    for expert, tensors in found.items():
        close(tensors, experts[expert])
