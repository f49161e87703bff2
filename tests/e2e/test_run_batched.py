"""Runs whose clients share forward passes, from the config on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
from coterie.compute import batched
from coterie.config.load import load_config
from coterie.engines import batch_size as sizing
from coterie.experiment import run
from coterie.types import CoterieError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> dict[str, float]:
    last = [event for event in events(folder) if event["event"] == "evaluation"][-1]
    return {client: scores["test"]["loss"] for client, scores in last["clients"].items()}


def test_a_run_is_the_same_within_rounding_however_many_clients_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sites.config(tmp_path)
    sizes: list[int] = []
    real = batched.train_together

    def seen(asked: Any) -> Any:
        sizes.append(len(asked))
        return real(asked)

    monkeypatch.setattr(batched, "train_together", seen)
    monkeypatch.setattr(sizing, "train_together", seen)
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 500})
    monkeypatch.setattr(sizing, "PASS_TOKENS", {"float32": 1e6})  # else uneven rows would gain too little
    cache: dict[str, Any] = {}
    found = {}
    for size in ("1", "3", "'auto'"):
        changes = [f"engine.clients_per_batch={size}", "train.optimizer=sgd", "run.rounds=2"]
        folder = tmp_path / f"run {size}"
        run(load_config(path, changes), folder, root=tmp_path, cache=cache)
        found[size] = losses(folder)
        expected = {"1": [], "3": [3, 2, 3, 2], "'auto'": [2, 5, 5]}
        assert sizes == expected[size], "auto tries two once, and knows from that that experts fit"
        sizes.clear()
    assert len(cache) == 1, "one base for all"
    assert all(len(of) == 5 for of in found.values())
    for size in ("3", "'auto'"):
        assert found[size].keys() == found["1"].keys()
        assert max(abs(found[size][c] - loss) for c, loss in found["1"].items()) < 1e-3
    notes = [event["text"] for event in events(tmp_path / "run 'auto'") if event["event"] == "note"]
    assert [note for note in notes if "forward pass" in note] == ["5 clients share a forward pass: at most 64"]


def test_when_memory_runs_out_the_run_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batched.train_together

    def short_of_memory(asked: Any) -> Any:
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(asked)

    monkeypatch.setattr(batched, "train_together", short_of_memory)
    changes = ["engine.clients_per_batch=4", "run.rounds=1", "method.name=fedit"]
    run(load_config(sites.config(tmp_path, method="fedit"), changes), tmp_path / "run", root=tmp_path)
    notes = [event["text"] for event in events(tmp_path / "run") if event["event"] == "note"]
    assert [n for n in notes if "memory" in n] == ["out of memory with 4 clients in a batch; continuing with 2"]
    (trained,) = (event for event in events(tmp_path / "run") if event["event"] == "round")
    assert len(trained["clients"]) == 5
    assert trained["failed"] == {}


@pytest.mark.parametrize("wrong", ["0", "-3", "many", "1.5"])
def test_a_wrong_number_of_clients_is_an_error(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"\[engine\] clients_per_batch"):
        load_config(sites.config(tmp_path), [f"engine.clients_per_batch={wrong}"])
