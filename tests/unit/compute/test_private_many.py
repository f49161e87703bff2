"""DP-SGD of clients that share passes: what each gets alone, with the same draws and the same noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from coterie.compute import batched
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.methods.row_privacy import RowPrivacy
from coterie.nn.attach_many import attached_many
from coterie.nn.build import build_layers
from coterie.nn.per_row import PerRow
from coterie.ops.noise import SeededNoise
from coterie.requests import Observe, Optim, Request, Score, Train
from coterie.types import Bank, CoterieError, Key, Part
from workplaces import client_of, equal_bits, largest_difference, make_workplace, plain_bank, sgd

ROWS = {"north": 8, "south": 3, "east": 10}  # a lot of 3 draws all of south's, and none or four of the others'
OPTIM = Optim(learning_rate=0.05, batch_size=3, steps=5, weight_decay=0.1)
GATES: dict[str, list[dict[str, Any]]] = {  # of each client
    "fedit": [{}, {}, {}],
    "fedlease": [{"experts": 3, "gate": "slot_top_k", "options": {"own": own}} for own in (0, 2, 0)],
    "fedamole": [
        {"experts": n, "rank": 2, "gate": "scaled_dot_product", "options": {"k": 2}, "shared": 4} for n in (3, 2, 4)
    ],
    "ranks": [{"experts": 2, "rank": (2, 3), "gate": "softmax"}, {"experts": 1, "gate": "softmax"}, {}],
}


def bank_of(workplace: Workplace, number: int, **of: Any) -> Bank:
    made = tiny.bank(workplace.base.spec.targets, seed=number, dtype=torch.float64, **of)
    if workplace.base.kind != "classification":
        return made
    head = {key: value.double() for key, value in tiny.head(workplace.base.model, 3).items()}
    return replace(made, tensors={**made.tensors, **head})


def compute_of(workplace: Workplace, name: str, optim: Optim = OPTIM, **of: Any) -> LocalCompute:
    private = replace(RowPrivacy(0.05, 0.5, SeededNoise(0), optim, ROWS[name]), **of)
    return LocalCompute(workplace, client_of(workplace, name, ROWS[name]), 1, private=private)


def together(asked: list[tuple[LocalCompute, Request]]) -> list[Any]:
    """The answers, all given in shared passes."""

    def alone(asked: Any, note: object) -> Any:
        raise AssertionError(f"{asked[0].client.info.id} was answered alone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "_alone", alone)
        return answer_all(asked, pytest.fail)


def own(bank: Bank, expert: int | None) -> frozenset[Key]:
    """All of the bank, or its router, its head and the expert with this number."""
    return frozenset(
        key for key in bank.tensors if expert is None or key.part not in (Part.A, Part.B) or key.expert == expert
    )


@pytest.mark.parametrize(
    ("arch", "gate", "accumulate"),
    [
        *(("bert", gate, 1) for gate in GATES),
        ("llama", "fedlease", 1),
        ("llama", "fedamole", 2),
        ("roberta", "fedit", 2),
    ],
)
def test_each_client_gets_what_it_gets_alone(arch: str, gate: str, accumulate: int) -> None:
    workplace, optim = make_workplace(arch), OPTIM.model_copy(update={"accumulate": accumulate})
    asked: list[tuple[LocalCompute, Request]] = []
    for number, (name, of) in enumerate(zip(ROWS, GATES[gate], strict=True)):
        bank = bank_of(workplace, number, **of)
        wanted = own(bank, of["options"]["own"] if gate == "fedlease" else None)
        asked.append((compute_of(workplace, name, optim), Train(bank, wanted, optim)))
    drawn = [[sum(map(len, step)) for step in compute.training(request).steps] for compute, request in asked]  # type: ignore[arg-type]
    assert len({tuple(sizes) for sizes in drawn}) == 3  # so there is padding
    for (compute, request), answer in zip(asked, together(asked), strict=True):
        alone = replace(compute, trained=None).train(request)  # type: ignore[arg-type]
        assert largest_difference(alone.tensors, answer.tensors) < 1e-9
        assert (answer.loss, answer.examples, answer.tokens) == (0.0, alone.examples, 0)
        assert not equal_bits(answer.tensors, {key: request.bank.tensors[key] for key in answer.tensors})  # type: ignore[union-attr]


def test_a_clients_rows_change_nothing_for_the_others() -> None:
    workplace = make_workplace()
    answers = []
    for other in ("south", "east"):
        asked: list[tuple[LocalCompute, Request]] = []
        for name in ("north", other):
            bank = plain_bank(workplace)
            asked.append((compute_of(workplace, name), Train(bank, frozenset(bank.tensors), OPTIM)))
        answers.append(together(asked)[0])
    assert largest_difference(answers[0].tensors, answers[1].tensors) < 1e-12


def test_rows_of_padding_are_not_collected() -> None:
    extra, key = torch.ones(2, 3, dtype=torch.float64), Key("m", 0, Part.A)
    left, right = (torch.randn(4, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    made: list[dict[Key, Tensor]] = []
    for padding in (0, 1):
        of = PerRow(2, padding=padding)  # of two tokens each
        wide = [torch.cat([values, extra]) if padding else values for values in (left, right)]
        of.add(key, *wide)
        made.append(of.clipped(0.1))
    assert equal_bits(*made)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    workplace = make_workplace()
    model, bank = workplace.base.model, plain_bank(workplace)
    made = [build_layers(model, bank, frozenset(bank.tensors)) for _ in range(2)]
    with attached_many(model, made) as many:
        for each in made:
            each.now.per_row = PerRow(2)
        many.now.choose((0, 1), 2, 5, ((2, 5), (2, 5)), torch.device("cpu"))
        layer = next(iter(many.layers.values()))
        x, y = (torch.zeros(20, of.shape[2], dtype=torch.float64) for of in (layer.rows, layer.columns))
        with pytest.raises(CoterieError, match=r"takes \[20, .* where the batch has 4 rows: \[privacy\]"):
            layer(torch.nn.Identity(), (x,), {}, y)  # tokens in one list


def test_every_row_of_a_shared_pass_is_cut() -> None:
    """Two clients, of one and of two rows a step: without noise no step moves further than its rows' clips."""
    workplace = make_workplace()
    clip, sizes = 0.01, {"north": 1, "south": 2}
    optim = sgd(1).model_copy(update={"learning_rate": 1.0, "batch_size": 2})
    asked: list[tuple[LocalCompute, Request]] = []
    for name, rows in sizes.items():
        private = RowPrivacy(clip, 1e-12, SeededNoise(0), optim, rows)
        client = client_of(workplace, name, rows)
        bank = plain_bank(workplace)
        asked.append((LocalCompute(workplace, client, 1, private=private), Train(bank, frozenset(bank.tensors), optim)))
    for (name, rows), (_, request), answer in zip(sizes.items(), asked, together(asked), strict=True):
        start = request.bank.tensors  # type: ignore[union-attr]
        moved = math.sqrt(sum(float((start[key] - answer.tensors[key]).square().sum()) for key in start))
        assert 0 < moved <= clip * (1 + 1e-6), name
        if rows == 1:
            assert moved == pytest.approx(clip, rel=1e-6)


