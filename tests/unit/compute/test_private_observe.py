"""Mean embeddings that hide every row: each row's are cut as one vector, and their sum has the counted noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from coterie.compute import client as client_module
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import method_named
from coterie.methods.row_privacy import RowPrivacy, measured_of, planned_of, row_multiplier
from coterie.ops.accounting import Noised, spent
from coterie.ops.noise import SeededNoise
from coterie.requests import HoldOut, Observe, Optim
from coterie.types import NO_EXPERT, Bank, CoterieError, Key
from workplaces import client_of, make_workplace

ROWS = 6
OPTIM = Optim(batch_size=2, epochs=2)


class NoNoise(SeededNoise):
    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def bank_of(workplace: Workplace) -> Bank:
    return tiny.bank(
        workplace.base.spec.targets,
        dtype=torch.float64,
        experts=2,
        gate="scaled_dot_product",
        options={"k": 2},
        shared=3,
    )


def private(noise: Any = None, clip: float = 1e9, rows: int = ROWS, measures: bool = True) -> RowPrivacy:
    return RowPrivacy(1.0, 1.5, noise or NoNoise(0), OPTIM, rows, clip, measures)


def only(client: ClientData, rows: list[int]) -> ClientData:
    """The client with some of its training rows alone."""
    kept = tuple(client.splits["train"][i] for i in rows)
    name = f"rows {rows}"  # a workplace keeps a client's examples by its name
    return ClientData(replace(client.info, id=name, num_train=len(kept)), {**client.splits, "train": kept})


@pytest.fixture(scope="module", params=["bert", "llama"])
def place(request: pytest.FixtureRequest) -> tuple[Workplace, ClientData, Bank, list[dict[Key, Tensor]]]:
    """A client, a bank, and the mean embeddings of each row, observed without privacy."""
    torch.set_num_threads(1)
    workplace = make_workplace(request.param)
    client, bank = client_of(workplace, number=ROWS), bank_of(workplace)
    ask = Observe(bank, "train", ("embeddings",))
    each = [dict(LocalCompute(workplace, only(client, [i]), 1).observe(ask).embeddings) for i in range(ROWS)]
    return workplace, client, bank, each


def lengths(each: list[dict[Key, Tensor]]) -> list[float]:
    return [float(torch.cat([value.double().flatten() for value in of.values()]).norm()) for of in each]


@pytest.mark.parametrize("part", [0.0, 0.5, 2.0])
def test_each_row_is_cut_as_one_vector_and_counts_alike(place: Any, part: float) -> None:
    workplace, client, bank, each = place
    clip = part * sorted(lengths(each))[ROWS // 2] or 1e-9
    found = LocalCompute(workplace, client, 1, private=private(clip=clip)).observe(
        Observe(bank, "train", ("embeddings",))
    )
    assert found.embeddings.keys() == each[0].keys()
    assert not found.usage
    for key, value in found.embeddings.items():
        cut = [min(1.0, clip / n) * of[key].double() for n, of in zip(lengths(each), each, strict=True)]
        assert torch.allclose(value.double(), torch.stack(cut).mean(0), atol=1e-6 * clip if part else 1e-12), key


def test_a_row_more_or_less_moves_the_sum_by_no_more_than_the_clip(place: Any) -> None:
    workplace, client, bank, each = place
    clip = 0.5 * min(lengths(each))
    ask = Observe(bank, "train", ("embeddings",))
    whole = LocalCompute(workplace, client, 1, private=private(clip=clip)).observe(ask).embeddings
    fewer = only(client, list(range(1, ROWS)))
    less = LocalCompute(workplace, fewer, 1, private=private(clip=clip, rows=ROWS - 1)).observe(ask).embeddings
    moved = torch.cat([(ROWS * whole[key].double() - (ROWS - 1) * less[key].double()).flatten() for key in whole])
    assert float(moved.norm()) == pytest.approx(clip, rel=1e-4)


def test_the_noise_is_the_one_that_is_counted(place: Any) -> None:
    workplace, client, bank, _ = place
    ask = Observe(bank, "train", ("embeddings",))
    plain = LocalCompute(workplace, client, 1, private=private(clip=1e-9)).observe(ask).embeddings
    noisy = LocalCompute(workplace, client, 1, private=private(SeededNoise(0), 1e-9)).observe(ask).embeddings
    counted = private().measured
    assert counted == measured_of(1.5, OPTIM, ROWS) == Noised(1.5 / (2 / 6 * 6**0.5))
    for key in plain:
        drawn = SeededNoise(0).normal(tuple(plain[key].shape), client.info.id, 1, "embeddings", str(key))
        expected = plain[key].double() + counted.multiplier * 1e-9 * drawn / ROWS
        assert torch.allclose(noisy[key].double(), expected, atol=1e-15), key


@pytest.mark.parametrize(
    "changes",
    [
        {"what": ("usage",)},
        {"what": ("embeddings", "directions")},
        {"hold_out": HoldOut(0.2, 10)},
        {"padding": True},
        {"examples": 2},
        {"split": "test"},
    ],
    ids=lambda of: next(iter(of)),
)
def test_nothing_else_is_measured(place: Any, changes: dict[str, Any]) -> None:
    workplace, client, bank, _ = place
    compute = LocalCompute(workplace, client, 1, private=private())
    with pytest.raises(CoterieError, match="would have no noise"):
        compute.observe(replace(Observe(bank, "train", ("embeddings",)), **changes))


def test_embeddings_are_measured_once_and_only_in_rounds_that_count_them(place: Any) -> None:
    workplace, client, bank, _ = place
    ask = Observe(bank, "train", ("embeddings",))
    with pytest.raises(CoterieError, match="would have no noise"):
        LocalCompute(workplace, client, 1, private=private(measures=False)).observe(ask)
    compute = LocalCompute(workplace, client, 1, private=private())
    compute.observe(ask)
    with pytest.raises(CoterieError, match="would have no noise"):
        compute.observe(ask)
    with pytest.raises(CoterieError, match="the noise is for 7 rows, and there are 6"):
        LocalCompute(workplace, client, 1, private=private(rows=7)).observe(ask)


def test_embeddings_are_measured_once_after_too_little_memory_too(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace, client, bank, _ = place
    whole, notes, tries = client_module.private_embeddings, list[str](), list[int]()

    def short(*given: Any) -> Any:
        tries.append(len(tries))
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return whole(*given)

    monkeypatch.setattr(client_module, "private_embeddings", short)
    compute, ask = LocalCompute(workplace, client, 1, private=private()), Observe(bank, "train", ("embeddings",))
    first, second, third = (answer_all([(compute, ask)], notes.append)[0] for _ in range(3))
    assert isinstance(first, torch.OutOfMemoryError), "rows pass one by one, fewer at once there are not"
    assert not notes
    assert not isinstance(second, Exception)
    assert "would have no noise" in str(third)


def test_a_budget_covers_steps_and_embeddings() -> None:
    kind, settings = method_named("fedamole"), PrivacySettings(unit="example", clip=1.0, epsilon=4.0)
    releases = kind(kind.Settings(), Plan()).releases()
    whole = Optim(batch_size=ROWS, epochs=2)  # all rows in each step: accounted for exactly, and so at once
    multiplier = row_multiplier(settings, whole, ROWS, 3, releases)
    planned = planned_of(multiplier, whole, ROWS, 3, releases)
    assert len(planned) == 3 * whole.steps_on(ROWS) + 2, "none in the last round"
    assert 3.95 < spent(planned, 1e-5).epsilon <= 4.0
    assert row_multiplier(settings, whole, ROWS, 3) < multiplier


def test_embeddings_that_are_not_requested_take_no_part_of_the_clip(place: Any) -> None:
    workplace, client, bank, each = place
    of_router = [{key: value for key, value in of.items() if key.expert == NO_EXPERT} for of in each]
    clip = 0.5 * min(lengths(of_router))
    ask = Observe(bank, "train", ("embeddings",), of_experts=False)
    found = LocalCompute(workplace, client, 1, private=private(clip=clip)).observe(ask).embeddings
    assert found.keys() == of_router[0].keys() < each[0].keys()
    for key, value in found.items():
        cut = [clip / n * of[key].double() for n, of in zip(lengths(of_router), of_router, strict=True)]
        assert torch.allclose(value.double(), torch.stack(cut).mean(0), atol=1e-6 * clip), key
    plain = LocalCompute(workplace, client, 1).observe(ask).embeddings
    assert plain.keys() == of_router[0].keys()
