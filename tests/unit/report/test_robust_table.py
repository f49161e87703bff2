"""The report's table of what a rule made of each client."""

from __future__ import annotations

import json
from pathlib import Path

from coterie.methods.robust import Weighed
from coterie.report.page import write_report
from coterie.report.read import read_run
from coterie.report.robust import robust_tables
from coterie.runs.events import RoundDone


def folder(path: Path, rounds: list[RoundDone]) -> Path:
    (path / "config.json").write_text(json.dumps({"method": {"name": "fedit"}, "run": {"rounds": len(rounds)}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(event.to_json()) + "\n" for event in rounds))
    return path


def test_who_points_away_most_often_comes_first(tmp_path: Path) -> None:
    usual = Weighed(1.0, 1.0, 0.9, False)
    rounds = [
        RoundDone(1, robust={"a": usual, "b": Weighed(50.0, 0.02, -0.8, True)}),
        RoundDone(2, robust={"a": usual, "b": Weighed(30.0, 0.05, 0.1, False)}),
    ]
    here = folder(tmp_path, rounds)
    (table,) = robust_tables(read_run(here))
    assert [tuple(row) for row in table.rows] == [
        ("b", 2, 1, 2, "2%", "40", "-0.80"),
        ("a", 2, 0, 0, None, "1", "0.90"),
    ]
    assert "Robust aggregation" in write_report(here).read_text(encoding="utf-8")


def test_a_run_without_a_rule_has_no_table(tmp_path: Path) -> None:
    assert robust_tables(read_run(folder(tmp_path, [RoundDone(1)]))) == []
