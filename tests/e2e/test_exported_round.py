"""What a run exports is of the round that validation chose, however long ago that was, and every file says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import coterie
import flower_sites
import sites
from coterie import experiment
from coterie.adapters.bundle import read_bundle
from coterie.config.load import load_config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, TextRow
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.runs import checkpoint, rounds, summary
from coterie.runs.events import CheckpointSaved, Evaluated, Event, Note
from coterie.types import CoterieError
from stop_run import stop_run

ROUNDS, BEST = 4, 2
# Each keeps other things.
METHODS = ["local", "fedit", "fedsa_lora", "feddpa", "fdlora", "fedalt", "fedamole", "fedlease", "ifca", "centralised"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation chooses round 2, whatever it measures."""

    def best_round(evaluations: Sequence[Evaluated], metric: str) -> int:
        return min(BEST, evaluations[-1].round)

    for module in (rounds, summary):
        monkeypatch.setattr(module, "best_round", best_round)


def run(path: Path, out: Path, *changes: str, resume: bool = False, listen: Any = lambda event: None) -> Any:
    changes = (f"run.rounds={ROUNDS}", *changes)
    config = load_config(path, changes)
    return experiment.run(config, out, root=path.parent, resume=resume, listen=listen)


def evaluated(out: Path, rnd: int) -> Any:
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return next(e["clients"] for e in events if e["event"] == "evaluation" and e["round"] == rnd)


def scores(folder: Path, client: ClientData) -> tuple[float, float]:
    """Mean loss and accuracy of a bundle on the client's test rows."""
    bank, about = read_bundle(folder)
    base = load_base(about.base_path, about.task)
    losses, right = [], 0
    with torch.no_grad(), attached(base.model, bank):
        for row in client.splits["test"]:
            assert isinstance(row, TextRow)
            tokens = base.tokenizer(row.text, truncation=True, max_length=about.max_length, return_tensors="pt")
            logits = base.model(**tokens).logits
            losses.append(float(functional.cross_entropy(logits, torch.tensor([row.label]))))
            right += int(logits.argmax()) == row.label
    return sum(losses) / len(losses), right / len(losses)


@pytest.mark.parametrize("export", ["best", "last"])
@pytest.mark.parametrize("method", METHODS)
def test_bundles_score_as_their_round_did(method: str, export: str, tmp_path: Path, chosen: None) -> None:
    path, out = sites.config(tmp_path, method=method), tmp_path / "out"
    # So short a run gains less than FDLoRA's penalty, which would take both of its LoRAs away.
    run(path, out, f"run.export={export}", *(["method.penalty=0"] if method == "fdlora" else []))
    rnd = BEST if export == "best" else ROUNDS
    config = load_config(path)
    measured, other = evaluated(out, rnd), evaluated(out, ROUNDS if export == "best" else BEST)
    assert measured != other
    for client in load_data(config.data, "classification", 0, tmp_path).clients:
        loss, accuracy = scores(out / "clients" / client.info.id, client)
        assert loss == pytest.approx(measured[client.info.id]["test"]["loss"], rel=1e-4)
        assert accuracy == measured[client.info.id]["test"]["accuracy"]
        assert loss != pytest.approx(other[client.info.id]["test"]["loss"], rel=1e-4)


def test_every_file_says_which_round_it_is_of(tmp_path: Path, chosen: None) -> None:
    path, out = sites.config(tmp_path, method="fedit"), tmp_path / "out"
    for export, rnd in (("best", BEST), ("last", ROUNDS)):
        found = run(path, out / export, f"run.export={export}")
        assert (found.best_round, found.exported_round) == (BEST, rnd)
        assert json.loads((out / export / "summary.json").read_text())["exported_round"] == rnd
        _, about = read_bundle(out / export / "clients" / "mood-0")
        assert (about.round, about.export) == (rnd, export)
        for adapter in ("experts/global", "clients/mood-0/adapter"):
            beside = json.loads((out / export / adapter / "coterie.json").read_text())
            assert (beside["round"], beside["export"]) == (rnd, export)
        assert f"Experts and bundles: round {rnd}" in (out / export / "report.html").read_text()
    assert len(list((out / "best" / "checkpoints").iterdir())) == 3
    assert len(list((out / "last" / "checkpoints").iterdir())) == 2


def exports(out: Path) -> dict[str, bytes]:
    found = [path for name in ("experts", "clients") for path in (out / name).rglob("*") if path.is_file()]
    assert len(found) >= 5
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def last_but_one_saved(event: Event) -> bool:
    return isinstance(event, CheckpointSaved) and event.round == ROUNDS - 1


@pytest.mark.parametrize("method", ["fedsa_lora", "fedamole"])
def test_a_resumed_run_exports_the_same(method: str, tmp_path: Path, chosen: None) -> None:
    path = sites.config(tmp_path, method=method)
    run(path, tmp_path / "whole")
    stop_run(run, path, tmp_path / "parts", when=last_but_one_saved)
    run(path, tmp_path / "parts", resume=True)
    assert exports(tmp_path / "parts") == exports(tmp_path / "whole")


