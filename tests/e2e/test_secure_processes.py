"""Secure aggregation with real processes: of six sites two are killed before each step. `make test-secure`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import sites
from coterie.secure.steps import STEPS
from flower_processes import Processes, processes

pytestmark = [pytest.mark.slow, pytest.mark.secure]
SIX = ["mood-0", "mood-1", "place-0", "place-1", "size-0", "size-1"]
KILLED = ["place-1", "size-1"]
AWAY = [sys.executable, str(Path(__file__).parents[1] / "support" / "away.py")]


def prepare(made: Processes) -> None:
    """Rows for six sites, keys for all, and secure aggregation at both ends."""
    sites.federation(made.folder / "clients", clients=len(SIX))
    done = made.coterie("keys", "init", "keys", "--sites", ",".join(SIX), "--host", "127.0.0.1")
    assert done.returncode == 0, done.stderr
    serve = made.folder / "serve.toml"
    serve.write_text(f"{serve.read_text()}\n[secure_aggregation]\nenabled = true\n")
    for site in SIX:
        file = made.folder / f"{site}.toml"
        file.write_text(file.read_text().replace("[site]\n", '[site]\npeers = "keys/sites"\n'))


@pytest.mark.parametrize("step", STEPS)
def test_two_of_six_sites_are_killed_before_a_step(step: str, tmp_path: Path) -> None:
    settings = "wait = 600\ngreeting = 5\ndeadline = 120"
    run = "rounds = 1\nevaluate_every = 1"
    with processes(tmp_path, SIX, insecure=False, run=run, federation=settings, method="fedit") as made:
        prepare(made)
        made.serve()
        for site in SIX:
            if site in KILLED:
                made.start(site, *AWAY, step, "join", f"{site}.toml")
            else:
                made.join(site)
        for site in KILLED:
            there = tmp_path / f"state-{site}" / step
            made.until(there.exists, f"step {step} at {site}")
            made.power_cut(site)
        (done,) = [made.event("round", round=1)]
        ((_, of),) = done["sums"].items()
        assert of["error"] is None
        gone = {*KILLED} if step in ("keys", "shares", "values") else set()
        assert {*of["members"]} == {*SIX}
        assert {*of["survivors"]} == {*SIX} - gone
        assert {*done["failed"]} == gone
        made.finished()
        assert (made.run / "summary.json").exists()
