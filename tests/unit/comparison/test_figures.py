"""What is compared, and the figures of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coterie.comparison.figures import curves, record_of
from coterie.comparison.variants import config_for, folder_of, title_of, variants_of
from coterie.methods.registry import methods
from coterie.types import CoterieError
from summaries import compared, scaled, summary, without_test


def test_a_comparison_adds_up_over_seeds() -> None:
    made = record_of(compared({"fedit": {0: summary(), 3: scaled(0.8)}, "local": {0: scaled(0.4)}})).variants
    assert made["fedit"].seeds == [0, 3]
    assert [run.mean for run in made["fedit"].runs] == [0.5, pytest.approx(0.4)]
    assert made["fedit"].mean == pytest.approx(0.45)
    assert made["fedit"].std == pytest.approx(0.1 / math.sqrt(2))
    assert made["fedit"].worst == pytest.approx(0.225)
    assert made["fedit"].clients == {"north": pytest.approx(0.225), "south": pytest.approx(0.675)}
    assert made["fedit"].bytes == 4 * 2**20
    assert made["local"].std == 0.0
    assert (made["fedit"].interval is not None, made["local"].interval) == (True, None)


def test_curves_are_means_over_seeds_by_round(tmp_path: Path) -> None:
    for seed, values in {0: (0.1, 0.3), 5: (0.3, 0.5)}.items():
        events: list[dict[str, Any]] = [{"event": "round", "round": 1}]
        events += [{"event": "evaluation", "round": r, "mean": {"test": {"accuracy": v}}} for r, v in enumerate(values)]
        events += [{"event": "evaluation", "round": 9, "mean": {}}]
        folder = tmp_path / f"fedit-{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = curves(compared({"fedit": {0: summary(), 5: summary()}}, tmp_path))
    assert found == {"FedIT": [(0, pytest.approx(0.2)), (1, pytest.approx(0.4))]}


def test_a_method_of_a_comparison_takes_its_own_settings_alone() -> None:
    raw: dict[str, Any] = {
        "data": {"folder": "x"}, "run": {"rounds": 4, "seed": 9},
        "method": {"name": "fedlease", "max_experts": 3}, "methods": {"fedit": {}},
    }  # fmt: skip
    fedlease = config_for(raw, "fedlease", 2)
    assert (fedlease.method["name"], fedlease.method["max_experts"], fedlease.run.seed) == ("fedlease", 3, 2)
    assert config_for(raw, "local", 2).method == {"name": "local"}
    assert config_for(raw, "local", 2).run.rounds == 4
    several = {"data": {"folder": "x"}, "methods": {"fedlease": {"linkage": "single"}}}
    assert config_for(several, "fedlease", 0).method["linkage"] == "single"
    assert config_for(several, "fedit", 0).method == {"name": "fedit"}
    for wrong, message in (
        ({"methods": {"fedleaze": {}}}, "unknown method 'fedleaze'"),
        ({"methods": {"fedlease": {"linkag": "single"}}}, r"unknown key 'linkag'; did you mean 'linkage'"),
        ({"method": "fedlease"}, "method = 'fedlease' in the config: method must be a section"),
        ({"methods": {"fedlease": 3}}, "fedlease = 3 in the config: fedlease must be a section"),
    ):
        with pytest.raises(CoterieError, match=message):
            config_for({"data": {"folder": "x"}, **wrong}, "fedlease", 0)
    with pytest.raises(CoterieError, match="unknown method 'nothing'"):
        config_for(raw, "nothing", 0)


def test_a_comparison_without_test_data_has_no_figures() -> None:
    made = record_of(compared({"fedit": {0: without_test(), 1: without_test()}})).variants["fedit"]
    assert (made.mean, made.worst, made.std, made.interval, made.client_interval) == (None, None, 0.0, None, None)
    assert made.clients == {"north": None, "south": None}


def test_names_of_variants_and_folders() -> None:
    assert variants_of([" local", "fedit", "local"]) == ("local", "fedit")
    assert variants_of(["fedlease:experts=2", "all"]) == ("fedlease:experts=2", *methods())
    assert folder_of("fedamole:assignment=static", 0) == "fedamole-assignment-static-0"
    assert folder_of("fedit", 3, ("train.learning_rate=2e-3",)) == "fedit-train.learning_rate-2e-3-3"
    assert title_of("fedamole:assignment=static") == "FedAMoLE, assignment static"


def test_settings_of_a_point_are_those_of_the_run_and_of_its_method() -> None:
    raw = {"data": {"folder": "x"}, "method": {"name": "fedlease", "max_experts": 3}, "train": {"epochs": 4}}
    point = ("train.learning_rate=0.5", "methods.fedlease.max_experts=2")
    made = config_for(raw, "fedlease", 0, point)
    assert (made.train.learning_rate, made.train.epochs, made.method["max_experts"]) == (0.5, 4, 2)
    assert config_for(raw, "fedit", 0, point).train.learning_rate == 0.5
    with pytest.raises(CoterieError, match="unknown key 'max_expert'"):
        config_for(raw, "fedlease", 0, ("methods.fedlease.max_expert=2",))
