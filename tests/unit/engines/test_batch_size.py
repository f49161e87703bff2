"""How many clients share a batch: by tokens on a CPU, by measured memory everywhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from coterie.compute.workplace import Workplace
from coterie.engines import batch_size as sizing
from coterie.engines.batch_size import AutoSize, Size, best_size, first_request
from coterie.methods.row_privacy import RowPrivacy
from coterie.ops.noise import SeededNoise
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
    monkeypatch.setattr(sizing, "_fits", lambda *_: (100, 1.0))
    monkeypatch.setattr(sizing, "PASS_TOKENS", {"float32": 1e9, "bfloat16": 1e9})
    workplace = make_workplace()
    lengths = sorted(workplace.lengths(client_of(workplace), "train"), reverse=True)
    each = 2 * sum(lengths[::2]) / 4  # a batch of two, as long as its longer row
    for clients, chosen in ((1, 1), (2, 2), (3, 2), (4, 4)):  # three and one take as many passes as two and two
        monkeypatch.setattr(sizing, "ENOUGH", {"float32": clients * each, "bfloat16": 1})
        assert size(Optim(batch_size=2)).clients == chosen
        assert size(Optim(batch_size=2), "bfloat16").clients == 1
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    assert size(Optim(batch_size=2)) == Size(4, "at most 64", 1.0)


def test_no_passes_are_shared_where_padding_costs_more_than_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_peak", lambda *_: pytest.fail("nothing is to be measured"))
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    found = size(Optim(batch_size=2))
    assert found.clients == 1
    assert re.fullmatch(r"with rows padded .* would be 1\.0\d times as fast", found.reason)


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are worth sharing, however many clients there are."""
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 1e9})
    monkeypatch.setattr(sizing, "PASS_TOKENS", {"float32": 1e9})


@pytest.mark.usefixtures("gaining")
def test_no_more_clients_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_peak", lambda workplace, request, rows, tokens, clients, private: 50 * clients)
    for free, clients in ((0, 1), (124, 1), (126, 2), (188, 3), (10_000, 4)):
        monkeypatch.setattr(sizing, "_free", lambda device, free=free: free)
        assert size(Optim()).clients == clients
    assert size(Optim()) == Size(4, "at most 64", 50.0)

    def short(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sizing, "_peak", short)
    assert size(Optim()) == Size(1, "no more fit in 80% of the free memory")


@pytest.mark.usefixtures("gaining")
def test_a_step_is_really_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert steps == [[(rows, {longest})] * 2], "as large as the largest real batch"
        steps.clear()


@pytest.mark.usefixtures("gaining")
def test_a_step_that_hides_rows_is_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = sizing.train_together, list[list[int]]()

    def seen(asked: Any) -> Any:
        drawn.append([sum(len(m) for step in c.training(request).steps for m in step) for c, request in asked])
        answers = real(asked)
        assert not any(isinstance(each, Exception) for each in answers)
        return answers

    monkeypatch.setattr(sizing, "train_together", seen)
    workplace, optim = make_workplace(), Optim(batch_size=3)
    private = RowPrivacy(1.0, 1.0, SeededNoise(0), optim, 8)
    clients = [client_of(workplace, name) for name in FOUR]
    assert best_size(workplace, clients, asked(workplace, optim), private).clients == 4
    assert drawn == [[3, 3]]


def test_a_larger_adapter_takes_more_memory() -> None:
    """What is measured is what the clients carry, also where the process holds free memory that would do for it."""
    workplace = make_workplace(dtype=torch.float32)
    pieces = [torch.randn(1000, 16) for _ in range(3000)]
    last = pieces[-1]  # above all that is freed, so that the allocator keeps it
    del pieces
    assert last.isfinite().all()
    peaks = [sizing._peak(workplace, asked(workplace, Optim(), rank), 8, 16, 2) for rank in (2, 4000)]
    assert peaks[1] > peaks[0] + 2 * 3 * 4 * sum(t.d_in + t.d_out for t in workplace.base.spec.targets) * 3998


def test_it_is_decided_anew_when_adapters_no_longer_surely_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four clients of 50 bytes with a bank of rank 1; 80% of 1,000 bytes are enough for four times as much."""
    workplace, measured = make_workplace(), list[int]()
    banks = {rank: asked(workplace, Optim(), rank) for rank in (1, 2, 4, 16)}

    def found(workplace: Workplace, clients: Any, request: Train, private: None) -> Size:
        measured.append(next(rank for rank, one in banks.items() if one is request))
        return Size(2 if request is banks[16] else 4, "measured", 50.0)

    monkeypatch.setattr(sizing, "best_size", found)
    monkeypatch.setattr(sizing, "_free", lambda device: 1000)
    auto = AutoSize()
    decided = [
        auto.decide([workplace], [], float(rank), lambda rank=rank: banks[rank]) for rank in (1, 1, 2, 16, 4, 16)
    ]
    assert decided == [Size(4, "measured", 50.0), None, None, Size(2, "measured", 50.0), None, None]
    assert measured == [1, 16]
    assert (auto.now, auto.weight) == (Size(2, "measured", 50.0), 16.0)


def test_where_clients_take_turns_nothing_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    monkeypatch.setattr(sizing, "best_size", lambda *_: pytest.fail("not to be decided again"))
    auto = AutoSize(Size(1, "padding"), 1.0, 1.0)
    assert auto.decide([workplace], [], 9.0, lambda: asked(workplace, Optim())) is None
    assert auto.weight == 9.0


def test_the_device_with_the_least_room_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "best_size", lambda workplace, *_: Size(workplace.seed, "measured"))
    places = [make_workplace(seed=5), make_workplace(seed=3)]
    assert AutoSize().decide(places, [], 1.0, lambda: asked(places[0], Optim())) == Size(3, "measured")


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
