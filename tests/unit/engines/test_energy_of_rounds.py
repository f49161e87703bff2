"""Every client's round says what energy it took, and where the number comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import short_runs
import sites
from coterie.deploy.remote import energy_in
from coterie.energy import Counter, Energy
from coterie.engines.base import Delivery
from coterie.engines.local import LocalEngine
from coterie.engines.together import Together
from coterie.flower.message import Message
from coterie.methods.privacy import PrivacySettings
from coterie.runs.entries import ClientRound
from coterie.runs.events import METRICS, RoundDone, from_json, read_events
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import joules_of
from coterie.types import ClientId

CLIENTS = ("mood-0", "mood-1", "size-0")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose counter is 2 J higher with every reading."""
    numbers = count(step=2)
    monkeypatch.setattr("coterie.energy.rapl", lambda *_: (Counter(lambda: float(next(numbers))),))


@pytest.fixture
def unmetered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.energy.rapl", lambda *_: ())


def trained(folder: Path, together: int = 0, devices: int = 1, **settings: Any) -> dict[ClientId, Delivery]:
    engine, method = short_runs.engine_of(short_runs.clients(*CLIENTS), folder), short_runs.make("fedit")
    workplace = replace(engine.workplace, **settings)
    passes = Together((workplace,) * devices, together) if together else None
    engine = LocalEngine(workplace, engine.federation, engine.states, passes)
    state = method.init(engine.spec, engine.clients)
    return dict(engine.train(method, method.configure(state, engine.clients, 1), 1))


def test_a_client_alone_is_measured(package: None, tmp_path: Path) -> None:
    made = trained(tmp_path, joules_per_tflop=5.0)
    assert {client: of.energy for client, of in made.items()} == dict.fromkeys(CLIENTS, Energy(2.0, "measured"))


def test_clients_of_one_pass_share_what_it_took(package: None, tmp_path: Path) -> None:
    made = trained(tmp_path, together=3)
    gflop = {client: of.reply.info["gflop"] for client, of in made.items() if of.reply}
    for client, of in made.items():
        assert of.energy is not None
        assert of.energy.source == "shared"
        assert of.energy.joules == pytest.approx(2.0 * gflop[client] / sum(gflop.values()))


def test_clients_on_several_devices_at_once_are_not_measured_by_a_counter_that_counts_them_all(
    package: None, tmp_path: Path
) -> None:
    made = trained(tmp_path, together=1, devices=2, joules_per_tflop=5.0)
    assert {of.energy.source for of in made.values() if of.energy} == {"estimate"}


@pytest.mark.parametrize("together", [0, 3])
def test_without_a_counter_it_is_an_estimate_or_not_known(together: int, unmetered: None, tmp_path: Path) -> None:
    made = trained(tmp_path / "set", together, joules_per_tflop=5.0)
    for of in made.values():
        assert of.reply is not None
        assert of.energy == Energy(of.reply.info["gflop"] / 1e3 * 5.0, "estimate")
    assert {of.energy for of in trained(tmp_path / "not", together).values()} == {None}


def test_a_site_sends_it_with_its_answer_unless_the_run_hides_it(unmetered: None, tmp_path: Path) -> None:
    path, clients = sites.config(tmp_path, method="fedit"), ["mood-0", "mood-1"]
    staff = flower_sites.workers(tmp_path, clients, engine={"joules_per_tflop": 5.0})
    hidden = {"unit": "client", "clip": 0.1, "noise_multiplier": 1.0}
    for privacy in ({}, {"privacy": hidden}):
        config = flower_sites.server_config(path, **privacy)
        remote = flower_sites.engine_over(config, staff, sites=tuple(clients))
        remote.sites.gather(0, 10)
        method = flower_sites.method_of(config)
        instructions = method.configure(method.init(remote.spec, remote.clients), remote.clients, 1)
        sources = {of.energy.source if of.energy else None for _, of in remote.train(method, instructions, 1)}
        assert sources == ({None} if privacy else {"estimate"})


def test_what_a_site_says_wrongly_is_not_known() -> None:
    assert energy_in(Message({"energy": {"joules": 3, "source": "shared"}})) == Energy(3.0, "shared")
    wrong = [{"joules": joules, "source": "shared"} for joules in (-1.0, float("nan"), "1", True, None)]
    wrong += [{"joules": 1.0, "source": source} for source in ("guess", ["shared"], None)]
    for said in (None, "much", {}, {"joules": 1.0}, *wrong):
        assert energy_in(Message({"energy": said})) is None
    assert energy_in("no reply") is None


def test_the_record_of_a_round_holds_it(package: None, tmp_path: Path) -> None:
    engine, method = short_runs.engine_of(short_runs.clients(*CLIENTS), tmp_path / "states"), short_runs.make("fedit")
    Runner(method, engine, RoundSettings(1, 0), tmp_path).run()
    (done,) = [event for event in read_events(tmp_path / METRICS) if isinstance(event, RoundDone)]
    assert from_json(done.to_json()) == done
    assert joules_of(done.clients.values()) == {"joules": 6.0, "joules_from": "measured"}


def test_the_record_of_a_private_round_does_not(package: None, tmp_path: Path) -> None:
    """It would say how much a client trained, which has no noise."""
    engine, method = short_runs.engine_of(short_runs.clients(*CLIENTS), tmp_path / "states"), short_runs.make("fedit")
    private = PrivacySettings(unit="client", clip=0.1, noise_multiplier=1.0)
    method = replace(method, plan=replace(method.plan, privacy=private))
    Runner(method, engine, RoundSettings(1, 0), tmp_path).run()
    (done,) = [event for event in read_events(tmp_path / METRICS) if isinstance(event, RoundDone)]
    assert {entry.energy for entry in done.clients.values()} == {None}


def entries() -> Iterator[ClientRound]:
    yield ClientRound(said={"loss": 1.0}, energy=Energy(2.0, "measured"))
    yield ClientRound(said={"loss": 1.0}, energy=Energy(3.0, "estimate"))
    yield ClientRound()  # its reply was not used


def test_a_sum_says_where_its_parts_come_from() -> None:
    assert joules_of(entries()) == {"joules": 5.0, "joules_from": "estimate, measured"}
    assert joules_of([*entries(), ClientRound(said={"loss": 1.0})])["joules_from"] == "estimate, measured, incomplete"
    assert joules_of([ClientRound(said={"loss": 1.0})]) == {"joules": None, "joules_from": ""}


def test_no_statistic_of_a_reply_takes_the_name_of_a_field() -> None:
    entry = ClientRound(1, 2, 3.0, {"energy": "much", "seconds": "many", "loss": 1.0, "gflop_active": 4.0, "gflop": 5})
    line = RoundDone(1, {"a": entry}).to_json()
    read = from_json(line)
    assert isinstance(read, RoundDone)
    assert read.clients["a"] == replace(entry, said={"loss": 1.0, "gflop_active": 4.0, "gflop": 5})
    assert (read.clients["a"].gflop, read.clients["a"].gflop_active) == (5.0, 4.0)
    assert ClientRound(said={"gflop": 5.0}).gflop_active == 5.0
