"""FedProx's term in training: two steps by its gradient mu (w - w0), alone and in passes that clients share."""

from __future__ import annotations

import pytest
import torch

from coterie.compute import batched
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.methods.parts import lora_of
from coterie.requests import Proximal, Train, Trained
from coterie.types import CoterieError, Part
from workplaces import RATE, client_of, equal_bits, largest_difference, make_workplace, plain_bank, sgd, train

MU = 3.0


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_second_step_is_pulled_back_by_the_first(accumulate: int) -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    keys = frozenset(lora_of(bank.tensors))
    once, free = (train(workplace, bank, sgd(n, accumulate)).tensors for n in (1, 2))
    done = train(workplace, bank, sgd(2, accumulate), proximal=Proximal(MU, keys))
    assert done.steps == 2
    pulled = [key for key in done.tensors if not torch.equal(done.tensors[key], free[key])]
    assert {*pulled} == keys
    for key in keys:
        expected = free[key] - RATE * MU * (once[key] - bank.tensors[key])
        torch.testing.assert_close(done.tensors[key], expected, atol=1e-12, rtol=1e-12)


def test_the_first_step_and_the_reported_loss_are_the_tasks() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    term = Proximal(MU, frozenset(bank.tensors))
    one, other = train(workplace, bank, sgd(1), proximal=term), train(workplace, bank, sgd(1))
    assert largest_difference(one.tensors, other.tensors) < 1e-15
    assert one.loss == other.loss


def test_without_a_term_nothing_changes() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    none = train(workplace, bank, sgd(3), proximal=Proximal(MU, frozenset()))
    assert equal_bits(none.tensors, train(workplace, bank, sgd(3)).tensors)


def test_clients_that_share_a_pass_are_pulled_to_their_own_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    alone, together = [], []
    for name, seed in (("north", 0), ("south", 1)):
        bank = plain_bank(workplace, seed=seed)
        request = Train(bank, frozenset(bank.tensors), sgd(3), proximal=Proximal(MU, frozenset(lora_of(bank.tensors))))
        compute = LocalCompute(workplace, client_of(workplace, name, 6), 1)
        alone.append(compute.train(request))
        together.append((compute, request))
    monkeypatch.setattr(batched, "_alone", lambda asked: pytest.fail("a client was answered alone"))
    answers = answer_all(together, lambda note: pytest.fail(note))
    for one, other in zip(alone, answers, strict=True):
        assert isinstance(other, Trained)
        assert largest_difference(one.tensors, other.tensors) < 1e-9


def test_what_does_not_train_cannot_be_pulled() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    of_b = frozenset(key for key in bank.tensors if key.part is Part.B)
    request = Train(bank, of_b, sgd(1), proximal=Proximal(MU, frozenset(lora_of(bank.tensors))))
    with pytest.raises(CoterieError, match="the proximal term is only for tensors that train"):
        LocalCompute(workplace, client_of(workplace), 1).train(request)
