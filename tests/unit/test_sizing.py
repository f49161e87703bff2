"""How many clients share a batch: by tokens on a CPU, by measured memory everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.engines import sizing
from coterie.engines.sizing import best_size
from coterie.types import Optim
from places import client_of, workplace

FOUR = ("north", "south", "east", "west")


def size(optim: Optim, precision: str = "float32") -> sizing.Size:
    place = workplace(dtype=torch.float32, precision=precision)
    kept = dict(place.cache)
    found = best_size(place, [client_of(place, name) for name in FOUR], optim, 4)
    assert kept.keys() <= place.cache.keys() == {(name, "train") for name in FOUR}
    return found


def test_as_many_clients_as_bring_a_step_to_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_fits", lambda *_: 100)
    place = workplace()
    rows = place.examples(client_of(place), "train")
    each = 2 * sum(len(row.ids) for row in rows) / len(rows)  # a batch of two
    for clients in (1, 2, 3):
        monkeypatch.setattr(sizing, "ENOUGH", {"float32": clients * each, "bfloat16": 1})
        assert size(Optim(batch_size=2)).clients == clients
        assert size(Optim(batch_size=2), "bfloat16").clients == 1
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    assert size(Optim(batch_size=2)) == sizing.Size(4, "at most 64")


def test_no_more_clients_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    monkeypatch.setattr(sizing, "_peak", lambda place, optim, rank, tokens, clients: 100 + 50 * clients)
    for free, clients in ((0, 1), (249, 1), (251, 2), (313, 3), (10_000, 4)):
        monkeypatch.setattr(sizing, "_free", lambda device, free=free: free)
        assert size(Optim()).clients == clients
    assert size(Optim()).reason == "at most 64"

    def short(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sizing, "_peak", short)
    assert size(Optim()) == sizing.Size(1, "80% of the free memory hold so many")


def test_a_step_is_really_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    steps: list[int] = []
    real = sizing.train_together
    monkeypatch.setattr(sizing, "train_together", lambda asked: steps.append(len(asked)) or real(asked))
    assert size(Optim(batch_size=3)).clients == 4
    assert steps == [1, 2]


def test_a_single_client_is_not_measured() -> None:
    place = workplace()
    assert best_size(place, [client_of(place)], Optim(), 4).clients == 1
