"""Whatever the rows, the seed and the partition: nobody shares a row, everybody gets what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coterie.data.partition import RowIndex, Share, partition, partitioners
from coterie.data.rows import SPLITS
from coterie.types import CoterieError

quick = settings(deadline=None, max_examples=60)
NAMES = ("by_dataset", "dirichlet", "iid", "natural", "pathological", "quantity_skew")
EXACT = ("by_dataset", "dirichlet", "iid", "natural", "pathological")  # as many training rows as asked for


@st.composite
def pools(draw: st.DrawFn) -> RowIndex:
    """Up to 4 labels in 1 to 3 datasets, with a column that is neither."""
    labels, columns, datasets = {}, {}, {}
    sizes = {
        "train": draw(st.integers(8, 120)),
        "validation": draw(st.integers(0, 30)),
        "test": draw(st.integers(0, 60)),
    }
    numbers = np.random.default_rng(draw(st.integers(0, 10**6)))
    kinds = draw(st.integers(1, 4))
    for split, size in sizes.items():
        labels[split] = [f"label {i}" for i in numbers.integers(kinds, size=size)]
        datasets[split] = [f"set-{i}" for i in numbers.integers(draw(st.integers(1, 3)), size=size)]
        columns[split] = [{"place": f"place {i}"} for i in numbers.integers(3, size=size)]
    return RowIndex(labels, datasets, columns)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(NAMES))
    clients = draw(st.integers(1, 6))
    options: dict[str, Any] = {
        "natural": {"column": "place"},
        "dirichlet": {"clients": clients, "alpha": draw(st.sampled_from([0.01, 0.1, 1.0, 100.0]))},
        "quantity_skew": {"clients": clients, "alpha": draw(st.sampled_from([0.01, 0.1, 1.0, 100.0]))},
        "pathological": {"clients": clients, "labels_per_client": draw(st.integers(1, 2))},
    }.get(name, {"clients": clients})
    if name in ("dirichlet", "pathological") and draw(st.booleans()):
        options["column"] = "place"
    if name == "by_dataset" and draw(st.booleans()):
        options["stratify"] = True
    rows = {split: draw(st.integers(0, 12)) for split in SPLITS}
    return {"name": name, "per_client": rows, "seed": draw(st.integers(0, 2**31)), "options": options}


def shares_of(pool: RowIndex, request: dict[str, Any]) -> list[Share]:
    try:
        return partition(pool, **request)
    except CoterieError:
        assume(False)
        raise


def plain(shares: Sequence[Share]) -> list[Any]:
    return [(s.id, s.group, {split: rows.tolist() for split, rows in s.rows.items()}) for s in shares]


def test_the_partitioners_are_those_that_these_tests_know() -> None:
    assert tuple(partitioners()) == NAMES


@quick
@given(pools(), requests())
def test_no_row_has_two_owners_and_every_row_is_from_the_pool(pool: RowIndex, request: dict[str, Any]) -> None:
    shares = shares_of(pool, request)
    assert shares
    for split in SPLITS:
        owned = [row for share in shares for row in share.rows[split].tolist()]
        assert len(set(owned)) == len(owned)
        assert all(0 <= row < len(pool.labels[split]) for row in owned)
    assert all(share.rows["train"].size > 0 for share in shares)


@quick
@given(pools(), requests())
def test_sizes_are_exact(pool: RowIndex, request: dict[str, Any]) -> None:
    shares = shares_of(pool, request)
    for split in SPLITS:
        sizes = [share.rows[split].size for share in shares]
        asked = request["per_client"][split]
        if asked and (request["name"] in EXACT or split != "train"):
            assert sizes == [asked] * len(shares)
        elif asked:
            assert sum(sizes) == asked * len(shares)
        elif request["name"] in ("iid", "dirichlet", "quantity_skew", "natural", "by_dataset"):
            assert sum(sizes) == len(pool.labels[split]) or request["name"] == "natural"


@quick
@given(pools(), requests())
def test_the_seed_decides(pool: RowIndex, request: dict[str, Any]) -> None:
    assert plain(shares_of(pool, request)) == plain(partition(pool, **request))


@quick
@given(pools(), requests())
def test_classes_are_kept(pool: RowIndex, request: dict[str, Any]) -> None:
    """natural: one value a client; by_dataset: one dataset; pathological: so many labels at most."""
    shares = shares_of(pool, request)
    column = request["options"].get("column")
    for share in shares:
        for split in SPLITS:
            rows = share.rows[split]
            values = {pool.columns[split][i]["place"] if column else pool.labels[split][i] for i in rows}
            if request["name"] == "natural":
                assert values <= {share.group}
            if request["name"] == "by_dataset":
                assert {pool.datasets[split][i] for i in rows} <= {share.group}
    if request["name"] == "pathological":
        for share in shares:
            splits = [
                {pool.columns[s][i]["place"] if column else pool.labels[s][i] for i in share.rows[s]} for s in SPLITS
            ]
            assert len(set().union(*splits)) <= request["options"]["labels_per_client"]


@quick
@given(pools(), requests(), st.sampled_from(SPLITS))
def test_more_rows_than_there_are_is_an_error(pool: RowIndex, request: dict[str, Any], split: str) -> None:
    request["per_client"] = {**dict.fromkeys(SPLITS, 0), split: 121}
    with pytest.raises(CoterieError):
        partition(pool, **request)


def balanced(per_label: int, labels: int = 4) -> RowIndex:
    return RowIndex({split: [f"label {i % labels}" for i in range(per_label * labels)] for split in SPLITS})


def proportions(pool: RowIndex, share: Share, split: str) -> np.ndarray[Any, Any]:
    found = [pool.labels[split][i] for i in share.rows[split]]
    return np.array([found.count(f"label {k}") for k in range(4)]) / len(found)


@quick
@given(st.integers(0, 10**6))
def test_a_large_alpha_is_near_uniform(seed: int) -> None:
    rows = {"train": 100, "validation": 20, "test": 40}
    for share in partition(balanced(200), "dirichlet", rows, seed, {"clients": 4, "alpha": 10_000.0}):
        for split in SPLITS:
            assert np.abs(proportions(balanced(200), share, split) - 0.25).max() < 0.06


@quick
@given(st.integers(0, 10**6))
def test_a_small_alpha_is_concentrated(seed: int) -> None:
    pool = balanced(500)
    rows = {"train": 100, "validation": 20, "test": 40}
    shares = partition(pool, "dirichlet", rows, seed, {"clients": 4, "alpha": 0.001})
    assert np.mean([proportions(pool, share, "train").max() for share in shares]) > 0.7


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0]))
def test_all_splits_of_a_dirichlet_client_follow_the_same_proportions(seed: int, alpha: float) -> None:
    pool = balanced(400)  # enough of every label for every client
    rows = {"train": 100, "validation": 50, "test": 100}
    for share in partition(pool, "dirichlet", rows, seed, {"clients": 4, "alpha": alpha}):
        train = proportions(pool, share, "train")
        assert np.abs(proportions(pool, share, "test") - train).max() < 1e-9
        assert np.abs(proportions(pool, share, "validation") - train).max() <= 1 / 50


@quick
@given(st.integers(0, 10**6))
def test_quantity_skew_is_skewed_in_training_rows_alone(seed: int) -> None:
    rows = {"train": 100, "validation": 20, "test": 40}
    small, large = (
        [
            s.rows["train"].size
            for s in partition(balanced(200), "quantity_skew", rows, seed, {"clients": 5, "alpha": a})
        ]
        for a in (0.01, 10_000.0)
    )
    assert sum(small) == sum(large) == 500
    assert max(large) - min(large) < 30
    assert max(small) > 200


@quick
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9))
def test_pathological_labels_have_nearly_as_many_holders_each(seed: int, each: int, clients: int) -> None:
    pool = balanced(400)
    options = {"clients": clients, "labels_per_client": each}
    shares = partition(pool, "pathological", dict.fromkeys(SPLITS, 24), seed, options)
    held = np.array([proportions(pool, share, "train") > 0 for share in shares])
    assert (held.sum(axis=1) == each).all()
    assert np.ptp(held.sum(axis=0)) <= 1
    assert all(np.array_equal(proportions(pool, s, "train"), proportions(pool, s, "test")) for s in shares)


def test_other_seeds_draw_other_rows() -> None:
    found = {
        str(plain(partition(balanced(50), name, dict.fromkeys(SPLITS, 10), seed, options)))
        for name, options in (("iid", {"clients": 4}), ("dirichlet", {"clients": 4, "alpha": 0.5}))
        for seed in range(5)
    }
    assert len(found) == 10


def test_one_dataset_more_leaves_the_others_as_they_were() -> None:
    def pool(*names: str) -> RowIndex:
        datasets = {split: [name for name in names for _ in range(30)] for split in SPLITS}
        return RowIndex({split: ["x"] * len(found) for split, found in datasets.items()}, datasets)

    rows = dict.fromkeys(SPLITS, 5)
    few = plain(partition(pool("a", "b"), "by_dataset", rows, 0, {"clients": 2}))
    many = plain(partition(pool("a", "b", "c"), "by_dataset", rows, 0, {"clients": 2}))
    assert [client[0] for client in many] == ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1"]
    assert many[:2] == few[:2]


@pytest.mark.parametrize(
    ("name", "rows", "options", "says"),
    [
        ("by_data", {}, {}, "by_dataset, dirichlet, iid, natural, pathological, quantity_skew"),
        ("dirichlet", {}, {"clients": 2}, "needs data.partition.alpha"),
        ("dirichlet", {}, {}, "needs data.partition.clients and data.partition.alpha"),
        ("iid", {}, {"clients": 2, "alpha": 1.0}, "iid does not use alpha; it uses clients"),
        ("iid", {"train": 30}, {"clients": 3}, "need 90, but there are 80; lower data.train_rows"),
        ("iid", {"test": 90}, {"clients": 1}, "need 90, but there are 80; lower data.test_rows"),
        ("iid", {}, {"clients": 81}, "81 client\\(s\\) with 1 train row\\(s\\) each need 81, but there are 80"),
        ("pathological", {}, {"clients": 2, "labels_per_client": 5}, "is 5, but there are 4 labels"),
        ("pathological", {"train": 21}, {"clients": 2, "labels_per_client": 1}, "needs 21 train rows of label"),
        ("natural", {}, {"column": "place"}, "the columns are town"),
        ("natural", {}, {"column": "town", "clients": 3}, "is 3, but 'town' has 2 values"),
    ],
)
def test_faults_say_what_to_change(name: str, rows: dict[str, int], options: dict[str, Any], says: str) -> None:
    columns = {split: [{"town": f"town {i % 2}"} for i in range(80)] for split in SPLITS}
    pool = RowIndex(balanced(20).labels, columns=columns)
    with pytest.raises(CoterieError, match=says):
        partition(pool, name, rows, 0, options)


def test_rows_to_generate_have_no_labels_to_split_by() -> None:
    with pytest.raises(CoterieError, match=r"set data\.partition\.column"):
        partition(RowIndex({split: [None] * 9 for split in SPLITS}), "dirichlet", {}, 0, {"clients": 2, "alpha": 1.0})


def test_where_a_label_runs_out_the_clients_still_get_their_number() -> None:
    pool = RowIndex({"train": ["rare"] * 3 + ["common"] * 97, "validation": ["rare"] * 10, "test": ["common"] * 10})
    shares = partition(pool, "dirichlet", {"train": 25, "validation": 2, "test": 2}, 0, {"clients": 4, "alpha": 0.1})
    assert [[share.rows[split].size for split in SPLITS] for share in shares] == [[25, 2, 2]] * 4


@quick
@given(pools(), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**31))
def test_stratified_clients_have_the_labels_in_their_datasets_proportions(
    pool: RowIndex, clients: int, size: int, seed: int
) -> None:
    rows = {"train": size, "validation": 0, "test": 0}
    request = {
        "name": "by_dataset",
        "per_client": rows,
        "seed": seed,
        "options": {"clients": clients, "stratify": True},
    }
    shares = shares_of(pool, request)
    names = np.array(pool.datasets["train"])
    labels = np.array(pool.labels["train"])
    for share in shares:
        of_dataset = labels[names == share.group]
        for label in np.unique(of_dataset):
            left = (of_dataset == label).sum()
            wish = size * left / len(of_dataset)
            got = (labels[share.rows["train"]] == label).sum()
            assert got <= left
            # Rounding is at most one row; what rounding took from a label before, later clients may miss.
            assert abs(got - wish) < 1 + clients
