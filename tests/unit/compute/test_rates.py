"""Factors on the learning rate of single tensors."""

from __future__ import annotations

import pytest
import torch

from coterie.requests import Optim, Train, Trained
from coterie.types import Bank, Key
from workplaces import make_workplace, plain_bank, train

torch.set_num_threads(1)


def trained(bank: Bank, optim: Optim, rates: dict[Key, float]) -> Trained:
    return train(make_workplace(), bank, optim, rates=rates)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_factor_is_on_the_rate_of_its_tensors_alone(optimizer: str) -> None:
    """After one step without clipping: the others' updates are the same bits, and its own is as many times as large."""
    workplace = make_workplace()
    bank = plain_bank(workplace)
    optim = Optim(optimizer=optimizer, learning_rate=0.01, steps=1, weight_decay=0.0, clip=0.0)  # type: ignore[arg-type]
    chosen = sorted(bank.tensors)[0]
    plain, faster = (trained(bank, optim, rates).tensors for rates in ({}, {chosen: 3.0}))
    assert all(torch.equal(plain[key], faster[key]) for key in plain if key != chosen)
    moved = [of[chosen] - bank.tensors[chosen] for of in (plain, faster)]
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 3 * moved[0], rtol=1e-4, atol=1e-9)


def test_a_factor_of_one_changes_no_bit() -> None:
    bank = plain_bank(make_workplace())
    optim = Optim(learning_rate=0.01, steps=2)
    plain, same = (trained(bank, optim, rates).tensors for rates in ({}, dict.fromkeys(bank.tensors, 1.0)))
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert Train(bank, frozenset(), optim).rates == {}
