"""FedProx: FedIT but for the pull towards what the server sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie import codec
from coterie.methods.fedprox import FedProx, FedProxSettings
from coterie.methods.plan import Plan
from coterie.requests import Train
from coterie.types import Part
from halves import Play

NAMES = ("mood-0", "mood-1", "size-0")


def make(mu: float, head: Any = "personal") -> FedProx:
    return FedProx(FedProxSettings(mu=mu), Plan(rank=2, alpha=4, head=head))


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_what_came_from_the_server_is_pulled_back_to_it(head: Any) -> None:
    play = Play(make(0.5, head))
    play.round()
    for (request,) in play.asked.values():
        assert isinstance(request, Train)
        assert request.proximal is not None
        assert request.proximal.weight == 0.5
        pulled = {key.part for key in request.proximal.keys}
        assert pulled == ({Part.A, Part.B, Part.HEAD} if head == "shared" else {Part.A, Part.B})
        assert {key.part for key in request.trainable} == {Part.A, Part.B, Part.HEAD}


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_without_a_pull_it_is_fedit_bit_for_bit(head: Any, tmp_path: Path) -> None:
    ended = [
        short_runs.run(short_runs.make(name, head=head, **own), short_runs.clients(*NAMES), tmp_path / name)
        for name, own in (("fedit", {}), ("fedprox", {"mu": 0.0}))
    ]
    assert codec.encode(ended[0].state) == codec.encode(ended[1].state)
    assert codec.encode(ended[0].banks) == codec.encode(ended[1].banks)


def test_a_stronger_pull_moves_the_clients_less(tmp_path: Path) -> None:
    moved = []
    for mu in (0.0, 1.0, 100.0):
        method = short_runs.make("fedprox", dropout=0.0, mu=mu)
        ended = short_runs.run(method, short_runs.clients(*NAMES), tmp_path / str(mu), rounds=1)
        start = method.init(ended.engine.spec, ended.engine.clients).lora
        replies = [reply.tensors for reply in ended.replies.values()]
        moved.append(sum(float((r[key] - value).norm()) for r in replies for key, value in start.items()))
    assert moved[0] > moved[1] > moved[2] > 0
    assert torch.isfinite(torch.tensor(moved)).all()
