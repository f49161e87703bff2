"""SmartFed from the command line: what one run exports feeds the next one's pool; killed and resumed it is the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sites
from coterie import codec
from coterie.adapters.bundle import ADAPTER_FOLDER, read_bundle
from coterie.adapters.pool import read_pool, write_pool
from coterie.adapters.read import build_pool, experts_of
from coterie.cli.main import app
from coterie.config.load import check_config, load_config
from coterie.experiment import run
from coterie.nn.locate import resolve
from coterie.runs.events import METRICS, CheckpointSaved, ClientDone, Event, RoundDone, read_events
from coterie.runs.summary import read_summary
from coterie.types import CoterieError, Part
from stop_run import stop_run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["bert", "llama"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a pool of the experts that a FedLEASE run exported."""
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp(request.param)
    path = sites.config(folder, request.param)
    run(load_config(path), folder / "lease", root=folder)
    app(["pool", "build", str(folder / "pool"), "--run", str(folder / "lease")], standalone_mode=False)
    assert len(read_pool(folder / "pool").adapters) == len(list((folder / "lease" / "experts").iterdir())) >= 2
    text = path.read_text().replace("warmup_rounds = 1", 'pool = "pool"\nrouter = "paper"\nactive = 3\nfresh_rank = 1')
    (folder / "smart.toml").write_text(text.replace('"fedlease"', '"smartfed"'))
    return folder


def test_a_run_without_experts_makes_no_pool(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match="has no experts to make a pool from"):
        experts_of(tmp_path)


def test_routers_of_a_few_numbers_go_through_a_run_and_some_end_as_one_lora(site: Path) -> None:
    """Each client alone, and all in one pass: the same within floating point."""
    whole = load_config(site / "smart.toml").model_dump(mode="json")
    losses = {}
    for router in ("signed", "mixing", "response"):
        for together in (1, 5):
            changed = {
                "method": {**whole["method"], "router": router},
                "engine": {**whole["engine"], "clients_per_batch": together},
            }
            out = site / f"{router}-{together}"
            summary = run(check_config({**whole, **changed}), out, root=site)
            losses[router, together] = summary.mean["test"]["loss"]
        assert losses[router, 1] == pytest.approx(losses[router, 5], rel=1e-4)
        beside = [folder / ADAPTER_FOLDER for folder in (out / "clients").iterdir()]
        assert len(beside) == 5
        assert all(folder.exists() == (router != "response") for folder in beside)


def test_a_run_exports_a_pool_that_the_next_run_routes_over(site: Path) -> None:
    out = site / "smart"
    run(load_config(site / "smart.toml"), out, root=site)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [e for e in events if e["event"] == "round"]
    assert [r["failed"] for r in rounds] == [{}, {}, {}]
    down = [sum(c["bytes_down"] for c in r["clients"].values()) for r in rounds]
    assert down[0] > down[1] == down[2]
    (start,) = [e for e in events if e["event"] == "start_state"]
    told = start["describe"] | rounds[0]["describe"]
    assert start["describe"]["adapters"] == told["adapters"]
    assert sum(told["quotas"].values()) == 3 * len(told["sizes"])
    assert all(value > 0 for value in told["importance"].values())
    assert sum(told["use"].values()) == pytest.approx(1)
    usage = next(e for e in events if "usage" in e)["usage"]
    assert len(usage) == 5
    bank, info = read_bundle(next((out / "clients").iterdir()))
    assert info.method == "smartfed"
    assert {key.part for key in bank.tensors} >= {Part.A, Part.B, Part.ROUTER}
    assert [p.name for p in (out / "experts").iterdir()] == ["fresh"]
    assert build_pool([str(out / "experts" / "fresh")]).adapters[0].rank == 1
    (kept,) = (out / "kept").iterdir()
    states = [state.stat().st_size for state in (out / "personal").rglob("*.safetensors")]
    assert len(states) >= 5
    assert max(states) < kept.stat().st_size


