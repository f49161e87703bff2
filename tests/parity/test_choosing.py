"""A method whose clients choose a bank by scoring: every engine evaluates and exports what each client chose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import packages
import sites
from coterie import codec
from coterie.data.clients import load_data
from coterie.engines import local
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.types import Part

CLIENTS = ["mood-0", "mood-1", "place-0", "size-0"]
SOURCE = '''
from dataclasses import dataclass, replace

from coterie.methods.fedit import FedIT
from coterie.ops.streams import kaiming_uniform, stream
from coterie.requests import Score
from coterie.types import Part


@dataclass(frozen=True)
class Picky(FedIT):
    """A client takes one of two B, whichever fits its training rows."""

    name = "picky"

    def choose(self, ins, me, personal):
        bank = self.bank(ins, me, personal)
        drawn = {key: kaiming_uniform(tuple(value.shape), stream(0, str(key))) for key, value in bank.tensors.items()}
        banks = [
            replace(bank, tensors={k: s * drawn[k] if k.part is Part.B else v for k, v in bank.tensors.items()})
            for s in (1.0, -1.0)
        ]
        scored = yield Score(banks, "train")
        return min(zip(scored, banks), key=lambda pair: pair[0].loss)[1]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    torch.set_num_threads(1)
    packages.forget()
    packages.install(
        tmp_path / "lib", monkeypatch, "coterie-picky", {"coterie.methods: picky": "picky:Picky"}, picky=SOURCE
    )
    yield tmp_path
    packages.forget()


def test_every_engine_lets_the_client_choose(folder: Path) -> None:
    path = sites.config(folder, method="picky")
    banks: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for engine_name, size in (("alone", 1), ("together", 3)):
        changes = {"engine": {"clients_per_batch": size}}
        config = flower_sites.local_config(path, CLIENTS, folder, **changes)
        data = load_data(config.data, config.task.kind, config.run.seed, folder)
        engine = local.make(config, data, folder / engine_name, folder, {})
        banks[engine_name], scores[engine_name] = after_two_rounds(engine, config, folder / engine_name)
    server = flower_sites.server_config(path)
    staff = flower_sites.workers(folder, CLIENTS, policy={"upload_bank": True})
    remote = flower_sites.engine_over(server, staff, sites=tuple(CLIENTS))
    remote.sites.gather(0, 10)
    banks["sites"], scores["sites"] = after_two_rounds(remote, server, folder / "sites")

    for name in ("together", "sites"):
        for client in CLIENTS:
            assert signs(banks[name][client]) == signs(banks["alone"][client])
            assert scores[name][client]["test"]["loss"] == pytest.approx(
                scores["alone"][client]["test"]["loss"], abs=1e-5
            )
    assert codec.encode(banks["sites"]) == codec.encode(banks["alone"])
    assert len({signs(banks["alone"][client]) for client in CLIENTS}) == 2, "the clients' choices must differ"


def after_two_rounds(engine: Any, config: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every client's bank and scores."""
    folder.mkdir(exist_ok=True)
    method = flower_sites.method_of(config)
    state = Runner(method, engine, RoundSettings(2, 0), folder).run()
    instructions = method.configure(state, engine.clients, 3)
    scores = {c: dict(of.scores) for c, of in engine.evaluate(method, instructions, 2, ("test",))}
    return dict(engine.banks(method, instructions, 2)), scores


def signs(bank: Any) -> tuple[bool, ...]:
    """Where B is positive, of one module."""
    (key, *_) = sorted(key for key in bank.tensors if key.part is Part.B)
    return tuple((bank.tensors[key] > 0).flatten().tolist())
