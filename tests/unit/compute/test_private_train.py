"""DP-SGD on the trained tensors: cut sums as of one row at a time with autograd, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.methods.row_privacy import RowPrivacy
from coterie.nn.per_row import PerRow, squared_norms
from coterie.ops.noise import Noise, SeededNoise
from coterie.requests import Balance, HoldOut, Observe, Optim, Score, Train
from coterie.types import Bank, CoterieError, Key, Part
from workplaces import LABELS, RATE, client_of, make_workplace, plain_bank, sgd

ROWS = 8
SEED = SeededNoise(0)
GATES: dict[str, dict[str, Any]] = {
    "fedit": {},
    "two experts": {"experts": 2},
    "fedlease": {"experts": 3, "gate": "slot_top_k", "options": {"own": 1}},
    "fedamole": {"experts": 3, "gate": "scaled_dot_product", "options": {"k": 2}, "shared": 4},
    "softmax": {"experts": 2, "gate": "softmax"},
    "ranks": {"experts": 2, "rank": (2, 3), "gate": "softmax"},
}


@dataclass(frozen=True)
class NoNoise:
    """Sampling as of :class:`SeededNoise`, and zeros for noise."""

    inner: Noise = SEED

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def bank_of(workplace: Workplace, of: Mapping[str, Any]) -> Bank:
    made = tiny.bank(workplace.base.spec.targets, dtype=torch.float64, **of)
    if workplace.base.kind != "classification":
        return made
    head = {key: value.double() for key, value in tiny.head(workplace.base.model, LABELS).items()}
    return replace(made, tensors={**made.tensors, **head})


def one_step(size: int = ROWS, accumulate: int = 1) -> Optim:
    return replace_optim(sgd(1, accumulate), batch_size=size)


def replace_optim(optim: Optim, **changes: Any) -> Optim:
    return optim.model_copy(update=changes)


def private_of(optim: Optim, clip: float = 1e9, noise: Any = None, multiplier: float = 1.0) -> RowPrivacy:
    return RowPrivacy(clip, multiplier, noise or NoNoise(), optim, ROWS)


def trained(workplace: Workplace, bank: Bank, optim: Optim, private: RowPrivacy | None, **of: Any) -> Any:
    client = of.pop("client", None) or client_of(workplace, number=ROWS)
    wanted = of.pop("trainable", frozenset(bank.tensors))
    return LocalCompute(workplace, client, 1, private=private).train(Train(bank, wanted, optim, **of)).tensors


def gradients(workplace: Workplace, bank: Bank, wanted: frozenset[Key]) -> list[dict[Key, Tensor]]:
    """Every row's own, from ordinary training on that row alone."""
    whole = client_of(workplace, number=ROWS)
    made = []
    for number in range(ROWS):
        alone = ClientData(
            replace(whole.info, id=f"row {number}"), {"train": whole.splits["train"][number : number + 1]}
        )
        after = trained(workplace, bank, one_step(), None, client=alone, trainable=wanted)
        made.append({key: (bank.tensors[key] - after[key]) / RATE for key in after})
    return made


def norm(of: Mapping[Key, Tensor]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in of.values()))


