"""Intervals and tests against slow enumeration, known examples, and their own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coterie.ops.statistics import bootstrap_interval, holm, seed_interval, sign_flip_p


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full((3, 5), 0.25)) == pytest.approx((0.25, 0.25))


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    inside = [low <= 0.0 <= high for low, high in (bootstrap_interval(draw.normal(size=(2, 30))) for _ in range(200))]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_a_client_is_drawn_with_all_its_seeds() -> None:
    """The same clients in more seeds say nothing more about other clients."""
    clients = np.random.default_rng(0).normal(size=12)
    assert bootstrap_interval(np.stack([clients] * 4)) == pytest.approx(bootstrap_interval(clients[None]))


def test_seeds_are_not_drawn() -> None:
    """Differences between seeds alone make no width: each seed keeps its weight."""
    assert bootstrap_interval(np.array([[1.0] * 4, [3.0] * 4])) == pytest.approx((2.0, 2.0))


def test_the_interval_over_seeds_is_students() -> None:
    low, high = seed_interval([1.0, 2.0, 3.0])  # type: ignore[misc]
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)  # t(.975, 2) / sqrt 3
    assert seed_interval([1.0]) is None


@pytest.mark.parametrize("clients", [3, 6])
def test_the_sign_flips_are_all_of_them(clients: int) -> None:
    table = np.random.default_rng(clients).normal(0.5, 1.0, size=(2, clients))
    by_client = table.mean(axis=0)
    flips = [abs(np.mean(by_client * signs)) for signs in itertools.product((1, -1), repeat=clients)]
    expected = np.mean([flip >= abs(by_client.mean()) - 1e-12 for flip in flips])
    assert sign_flip_p(table) == pytest.approx(expected)


def test_many_clients_are_sampled_and_a_clear_difference_is_found() -> None:
    draw = np.random.default_rng(1)
    assert sign_flip_p(draw.normal(1.0, 0.5, size=(3, 20))) < 0.001
    assert sign_flip_p(draw.normal(0.0, 0.5, size=(3, 20))) > 0.01
    assert sign_flip_p(np.zeros((2, 4))) == 1.0


def test_one_client_alone_shows_nothing() -> None:
    assert sign_flip_p(np.array([[0.3], [0.4]])) == 1.0


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("table", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_bad_tables(table: np.ndarray) -> None:
    for function in (bootstrap_interval, sign_flip_p):
        with pytest.raises(ValueError, match="finite values"):
            function(table)
