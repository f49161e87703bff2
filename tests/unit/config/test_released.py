"""The table of releases says of a mode what a config with that mode does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coterie.config.load import check_config
from coterie.config.released import HEAD, NOT_SENT, REFUSED, table
from coterie.methods.registry import methods
from coterie.types import CoterieError

DP = {"unit": "client", "clip": 1.0, "noise_multiplier": 1.0}
SECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "robust": {"robust": {"rule": "median"}},
    "DP at the server": {"privacy": DP},
    "DP at the client": {"privacy": {**DP, "noise_at": "client"}},
    "DP of each row": {"privacy": {**DP, "unit": "example"}, "lora": {"dropout": 0.0}},
    "secure aggregation": {"secure_aggregation": {"enabled": True}},
    "DP with secure aggregation": {"privacy": {**DP, "noise_at": "sum"}, "secure_aggregation": {"enabled": True}},
}


def test_statistics_that_the_server_does_not_need_are_not_sent_beside_secure_sums() -> None:
    column = HEAD.index("secure aggregation")
    said = {row[1]: row[column] for row in table() if row[0] == "every method"}
    assert next(said[what] for what in said if what.startswith("loss, tokens")) == NOT_SENT
    assert said["number of training examples, a weight in means"] == "in the clear"


def test_the_page_is_the_table() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "releases.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in page.splitlines() if "|" in line]
    assert rows[0] == HEAD
    assert rows[2:] == table(), "docs/reference/releases.md is stale; write it anew with `make docs`"


@pytest.mark.parametrize("mode", SECTIONS)
def test_a_method_is_refused_where_the_table_says_so(mode: str, tmp_path: Any) -> None:
    column, rows = HEAD.index(mode), table()
    assert len(rows) > 40
    named = {row[0] for row in rows} - {"every method"}
    assert named == methods().keys() - {"local"}
    for name in sorted(named):
        raw = {"data": {"folder": "x"}, "task": {"head": "shared"}, "method": {"name": name}, "run": {"export": "last"}}
        own = [row for row in rows if row[0] == name and ", with `" not in row[1]]
        said = {row[column].startswith(REFUSED) for row in own}
        try:
            check_config({**raw, **SECTIONS[mode]}).make_method(tmp_path)
            refused = False
        except CoterieError:
            refused = True
        assert said == {refused}, name


def test_a_setting_that_lets_a_method_run_where_its_default_is_refused_does(tmp_path: Path) -> None:
    named = set()
    for row in table():
        for mode, cell in zip(HEAD, row, strict=True):
            if not (found := re.match(rf"{REFUSED}; with `(.*)`: .", cell)):
                continue
            named.add((row[0], mode, found[1]))
            method = {"name": row[0], **tomllib.loads(found[1].replace(", ", "\n"))}
            raw = {"data": {"folder": "x"}, "task": {"head": "shared"}, "method": method, "run": {"export": "last"}}
            check_config({**raw, **SECTIONS[mode]}).make_method(tmp_path)
    assert ("fedlease", "secure aggregation", 'allocation = "oracle"') in named
    assert ("fedlease", "DP of each row", 'distance = "B"') in named
    assert {name for name, _, _ in named} == {"fedlease", "fedamole"}
