"""The study's published figures grow method by method: bench/study/joined.py."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from coterie.comparison.figures import record_of
from coterie.comparison.record import Record, write_record
from coterie.runs.summary import Summary
from coterie.types import CoterieError
from summaries import compared, of_clients

HIGH, MIDDLE, LOW = [0.8, 0.7, 0.9, 0.6, 0.8, 0.7], [0.6, 0.6, 0.7, 0.6, 0.5, 0.8], [0.2, 0.3, 0.1, 0.2, 0.4, 0.3]
BEST, WORST, MIDDLING = of_clients(HIGH, 0.9), of_clients(LOW, 0.2), of_clients(MIDDLE, 0.6)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "study"))
    return importlib.import_module("joined")


def record(commit: str = "a", **methods: Summary) -> Record:
    made = record_of(compared({name: {0: summary, 1: summary} for name, summary in methods.items()}), target=0.8)
    return replace(made, commit=commit)


def test_one_method_after_another_gives_what_all_at_once_give(joined: ModuleType) -> None:
    whole = record(local=WORST, fedit=MIDDLING, fedlease=BEST)
    parts = joined.join(joined.join(record(local=WORST), record(fedit=MIDDLING)), record(fedlease=BEST))
    assert parts == whole
    assert parts.variants["local"].against.variant == "fedlease"


def test_a_method_that_was_run_again_replaces_its_figures(joined: ModuleType) -> None:
    again = joined.join(record(local=WORST, fedit=BEST), record(fedit=MIDDLING))
    assert again == record(local=WORST, fedit=MIDDLING)


def test_other_federations_and_targets_are_refused(joined: ModuleType) -> None:
    with pytest.raises(CoterieError, match="the published local is of another federation; --anew"):
        joined.join(record(local=of_clients(LOW[:5], 0.2)), record(fedit=BEST))
    with pytest.raises(CoterieError, match=r"published rounds are to 0\.7, these to 0\.8"):
        joined.join(replace(record(local=WORST), target=0.7), record(fedit=BEST))


def test_the_published_file_says_where_each_method_was_run(joined: ModuleType, tmp_path: Path) -> None:
    measured, published = tmp_path / "compare.json", tmp_path / "study.json"
    with pytest.raises(CoterieError, match="has no comparison"):
        joined.publish(measured, published)
    calls = (
        ("a", {"local": WORST, "fedit": WORST}),
        ("b", {"local": WORST, "fedit": MIDDLING}),  # local is not run again: its runs are still there
        ("c", {"ifca": BEST}),
    )
    for commit, methods in calls:
        write_record(measured, record(commit, **methods))
        joined.publish(measured, published)
    found = json.loads(published.read_text())
    assert {name: made["commit"] for name, made in found["made"].items()} == {"local": "a", "fedit": "b", "ifca": "c"}
    assert found["variants"].keys() == {"local", "fedit", "ifca"}
    assert found["best"] == "ifca"
    joined.publish(measured, published, anew=True)
    assert json.loads(published.read_text())["made"].keys() == {"ifca"}
