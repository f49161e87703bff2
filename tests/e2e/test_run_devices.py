"""Runs on several devices, from the config on; and with what lies between the adapters compiled."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
from coterie.compute import batched, loading
from coterie.compute.client import LocalCompute
from coterie.compute.loading import device_names
from coterie.config.load import load_config
from coterie.engines import batch_size as sizing
from coterie.experiment import run
from coterie.nn.base import load_base
from coterie.nn.compiled import compile_frozen
from coterie.types import CoterieError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def clients_of(folder: Path, kind: str) -> list[Any]:
    """What a run says of its clients, without the seconds that they took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == kind]
    return [
        {c: {k: v for k, v in of.items() if k not in ("seconds", "energy")} for c, of in e["clients"].items()}
        for e in events
    ]


@pytest.mark.parametrize("together", [1, 2])
def test_a_run_on_two_devices_is_the_same_as_on_one(together: int, tmp_path: Path) -> None:
    path, cache = sites.config(tmp_path), dict[str, Any]()
    common = [f"engine.clients_per_batch={together}", "run.rounds=3"]
    folders = {}
    for device in ("'cpu'", "['cpu', 'cpu']"):
        folders[device] = tmp_path / f"run on {device}"
        run(load_config(path, [*common, f"engine.device={device}"]), folders[device], root=tmp_path, cache=cache)
    assert sorted(map(len, cache.values())) == [1, 2]
    for kind in ("round", "evaluation"):
        one, two = (clients_of(folder, kind) for folder in folders.values())
        assert len(one) == 3
        assert one == two, "to the last bit"
    states = [sorted((f / "personal").rglob("*.safetensors")) for f in folders.values()]
    assert len(states[0]) == len(states[1]) >= 5
    for mine, other in zip(*states, strict=True):
        assert mine.read_bytes() == other.read_bytes()


def test_a_fault_on_one_device_ends_the_run_and_leaves_it_to_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sites.config(tmp_path, method="fedit")
    config = load_config(path, ["engine.device=['cpu', 'cpu']", "run.rounds=3"])
    real = LocalCompute.train

    def broken(self: LocalCompute, request: Any) -> Any:
        if (self.rnd, self.client.info.id) == (2, "size-0"):
            raise RuntimeError("the device is gone")
        return real(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(LocalCompute, "train", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            run(config, tmp_path / "broken", root=tmp_path)
    assert not [t for t in threading.enumerate() if t.name.startswith(("workplace-", "disk"))]
    assert len(clients_of(tmp_path / "broken", "round")) == 1
    run(config, tmp_path / "broken", root=tmp_path, resume=True)
    run(config, tmp_path / "whole", root=tmp_path)
    assert clients_of(tmp_path / "broken", "evaluation") == clients_of(tmp_path / "whole", "evaluation")


def test_auto_takes_part_of_the_clients_on_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = batched.train_together
    monkeypatch.setattr(batched, "train_together", lambda asked: sizes.append(len(asked)) or real(asked))
    monkeypatch.setattr(sizing, "ENOUGH", {"float32": 500})
    monkeypatch.setattr(sizing, "PASS_TOKENS", {"float32": 1e6})
    changes = ["engine.device=['cpu', 'cpu']", "engine.clients_per_batch='auto'", "run.rounds=1"]
    run(load_config(sites.config(tmp_path, method="fedit"), changes), tmp_path / "run", root=tmp_path)
    assert sorted(sizes) == [2, 3]


def test_which_devices_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "devices", lambda: ("cpu", "cuda:0", "cuda:1"))
    assert device_names("cuda:all") == ("cuda:0", "cuda:1")
    assert device_names("cuda:1") == ("cuda:1",)
    assert device_names(("cuda:1", "cpu")) == ("cuda:1", "cpu")
    assert device_names(("cpu", "cpu")) == ("cpu", "cpu")
    with pytest.raises(CoterieError, match="names cuda:0 twice"):
        device_names(("cuda:0", "cuda:1", "cuda:0"))


def test_no_device_is_an_error(tmp_path: Path) -> None:
    path = sites.config(tmp_path)
    with pytest.raises(CoterieError, match=r"\[engine\] device: .*give at least one device"):
        load_config(path, ["engine.device=[]"])
    if not torch.cuda.is_available():
        with pytest.raises(CoterieError, match="'cuda' is not available"):
            run(load_config(path, ["engine.device='cuda:all'"]), tmp_path / "run", root=tmp_path)


def test_what_lies_between_the_adapters_is_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(sites.config(tmp_path).parent / "model"), "classification")
    chosen: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: chosen.append(self))
    assert compile_frozen(base) == len(chosen) > 4
    names = {id(module): name for name, module in base.model.named_modules()}
    compiled = {names[id(module)] for module in chosen}
    assert {"bert.embeddings", "bert.encoder.layer.0.intermediate", "bert.encoder.layer.1.output"} <= compiled
    apart = [target.name for target in base.spec.targets] + ["classifier"]
    assert len(apart) == 5
    for name in apart:
        assert not any(name == one or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in compiled)


@pytest.mark.slow
def test_compiled_a_run_is_the_same_within_rounding(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="fedit")
    found = []
    for compiled in ("false", "true"):
        changes = [f"engine.compile={compiled}", "run.rounds=1", "train.optimizer=sgd", "engine.clients_per_batch=3"]
        run(load_config(path, changes), tmp_path / compiled, root=tmp_path)
        found.append(clients_of(tmp_path / compiled, "evaluation")[-1])
    one, two = found
    assert len(one) == 5
    assert one.keys() == two.keys()
    assert max(abs(one[c]["test"]["loss"] - two[c]["test"]["loss"]) for c in one) < 1e-4
