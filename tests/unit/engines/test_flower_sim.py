"""What the simulation's engine asks Ray for, what it refuses, and what is said where Ray is missing. Starts nothing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sites
from coterie.config.load import check_config, load_config
from coterie.data.clients import load_data
from coterie.engines import flower_sim, local
from coterie.experiment import run
from coterie.flower.message import Message
from coterie.flower.ray import own_ray
from coterie.types import ClientInfo, CoterieError


def resources(clients: int = 9, device: str = "cpu", together: int = 1, **ray: Any) -> Any:
    engine = {"name": "flower-sim", "device": device, "clients_per_batch": together, "ray": ray}
    return flower_sim._resources(check_config({"data": {"folder": "x"}, "engine": engine}), clients)


def test_ray_gets_as_many_cores_as_the_clients_at_once_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_sim, "cpu_cores", lambda: 8)
    actor, ray = resources()
    assert actor == {"num_cpus": 1.0, "num_gpus": 0.0}
    assert ray == {"num_cpus": 8, "object_store_memory": 256 * 2**20}
    assert resources(cpus_per_client=3)[1]["num_cpus"] == 6
    assert resources(cpus_per_client=16)[1]["num_cpus"] == 16
    assert resources(clients_at_once=3, cpus_per_client=2)[1]["num_cpus"] == 6
    assert resources(clients=2)[1]["num_cpus"] == 2
    assert resources(device="cuda", gpus_per_client=0.25)[0] == {"num_cpus": 1.0, "num_gpus": 0.25}
    assert resources(address="auto")[1] == {"address": "auto"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"together": 2}, "clients_per_batch is for the local engine only"),
        ({"device": "cuda:all"}, "device names several"),
        ({"device": "cuda"}, "gpus_per_client = 0 leaves clients without a GPU"),
        ({"device": "cuda:all"}, "device names several, .* name one"),
        ({"device": ("cpu", "cpu")}, "device names several, .* name one"),
        ({"address": "auto", "clients_at_once": 2}, "has no effect on a Ray cluster"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        resources(**settings)


@pytest.mark.parametrize("missing", ["flwr", "ray"])
def test_a_missing_library_is_named_with_its_command(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, there = importlib.util.find_spec, {"flwr": "json", "ray": "json"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(there.get(name, name))
    )
    path = sites.config(tmp_path)
    with pytest.raises(CoterieError, match=rf"flower-sim needs {missing}: pip install 'coterie\[flower-sim\]'"):
        run(load_config(path, ["engine.name=flower-sim"]), tmp_path / "out", root=tmp_path)
    with pytest.raises(CoterieError, match="the engines are flower-sim, local"):
        run(load_config(path, ["engine.name=flwer"]), tmp_path / "out", root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_ray_that_was_loaded_open_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", object())
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ConnectionError, match="before it could be closed"), own_ray({}):
        pass


class Broken:
    """A transport that takes messages and then answers as ``answers`` says."""

    pause = 0.0

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    takes = True

    def nodes(self) -> dict[int, str]:
        return {11: "", 12: ""}

    def send(self, to: Any, ttl: float, group: str) -> list[str | None]:
        return [f"{node}" if self.takes else None for node, _, _ in to]

    def receive(self, tickets: Any) -> Any:
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def test_a_message_that_flower_does_not_take_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "takes", False)
    engine = flower_sim.FlowerSimEngine((ClientInfo("a", 3), ClientInfo("b", 3)), {}, tmp_path, lambda: started())

    @contextmanager
    def started() -> Iterator[Any]:
        yield Broken()

    with pytest.raises(CoterieError, match="Flower did not take the message of a; continue with --resume"):
        _ = engine.spec


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[], [("11", "Flower reports error 1: the actor died")]], "client a, query.hello of .*actor died.*--resume"),
        ([ConnectionError("Flower's simulation ended: Failed to start")], "Failed to start; continue with --resume"),
        ([[("11", Message({"fault": "there is no model"}))]], "there is no model"),
    ],
)
def test_what_goes_wrong_there_ends_the_run_here(answers: list[Any], message: str, tmp_path: Path) -> None:
    ended = []

    @contextmanager
    def start() -> Iterator[Any]:
        yield Broken(*answers)
        ended.append(True)

    engine = flower_sim.FlowerSimEngine((ClientInfo("a", 3), ClientInfo("b", 3)), {}, tmp_path, start)
    with pytest.raises(CoterieError, match=message):
        _ = engine.spec
    engine.close()
    assert ended == [True]


@pytest.mark.parametrize(("arch", "kind"), [("bert", "classification"), ("llama", "generation")])
def test_what_is_cut_off_the_rows_is_known_without_an_actor(arch: str, kind: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, arch, kind=kind)
    config = load_config(path, [f"model.max_length={12 if arch == 'bert' else 28}"])
    federation = load_data(config.data, config.task.kind, 0, tmp_path)
    simulated = flower_sim.make(config, federation, tmp_path / "out", tmp_path, {}).truncation()
    assert simulated == local.make(config, federation, tmp_path / "out", tmp_path, {}).truncation()
    assert simulated.rows == sum(len(rows) for client in federation.clients for rows in client.splits.values())
    assert 0 < simulated.cut < simulated.rows
    assert simulated.tokens >= simulated.cut


def test_training_rows_that_cannot_be_encoded_are_left_out_of_what_is_cut(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "gpt2", kind="multiple_choice")
    row = {"prompt": "one", "choices": [f" {'great ' * 40}one", f" {'great ' * 40}two"], "label": 0}
    sites.write_rows(tmp_path / "clients" / "mood-0" / "train.jsonl", [row, row])
    config = load_config(path)
    federation = load_data(config.data, config.task.kind, 0, tmp_path)
    others = sum(
        len(rows)
        for client in federation.clients
        for split, rows in client.splits.items()
        if (client.info.id, split) != ("mood-0", "train")
    )
    for engine in (flower_sim, local):
        assert engine.make(config, federation, tmp_path / "out", tmp_path, {}).truncation().rows == others
