"""The demo, on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tiny
from coterie.cli import demo
from coterie.comparison.record import read_record
from coterie.types import CoterieError


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    tiny.folder(tmp_path / "model", "bert")
    changes: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "max_length": 16},
        "data": {**demo.CONFIG["data"], "train_rows": 12, "validation_rows": 6, "test_rows": 6},
        "methods": {"fedlease": {"warmup_rounds": 1}},
        "run": {"rounds": 2},
    }  # fmt: skip
    monkeypatch.setattr(demo, "CONFIG", {**demo.CONFIG, **changes})


@pytest.mark.slow
def test_the_demo_leaves_the_record_of_a_comparison_and_a_picture(small: None, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    folder = tmp_path / "demo"
    demo.run_demo(folder, console)
    record = read_record(folder / "demo.json")
    assert record is not None
    assert list(record.variants) == list(demo.METHODS)
    assert len(record.clusters["fedlease"]) == 8
    assert json.loads((folder / "demo.json").read_text()) == json.loads((folder / "compare.json").read_text())
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(console.file, io.StringIO)
    assert f"picture: {folder / 'demo.png'}" in console.file.getvalue()
    assert f"in a browser: coterie api {folder / 'fedlease-0'}" in console.file.getvalue()
    assert len(list(folder.glob("fedlease-0/clients/*/bundle.safetensors"))) == 8  # what that command serves


def test_the_demo_deletes_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(CoterieError, match="holds files that are not a demo"):
        demo.run_demo(tmp_path, Console(quiet=True))
    assert (tmp_path / "mine").exists()
