"""RoLoRA's two halves without a model: B and A take turns, and each turn averages exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.methods.parts import mean_error
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.rolora import RoLoRA
from coterie.ops.mean import relative_error
from coterie.types import Part, Reply
from halves import BASE, CLIENTS, Play, finished, mean_of_products, parts, products


def make(head: Any = "personal") -> RoLoRA:
    return RoLoRA(MethodSettings(), Plan(rank=2, alpha=4, head=head))


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_b_and_a_take_turns_from_b_on(head: Any) -> None:
    play = Play(make(head))
    shared = {Part.HEAD} if head == "shared" else set()
    for turn, other in ((Part.B, Part.A), (Part.A, Part.B), (Part.B, Part.A)):
        before = play.state.lora
        replies = play.round()
        assert all(parts(reply.tensors) == {turn, *shared} for reply in replies.values())
        for key, value in play.state.lora.items():
            assert torch.equal(value, before[key]) == (key.part is other)


def test_only_the_turn_and_the_head_train() -> None:
    method = make()
    me = CLIENTS[0]
    state = method.init(BASE, CLIENTS)
    for rnd, turn in ((1, Part.B), (2, Part.A), (3, Part.B)):
        (ins,) = method.configure(state, [me], rnd).values()
        _, request = finished(method.client(ins, me, method.begin(BASE, me)), me)
        assert {key.part for key in request.trainable} == {turn, Part.HEAD}
        assert parts(request.bank.tensors) == {Part.A, Part.B, Part.HEAD}


def test_every_turn_is_the_exact_mean_of_the_products() -> None:
    play = Play(make())
    for _ in range(4):
        before = play.state.lora
        replies = {c: Reply({**before, **r.tensors}, r.num_examples) for c, r in play.round().items()}
        expected = mean_of_products(replies, dict.fromkeys(replies, 2.0))
        for module, product in products(play.method.experts(play.state)["global"], 2.0).items():
            torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-5)
        uploads, weights = [r.tensors for r in replies.values()], [float(r.num_examples) for r in replies.values()]
        lora = [{k: v for k, v in u.items() if k.part in (Part.A, Part.B)} for u in uploads]
        assert relative_error(mean_error(lora, weights)) < 1e-6
