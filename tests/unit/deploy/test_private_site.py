"""What a site refuses in a run with ``[privacy]``: the server is not trusted where clients add the noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import sites
from coterie import codec
from coterie.config.sections import Config
from coterie.deploy.agreement import Agreement, config_at, federation_config, terms_of
from coterie.deploy.head import digest_of
from coterie.deploy.hello import Hello
from coterie.deploy.serve import serve
from coterie.deploy.worker import Worker
from coterie.flower.message import Message
from coterie.types import CoterieError, Instruction, Reply

SITE = "mood-0"
PRIVACY = {"unit": "client", "clip": 0.1, "epsilon": 1.0, "noise_at": "client"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return sites.config(tmp_path, method="fedit", run="evaluate_every = 3")


def server(path: Path, privacy: dict[str, Any], rounds: int = 2) -> Config:
    run = {"rounds": rounds, "export": "last"}
    return flower_sites.server_config(path, privacy=privacy, run=run, federation={"sites": [SITE]})


def agreement(config: Config, run: str = "run", **changes: Any) -> Agreement:
    terms = {**terms_of(config), **changes}
    return Agreement(run, terms, digest_of(terms))


def instruction(worker: Worker, config: Config, of: Agreement, rnd: int = 1) -> bytes:
    hello = codec.decode(Hello, worker.answer(of.message("query.hello", SITE)).body)
    method = flower_sites.method_of(config)
    state = method.init(hello.spec, [hello.info])
    return codec.encode(method.configure(state, [hello.info], rnd)[SITE])


def other(body: bytes) -> bytes:
    """An instruction that is a little different."""
    ins = codec.decode(Instruction, body)
    key = min(ins.tensors)
    return codec.encode(replace(ins, tensors={**ins.tensors, key: ins.tensors[key] + 1e-3}))


def error(answer: Message) -> str:
    assert not answer.body
    return str(answer.head["error"])


def test_a_round_has_one_noisy_reply_however_often_it_is_done(path: Path, tmp_path: Path) -> None:
    config = server(path, PRIVACY)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    message = of.message("train", SITE, 1, body=body)
    first = worker.answer(message)
    assert codec.decode(Reply, first.body).tensors
    assert worker.answer(message).body == first.body
    (again,) = flower_sites.workers(tmp_path, [SITE]).values()  # the site's process is started anew
    assert again.answer(message).body == first.body
    later = replace(of, attempt=2)
    assert again.answer(later.message("train", SITE, 1, body=body)).body == first.body
    assert "to another instruction" in error(again.answer(later.message("train", SITE, 1, body=other(body))))
    second = again.answer(later.message("train", SITE, 2, body=body, keep=1))
    assert second.body
    assert second.body != first.body


def test_no_reply_is_beyond_what_the_noise_is_for(path: Path, tmp_path: Path) -> None:
    config = server(path, PRIVACY)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    assert "2 rounds of the run" in error(worker.answer(of.message("train", SITE, 3, body=body)))
    assert worker.answer(of.message("train", SITE, 1, body=body)).body
    longer = agreement(server(path, PRIVACY, rounds=4))
    assert "other terms" in error(worker.answer(longer.message("train", SITE, 2, body=body)))
    damaged = tmp_path / "states" / SITE / "run" / "released" / "000001"
    damaged.write_bytes(b"{}\n")
    assert "damaged" in error(worker.answer(of.message("train", SITE, 2, body=body)))


def test_a_reply_that_is_no_longer_kept_is_not_made_again(path: Path, tmp_path: Path) -> None:
    config = server(path, PRIVACY, rounds=4)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    for rnd in (1, 2):
        assert worker.answer(of.message("train", SITE, rnd, body=body, keep=2)).body
    assert "too long ago" in error(worker.answer(of.message("train", SITE, 1, body=body)))
    assert worker.answer(of.message("train", SITE, 2, body=body)).body


@pytest.mark.parametrize("noise_at", ["server", "client"])
def test_a_private_site_answers_no_evaluation(path: Path, tmp_path: Path, noise_at: str) -> None:
    config = server(path, {**PRIVACY, "noise_at": noise_at})
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    message = of.message("evaluate", SITE, 1, {"splits": ["validation", "test"], "usage": True}, body)
    assert "no metrics" in error(worker.answer(message))


@pytest.mark.parametrize(
    ("setting", "value"), [("noise_source", "seeded"), ("metrics", "unprotected")], ids=["noise", "metrics"]
)
def test_sites_refuse_what_only_a_simulation_may(path: Path, tmp_path: Path, setting: str, value: str) -> None:
    with pytest.raises(CoterieError, match=f'{setting} = "{value}"'):
        server(path, {**PRIVACY, setting: value})
    terms = terms_of(server(path, PRIVACY))
    terms["privacy"] = {**terms["privacy"], setting: value}  # a server that does not check
    with pytest.raises(CoterieError, match=f'{setting} = "{value}"'):
        config_at(flower_sites.site_settings(tmp_path, SITE), terms)


ROWS = {"unit": "example", "clip": 0.5, "epsilon": 2.0}


def by_row(path: Path, privacy: dict[str, Any], rounds: int = 2, **changes: Any) -> Config:
    run = {"rounds": rounds, "export": "last"}
    return flower_sites.server_config(
        path, privacy=privacy, run=run, lora={"dropout": 0.0}, federation={"sites": [SITE]}, **changes
    )


def test_a_round_that_hides_rows_is_trained_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = by_row(path, ROWS, rounds=3)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    message = of.message("train", SITE, 1, body=body)
    first = worker.answer(message)
    reply = codec.decode(Reply, first.body)
    assert reply.tensors
    assert not reply.info
    assert reply.num_examples == 1
    (personal,) = (tmp_path / "states" / SITE / "run" / "personal" / SITE).glob("000001*")
    kept = personal.read_bytes()
    (again,) = flower_sites.workers(tmp_path, [SITE]).values()
    monkeypatch.setattr("coterie.deploy.worker.train_client", lambda *of: pytest.fail("it trains again"))
    later = replace(of, attempt=2)  # the server has lost the round: the site's state of it goes, and comes back
    assert again.answer(later.message("train", SITE, 1, body=body)).body == first.body
    assert personal.read_bytes() == kept
    assert "to another instruction" in error(again.answer(later.message("train", SITE, 1, body=other(body))))


def test_no_round_before_one_that_was_answered_is_trained(path: Path, tmp_path: Path) -> None:
    config = by_row(path, ROWS, rounds=3)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    body = instruction(worker, config, of)
    assert worker.answer(of.message("train", SITE, 2, body=body)).body
    assert "trains no earlier one" in error(worker.answer(of.message("train", SITE, 1, body=body)))
    assert "3 rounds of the run" in error(worker.answer(of.message("train", SITE, 4, body=body)))
    message = of.message("evaluate", SITE, 1, {"splits": ["test"], "usage": False}, body)
    assert "no metrics" in error(worker.answer(message))


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        ({}, "only with noise of its own"),
        ({**PRIVACY, "noise_at": "server"}, "only with noise of its own"),
        ({**ROWS, "epsilon": 3.0}, "would cost this site epsilon = "),
        ({**ROWS, "delta": 1e-2}, "would cost this site epsilon = "),
        ({**ROWS, "noise_multiplier": 0.3}, "would cost this site epsilon = "),
        ({**PRIVACY, "epsilon": 3.0}, "would cost this site epsilon = "),
        (ROWS, ""),
        (PRIVACY, ""),
    ],
)
def test_a_site_calculates_itself_what_a_run_would_cost(
    path: Path, tmp_path: Path, privacy: dict[str, Any], says: str
) -> None:
    of = agreement(by_row(path, privacy))
    (worker,) = flower_sites.workers(tmp_path, [SITE]).values()
    worker.site = worker.site.model_copy(update={"policy": worker.site.policy.model_copy(update={"max_epsilon": 2.0})})
    answer = worker.answer(of.message("query.hello", SITE))
    assert says in str(answer.head.get("error", ""))
    assert bool(answer.body) == (not says)


@pytest.mark.parametrize("privacy", [ROWS, PRIVACY], ids=["rows", "client"])
def test_a_site_with_its_own_noise_sends_no_bank(path: Path, tmp_path: Path, privacy: dict[str, Any]) -> None:
    config = by_row(path, privacy)
    of = agreement(config)
    (worker,) = flower_sites.workers(tmp_path, [SITE], policy={"upload_bank": True}).values()
    body = instruction(worker, config, of)
    assert worker.answer(of.message("train", SITE, 1, body=body)).body
    answer = worker.answer(of.message("query.bank", SITE, 1, {"export": "last"}, body))
    assert "error" not in answer.head
    assert not answer.body


def test_a_federation_whose_noise_protects_nobody_is_refused_before_its_sites_join(tmp_path: Path) -> None:
    raw = {"federation": {"sites": ["a", "b"]}, "method": {"name": "fedit"}, "run": {"rounds": 10, "export": "last"}}
    config = federation_config({**raw, "privacy": {"unit": "client", "clip": 0.1, "noise_multiplier": 0.01}})
    with pytest.raises(CoterieError, match=r"noise_multiplier = 0.01 would cost epsilon = 51,348 at delta = 1e-05"):
        serve(config, tmp_path / "run", root=tmp_path, insecure=True)
    assert not (tmp_path / "run").exists()
