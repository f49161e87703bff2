"""The table of releases says of a mode what a config with that mode does."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.config.load import check_config
from coterie.config.released import HEAD, REFUSED, table
from coterie.methods.registry import methods
from coterie.types import CoterieError

DP = {"unit": "client", "clip": 1.0, "noise_multiplier": 1.0}
SECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "robust": {"robust": {"rule": "median"}},
    "DP at the server": {"privacy": DP},
    "DP at the client": {"privacy": {**DP, "noise_at": "client"}},
    "secure aggregation": {"secure_aggregation": {"enabled": True}},
    "DP with secure aggregation": {"privacy": DP, "secure_aggregation": {"enabled": True}},
}


@pytest.mark.parametrize("mode", SECTIONS)
def test_a_method_is_refused_where_the_table_says_so(mode: str, tmp_path: Any) -> None:
    column, rows = HEAD.index(mode), table()
    assert len(rows) > 40
    named = {row[0] for row in rows} - {"every method"}
    assert named == methods().keys() - {"local"}
    for name in sorted(named):
        raw = {"data": {"folder": "x"}, "task": {"head": "shared"}, "method": {"name": name}, "run": {"export": "last"}}
        said = {row[column] == REFUSED for row in rows if row[0] == name}
        try:
            check_config({**raw, **SECTIONS[mode]}).make_method(tmp_path)
            refused = False
        except CoterieError:
            refused = True
        assert said == {refused}, name
