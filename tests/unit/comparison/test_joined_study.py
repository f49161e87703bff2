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
from coterie.comparison.tuning import Choice
from coterie.runs.events import Evaluated
from coterie.runs.summary import Summary
from coterie.types import CoterieError
from summaries import compared, of_clients

HIGH, MIDDLE, LOW = [0.8, 0.7, 0.9, 0.6, 0.8, 0.7], [0.6, 0.6, 0.7, 0.6, 0.5, 0.8], [0.2, 0.3, 0.1, 0.2, 0.4, 0.3]
METHODS = ("local", "fedit", "ifca", "fedlease")
BEST, WORST, MIDDLING = of_clients(HIGH, 0.9), of_clients(LOW, 0.2), of_clients(MIDDLE, 0.6)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "study"))
    return importlib.import_module("joined")


def record(commit: str = "a", seeds: tuple[int, ...] = (0, 1), rate: str = "", **methods: Summary) -> Record:
    done = {name: dict.fromkeys(seeds, summary) for name, summary in methods.items()}
    choices = dict.fromkeys(done, Choice((f"train.learning_rate={rate}",), 1000, {rate: 0.5})) if rate else {}
    return replace(record_of(compared(done, choices=choices), target=0.8), commit=commit)


def test_one_method_after_another_gives_what_all_at_once_give(joined: ModuleType) -> None:
    whole = record(local=WORST, fedit=MIDDLING, fedlease=BEST)
    parts = joined.join(joined.join(record(local=WORST), record(fedit=MIDDLING)), record(fedlease=BEST))
    assert parts == whole
    assert parts.variants["local"].against.variant == "fedlease"


def test_a_method_that_was_run_again_replaces_its_figures(joined: ModuleType) -> None:
    again = joined.join(record(local=WORST, fedit=BEST), record(fedit=MIDDLING))
    assert again == record(local=WORST, fedit=MIDDLING)


def test_seeds_join_seeds_of_the_same_learning_rate(joined: ModuleType) -> None:
    before, after = (record(rate="1e-3", seeds=seeds, local=WORST, fedit=BEST) for seeds in ((0, 1), (0, 1, 2, 3)))
    new = record(rate="1e-3", seeds=(2, 3), fedit=BEST, local=WORST)
    assert joined.join(before, new) == after
    choice = Choice(("train.learning_rate=1e-3",), 1000, {})  # taken from what is published, without a trial
    again = {name: replace(row, tuned=choice) for name, row in new.variants.items()}
    assert joined.join(before, replace(new, variants=again)) == after


def test_methods_with_other_seeds_are_compared_over_those_of_both(joined: ModuleType) -> None:
    before = record(rate="1e-3", local=WORST, fedit=BEST)
    more = joined.join(before, record(rate="1e-3", seeds=(2, 3), fedit=BEST))
    assert more.variants["fedit"].seeds == [0, 1, 2, 3]
    assert more.variants["local"].against.seeds == [0, 1]


def test_another_learning_rate_replaces_all_seeds(joined: ModuleType) -> None:
    again = joined.join(record(rate="1e-3", local=WORST), record(rate="2e-3", seeds=(2,), local=MIDDLING))
    assert again.variants["local"].seeds == [2]


def test_other_federations_and_targets_are_refused(joined: ModuleType) -> None:
    with pytest.raises(CoterieError, match="the published local is of another federation; --anew"):
        joined.join(record(local=of_clients(LOW[:5], 0.2)), record(fedit=BEST))
    with pytest.raises(CoterieError, match=r"published rounds are to 0\.7, these to 0\.8"):
        joined.join(replace(record(local=WORST), target=0.7), record(fedit=BEST))


def test_the_published_file_says_where_each_method_was_run(joined: ModuleType, tmp_path: Path) -> None:
    measured, published = tmp_path / "compare.json", tmp_path / "study.json"
    with pytest.raises(CoterieError, match="has no comparison"):
        joined.publish(measured, published, METHODS)
    calls = (
        ("a", {"local": WORST, "fedit": WORST}),
        ("b", {"local": WORST, "fedit": MIDDLING}),  # local is not run again: its runs are still there
        ("c", {"ifca": BEST}),
    )
    for commit, methods in calls:
        write_record(measured, record(commit, **methods))
        joined.publish(measured, published, METHODS)
    found = json.loads(published.read_text())
    commits = {name: {found["places"][n]["commit"] for n in made.values()} for name, made in found["made"].items()}
    assert commits == {"local": {"a"}, "fedit": {"b"}, "ifca": {"c"}}
    write_record(measured, record("d", seeds=(2,), fedit=MIDDLING))
    joined.publish(measured, published, METHODS)
    found = json.loads(published.read_text())
    commits = {seed: found["places"][n]["commit"] for seed, n in found["made"]["fedit"].items()}
    assert commits == {"0": "b", "1": "b", "2": "d"}
    assert found["variants"].keys() == {"local", "fedit", "ifca"}
    assert found["best"] == "ifca"
    joined.publish(measured, published, METHODS, anew=True)
    assert json.loads(published.read_text())["made"] == {"fedit": {"2": 0}}


def test_only_the_methods_that_were_asked_for_are_published(joined: ModuleType, tmp_path: Path) -> None:
    measured, published = tmp_path / "compare.json", tmp_path / "study.json"
    write_record(measured, record("new", local=WORST, fedit=MIDDLING))
    joined.publish(measured, published, METHODS)
    write_record(measured, record("old", local=MIDDLING, fedit=BEST))  # local: a run of before
    joined.publish(measured, published, ["fedit"])
    found = json.loads(published.read_text())
    assert found["variants"]["local"]["mean"] == record(local=WORST).variants["local"].mean
    assert found["variants"]["fedit"]["mean"] == record(fedit=BEST).variants["fedit"].mean
    assert {found["places"][n]["commit"] for n in found["made"]["local"].values()} == {"new"}


def test_runs_of_other_lengths_do_not_share_a_table(joined: ModuleType) -> None:
    published = record(local=WORST)
    (rounds,) = {run.rounds for run in published.variants["local"].runs}
    joined.check_rounds(published, rounds)
    with pytest.raises(CoterieError, match=f"published runs have {rounds} rounds, the config 99: --anew"):
        joined.check_rounds(published, 99)


def test_what_a_run_reached_by_round_is_published_with_it(joined: ModuleType, tmp_path: Path) -> None:
    measured, published = tmp_path / "compare.json", tmp_path / "study.json"

    def reach(folder: str, value: float) -> None:
        scores = {"client": {"validation": {"accuracy": value}}}
        event = Evaluated(round=3, clients=scores, mean=scores["client"])
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps(event.to_json()) + "\n")

    write_record(measured, record(rate="1e-3", local=WORST, fedit=BEST))
    reach("local-0", 0.2)
    reach("fedit-1", 0.5)
    joined.publish(measured, published, METHODS)
    write_record(measured, record(rate="1e-3", seeds=(0,), local=WORST))
    reach("local-0", 0.3)
    joined.publish(measured, published, METHODS)
    curves = joined.curves_of(published)
    assert curves["local"]["0"] == {"3": 0.3}, "the run was made again"
    assert curves["fedit"]["1"] == {"3": 0.5}