def test_clients_whose_rows_are_not_hidden_do_not_share_their_passes() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    hidden, open_ = compute_of(workplace, "north"), replace(compute_of(workplace, "east"), private=None)
    answers = answer_all([(hidden, request), (open_, request)], pytest.fail)
    for compute, answer in zip((hidden, open_), answers, strict=True):
        alone = replace(compute, trained=None).train(request)
        assert equal_bits(alone.tensors, answer.tensors)  # type: ignore[union-attr]


@pytest.mark.parametrize("request_of", [lambda bank: Score([bank]), Observe])
def test_measuring_is_refused_to_each(request_of: Any) -> None:
    workplace = make_workplace()
    asked = [(compute_of(workplace, name), request_of(plain_bank(workplace))) for name in ("north", "south")]
    answers = answer_all(asked, pytest.fail)
    assert len(answers) == 2
    assert all(isinstance(each, CoterieError) and "would have no noise" in str(each) for each in answers)


def test_a_second_training_is_refused_to_each() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    asked: list[tuple[LocalCompute, Request]] = [
        (compute_of(workplace, name), Train(bank, frozenset(bank.tensors), OPTIM)) for name in ("north", "south")
    ]
    assert not any(isinstance(each, Exception) for each in together(asked))
    again = together(asked)
    assert all("one training in a round" in str(each) for each in again)


def test_after_too_little_memory_a_client_has_the_same_draws_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    asked: list[tuple[LocalCompute, Request]] = [(compute_of(workplace, name), request) for name in ROWS]
    expected = [replace(compute).train(request) for compute, _ in asked]
    whole = batched.train_together
    notes: list[str] = []

    def short(requests: Any) -> Any:
        made = whole(requests) if len(requests) < 3 else None
        if made is None:
            raise torch.OutOfMemoryError
        return made

    monkeypatch.setattr(batched, "train_together", short)
    answers = answer_all(asked, notes.append)
    assert notes == ["out of memory with 3 clients in a batch; continuing with 2"]
    for alone, answer in zip(expected, answers, strict=True):
        assert largest_difference(alone.tensors, answer.tensors) < 1e-9  # type: ignore[union-attr]


def test_a_client_that_fails_leaves_the_others_as_they_were() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    wrong = compute_of(workplace, "south")
    wrong = replace(wrong, client=ClientData(wrong.client.info, {"train": wrong.client.splits["train"][:2]}))
    asked: list[tuple[LocalCompute, Request]] = [(compute_of(workplace, "north"), request), (wrong, request)]
    good, fault = together(asked)
    assert "for 3 rows, and there are 2" in str(fault)
    assert equal_bits(good.tensors, compute_of(workplace, "north").train(request).tensors)
