"""Every optimiser step is reported, of one client alone and of those that train together."""

from __future__ import annotations

import torch

from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Steps
from coterie.engines.batch_size import _peak
from coterie.requests import Optim, Train
from workplaces import client_of, make_workplace, plain_bank


def test_steps_of_one_client_and_of_many() -> None:
    workplace, heard = make_workplace(), list[Steps]()
    workplace.report = heard.append
    bank, north, south = plain_bank(workplace), client_of(workplace), client_of(workplace, "south", 4)
    request = Train(bank, frozenset(bank.tensors), Optim(batch_size=4, epochs=1, accumulate=1))
    LocalCompute(workplace, north, 1).train(request)
    assert heard == [Steps(("north",), 1, 2), Steps(("north",), 2, 2)]
    heard.clear()
    train_together([(LocalCompute(workplace, client, 1), request) for client in (south, north)])
    assert heard == [Steps(("north", "south"), 1, 2), Steps(("north",), 2, 2)]


def test_the_step_that_measures_memory_is_no_clients() -> None:
    workplace, heard = make_workplace(dtype=torch.float32), list[Steps]()
    workplace.report = heard.append
    bank = plain_bank(workplace)
    assert _peak(workplace, Train(bank, frozenset(bank.tensors), Optim()), 2, 8, 2) >= 0
    assert heard == []
