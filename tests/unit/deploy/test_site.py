"""A site: what it agreed to is enforced there, its socket is its user's alone, its log holds no text of its data."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import pools
import sites
from coterie import codec
from coterie.config.deployment import Policy
from coterie.config.load import load_site
from coterie.deploy.agreement import Agreement, federation_config, terms_of
from coterie.deploy.base_digest import files_digest
from coterie.deploy.head import digest_of
from coterie.deploy.hello import Hello
from coterie.deploy.hello import refusal as refusal_of
from coterie.deploy.policy import without_usage
from coterie.deploy.site_check import check as check_site
from coterie.deploy.site_log import log_without_text
from coterie.deploy.worker import Worker
from coterie.engines.checks import site_fault
from coterie.flower.message import Message
from coterie.machine import Check
from coterie.methods.plan import Plan
from coterie.methods.smartfed.method import SmartFed
from coterie.methods.smartfed.settings import SmartFedSettings
from coterie.ops.accounting import _spent as spent_before
from coterie.ops.accounting import multiplier_for
from coterie.requests import Optim
from coterie.types import FOLDED, BaseSpec, ClientInfo, CoterieError, Instruction, Part, Reply

CLIENT = "mood-0"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def head(config: Any, kind: str = "train", **changes: Any) -> dict[str, Any]:
    made = {
        "kind": kind,
        "client": CLIENT,
        "round": 1,
        "run": "run",
        "attempt": 1,
        "since": 0,
        "keep": 0,
        "kept_rounds": [],
    }
    return {**made, "terms": terms_of(config), "patience": 60, **changes}


@pytest.fixture
def fedit(tmp_path: Path) -> tuple[Any, Any]:
    config = flower_sites.server_config(sites.config(tmp_path, method="fedit"))
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    hello = codec.decode(Hello, worker.answer(Message(head(config, "query.hello"))).body)
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    return config, codec.encode(ins)


def refusal(folder: Path, message: Message, **sections: Any) -> str:
    answer = flower_sites.workers(folder, [CLIENT], **sections)[CLIENT].answer(message)
    assert answer.body == b""
    return str(answer.head["error"])


POLICIES = {
    "method": ({"methods": ["fedlease"]}, "does not run fedit, only fedlease"),
    "rank": ({"max_rank": 1}, "rank up to 1, but the run has 2"),
    "fresh rank": ({"max_rank": 4}, "rank up to 4, but the run has 5"),
    "ranks by client": ({"max_rank": 4}, "rank up to 4, but the run has 9"),
    "rounds": ({"max_rounds": 2}, "rounds up to 2, but the run has 3"),
    "steps": ({"max_steps": 2}, "would take 3 steps here, but this site allows 2"),
    "settings": ({"settings": {"train.epochs": [2, 3]}}, "requires train.epochs = [2, 3], but the run has 1"),
    "upload": ({"upload": ["A"]}, "this site does not send B"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_site_did_not_agree_to_is_refused_there(name: str, fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    policy, reason = POLICIES[name]
    if name == "fresh rank":
        smart = {"name": "smartfed", "fresh_rank": 5}
        config = flower_sites.server_config(sites.config(tmp_path / "smart", method="smartfed"), method=smart)
    if name == "ranks by client":
        path = sites.config(tmp_path / "flex", method="flexlora")
        config = flower_sites.server_config(path, lora={"ranks": {"size-0": 9}})
    assert reason in refusal(tmp_path, Message(head(config), blob), policy=policy)


def test_no_expert_of_a_higher_rank_trains_than_was_agreed(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    ins, policy = codec.decode(Instruction, blob), {"max_rank": 2}
    assert (
        "error"
        not in flower_sites.workers(tmp_path, [CLIENT], policy=policy)[CLIENT].answer(Message(head(config), blob)).head
    )
    key = min(ins.tensors)._replace(expert=FOLDED)
    folded = {key: torch.zeros(32, 32), key._replace(part=Part.B): torch.zeros(32, 32)}
    allowed = Message(head(config), codec.encode(replace(ins, tensors={**ins.tensors, **folded})))
    answer = flower_sites.workers(tmp_path, [CLIENT], policy=policy)[CLIENT].answer(allowed)
    assert "error" not in answer.head, "a change of the base may have its rank"
    for part, made, expert in (
        (Part.A, torch.zeros(300, 32), 0),
        (Part.B, torch.zeros(32, 300), 0),
        (Part.A, torch.zeros(3), 0),
        (Part.A, torch.zeros(33, 32), FOLDED),
        (Part.B, torch.zeros(32, 33), FOLDED),
    ):
        key = next(key for key in ins.tensors if key.part is part)._replace(expert=expert)
        changed = codec.encode(replace(ins, tensors={**ins.tensors, key: made}))
        for kind in ("train", "evaluate", "query.bank"):
            assert f"{key} has rank " in refusal(tmp_path, Message(head(config, kind), changed), policy=policy)


def test_metrics_usage_and_banks_are_sent_only_as_agreed(
    fedit: tuple[Any, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, blob = fedit
    ask = Message(head(config, "evaluate", splits=["test"], usage=True), blob)
    assert "sends no metrics" in refusal(tmp_path, ask, policy={"upload_metrics": False})
    bank = Message(head(config, "query.bank"), blob)
    kept = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    with caplog.at_level("INFO", "coterie.site"):
        assert kept.answer(bank).body == b""
    assert (kept.state / "run" / "export" / "bundle.safetensors").exists()
    assert f"this site's model is in {kept.state / 'run' / 'export'}" in caplog.text
    given = flower_sites.workers(tmp_path, [CLIENT], policy={"upload_bank": True})[CLIENT]
    assert given.answer(bank).body


def test_usage_is_answered_after_the_last_round_alone(tmp_path: Path) -> None:
    config = flower_sites.server_config(sites.config(tmp_path, method="fedlease"), run={"rounds": 3})
    clients = [CLIENT, "place-0", "size-0"]
    staff = flower_sites.workers(tmp_path, clients)
    engine = flower_sites.engine_over(config, staff, sites=tuple(clients))
    engine.sites.gather(0, 10)
    method = flower_sites.method_of(config)
    made = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    told = {}
    for rnd in (0, 1, 2, 3, 4):
        asked = dict(engine.evaluate(method, made, rnd, ("validation", "test"), usage=True))
        assert all(sorted(each.scores) == ["test", "validation"] for each in asked.values())
        told[rnd] = {client for client, each in asked.items() if each.observed is not None}
    assert told == {0: set(), 1: set(), 2: set(), 3: set(clients), 4: set(clients)}


def test_how_the_rows_use_the_experts_stays_where_that_was_agreed() -> None:
    reply = Reply({}, 3, {"loss": 0.5, "importance": {"q": 1.0}, "use": {"one": 0.5}})
    method = SmartFed(SmartFedSettings(pool="x"), Plan())
    assert without_usage(Policy(), method, reply) == reply
    assert without_usage(Policy(upload_usage=False), method, reply) == Reply({}, 3, {"loss": 0.5})


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "shell"}, "does not know the kind 'shell'"),
    "run": ({"run": "../../etc"}, "not a valid folder name"),
    "attempt": ({"attempt": "1"}, "attempt is not of the type int"),
    "round": ({"round": 10**5}, "takes part in rounds 1 to 1000"),
    "negative": ({"round": -1}, "round is -1; it must be at least 0"),
    "since": ({"since": -1}, "since is -1; it must be at least 0"),
    "keep": ({"kind": "evaluate", "keep": -7}, "keep is -7; it must be at least 0"),
    "large": ({"kind": "query.bank", "round": 10**9}, "below 1000000"),
    "splits": ({"kind": "evaluate", "splits": 3}, "splits are not among validation, test"),
    "split": ({"kind": "evaluate", "splits": ["../x"]}, "splits are not among validation, test"),
    "training rows": (
        {"kind": "evaluate", "splits": ["test", "train"]},
        "the loss of training rows says whether a text",
    ),
    "starts": ({"starts": [[1, 0], [2]]}, "starts are not pairs of an attempt and a round"),
    "many starts": ({"starts": [[1, 0]] * 1001}, "more than 1000 starts"),
    "export": ({"kind": "query.bank", "export": "worst"}, "export is neither best nor last"),
    "client": ({"client": "size-0"}, "this is mood-0, the message is for size-0"),
    "terms": ({"terms": {}}, "not the terms of a Coterie server"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_message_that_makes_no_sense_is_refused(name: str, fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    change, reason = HEADS[name]
    assert reason in refusal(tmp_path, Message({**head(config), **change}, blob))
    assert "cannot decode" in refusal(tmp_path, Message(head(config), b"junk"))


def test_another_version_is_refused(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, _ = fedit
    terms = {**terms_of(config), "coterie": "9.9"}
    assert "install the same version" in refusal(tmp_path, Message(head(config, "query.hello", terms=terms)))


def test_a_site_imports_no_score_that_the_server_names(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, _ = fedit
    terms = terms_of(config)
    terms["task"] = {**terms["task"], "scores": ["os:system"]}  # type: ignore[dict-item]
    assert "a site imports nothing that a server names" in refusal(
        tmp_path, Message(head(config, "query.hello", terms=terms))
    )
    with pytest.raises(CoterieError, match="a site imports nothing that a server names"):
        federation_config({"federation": {"sites": ["a"]}, "task": {"scores": ["os:system"]}})


def test_the_terms_hold_neither_paths_nor_addresses_nor_data(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="fedlease")
    config = flower_sites.server_config(path, federation={"host": "10.1.2.3", "keys": "secret-keys"})
    text = json.dumps(terms_of(config))
    for word in ("10.1.2.3", "secret-keys", "clients", "path", "folder"):
        assert word not in text
    assert digest_of(terms_of(config)) != digest_of(terms_of(flower_sites.server_config(path, lora={"rank": 3})))


def test_steps_are_counted_as_training_takes_them() -> None:
    assert Optim(batch_size=4, epochs=2).steps_on(9) == 6
    assert Optim(batch_size=4, epochs=2, accumulate=2).steps_on(9) == 4
    assert Optim(steps=7).steps_on(9) == 7


def test_the_digest_of_a_base_is_that_of_its_files(tmp_path: Path) -> None:
    sites.config(tmp_path)
    book, model = tmp_path / "book.json", tmp_path / "model"
    first = files_digest(str(model), book)
    assert files_digest(str(model), book) == first == files_digest(str(model), tmp_path / "other.json")
    weights = model / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    os.utime(weights, ns=(1, 1))
    assert files_digest(str(model), book) != first


# what is logged ------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_the_log_holds_no_text_of_the_data(
    fedit: tuple[Any, bytes], tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    config, blob = fedit
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    for kind in ("query.hello", "train", "evaluate", "query.bank"):
        assert "error" not in worker.answer(Message(head(config, kind, splits=["test"]), blob)).head
    worker.answer(Message({"kind": "awful street", "round": "great"}))
    try:
        raise KeyError("awful great street")
    except KeyError as fault:
        log_without_text(type(fault), fault, fault.__traceback__)
    text = logged.text
    assert "train of round 1: done" in text
    assert "KeyError at" in text
    for job in sites.JOBS.values():
        for word in (*job[0], *job[1]):
            assert f" {word}" not in text


# what the server hears of a fault -------------------------------------------------------------------------------------

SECRET = "patient John Doe has HIV"
ROWS_FAULT = "this site cannot read its rows; run `coterie site check` there to see why"
BAD_ROWS: dict[str, str | bytes | None] = {
    "no JSON": f"{SECRET}\n",
    "no object": f'"{SECRET}"\n',
    "a list": f'["{SECRET}"]\n',
    "not UTF-8": SECRET.encode() + b"\xff\n",
    "no column": f'{{"{SECRET}": 1}}\n',
    "empty text": f'{{"text": "", "label": "{SECRET}"}}\n',
    "no text": f'{{"text": ["{SECRET}"], "label": "good"}}\n',
    "no label": f'{{"text": "one", "label": ["{SECRET}"]}}\n',
    "another label": f'{{"text": "one", "label": "{SECRET}"}}\n',
    "no rows": "",
    "no file": None,
}


def is_told_nothing(error: str, folder: Path) -> bool:
    """Whether an error holds no word of the row, and no path."""
    return not any(word in error for word in (*SECRET.split(), "John", "secret", str(folder), "jsonl", "clients/"))


@pytest.mark.parametrize("name", BAD_ROWS)
def test_of_rows_that_cannot_be_read_the_server_hears_no_word(
    name: str, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    config = flower_sites.server_config(sites.config(tmp_path, method="fedit"))
    path, bad = tmp_path / "clients" / CLIENT / "test.jsonl", BAD_ROWS[name]
    path.unlink()
    if bad is not None:
        path.write_bytes(bad if isinstance(bad, bytes) else (bad.encode()))
    for kind in ("query.hello", "train"):
        error = refusal(tmp_path, Message(head(config, kind), codec.encode(Instruction())))
        assert error == ROWS_FAULT
        assert is_told_nothing(error, tmp_path)
    assert "DataError at" in logged.text
    assert not any(word in logged.text for word in SECRET.split()[1:])


CSV = {
    "fields": f"text,label\none,good,{SECRET}\n",
    "quotes": f'text,label\n"one" {SECRET},good\n',
    "twice": f'text,label\n"{SECRET}\n',
}


@pytest.mark.parametrize("name", [*CSV, "parquet", "ending", "copy", "columns", "labels", "too few"])
def test_nor_of_other_files_and_settings(name: str, tmp_path: Path) -> None:
    config = flower_sites.server_config(sites.config(tmp_path, method="fedit"))
    path = tmp_path / f"secret.{ {'parquet': 'parquet', 'ending': 'John'}.get(name, 'csv') }"
    path.write_text(CSV.get(name, f"text,label\n{SECRET},good\n"))
    data: dict[str, Any] = {"validation": str(path)}
    if name == "copy":
        data["test"] = str(path)
    elif name == "columns":
        data["columns"] = {"text": "John"}
    elif name == "labels":
        data["labels"] = ["John", "John"]
    elif name == "too few":
        data["train_rows"] = 10**6
    error = refusal(tmp_path, Message(head(config, "query.hello")), data=data)
    assert error == ROWS_FAULT


def test_nor_of_a_row_that_cannot_be_tokenised(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "gpt2", method="fedit", kind="multiple_choice")
    config = flower_sites.server_config(path)
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    for split in ("train", "test"):
        rows = tmp_path / "clients" / CLIENT / f"{split}.jsonl"
        long = f"{SECRET} " * 40
        row = {"prompt": "one", "choices": [f" {long} one", f" {long} two"], "label": 0}
        rows.write_text(f"{json.dumps(row)}\n" * (1 + (split == "train")))
    hello = codec.decode(Hello, worker.answer(Message(head(config, "query.hello"))).body)
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    for kind in ("train", "evaluate"):
        answer = worker.answer(Message(head(config, kind, splits=["test"]), codec.encode(ins)))
        assert answer.head["error"] == ROWS_FAULT


def test_nor_of_a_model_a_state_or_a_pool_where_they_are(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    error = refusal(tmp_path, Message(head(config, "query.hello")), model={"path": str(tmp_path / "secret")})
    assert error == "this site cannot load its model; run `coterie site check` there to see why"
    kept = tmp_path / "states" / CLIENT / "run" / "personal" / CLIENT / "000000.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"damaged")
    general = "this site cannot use one of its files; its site.log says which"
    assert refusal(tmp_path, Message(head(config), blob)) == general


def test_a_server_cannot_ask_whether_a_file_is_there(tmp_path: Path) -> None:
    """It names the folder of a pool that is everywhere: one that is not there, one with a file, one that is damaged."""
    path, told = sites.config(tmp_path, method="smartfed"), set()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "pool.safetensors").write_bytes(b"damaged")
    ours = {"pool": pools.for_tiny(), "pool_at": "everywhere"}
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    config = flower_sites.server_config(path, method=ours)
    hello = codec.decode(Hello, worker.answer(Message(head(config, "query.hello"))).body)
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    other = replace(ins, info={**ins.info, "pool": "0" * 64})
    for pool, sent in (("gone", ins), ("damaged", ins), (ours["pool"], other)):
        config = flower_sites.server_config(path, method={**ours, "pool": pool})
        for kind in ("train", "evaluate", "query.bank"):
            told.add(worker.answer(Message(head(config, kind, splits=["test"]), codec.encode(sent))).head["error"])
    assert told == {"this site cannot use one of its files; its site.log says which"}


def test_site_check_quotes_a_row_that_cannot_be_tokenised(tmp_path: Path) -> None:
    run = sites.config(tmp_path, "gpt2", method="fedit", kind="multiple_choice")
    row = {"prompt": "one", "choices": [f" {'great ' * 40}one", f" {'great ' * 40}two"], "label": 0}
    (tmp_path / "clients" / CLIENT / "test.jsonl").write_text(json.dumps(row) + "\n")
    path = tmp_path / "SITE.toml"
    files = "\n".join(f'{s} = "clients/{CLIENT}/{s}.jsonl"' for s in ("train", "validation", "test"))
    path.write_text(
        f'[site]\nid = "{CLIENT}"\nserver = "127.0.0.1:9"\n[model]\npath = "model"\n[data]\n{files}\n'
        '[engine]\ndevice = "cpu"\n'
    )
    failed = {check.name: check.value for check in check_site(path, run, insecure=True) if not check.ok}
    assert failed.keys() == {"server", "rows"}
    assert "two candidates have the same tokens" in failed["rows"]


# how many experts are active -----------------------------------------------------------------------------------------


def test_a_sites_limit_of_active_experts_is_in_what_it_reports(tmp_path: Path) -> None:
    config = flower_sites.server_config(
        sites.config(tmp_path, method="smartfed"), method={"pool": pools.for_tiny(), "router": "paper", "active": 3}
    )
    worker = flower_sites.workers(tmp_path, [CLIENT], site={"active": 1})[CLIENT]
    hello = codec.decode(Hello, worker.answer(Message(head(config, "query.hello"))).body)
    assert hello.info.active == 1
    assert site_fault(hello.info, hello.spec) is None
    for wrong in (0, -3, 2**40):
        assert "active experts is out of range" in str(site_fault(replace(hello.info, active=wrong), hello.spec))
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    assert {*ins.info["quotas"].values()} == {1}
    reply = codec.decode(Reply, worker.answer(Message(head(config), codec.encode(ins))).body)
    assert reply.info["active"] == 1


def test_a_site_with_a_limit_of_active_experts_joins_no_other_method(tmp_path: Path) -> None:
    run = sites.config(tmp_path, method="fedit")
    hello = Message(head(flower_sites.server_config(run), "query.hello"))
    assert refusal(tmp_path, hello, site={"active": 2}) == (
        f"[site] active = 2 at {CLIENT}: fedit activates the same experts at every client; leave it out"
    )
    dense = {"pool": pools.for_tiny(), "router": "signed"}
    config = flower_sites.server_config(sites.config(tmp_path / "dense", method="smartfed"), method=dense)
    assert "every expert is active; set [method] sparse = true" in refusal(
        tmp_path, Message(head(config, "query.hello")), site={"active": 2}
    )
    path = tmp_path / "SITE.toml"
    path.write_text(
        f'[site]\nid = "{CLIENT}"\nserver = "127.0.0.1:9"\nactive = 2\n[model]\npath = "gone"\n[data]\ntrain = "x"\n'
    )
    failed = {check.name for check in check_site(path, run, insecure=True) if not check.ok}
    assert "active" in failed


def test_a_site_may_change_its_limit_but_not_its_rows() -> None:
    known = Hello(ClientInfo(CLIENT, 9, labels=("no", "yes"), active=4), BaseSpec(()), "terms", "0" * 64, {})
    agreement = Agreement("run", {}, "terms", 1)
    lower = replace(known, info=replace(known.info, active=None))
    assert refusal_of(lower, agreement, "", {CLIENT: known}) is None
    fewer = replace(known, info=replace(known.info, num_train=8))
    assert "rows or labels" in str(refusal_of(fewer, agreement, "", {CLIENT: known}))


# SITE.toml -----------------------------------------------------------------------------------------------------------


def test_a_site_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "SITE.toml"
    path.write_text('[site]\nid = "a"\nserver = "b:1"\n[data]\ntrain = "x"\n[policy]\nupload = ["A", "B"]\n')
    assert load_site(path).policy.upload == (Part.A, Part.B)
    path.write_text('[site]\nid = "a"\nserver = "b:1"\n[data]\ntrain = "x"\n[policy]\nmax_step = 3\n')
    with pytest.raises(CoterieError, match=r"\[policy\] unknown key 'max_step'; did you mean 'max_steps'"):
        load_site(path)


def test_site_check_says_what_does_not_fit(tmp_path: Path) -> None:
    run = sites.config(tmp_path, method="fedit")
    path = tmp_path / "SITE.toml"
    text = f"""