def test_the_checkpoints_that_are_kept_know_their_own_best_round(tmp_path: Path, monkeypatch: Any) -> None:
    """The best round changes with the last one; from the checkpoint before it, the run needs the earlier one."""

    def best_round(evaluations: Sequence[Evaluated], metric: str) -> int:
        last = evaluations[-1].round
        return last if last == ROUNDS - 1 else min(last, BEST)

    for module in (rounds, summary):
        monkeypatch.setattr(module, "best_round", best_round)
    path, heard = sites.config(tmp_path, method="fedsa_lora"), []
    stop_run(run, path, tmp_path / "out", when=last_but_one_saved)
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    assert newest.name == f"{ROUNDS - 1:06d}.ckpt"
    newest.write_bytes(b"damaged")
    assert run(path, tmp_path / "out", resume=True, listen=heard.append).exported_round == BEST
    assert not [event for event in heard if isinstance(event, Note) and "cannot be exported" in event.text]


@pytest.mark.parametrize("lost", ["checkpoints/000002.ckpt", "personal/mood-0/000002.safetensors"])
def test_where_the_best_round_is_lost_the_last_one_is_exported_and_said(
    lost: str, tmp_path: Path, chosen: None
) -> None:
    path, out = sites.config(tmp_path, method="fedsa_lora"), tmp_path / "out"
    heard: list[Event] = []

    def lose(event: Event) -> None:
        heard.append(event)
        if isinstance(event, CheckpointSaved) and event.round == ROUNDS:
            (out / lost).unlink()

    found = run(path, out, listen=lose)
    assert (found.best_round, found.exported_round) == (BEST, ROUNDS)
    assert read_bundle(out / "clients" / "mood-0")[1].export == "last"
    assert [e.text for e in heard if isinstance(e, Note) and "round 2, the best, cannot be exported" in e.text]


@pytest.mark.parametrize(("method", "lost"), [("fedsa_lora", False), ("fedsa_lora", True), ("fedamole", False)])
def test_sites_export_the_round_that_the_server_names(
    method: str, lost: bool, tmp_path: Path, chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best round, or the last one where the checkpoint of the best one is lost."""
    from coterie.deploy import server
    from coterie.deploy.attempt import begin_attempt
    from coterie.deploy.journal import JOURNAL, Journal
    from coterie.files import write_json
    from coterie.flower.app import GridTransport
    from coterie.runs.folder import plain
    from grid import InProcessGrid

    def corrupt(*args: Any) -> Any:
        raise checkpoint.CorruptCheckpointError("damaged")

    if lost:
        monkeypatch.setattr(checkpoint, "load", corrupt)
    clients = ["mood-0", "place-0", "size-0"]
    path, out = sites.config(tmp_path, method=method), tmp_path / "served"
    changes: dict[str, Any] = {"run": {"rounds": ROUNDS}}
    federation = {"sites": clients, "at_least": 3, "wait": 5.0, "greeting": 0.0}
    config = flower_sites.server_config(path, federation=federation, **changes)
    write_json(out / "config.json", {"root": str(tmp_path), "config": plain(config)})
    begin_attempt(out, {})
    staff = flower_sites.workers(tmp_path, clients, policy={"upload_bank": True})
    grid = InProcessGrid({11 + i: staff[client].answer for i, client in enumerate(clients)})
    server.run(GridTransport(grid, pause=0.01), out, Journal(out / JOURNAL))
    experiment.run(flower_sites.local_config(path, clients, tmp_path, **changes), tmp_path / "alone", root=tmp_path)
    assert exports(out) == exports(tmp_path / "alone")
    for client in clients:
        (site,) = staff[client].state.glob("*/export")
        about = read_bundle(site)[1]
        assert (about.round, about.export) == ((ROUNDS, "last") if lost else (BEST, "best"))
        assert (site / "bundle.safetensors").read_bytes() == (
            out / "clients" / client / "bundle.safetensors"
        ).read_bytes()


def test_exports_hold_no_path_but_the_one_beside_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sites.config(tmp_path / "one", method="fedit"), tmp_path / "one" / "out"
    run(path, out, "run.rounds=1")
    for adapter in ("experts/global", "clients/mood-0/adapter"):
        config = json.loads((out / adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "model"
        about = json.loads((out / adapter / "coterie.json").read_text())
        assert (about["base"], about["base_path"]) == ("model", str(tmp_path / "one" / "model"))
        assert len(about["base_sha256"]) == 64
    (tmp_path / "one").rename(tmp_path / "two")
    moved = tmp_path / "two"
    with pytest.raises(CoterieError, match="no base 'model' here"):
        coterie.load(moved / "out", "mood-0")
    assert coterie.load(moved / "out", "mood-0", base=str(moved / "model")).labels == ("bad", "good")


def test_peft_needs_an_adapter_and_the_file_beside_it_and_no_more(tmp_path: Path, chosen: None) -> None:
    path, out = sites.config(tmp_path, method="fedit"), tmp_path / "out"
    found = run(path, out)
    for client in load_data(load_config(path).data, "classification", 0, tmp_path).clients:
        adapter = out / "clients" / client.info.id / "adapter"
        about = json.loads((adapter / "coterie.json").read_text())
        base = AutoModelForSequenceClassification.from_pretrained(about["base_path"], num_labels=len(about["labels"]))
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        tokenizer = AutoTokenizer.from_pretrained(about["base_path"])
        right = 0
        for row in client.splits["test"]:
            assert isinstance(row, TextRow)
            cut = tokenizer(row.text, truncation=True, max_length=about["max_length"], return_tensors="pt")
            with torch.no_grad():
                said = about["labels"][int(model(**cut).logits.argmax())]
            right += client.info.labels is not None and said == client.info.labels[row.label]
        assert right / len(client.splits["test"]) == found.clients[client.info.id].test["accuracy"]
