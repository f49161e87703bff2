"""``coterie onboard``: from a client's folder to its bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import coterie
import finished_runs
import sites
from coterie.adapters.bundle import read_bundle
from coterie.artifacts.onboard import onboard
from coterie.cli.main import app
from coterie.files import read_json, write_json
from coterie.types import CoterieError, Part


@pytest.fixture(scope="module")
def finished() -> Path:
    folder = finished_runs.fedlease().parent
    for split, number in (("train", 12), ("validation", 6), ("test", 6)):
        sites.write_rows(folder / "late" / f"{split}.jsonl", sites.classification_rows("size", number, f"{split} late"))
    return folder


def test_a_late_client_gets_a_bundle_that_loads(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    arguments = ["onboard", str(finished / "out"), "--data", str(finished / "late"), "--out", str(tmp_path / "late")]
    app([*arguments, "--epochs", "2"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "late, on its test rows, before and after its router and head trained" in shown
    late = coterie.load(tmp_path / "late")
    assert (late.client, late.labels, late.method) == ("late", ("big", "small", "tiny"), "fedlease")
    assert late.bank.gate.name == "slot_top_k"
    assert len(late.predict([{"text": "huge"}])[0].columns()["probabilities"]) == 3  # type: ignore[arg-type]
    others = read_bundle(finished / "out" / "clients" / "size-0")[0].tensors
    same = [key for key, value in late.bank.tensors.items() if key in others and torch.equal(value, others[key])]
    assert {key.part for key in same} == {Part.A, Part.B}
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    with pytest.raises(CoterieError, match="late is not empty; name another folder"):
        app(arguments, standalone_mode=False)


def test_a_late_client_of_several_datasets_names_its_columns(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run, as if its rows had come from two datasets with different columns."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    kept = read_json(out / "config.json")
    sources = [{"source": "a", "columns": {"text": "body"}}, {"source": "b", "columns": {"text": "title"}}]
    write_json(out / "config.json", {**kept, "config": {**kept["config"], "data": {"datasets": sources}}})
    late = tmp_path / "late"
    for path in (finished / "late").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sites.write_rows(late / path.name, [{"title": row["text"], "label": row["label"]} for row in rows])
    arguments = ["onboard", str(out), "--data", str(late), "--out", str(tmp_path / "made"), "--epochs", "1"]
    with pytest.raises(CoterieError, match=r"come from datasets with different columns: .*--column text=body"):
        app(arguments, standalone_mode=False)
    app([*arguments, "--column", "text=title"], standalone_mode=False)
    assert "bundle: " in capsys.readouterr().out
    assert coterie.load(tmp_path / "made").labels == ("big", "small", "tiny")


def test_what_keeps_a_client_out_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"has no training rows; put a file train\.jsonl"):
        onboard(finished / "out", tmp_path, tmp_path / "x")
    kept = {path: path.read_bytes() for path in (finished / "out" / "checkpoints").iterdir()}
    for path in kept:
        path.unlink()
    with pytest.raises(CoterieError, match=r"lacks the checkpoint of round \d+, which it exported \(there is none\)"):
        onboard(finished / "out", finished / "late", tmp_path / "x")
    for path, content in kept.items():
        path.write_bytes(content)
    (tmp_path / "config.json").write_bytes((finished / "out" / "config.json").read_bytes())
    with pytest.raises(CoterieError, match="holds no finished run"):
        onboard(tmp_path, finished / "late", tmp_path / "x")