[site]
id = "{CLIENT}"
server = "127.0.0.1:9"
[model]
path = "model"
[data]
train = "clients/{CLIENT}/train.jsonl"
[engine]
device = "cpu"
"""
    path.write_text(text)
    found = {check.name: check for check in check_site(path, run)}
    assert [name for name, check in found.items() if not check.ok] == ["key", "ca", "server"]
    assert found["config"].value == str(run)
    assert "tried with the defaults" in next(c.value for c in check_site(path) if c.name == "config")
    assert "7 train" in found["data"].value or "train" in found["data"].value
    assert "targets, SHA-256" in found["model"].value
    short = run.parent / "short.toml"
    short.write_text(run.read_text().replace("max_length = 32", "max_length = 12"))
    (cut,) = (check for check in check_site(path, short) if check.name == "length")
    assert re.search(r"^\d+ of 12 rows are longer than \[model\] max_length", cut.value)
    for noise, value in ((1.0, "costs this site epsilon "), (0.01, "above 50 it protects nobody")):
        own = '[privacy]\nunit = "client"\nnoise_at = "client"\nclip = 0.1\nnoise_multiplier = '
        short.write_text(f"{run.read_text()}\n{own}{noise}\n")
        (cost,) = (check for check in check_site(path, short) if check.name == "privacy")
        assert (cost.ok, value in f"{cost.value}{cost.fix}") == (noise == 1.0, True)
    path.write_text(text + "[policy]\nmax_rank = 1\nmax_steps = 1\n")
    failed = {check.name for check in check_site(path, run, insecure=True) if not check.ok}
    assert failed == {"server", "policy", "steps per round"}
    path.write_text(text.replace("train.jsonl", "gone.jsonl"))
    failed = {check.name for check in check_site(path, run, insecure=True) if not check.ok}
    assert failed == {"server", "data"}


def test_site_check_says_where_privacy_would_protect_none_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = sites.config(tmp_path, method="fedit"), tmp_path / "SITE.toml"
    rows = tmp_path / "clients" / CLIENT / "train.jsonl"
    some = [json.loads(line) for line in rows.read_text().splitlines()]
    sites.write_rows(rows, [{**some[i % len(some)], "text": f"great {i}"} for i in range(200)])
    path.write_text(
        f'[site]\nid = "{CLIENT}"\nserver = "127.0.0.1:9"\n[model]\npath = "model"\n'
        f'[data]\ntrain = "clients/{CLIENT}/train.jsonl"\n[engine]\ndevice = "cpu"\n'
    )
    plain = run.read_text()

    def found(privacy: str, dropout: str = "0.0") -> Check:
        before = plain.replace("dropout = 0.1", f"dropout = {dropout}")
        run.write_text(f'{before}\n[privacy]\nunit = "example"\nclip = 0.1\n{privacy}\n')
        (check,) = (check for check in check_site(path, run, insecure=True) if check.name == "privacy")
        return check

    assert found("epsilon = 2.0").ok
    many = found("epsilon = 2.0\ndelta = 0.009")
    assert not many.ok
    assert re.search(rf"client {CLIENT} has \d+ training rows, and publishing one of them at random", many.value)
    assert "install" not in many.fix
    mixed = found("epsilon = 2.0", "0.1")
    assert "[privacy] does not work with fedit here" in mixed.value
    assert mixed.fix == "ask whoever runs the server to change [privacy]"
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    spent_before.cache_clear()
    multiplier_for.cache_clear()
    missing = found("epsilon = 3.0")
    assert (missing.ok, missing.fix) == (False, "pip install 'coterie[privacy]'")


def test_the_servers_config_needs_no_rows(tmp_path: Path) -> None:
    config = federation_config({"federation": {"sites": ["a", "b"]}, "method": {"name": "fedit"}})
    assert [client.id for client in config.data.clients] == ["a", "b"]
    with pytest.raises(CoterieError, match=r"\[federation\] unknown key 'deadlin'; did you mean 'deadline'"):
        federation_config({"federation": {"deadlin": 3}})


def test_instructions_survive_the_way(fedit: tuple[Any, bytes]) -> None:
    assert codec.decode(Instruction, fedit[1]).tensors
    assert isinstance(Worker(flower_sites.site_settings(Path("."), CLIENT), Path(".")).state, Path)
