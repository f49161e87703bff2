"""FedALT has no model for someone new without rows, and docs/using-a-run.md says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coterie
import sites
from coterie.artifacts.onboard import onboard
from coterie.experiment import run
from coterie.types import CoterieError

PAGE = Path(__file__).parents[2] / "docs" / "using-a-run.md"


def test_a_fedalt_run_is_not_loaded_for_someone_new_but_onboards_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run(sites.config(tmp_path, method="fedalt"), tmp_path / "out")
    for labels in (None, ("bad", "good")):
        with pytest.raises(CoterieError, match=r"have no expert in common, .*; name a client"):
            coterie.load(tmp_path / "out", labels=labels)
    assert coterie.load(tmp_path / "out", "mood-0").client == "mood-0"
    onboard(tmp_path / "out", tmp_path / "clients" / "mood-1", tmp_path / "west", client="west", epochs=1)
    assert coterie.load(tmp_path / "west").client == "west"
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| FedALT |")]
    assert "`coterie.load(RUN)` is refused" in row
    assert "`coterie onboard`" in row
