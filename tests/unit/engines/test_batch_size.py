"""How many clients share a batch: by tokens on a CPU, by measured memory everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.compute.workplace import Workplace
from coterie.engines import batch_size as sizing
from coterie.engines.batch_size import AutoSize, Size, best_size, first_request
from coterie.requests import Optim, Score, Train
from coterie.types import Bank, ClientResult, Personal, Reply
from workplaces import client_of, make_workplace, plain_bank

FOUR = ("north", "south", "east", "west")


def asked(workplace: Workplace, optim: Optim, rank: int = 4) -> Train:
    bank = plain_bank(workplace, rank=rank)
    return Train(bank, frozenset(bank.tensors), optim)


def size(optim: Optim, precision: str = "float32") -> Size:
    workplace = make_workplace(dtype=torch.float32, precision=precision)
    found = best_size(workplace, [client_of(workplace, name) for name in FOUR], asked(workplace, optim))
    assert set(workplace.cache) == {(name, "train") for name in FOUR}, "what was made to measure is gone"
    return found


def test_as_many_clients_as_bring_a_step_to_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_fits", lambda *_: 100)
    workplace = make_workplace()
    rows = workplace.examples(client_of(workplace), "train")
    each = 2 * sum(len(row.ids) for row in rows) / len(rows)  # a batch of two
    for clients in (1, 2, 3):
        monkeypatch.setattr(sizing, "ENOUGH", {"float32": clients * each, "bfloat16": 1})
        assert size(Optim(batch_size=2)).clients == clients
        assert size(Optim(batch_size=2), "bfloat16").clients == 1
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    assert size(Optim(batch_size=2)) == Size(4, "at most 64")


def test_no_more_clients_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    monkeypatch.setattr(sizing, "_peak", lambda workplace, request, rows, tokens, clients: 100 + 50 * clients)
    for free, clients in ((0, 1), (249, 1), (251, 2), (313, 3), (10_000, 4)):
        monkeypatch.setattr(sizing, "_free", lambda device, free=free: free)
        assert size(Optim()).clients == clients
    assert size(Optim()).reason == "at most 64"

    def short(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sizing, "_peak", short)
    assert size(Optim()) == Size(1, "no more fit in 80% of the free memory")


def test_a_step_is_really_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    steps: list[list[tuple[int, set[int]]]] = []
    real = sizing.train_together

    def seen(asked: Any) -> Any:
        lengths = [[len(e.ids) for e in c.workplace.examples(c.client, "train")] for c, _ in asked]
        steps.append([(len(each), set(each)) for each in lengths])
        assert all(request.optim.steps == request.optim.accumulate == 1 for _, request in asked)
        return real(asked)

    monkeypatch.setattr(sizing, "train_together", seen)
    workplace = make_workplace()
    longest = max(workplace.lengths(client_of(workplace), "train"))
    for batch, rows in ((3, 3), (100, 8)):
        assert size(Optim(batch_size=batch, epochs=7, accumulate=2)).clients == 4
        assert steps == [[(rows, {longest})], [(rows, {longest})] * 2], "as large as the largest real batch"
        steps.clear()


def test_a_larger_adapter_takes_more_memory() -> None:
    """What is measured is what the clients carry, also where the process holds free memory that would do for it."""
    workplace = make_workplace(dtype=torch.float32)
    pieces = [torch.randn(1000, 16) for _ in range(3000)]
    last = pieces[-1]  # above all that is freed, so that the allocator keeps it
    del pieces
    assert last.isfinite().all()
    peaks = [sizing._peak(workplace, asked(workplace, Optim(), rank), 8, 16, 2) for rank in (2, 4000)]
    assert peaks[1] > peaks[0] + 2 * 3 * 4 * sum(t.d_in + t.d_out for t in workplace.base.spec.targets) * 3998


def test_it_is_decided_anew_when_adapters_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    sizes = {100.0: 8, 105.0: 7, 300.0: 8, 900.0: 2}
    monkeypatch.setattr(sizing, "best_size", lambda workplace, clients, request: Size(sizes[request], "measured"))
    auto, told = AutoSize(), []
    for weight in (100.0, 105.0, 90.0, 300.0, 100.0, 900.0):
        told.append(auto.decide([workplace], [], weight, lambda weight=weight: weight))
    assert told == [Size(8, "measured"), None, None, None, None, Size(2, "measured")]
    assert (auto.now, auto.weight) == (Size(2, "measured"), 900.0)


def test_the_device_with_the_least_room_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "best_size", lambda workplace, clients, request: Size(workplace.seed, "measured"))
    assert AutoSize().decide([make_workplace(seed=5), make_workplace(seed=3)], [], 1.0, lambda: 1.0) == Size(
        3, "measured"
    )


def test_the_first_request_of_a_program_is_what_is_measured() -> None:
    workplace = make_workplace()
    request, closed = asked(workplace, Optim(steps=3)), []

    def program(first: Any) -> Any:
        try:
            if first:
                yield first
            return ClientResult(Reply(), Personal())
        finally:
            closed.append(first)

    def bank() -> Bank:
        return request.bank

    assert first_request(program(request), bank, Optim()) is request
    for other in (Score([request.bank]), None):
        made = first_request(program(other), bank, Optim(steps=9))
        assert made == Train(request.bank, frozenset(request.bank.tensors), Optim(steps=9))
    assert len(closed) == 3


def test_a_single_client_is_not_measured() -> None:
    workplace = make_workplace()
    assert best_size(workplace, [client_of(workplace)], asked(workplace, Optim())).clients == 1


def test_where_no_client_asks_for_anything_it_stays_as_it_was() -> None:
    auto = AutoSize(Size(4, "measured"), 1.0)
    assert auto.decide([], [], 9.0, lambda: None) is None
    assert auto == AutoSize(Size(4, "measured"), 1.0)
