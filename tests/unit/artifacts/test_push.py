"""``coterie push`` against a stand-in of the hub's API on loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

import bundles
import hub
import sites
from coterie.artifacts.export import export
from coterie.artifacts.push import push
from coterie.cli.main import app
from coterie.types import CoterieError


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the hub here is on loopback


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("push")
    rows = [{"text": label, "label": label} for label in bundles.LABELS]
    sites.write_rows(folder / "rows.jsonl", rows)
    run = bundles.finished(folder)
    return export(run, "north", folder / "out", form="static", data=folder / "rows.jsonl").folder


def test_an_export_becomes_a_repository(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    (exported / ".hidden").write_text("not this")
    with hub.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)  # as HF_ENDPOINT does at the start of a process
        address = push(exported, "me/north")
        assert address == f"{server.address}/me/north"
        assert server.private == {"me/north": True}
        sent = server.files["me/north"]
        assert sent == {path.name: path.read_bytes() for path in exported.iterdir() if path.name != ".hidden"}
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "coterie.json"} == sent.keys()
        assert ModelCard(sent["README.md"].decode()).data.library_name == "peft"
        assert server.tokens == {"Bearer hf_of_the_test"}
        app(["push", str(exported), "me/open", "--public"], standalone_mode=False)
        assert server.private["me/open"] is False
        assert f"{server.address}/me/open" in capsys.readouterr().out


def test_what_the_hub_refuses_is_said(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    with hub.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)  # as HF_ENDPOINT does at the start of a process
        server.refuses = True
        with pytest.raises(CoterieError, match=r"the hub refuses me/north: .*403.*; check the name, and log in"):
            push(exported, "me/north")
        with pytest.raises(CoterieError, match=r"'me/nor/th' is no name of a repository; give OWNER/NAME"):
            push(exported, "me/nor/th")
        with pytest.raises(CoterieError, match=r"has no README\.md; make it with `coterie export`"):
            push(tmp_path, "me/north")
        assert server.files == {}


def test_a_hub_that_does_not_answer_is_an_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)  # nobody listens there now
    with pytest.raises(CoterieError, match=rf"{address} does not answer: .+; check the network, and HF_ENDPOINT"):
        push(exported, "me/north")


def test_nothing_is_sent_offline(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CoterieError, match="HF_HUB_OFFLINE is set"):
        push(exported, "me/north")