def stopped_and_not(site: Path, setting: str, rnd: int) -> Path:
    """The folder of a run that went through; one that was stopped in round ``rnd`` has the same bundles."""
    whole, parts = site / f"whole-{rnd}", site / f"parts-{rnd}"
    config = load_config(site / "smart.toml", [setting])
    run(config, whole, root=site)
    stop_run(run, config, parts, root=site, when=lambda event: isinstance(event, ClientDone) and event.round == rnd)
    run(config, parts, root=site, resume=True)
    for client in (whole / "clients").iterdir():
        ours, theirs = (read_bundle(folder / "clients" / client.name)[0] for folder in (whole, parts))
        assert codec.encode(ours) == codec.encode(theirs)
    return whole


def test_a_run_that_was_stopped_ends_with_the_same_bits(site: Path) -> None:
    """One client has a budget of its own: it is in its bundle, in the record and in the report."""
    whole = stopped_and_not(site, "method.budgets={mood-0 = 1}", 2)
    for client in (whole / "clients").iterdir():
        bank, _ = read_bundle(client)
        ks = [options["k"] for options in bank.gate.per_module.values()]
        assert sum(ks) == len(ks) * (1 if client.name == "mood-0" else 3)
    summary = read_summary(whole / "summary.json")
    assert summary.describe["budgets"] == {"mood-0": 1}
    assert 0 < summary.gflop_active < summary.gflop
    rounds = [e for e in read_events(whole / METRICS) if isinstance(e, RoundDone)]
    per_token = [{c: of.gflop_active / of.tokens for c, of in e.clients.items()} for e in rounds]
    assert all(of["mood-0"] < min(of[c] for c in of if c != "mood-0") for of in per_token)
    assert "Budgets of clients" in (whole / "report.html").read_text(encoding="utf-8")


def test_a_run_with_weights_that_learn_more_slowly_each_round_ends_with_the_same_bits(site: Path) -> None:
    """The default router; its report has no quotas, because every expert is active."""
    whole = stopped_and_not(site, "method.router=signed", 3)
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert "Use of the adapters by round" in report
    assert "Where the active experts go" not in report


def test_a_run_with_another_base_than_the_pools_is_refused_and_an_untold_one_noted(site: Path) -> None:
    config = load_config(site / "smart.toml")
    file = Path(resolve(config.model.path, site)) / "model.safetensors"
    blob = file.read_bytes()
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CoterieError, match="built for another base"):
        run(config, site / "other", root=site)
    file.write_bytes(blob)
    pool = read_pool(site / "pool")
    write_pool(site / "old", replace(pool, weights={}))
    run(load_config(site / "smart.toml", ['method.pool="old"', "run.rounds=1"]), site / "untold", root=site)
    notes = [e["text"] for e in map(json.loads, (site / "untold" / "metrics.jsonl").read_text().splitlines())
             if e["event"] == "note"]  # fmt: skip
    assert any("was not checked" in note for note in notes)


@pytest.mark.parametrize(("together", "lost"), [(1, "personal/mood-0"), (5, "personal/mood-0"), (1, "kept")])
def test_a_client_that_loses_the_pool_takes_part_again(site: Path, together: int, lost: str) -> None:
    out = site / f"lost-{together}-{lost[:4]}"
    changes = [f"engine.clients_per_batch={together}", "method.budgets={mood-0 = 1}"]
    config = load_config(site / "smart.toml", changes)

    def listen(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.round == 1:
            shutil.rmtree(out / lost)

    run(config, out, root=site, listen=listen)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [e for e in events if e["event"] == "round"]
    assert [r["failed"] for r in rounds] == [{}, {}, {}]
    told = [r["clients"]["mood-0"] for r in rounds]
    assert ["loss" in t for t in told] == [True, False, True]
    assert told[1]["lacks_pool"]
    assert [t["active"] for t in told] == [1, 1, 1]
    assert told[2]["bytes_down"] > 2 * told[1]["bytes_down"]
    assert all("mood-0" in e["clients"] for e in events if e["event"] == "evaluation")


def test_a_run_without_a_pool_is_refused_before_its_folder_is_made(site: Path) -> None:
    with pytest.raises(CoterieError, match="coterie pool build"):
        run(load_config(site / "smart.toml", ['method.pool="nowhere"']), site / "none", root=site)
    assert not (site / "none").exists()
