"""The study's page holds the published figures: bench/study/page.py and pictures.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from coterie.comparison.figures import record_of
from summaries import compared, of_clients

ALONE, LOW, HIGH = of_clients([0.5, 0.6], 0.5), of_clients([0.4, 0.5], 0.4), of_clients([0.7, 0.9], 0.8)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "study"))
    return importlib.import_module("page")


def test_the_page_has_the_published_figures(page: ModuleType) -> None:
    text = page.PAGE.read_text()
    records = page.published()
    assert set(records) == set(page.FEDERATIONS)
    for name, record in records.items():
        assert page.filled(text, name, page.table(page.common(record))) == text, "run: python bench/study/page.py"
    claims = page.claims.table(page.claims.claims_of(page.titled(records)))
    assert page.filled(text, "claims", claims) == text, "run: python bench/study/page.py"


def test_a_table_is_of_the_seeds_that_every_method_has(page: ModuleType) -> None:
    """The claims take all seeds that a pair has."""
    few = {"fedit": {0: LOW, 1: LOW}, "local": {0: ALONE, 1: ALONE}}
    made = page.common(record_of(compared({**few, "fedlease": {0: HIGH, 1: HIGH, 2: LOW}}), target=0.8))
    assert made == record_of(compared({**few, "fedlease": {0: HIGH, 1: HIGH}}), target=0.8)


def test_a_block_is_replaced_and_a_missing_one_is_named(page: ModuleType) -> None:
    text = "a\n<!-- sick -->\n| 1 |\n<!-- end of sick -->\nb\n"
    assert page.filled(text, "sick", "| 2 |\n") == "a\n<!-- sick -->\n| 2 |\n<!-- end of sick -->\nb\n"
    with pytest.raises(ValueError, match="has 0 blocks named other"):
        page.filled(text, "other", "")


def test_methods_stand_in_the_order_of_their_accuracy(page: ModuleType) -> None:
    record = record_of(compared({"fedit": {0: LOW}, "local": {0: ALONE}, "fedlease": {0: HIGH}}), target=0.8)
    names = [line.split(" | ")[0] for line in page.table(record).splitlines()]
    assert names == ["| method", "| ---", "| FedLEASE", "| Local", "| FedIT"]


def test_a_dot_is_the_gain_over_training_alone_with_the_same_seed(page: ModuleType) -> None:
    better = of_clients([0.6, 0.7], 0.6)
    record = record_of(compared({"local": {0: ALONE, 1: better}, "fedlease": {0: HIGH, 1: HIGH}}), target=0.8)
    (panel,) = page.pictures.gains({"sick": record}).axes
    seeds, mean = (dots.get_offsets()[:, 0].tolist() for dots in panel.collections[1:])
    assert seeds == pytest.approx([25.0, 15.0])
    assert mean == pytest.approx([20.0])


def test_seeds_without_training_alone_have_no_dot(page: ModuleType) -> None:
    record = record_of(compared({"local": {0: ALONE}, "fedlease": {0: HIGH, 5: LOW}}), target=0.8)
    (panel,) = page.pictures.gains({"sick": record}).axes
    assert panel.collections[1].get_offsets()[:, 0].tolist() == pytest.approx([25.0])


def test_a_line_is_the_mean_over_seeds_of_the_rounds_that_all_have(page: ModuleType) -> None:
    record = record_of(compared({"local": {0: ALONE}, "fedlease": {0: HIGH, 1: HIGH}, "ifca": {0: LOW}}), target=0.8)
    seeds = {"0": {"3": 0.5, "6": 0.7}, "1": {"3": 0.7, "6": 0.8, "9": 0.9}}
    (panel,) = page.pictures.by_round({"a": record}, {"a": {"fedlease": seeds, "ifca": {"0": {"3": 0.4}}}}).axes
    lines = {line.get_label(): line.get_xydata().round(6).tolist() for line in panel.lines}
    assert lines["FedLEASE"] == [[3.0, 60.0], [6.0, 75.0]]
    assert [3.0, 40.0] in [line[0] for line in lines.values()]
    assert len(lines) == 2, "of local nothing is known"
