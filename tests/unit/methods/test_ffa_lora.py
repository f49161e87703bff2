"""FFA-LoRA's two halves without a model: A never moves and never travels; averaging B is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.methods.ffa_lora import FFALoRA
from coterie.methods.findings import AggregationError
from coterie.methods.parts import start_lora
from coterie.methods.plan import MethodSettings, Plan
from coterie.types import Part, Reply
from halves import BASE, CLIENTS, Play, finished, mean_of_products, parts, products, still


def make(head: Any = "personal") -> FFALoRA:
    return FFALoRA(MethodSettings(), Plan(rank=2, alpha=4, head=head))


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_a_is_the_seeds_and_only_b_travels(head: Any) -> None:
    play = Play(make(head))
    start = start_lora(BASE, play.method.plan)
    shared = {Part.HEAD} if head == "shared" else set()
    for _ in range(3):
        instructions = play.method.configure(play.state, CLIENTS, play.rnd + 1)
        assert all(parts(ins.tensors) == {Part.B, *shared} for ins in instructions.values())
        replies = play.round()
        assert all(parts(reply.tensors) == {Part.B, *shared} for reply in replies.values())
        for bank in play.banks().values():
            for key, value in start.items():
                same = torch.equal(bank.tensors[key], value)
                assert same if key.part is Part.A else not same


def test_the_mean_of_b_is_the_mean_of_the_products() -> None:
    play = Play(make())
    replies = play.round()
    whole = {c: Reply({**r.tensors, **play.state.a}, r.num_examples) for c, r in replies.items()}
    expected = mean_of_products(whole, dict.fromkeys(whole, 2.0))
    for module, product in products(play.method.experts(play.state)["global"], 2.0).items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-6)
    assert play.method.describe(play.state) == [AggregationError(0.0)]


def test_a_is_not_trained_and_b_and_the_head_are() -> None:
    method = make()
    me = CLIENTS[0]
    (ins,) = method.configure(method.init(BASE, CLIENTS), [me], 1).values()
    _, request = finished(method.client(ins, me, method.begin(BASE, me)), me)
    assert parts(request.bank.tensors) == {Part.A, Part.B, Part.HEAD}
    assert {key.part for key in request.trainable} == {Part.B, Part.HEAD}


def test_clients_that_do_not_move_leave_the_model_as_it_is() -> None:
    play = Play(make("shared"))
    before = play.method.experts(play.state)["global"]
    play.round(still)
    for key, value in play.method.experts(play.state)["global"].items():
        torch.testing.assert_close(value, before[key])
