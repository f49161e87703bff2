"""Federations of real processes on loopback with sites that answer wrongly, late or not at all: `make test-flower`."""

from __future__ import annotations

import random
import re
import urllib.request
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from coterie.deploy.journal import read_journal
from coterie.deploy.processes import free_port
from coterie.deploy.status import status_of
from flower_processes import Processes, processes
from pages import Page
from spoiled import SPOILED

pytestmark = [pytest.mark.flower, pytest.mark.slow]
A, B, C = "mood-0", "size-0", "place-0"
SEED = 4  # of those by which two sites answer in every round: a busy machine may make one of them late


def outcomes(made: Processes) -> dict[int, dict[str, str]]:
    """Of every round who did not count, and why."""
    return {e["round"]: e["failed"] for e in made.lines() if e["event"] == "round"}


def test_a_site_that_answers_wrongly_then_late_and_is_killed_in_mid_round(tmp_path: Path) -> None:
    """Every such round goes on without it and says why; it takes part in the next in which it behaves."""
    bad = ["nan", "shape", "garbage"]
    port = free_port()
    settings = f"wait = 600\ngreeting = 60\nmetrics_port = {port}"
    run = "rounds = 200\nevaluate_every = 200"
    with processes(tmp_path, [A, B], insecure=True, run=run, federation=settings, method="fedit") as made:
        deadline = made.deadline()
        made.serve()
        made.join(A)
        late = f"late {deadline - 1}"
        made.join(B, {"1": bad[0], "2": bad[1], "3": bad[2], "4": "noise", "6": late, "7": "never"})
        made.event("start", round=7)
        made.until((tmp_path / f"state-{B}" / "misbehaves-7").exists, "round in which the site is at work")
        made.power_cut(B)
        made.event("late", client=B, round=6)
        made.event("round", round=7)
        made.join(B)  # the same site, behaving
        made.event("back", client=B)
        made.until(lambda: [r for r, failed in outcomes(made).items() if r > 7 and not failed], "round with both")
        check_metrics(made, port)

        failed = outcomes(made)
        assert all(found.keys() <= {B} for found in failed.values())
        for rnd, name in enumerate(bad, 1):
            assert SPOILED[name][1] in failed[rnd][B], name
        assert "the worker's answer" in failed[4][B]
        assert failed[5] == {}
        assert failed[6][B] == failed[7][B] == f"no reply within {deadline:g} s ([federation] deadline)"
        said = made.coterie("status", "run").stdout
        for rnd in [rnd for rnd in failed if failed[rnd]][-4:]:
            assert f"{B}, train of round {rnd}: {failed[rnd][B]}" in said
        assert f"an answer of {B} for round 6 arrived too late and was dropped" in said
        ends_with_all_that_it_started(made, "serve")
        assert "--resume" in (tmp_path / "serve.out").read_text()
        assert made.coterie("report", "run").returncode == 0
        ends_with_all_that_it_started(made, A)


def check_metrics(made: Processes, port: int) -> None:
    """What a Prometheus would fetch now is what the journal adds up to, for as long as it has not gone on."""

    def fetched() -> dict[str, float] | None:
        before = status_of(read_journal(made.run))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = page.read().decode()
        if status_of(read_journal(made.run)) != before:
            return None
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        found = {name: float(value) for name, _, value in lines}
        for site, row in before.sites.items():
            assert found[f'coterie_replies_total{{site="{site}",kind="train"}}'] == row.replies["train"]
            assert found[f'coterie_received_bytes_total{{site="{site}"}}'] == pytest.approx(row.bytes_up, rel=1e-4)
            assert found[f'coterie_late_total{{site="{site}"}}'] == row.late
        assert found["coterie_round"] == before.round
        assert found["coterie_loss"] == pytest.approx(before.loss, rel=1e-4)
        return found

    found = made.until(fetched, "metrics between two events")
    assert (found["coterie_rounds"], found["coterie_sites"], found["coterie_attempts_total"]) == (200, 2, 1)
    assert found[f'coterie_failures_total{{site="{B}",kind="train"}}'] >= 6
    assert f'coterie_failures_total{{site="{A}",kind="train"}}' not in found
    assert found[f'coterie_late_total{{site="{B}"}}'] >= 1
    assert found[f'coterie_sent_bytes_total{{site="{A}"}}'] > 10_000


def ends_with_all_that_it_started(made: Processes, name: str) -> None:
    tree = psutil.Process(made.running[name].pid).children(recursive=True)
    assert len(tree) >= 3  # a SuperLink and the run, or a worker and a SuperNode, and what these start
    assert made.end(name) == 130
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []


def plan_of_losses(client: str) -> dict[str, str]:
    """Of ten answers each is lost with a probability of 0.3."""
    draw = random.Random(f"{SEED} {client}")
    return {str(rnd): "never" for rnd in range(1, 11) if draw.random() < 0.3}


def test_thirty_percent_of_the_answers_missing_at_random_over_ten_rounds(tmp_path: Path) -> None:
    """Every round ends with those that answered, the run ends, and what was trained is finite and has learned."""
    plans = {site: plan_of_losses(site) for site in (A, B, C)}
    lost = {(site, int(rnd)) for site, plan in plans.items() for rnd in plan}
    assert 7 <= len(lost) <= 11
    settings = "wait = 600\ngreeting = 60"
    run = "rounds = 10\nevaluate_every = 10\nquorum = 0.3"
    with processes(tmp_path, [A, B, C], insecure=True, run=run, federation=settings, method="fedit") as made:
        made.deadline()
        made.serve()
        for site, plan in plans.items():
            made.join(site, plan)
        made.finished()

        events = [e for e in made.lines() if e["event"] == "round"]
        assert [e["round"] for e in events] == [*range(1, 11)]
        failed = {(site, e["round"]): why for e in events for site, why in e["failed"].items()}
        assert lost <= failed.keys()
        assert {re.sub(r"\d+", "N", why) for why in failed.values()} == {"no reply within N s ([federation] deadline)"}
        assert all(len(e["failed"]) < 3 for e in events)
        for site in (A, B, C):
            losses = [e["clients"][site]["loss"] for e in events if site not in e["failed"]]
            assert len(losses) >= 3
            assert losses[-1] < losses[0], site
        paths = [*(made.run / "experts").rglob("*.safetensors")]
        tensors = [tensor for path in paths for tensor in load_file(path).values()]
        assert tensors
        assert all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in tensors)
        status = status_of(read_journal(made.run))
        assert "finished; 10 of 10 rounds done" in made.coterie("status", "run").stdout
        page = Page(made.run / "report.html").text
        assert "Over the network" in page
        for site, row in status.sites.items():
            assert row.rounds == [e["round"] for e in events if site not in e["failed"]]
            assert f"train of round {row.failures[0][1]}: no reply within" in page
