"""FedSA-LoRA's two halves without a model: A is averaged, B stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.methods.fedsa_lora import FedSALoRA
from coterie.methods.plan import MethodSettings, Plan
from coterie.ops.mean import mean
from coterie.types import Part
from halves import CLIENTS, Play, parts, still


def make(head: Any = "personal") -> FedSALoRA:
    return FedSALoRA(MethodSettings(), Plan(rank=2, alpha=4, head=head))


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_a_travels_and_b_stays(head: Any) -> None:
    play = Play(make(head))
    shared = {Part.HEAD} if head == "shared" else set()
    for _ in range(2):
        replies = play.round()
        for client, reply in replies.items():
            assert parts(reply.tensors) == {Part.A, *shared}
            assert parts(play.personal[client].tensors) == ({Part.B} if shared else {Part.B, Part.HEAD})
        instructions = play.method.configure(play.state, CLIENTS, play.rnd + 1)
        assert all(parts(ins.tensors) == {Part.A, *shared} for ins in instructions.values())
    assert play.method.experts(play.state) == {}


def test_a_client_evaluates_with_the_mean_a_and_its_own_b() -> None:
    play = Play(make())
    replies = play.round()
    weights = [float(r.num_examples) for r in replies.values()]
    a = mean([r.tensors for r in replies.values()], weights)
    banks = play.banks()
    b = {c: {k: v for k, v in bank.tensors.items() if k.part is Part.B} for c, bank in banks.items()}
    for client, bank in banks.items():
        assert bank.scaling == 2.0
        for key, value in a.items():
            torch.testing.assert_close(bank.tensors[key], value)
        for key, value in b[client].items():
            assert torch.equal(value, play.personal[client].tensors[key])
            others = [b[c][key] for c in b if c != client]
            assert not any(torch.equal(value, other) for other in others)


def test_a_client_that_missed_a_round_keeps_its_b() -> None:
    play = Play(make())
    play.round()
    before = play.personal["client-2"].tensors
    play.round(only=["client-0", "client-1"])
    after = play.banks()["client-2"].tensors
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(torch.equal(after[key], value) for key, value in play.state.a.items())


def test_clients_that_do_not_move_leave_a_as_it_is() -> None:
    play = Play(make())
    before = play.state.a
    play.round(still)
    for key, value in play.state.a.items():
        torch.testing.assert_close(value, before[key])