@pytest.mark.parametrize("arch", ["bert", "llama"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("frozen", ["nothing", "A"])
def test_the_step_is_the_mean_of_every_rows_cut_gradient(arch: str, gate: str, frozen: str) -> None:
    workplace = make_workplace(arch)
    bank = bank_of(workplace, GATES[gate])
    wanted = frozenset(key for key in bank.tensors if frozen == "nothing" or key.part is not Part.A)
    each = gradients(workplace, bank, wanted)
    clip = sorted(map(norm, each))[ROWS // 2]  # half of the rows are cut
    optim = one_step(4, 2)
    after = trained(workplace, bank, optim, private_of(optim, clip), trainable=wanted)
    for key in wanted:
        cut = sum(min(1.0, clip / norm(of)) * of[key] for of in each)
        torch.testing.assert_close(after[key], bank.tensors[key] - RATE / ROWS * cut, atol=1e-10, rtol=1e-9)


def test_heads_of_several_linears_count() -> None:
    workplace = make_workplace("roberta")
    bank = plain_bank(workplace)
    wanted = frozenset(key for key in bank.tensors if key.part is Part.HEAD)
    assert len(wanted) == 4
    each = gradients(workplace, bank, wanted)
    optim = one_step()
    after = trained(workplace, bank, optim, private_of(optim, 0.5), trainable=wanted)
    for key in wanted:
        cut = sum(min(1.0, 0.5 / norm(of)) * of[key] for of in each)
        torch.testing.assert_close(after[key], bank.tensors[key] - RATE / ROWS * cut, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("tokens", [2, 40])  # two Grams, or the part itself
def test_norms_of_uses_one_after_another(tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    uses = [[torch.randn(3, tokens, width, generator=draw, dtype=torch.float64) for width in (4, 30)] for _ in range(2)]
    of, key = PerRow(3), Key("m", 0, Part.A)
    for left, right in uses:
        of.add(key, left.flatten(0, 1), right.flatten(0, 1))
    parts = sum(left.mT @ right for left, right in uses)
    expected = parts.square().sum((1, 2))  # type: ignore[union-attr]
    both = (torch.cat([use[side] for use in uses], dim=1) for side in (0, 1))
    torch.testing.assert_close(squared_norms(*both), expected)
    cut = of.clipped(3.0)[key]
    factors = (3.0 / expected.sqrt()).clamp_max(1.0)
    torch.testing.assert_close(cut, (parts * factors[:, None, None]).sum(0))  # type: ignore[operator]


def test_a_row_whose_gradient_is_not_a_number_counts_as_none() -> None:
    of, key = PerRow(2), Key("m", 0, Part.A)
    of.add(key, torch.tensor([[torch.nan], [2.0]]), torch.tensor([[1.0, 1.0], [3.0, 4.0]]))
    torch.testing.assert_close(of.clipped(5.0)[key], torch.tensor([[3.0, 4.0]]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1e4, 1e12])
def test_a_row_whose_tokens_nearly_take_each_other_off_is_cut(seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    left, right, other = (torch.randn(1, 30, generator=draw) for _ in range(3))
    of, key = PerRow(1), Key("m", 0, Part.A)  # float32 Grams of these have a length of 0, or of anything
    of.add(key, torch.cat([left, -left]) * size, torch.cat([right, right + 1e-5 * other]))
    assert 0.01 < float(of.clipped(1.0)[key].double().norm()) <= 1 + 1e-5


def test_a_row_far_beyond_the_clip_is_cut_to_it() -> None:
    of, key = PerRow(1), Key("m", 0, Part.A)  # its factor is 1 / 1.33e45, which in float32 has one digit
    of.add(key, torch.full((1, 4), 1.33e22 / 2), torch.full((1, 4), 1e23 / 2))
    torch.testing.assert_close(float(of.clipped(1.0)[key].double().norm()), 1.0, rtol=1e-5, atol=0.0)


def test_noise_of_the_multiplier_times_the_clip_is_added_to_the_sum() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    optim = one_step()
    without = trained(workplace, bank, optim, private_of(optim, 0.1))
    other = trained(workplace, bank, optim, private_of(optim, 0.1, SEED, 3.0))
    for key in bank.tensors:
        noise = SEED.normal(tuple(bank.tensors[key].shape), "north", 1, "train", 0, str(key))
        torch.testing.assert_close(without[key] - other[key], RATE * 3.0 * 0.1 / ROWS * noise, atol=1e-12, rtol=1e-9)


def test_rows_are_drawn_one_by_one_and_a_step_without_any_is_noise() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    optim = replace_optim(sgd(40), batch_size=1)
    compute = LocalCompute(workplace, client_of(workplace, number=ROWS), 1, private=private_of(optim, 0.1, SEED))
    training = compute.training(Train(bank, frozenset(bank.tensors), optim))
    sizes = [sum(map(len, step)) for step in training.steps]
    assert len(sizes) == 40
    assert {0, 1, 2} <= set(sizes)
    assert 20 <= sum(sizes) <= 60  # 40 expected
    assert all(len(micro) == 1 for step in training.steps for micro in step)  # never more at once than batch_size
    other = compute.train(Train(bank, frozenset(bank.tensors), optim))
    assert (other.loss, other.tokens, other.examples, other.steps) == (0.0, 0, ROWS, 40)  # not what it drew
    assert all(bool(value.isfinite().all()) for value in other.tensors.values())


def test_another_row_changes_a_step_by_its_cut_gradient_alone() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace)
    optim, clip = one_step(), 0.05
    whole = client_of(workplace, number=ROWS)
    other = client_of(workplace, "south", 10)
    changed = (*whole.splits["train"][:-1], other.splits["train"][-1])
    one = trained(workplace, bank, optim, private_of(optim, clip), client=whole)
    other = replace(other, splits={"train": changed})  # of another name: rows are tokenised once
    two = trained(workplace, bank, optim, private_of(optim, clip), client=other)
    moved = norm({key: (one[key] - two[key]) * ROWS / RATE for key in one})
    assert 0 < moved <= 2 * clip * (1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"balance": Balance(0.1)}, r"\[method\] balance = 0"),
        ({"hold_out": HoldOut(0.5, 2)}, r"\[method\] embed_rows"),
        ({"optim": one_step(2)}, "the steps are those of"),
    ],
)
def test_what_the_accounting_does_not_cover_is_refused(changes: dict[str, Any], setting: str) -> None:
    workplace = make_workplace()
    bank, optim = plain_bank(workplace), one_step()
    with pytest.raises(CoterieError, match=setting):
        trained(workplace, bank, changes.pop("optim", optim), private_of(optim), **changes)


def test_dropout_and_other_numbers_of_rows_are_refused() -> None:
    workplace = make_workplace()
    optim = one_step()
    with pytest.raises(CoterieError, match=r"\[lora\] dropout = 0"):
        trained(workplace, plain_bank(workplace, dropout=0.1), optim, private_of(optim))
    with pytest.raises(CoterieError, match="for 8 rows, and there are 6"):
        trained(workplace, plain_bank(workplace), optim, private_of(optim), client=client_of(workplace, number=6))


def test_a_router_that_all_rows_share_is_refused() -> None:
    workplace = make_workplace()
    bank = bank_of(workplace, {"experts": 2, "gate": "signed"})
    optim = one_step()
    with pytest.raises(CoterieError, match="which all rows share"):
        trained(workplace, bank, optim, private_of(optim))


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(CoterieError, match=r"takes \[12, 5\] where the batch has 4 rows"):
        PerRow(4).check(torch.zeros(12, 5), "m")
    with pytest.raises(CoterieError, match=r"takes \[1, 12, 5\] where the batch has 4 rows"):
        PerRow(4).check(torch.zeros(1, 12, 5), "m")
    with pytest.raises(CoterieError, match=r"takes \[4, 5\] where the batch has 4 rows"):
        PerRow(4).check(torch.zeros(4, 5), "m")  # four tokens of an expert in the base, perhaps


def test_a_second_training_and_measuring_are_refused() -> None:
    workplace = make_workplace()
    bank, optim = plain_bank(workplace), one_step()
    compute = LocalCompute(workplace, client_of(workplace, number=ROWS), 1, private=private_of(optim))
    request = Train(bank, frozenset(bank.tensors), optim)
    compute.train(request)
    with pytest.raises(CoterieError, match="one training in a round is what is counted"):
        compute.train(request)
    with pytest.raises(CoterieError, match="would have no noise"):
        compute.score(Score([bank]))
    with pytest.raises(CoterieError, match="would have no noise"):
        compute.observe(Observe(bank))
