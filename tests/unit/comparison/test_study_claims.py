"""The table of the study's claims: bench/study/claims.py."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from coterie.comparison.figures import record_of
from coterie.comparison.record import Record
from coterie.runs.summary import Summary, Traffic
from summaries import compared, of_clients


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "study"))
    return importlib.import_module("claims")


def made(better: float, validation: float, method: str, sent: int = 100, gflop: float = 0.0) -> Summary:
    values = [0.5 + better + 0.01 * i for i in range(8)]
    return of_clients(values, validation, method=method, bytes=Traffic(sent, 0), gflop=gflop)


def record() -> Record:
    runs = {
        "local": {0: made(0.0, 0.40, "local"), 1: made(0.0, 0.40, "local")},
        "fedit": {0: made(0.1, 0.60, "fedit", 200, 4.0), 1: made(0.1, 0.60, "fedit", 200, 4.0)},
        "ifca": {0: made(0.3, 0.30, "ifca")},
        "fedprox": {0: made(0.05, 0.50, "fedprox"), 1: made(0.3, 0.90, "fedprox")},  # only seed 0 is common to all
        "fedlease": {0: made(0.2, 0.70, "fedlease", 500, 6.0), 1: made(0.2, 0.70, "fedlease", 500, 6.0)},
        "fedlease:distance=B": {0: made(0.19, 0.90, "fedlease")},
        "centralised": {0: made(0.3, 0.95, "centralised")},
    }
    return record_of(compared(runs), target=0.8)


def test_the_best_baselines_are_those_of_validation_and_none_of_ours(claims: ModuleType) -> None:
    assert claims.best_baselines(record()) == ["fedit", "fedprox", "local"]


def test_a_system_is_held_against_its_published_form_and_the_best_baselines(claims: ModuleType) -> None:
    found = claims.claims_of({"Tasks": record()})
    assert [claim.name for claim in found] == ["fedlease:distance=B", "fedit", "fedprox", "local"]
    assert [claim.found.difference for claim in found] == pytest.approx([0.01, 0.1, 0.025, 0.2])
    assert [len(claim.found.seeds) for claim in found] == [1, 2, 2, 2]


def test_holm_counts_the_claims_of_all_federations(claims: ModuleType) -> None:
    one, two = claims.claims_of({"a": record()}), claims.claims_of({"a": record(), "b": record()})
    alone, smallest = one[1].found.p, 2 / 2**8  # all eight clients gain the same
    assert alone == pytest.approx(smallest)
    assert (one[1].found.p_holm, two[1].found.p_holm) == pytest.approx((4 * smallest, 8 * smallest))


def test_a_line_has_what_each_costs(claims: ModuleType) -> None:
    lines = claims.table(claims.claims_of({"Tasks": record()})).splitlines()
    ahead = "2 of 2 seeds, 8 of 8 clients"
    assert lines[3] == f"| Tasks | FedLEASE | FedIT | +10.0 [+10.0, +10.0] | {ahead} | 0.031 | 2.5x | 1.5x |"
    assert "| 1 of 2 seeds, 8 of 8 clients |" in lines[4]
    assert lines[5].endswith("| 5x | - |")
    assert [claims._times([cost]) for cost in ((1900.4, 1.0), (12.4, 1.0), (1.0, 8.0))] == ["1,900x", "12x", "0.12x"]


def test_a_form_without_figures_is_in_the_table_and_is_no_test(claims: ModuleType) -> None:
    whole = record()
    few = replace(whole, variants={v: row for v, row in whole.variants.items() if v != "fedlease:distance=B"})
    found = claims.claims_of({"Tasks": few})
    assert [claim.name for claim in found] == ["fedlease:distance=B", "fedit", "fedprox", "local"]
    line = claims.table(found).splitlines()[2]
    assert line == "| Tasks | FedLEASE | FedLEASE, clusters of B | not run | - | - | - | - |"
    assert found[1].found.p_holm == pytest.approx(3 * 2 / 2**8)


def test_means_that_differ_by_rounding_alone_are_not_ahead(claims: ModuleType) -> None:
    def run(extra: float, method: str) -> dict[int, Summary]:
        return {0: made(0.1 + extra, 0.7, method)}

    alike = record_of(compared({"fedlease": run(1e-13, "fedlease"), "fedit": run(0.0, "fedit")}), target=0.8)
    (line,) = (line for line in claims.table(claims.claims_of({"Tasks": alike})).splitlines() if "FedIT" in line)
    assert "| 0 of 1 seeds, " in line
