"""HetLoRA's term on a LoRA's last ranks, in training: its gradient, alone and in passes that clients share."""

from __future__ import annotations

import pytest
import torch

from coterie.compute import batched
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.requests import LastRanks, Train, Trained
from coterie.types import Part
from workplaces import RATE, client_of, equal_bits, largest_difference, make_workplace, plain_bank, sgd, train

WEIGHT = 0.7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kept", [0, 3])
def test_a_step_shrinks_the_last_ranks_and_no_others(kept: int, accumulate: int) -> None:
    """d/dB ||B|| ||A|| = ||A|| B / ||B||, and the other way round."""
    workplace = make_workplace()
    bank = plain_bank(workplace)
    free = train(workplace, bank, sgd(1, accumulate))
    done = train(workplace, bank, sgd(1, accumulate), last_ranks=LastRanks(WEIGHT, kept))
    seen = 0
    for key in (key for key in bank.tensors if key.part is Part.A):
        a, b = bank.tensors[key][kept:], bank.tensors[key._replace(part=Part.B)][:, kept:]
        expected_a, expected_b = free.tensors[key].clone(), free.tensors[key._replace(part=Part.B)].clone()
        expected_a[kept:] -= RATE * WEIGHT * b.norm() * a / a.norm()
        expected_b[:, kept:] -= RATE * WEIGHT * a.norm() * b / b.norm()
        torch.testing.assert_close(done.tensors[key], expected_a, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(done.tensors[key._replace(part=Part.B)], expected_b, atol=1e-12, rtol=1e-12)
        seen += 1
    assert seen >= 2
    assert done.loss == free.loss, "the reported loss is the task's"


def test_last_ranks_of_zero_have_no_pull_and_no_fault() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace, zero_b=True)
    done = train(workplace, bank, sgd(1), last_ranks=LastRanks(WEIGHT, 2))
    assert equal_bits(done.tensors, train(workplace, bank, sgd(1)).tensors)


def test_a_lora_of_which_one_half_trains_has_no_term() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    of_b = frozenset(key for key in bank.tensors if key.part is Part.B)
    one, other = (
        LocalCompute(workplace, client_of(workplace), 1).train(Train(bank, of_b, sgd(2), last_ranks=last))
        for last in (LastRanks(WEIGHT, 2), None)
    )
    assert equal_bits(one.tensors, other.tensors)


def test_clients_that_share_a_pass_have_each_their_own_last_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    alone, together = [], []
    for name, seed, rank in (("north", 0, 4), ("south", 1, 2)):
        bank = plain_bank(workplace, seed=seed, rank=rank)
        request = Train(bank, frozenset(bank.tensors), sgd(3), last_ranks=LastRanks(WEIGHT, rank - 1))
        compute = LocalCompute(workplace, client_of(workplace, name, 6), 1)
        alone.append(compute.train(request))
        together.append((compute, request))
    monkeypatch.setattr(batched, "_alone", lambda asked: pytest.fail("a client was answered alone"))
    answers = answer_all(together, lambda note: pytest.fail(note))
    for one, other in zip(alone, answers, strict=True):
        assert isinstance(other, Trained)
        assert largest_difference(one.tensors, other.tensors) < 1e-9
