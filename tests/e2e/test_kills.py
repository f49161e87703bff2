"""Random kills, each resumed: `make test-kill KILLS=100 FEDERATION_KILLS=20`."""

from __future__ import annotations

import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import sites
from flower_processes import Processes, experts, in_process, newest_state, processes
from killed_runs import go_on, killed, results, run

pytestmark = [pytest.mark.slow, pytest.mark.kill]
KILLS = int(os.environ.get("KILLS") or 100)
FEDERATION_KILLS = int(os.environ.get("FEDERATION_KILLS") or 20)
SEED = os.environ.get("KILL_SEED") or "0"
SECURE = "[secure_aggregation]\nenabled = true"
CASES = {  # method, architecture, more of [run], more sections
    "fedlease": ("fedlease", "bert", "", ""),
    "fedamole, half a cohort": ("fedamole", "llama", "cohort = 0.6", ""),
    "fedit, generation": ("fedit", "llama", "", ""),
    "flora": ("flora", "bert", "", ""),
    "fedsa_lora, half a cohort": ("fedsa_lora", "bert", "cohort = 0.6", ""),
    "fedit, secure aggregation": ("fedit", "bert", "", SECURE),
}
A, B = "mood-0", "size-0"


@pytest.mark.parametrize("name", CASES)
def test_simulations_that_are_killed_end_with_the_same_bits(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a forked child cannot use the parent's threads
    method, arch, more, sections = CASES[name]
    path = sites.config(tmp_path, arch, method=method, run=more)
    path.write_text(f"{path.read_text()}\n{sections}\n")
    started = time.perf_counter()
    run(path, tmp_path / "whole")
    seconds, whole = time.perf_counter() - started, results(tmp_path / "whole")
    wanted = -(-KILLS // len(CASES))
    draw, kills, runs = random.Random(f"{SEED} {name}"), 0, 0
    while kills < wanted:
        out, runs = tmp_path / f"killed-{runs}", runs + 1
        while not (out / "summary.json").exists():
            kills += killed(partial(go_on, path, out), draw.uniform(0.02, 0.9) * seconds if kills < wanted else None)
        assert results(out) == whole
    print(f"{name}: {kills} kills in {runs} runs")


def test_a_federation_whose_processes_are_killed_loses_no_round(tmp_path: Path) -> None:
    """Server, SuperLink, a whole site and a worker, in random order: all rounds are done, with the same bits."""
    rounds = FEDERATION_KILLS + 2
    settings = "wait = 600\ndeadline = 600\ngreeting = 400"
    run_settings = f"rounds = {rounds}\nevaluate_every = {rounds}"
    draw, done = random.Random(f"{SEED} federation"), {"server": 0, "superlink": 0, "site": 0, "worker": 0}
    with processes(tmp_path, [A, B], insecure=True, run=run_settings, federation=settings) as made:
        made.serve()
        for site in (A, B):
            made.join(site)
        for number in range(FEDERATION_KILLS):
            made.event("start", round=min(number + 1, rounds))
            time.sleep(draw.uniform(0.0, 4.0))
            what = draw.choice(sorted(done))
            kill(made, what, draw.choice((A, B)))
            done[what] += 1
        made.finished()
        finished = [event["round"] for event in made.lines() if event["event"] == "round"]
        assert sorted(set(finished)) == list(range(1, rounds + 1))
        assert [event["failed"] for event in made.lines() if event["event"] == "round" and event["failed"]] == []
        whole = in_process(made.folder, (A, B))
        assert experts(made.run) == experts(whole)
        assert newest_state(made.run) == newest_state(whole)
    print(f"federation: {done}")


def kill(made: Processes, what: str, site: str) -> None:
    """Kill one thing, and start again what does not start itself."""
    match what:
        case "server":
            made.kill("serve")
            made.serve("--resume")
        case "superlink":
            made.descendant("serve", "superlink_command").kill()
        case "site":
            made.power_cut(site)
            made.join(site)
        case _:
            made.descendant(site, "worker_process import work").kill()
