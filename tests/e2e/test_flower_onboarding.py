"""Sites that come late to a federation of real processes, during the run or after its end: `make test-flower`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coterie
from coterie.methods.fedamole import FedAMoLEState
from coterie.runs import checkpoint
from flower_processes import processes, write_site

pytestmark = [pytest.mark.flower, pytest.mark.slow]
A, B, LATE = "mood-0", "size-0", "mood-1"


def test_a_third_site_joins_a_finished_federation_and_its_model_predicts(tmp_path: Path) -> None:
    settings = "wait = 300\ndeadline = 300\ngreeting = 100"
    run = "rounds = 2\nevaluate_every = 2"
    with processes(tmp_path, [A, B], insecure=True, run=run, federation=settings) as made:
        made.serve()
        for site in (A, B):
            made.join(site)
        made.finished()
        files = ["summary.json", *(str(p.relative_to(made.run)) for p in (made.run / "checkpoints").glob("*.ckpt"))]
        before = {name: (made.run / name).read_bytes() for name in files}
        assert len(before) >= 2

        port = int(re.search(r"port = (\d+)", (tmp_path / "serve.toml").read_text())[1])  # type: ignore[index]
        write_site(tmp_path, LATE, port)
        made.join(LATE)  # A and B still wait, and stay as they are
        made.serve("--onboard", LATE)
        made.finished()
        assert {name: (made.run / name).read_bytes() for name in files} == before
        (joined,) = [event for event in made.lines() if event["event"] == "onboarded"]
        assert joined["client"] == LATE
        assert {"loss", "accuracy"} <= joined["after"].keys()
        assert f"{LATE} has its model: loss" in (tmp_path / "serve.out").read_text()
        (bundle,) = (tmp_path / f"state-{LATE}").glob("run-*/export")
        model = coterie.load(bundle)
        assert (model.client, model.labels) == (LATE, ("bad", "good"))
        assert len(model.predict([{"text": "awful"}, {"text": "great"}])) == 2
        said = made.coterie("status", "run").stdout
        assert "finished; 2 of 2 rounds done" in said
        assert f"only {LATE} can join it now" in said


def test_a_third_site_joins_fedamole_during_the_run_and_experts_choose_it(tmp_path: Path) -> None:
    settings = "wait = 300\ndeadline = 300\ngreeting = 100"
    run = "rounds = 4\nevaluate_every = 4"
    with processes(tmp_path, [A, B], insecure=True, run=run, federation=settings, method="fedamole") as made:
        made.serve()
        for site in (A, B):
            made.join(site)
        made.event("round", round=1)
        made.end("serve")
        assert not (made.run / "summary.json").exists()
        path = tmp_path / "serve.toml"
        text = path.read_text()
        path.write_text(text.replace(f'sites = ["{A}", "{B}"]', f'sites = ["{A}", "{B}", "{LATE}"]'))
        port = int(re.search(r"port = (\d+)", text)[1])  # type: ignore[index]
        write_site(tmp_path, LATE, port)
        made.join(LATE)
        made.serve("--resume")
        made.finished()

        rounds = {e["round"] for e in made.lines() if e["event"] == "exchange" and e["client"] == LATE}
        assert len(rounds) >= 2
        assert max(rounds) == 4
        state = checkpoint.load(made.run / "checkpoints", 4, FedAMoLEState).state
        assert state.clients == (A, B, LATE)
        assert all((z.sum(0) >= 2).all() and {*z.sum(1).tolist()} <= {0, 3} for z in state.holds.values())  # one group
        assert LATE in (made.run / "report.html").read_text()
        (bundle,) = (tmp_path / f"state-{LATE}").glob("run-*/export")
        model = coterie.load(bundle)
        assert (model.client, model.method) == (LATE, "fedamole")
        assert len({key.expert for key in model.bank.tensors if key.expert >= 0}) >= 2
        assert len(model.predict([{"text": "awful"}])) == 1
