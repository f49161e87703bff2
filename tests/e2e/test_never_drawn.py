"""A client that no round has drawn: its run is loaded for someone new and served, with that client."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coterie
import sites
from coterie.adapters.bundle import read_bundle
from coterie.api.served import served
from coterie.experiment import run
from coterie.types import GateSpec

NEVER = "mood-0"  # of five clients, with seed 0, two a round and three rounds
EVALUATED = {"feddpa": "received", "fedlease": "received", "flora": "trained", "fedex_lora": "trained"}


@pytest.mark.parametrize("method", EVALUATED)
def test_a_run_with_a_client_that_never_took_part_is_loaded_and_served(method: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = f'cohort = 0.4\nexport = "last"\nevaluate = "{EVALUATED[method]}"'
    done = run(sites.config(tmp_path, method=method, run=settings), tmp_path / "out")
    assert [client for client, of in done.clients.items() if not of.bytes_up] == [NEVER]
    bank, _ = read_bundle(tmp_path / "out" / "clients" / NEVER)
    assert bank.gate == GateSpec()
    (answer,) = coterie.load(tmp_path / "out", labels=("yes", "no")).predict([{"text": "x"}])
    assert answer.columns()["prediction"] in ("yes", "no")
    with served(tmp_path / "out") as models:
        assert set(models.names) == set(done.clients)
