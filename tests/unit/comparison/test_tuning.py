"""The grid of settings and the choice from it."""

from __future__ import annotations

import pytest

from coterie.comparison.tuning import SEED, Grid, choose, grid_of, rounds_of_tuning, tune_seed
from coterie.types import CoterieError


def test_a_grid_has_every_combination_of_the_values_that_a_method_has() -> None:
    grid = grid_of(["train.learning_rate=1e-3, 2e-3,1e-3", "methods.fedlease.max_experts=2,3", "train.epochs=1"])
    assert grid.points("fedit") == [
        ("train.learning_rate=1e-3", "train.epochs=1"), ("train.learning_rate=2e-3", "train.epochs=1"),
    ]  # fmt: skip
    assert len(grid.points("fedlease:routing=dense")) == 4
    assert grid.points("fedlease")[1] == (
        "train.learning_rate=1e-3",
        "methods.fedlease.max_experts=3",
        "train.epochs=1",
    )
    assert grid_of(["methods.fedlease.max_experts=2,3"]).points("fedit") == [()]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["learning_rate=1"], "is not of the form section.key=value1,value2"),
        (["train.learning_rate"], "is not of the form"),
        (["train.learning_rate=,"], "is not of the form"),
        (["method.max_experts=2,3"], "name the method whose setting it is, as in methods.fedlease.max_experts"),
        (["run.seed=1,2"], "seeds are not tuned"),
        (["train.epochs=1", "train.epochs=2"], "train.epochs is given twice"),
    ],
)
def test_what_is_no_grid_is_an_error(texts: list[str], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        grid_of(texts)


def test_the_best_validation_mean_is_chosen_and_the_edge_of_the_grid_reported() -> None:
    grid = grid_of(["train.learning_rate=1e-3,4e-3,2e-3", "lora.targets=query,value", "train.epochs=2"])
    values = dict.fromkeys(grid.points("fedit"), 0.1)
    first, best = ("train.learning_rate=1e-3", "lora.targets=query", "train.epochs=2"), (
        "train.learning_rate=2e-3", "lora.targets=value", "train.epochs=2",
    )  # fmt: skip
    made = choose(grid, 7, "accuracy", values)
    assert made is not None
    assert (made.settings, made.at_edge) == (first, ("train.learning_rate",))  # of equals the first
    made = choose(grid, 7, "accuracy", {**values, best: 0.2, first: None})
    assert made is not None
    assert (made.settings, made.seed, made.at_edge) == (best, 7, ())
    assert made.tried["train.learning_rate=2e-3 lora.targets=value train.epochs=2"] == 0.2
    assert made.tried["train.learning_rate=1e-3 lora.targets=query train.epochs=2"] is None
    made = choose(grid, 7, "loss", {**values, best: 0.2})
    assert made is not None
    assert made.settings == first
    assert choose(grid, 7, "loss", dict.fromkeys(values)) is None
    assert Grid({"a.b": ("4e-3", "1e-3")}).at_edge(("a.b=4e-3",)) == ("a.b",)


def test_the_seed_of_tuning_is_not_a_reported_one() -> None:
    assert tune_seed(None, [0, 1]) == SEED
    assert tune_seed(None, [SEED]) == SEED + 1
    assert tune_seed(5, [0]) == 5
    with pytest.raises(CoterieError, match="--tune-seed 5 is also in --seeds"):
        tune_seed(5, [0, 5])


def test_rounds_of_tuning_need_something_to_tune_and_are_given_once() -> None:
    assert rounds_of_tuning(None, grid_of([])) == ()
    assert rounds_of_tuning(9, grid_of(["train.epochs=1,2"])) == ("run.rounds=9",)
    with pytest.raises(CoterieError, match="--tune-rounds 9 without --tune"):
        rounds_of_tuning(9, grid_of([]))
    with pytest.raises(CoterieError, match="both set the rounds"):
        rounds_of_tuning(9, grid_of(["run.rounds=1,2"]))
