"""One client of eight that answers with -50 times its update costs the others little, without any setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
import tiny
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.engines.base import Delivery, Stream
from coterie.engines.local import LocalEngine
from coterie.experiment import run
from coterie.methods.base import Method
from coterie.types import ClientId, Instruction

CLIENTS, ATTACKER, FACTOR = 8, "size-7", -50
METHODS: dict[str, dict[str, Any]] = {"fedit": {}, "fedlease": {"warmup_rounds": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and clients with two jobs."""
    made = tmp_path_factory.mktemp("attack")
    tiny.folder(made / "model", "bert")
    for i in range(CLIENTS):
        job = ("mood", "size")[i % 2]
        for split, number in (("train", 48), ("validation", 6), ("test", 24)):
            rows = sites.classification_rows(job, number, f"{split} {i}")
            sites.write_rows(made / "clients" / f"{job}-{i}" / f"{split}.jsonl", rows)
    return made


def config(folder: Path, method: dict[str, Any], rounds: int, robust: dict[str, Any] | None = None) -> Config:
    torch.set_num_threads(1)
    return check_config(
        {
            "model": {"path": str(folder / "model"), "max_length": 32},
            "data": {"folder": str(folder / "clients")},
            "task": {"kind": "classification"},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "train": {"learning_rate": 0.02, "batch_size": 8},
            "method": method,
            "robust": robust or {},
            "run": {"rounds": rounds, "evaluate_every": rounds},
            "engine": {"threads": 1, "device": "cpu"},
        }
    )


def honest_accuracy(
    folder: Path, out: str, method: str, bad: tuple[str, ...] = (ATTACKER,), robust: dict[str, Any] | None = None
) -> float:
    """The mean test accuracy of all but the attackers after six rounds."""
    settings = {"name": method, **METHODS[method]}
    clients = run(config(folder, settings, 6, robust), folder / out, root=folder).clients
    assert len(clients) == CLIENTS
    honest = [row.test["accuracy"] for name, row in clients.items() if name not in bad]
    return sum(honest) / (CLIENTS - len(bad))


def rounds(out: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["event"] == "round"]


def attack(monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...] = (ATTACKER,), factor: float = FACTOR) -> None:
    """Let the attackers reply with what they started from plus ``factor`` times their update."""
    honest = LocalEngine.train

    def train(
        self: LocalEngine,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        limits: Mapping[ClientId, int] | None = None,
    ) -> Stream[Delivery]:
        infos = {client.id: client for client in self.clients}
        for client, delivery in honest(self, method, instructions, rnd, limits):
            if client in bad and delivery.reply is not None:
                start = {**method.begin(self.spec, infos[client]).tensors, **instructions[client].tensors}
                came = delivery.reply.tensors
                turned = {  # its texts, which have no start, as they are
                    key: start[key] + factor * (value - start[key]) if key in start else value
                    for key, value in came.items()
                }
                yield client, replace(delivery, reply=replace(delivery.reply, tensors=turned))
            else:
                yield client, delivery

    monkeypatch.setattr(LocalEngine, "train", train)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_minus_fifty_times_an_update_costs_the_honest_at_most_ten_points(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = honest_accuracy(folder, f"{method}-honest", method)
    assert without > 0.65  # of 2 and 3 labels; there is something to lose
    attack(monkeypatch)
    assert honest_accuracy(folder, f"{method}-attacked", method) >= without - 0.10
    done = rounds(folder / f"{method}-attacked")
    assert len(done) == 6
    for event in done:  # FedLEASE's warm-up is the first
        assert list(event["failed"]) == [ATTACKER]
        assert "times the round's median, more than 10 ([run] update_bound)" in event["failed"][ATTACKER]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_with_a_rule_two_of_eight_that_turn_round_cost_the_honest_little(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minus five times the update: too short for ``update_bound``."""
    bad = (ATTACKER, "mood-6")
    without = honest_accuracy(folder, f"{method}-honest-of-six", method, bad)
    attack(monkeypatch, bad, -5)
    bent = honest_accuracy(folder, f"{method}-bent", method, bad)
    robust = {"rule": "multi_krum", "clip": 0.5, "attackers": 2}
    held = honest_accuracy(folder, f"{method}-held", method, bad, robust)
    assert held >= without - 0.05
    assert method != "fedit" or bent < held - 0.05
    done = rounds(folder / f"{method}-held")
    assert all(event["failed"] == {} for event in done)
    for client in bad:
        assert any(event["robust"][client]["outlying"] for event in done if client in event["robust"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "fedamole", "experts": 8}, {"name": "fedlease", "warmup_rounds": 1}])
def test_honest_clients_with_very_different_numbers_of_rows_are_all_used(
    method: dict[str, Any], tmp_path: Path
) -> None:
    """The client with 400 rows takes 50 times as many steps as those with 8, and moves further."""
    tiny.folder(tmp_path / "model", "bert")
    sites.federation(tmp_path / "clients", clients=5, rows=8)
    sites.write_rows(tmp_path / "clients" / "size-1" / "train.jsonl", sites.classification_rows("size", 400, "many"))
    run(config(tmp_path, method, 3), tmp_path / "out", root=tmp_path)
    assert [event["failed"] for event in rounds(tmp_path / "out")] == [{}, {}, {}]
