"""A site: what it agreed to is enforced there, its socket is its user's alone, its log holds no text of its data."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

import flower_sites
import sites
from coterie import codec
from coterie.config import load_site
from coterie.deployment import Policy
from coterie.engines.parcel import BrokenParcelError, Parcel, hand_over, listening, receive, send
from coterie.engines.remote import Hello
from coterie.federation.policy import steps_of, without_usage
from coterie.federation.site_check import check as check_site
from coterie.federation.terms import federation_config, hash_of, terms_of
from coterie.federation.worker import Worker, _without_text, fingerprint, serve_forever
from coterie.types import CoterieError, Instruction, Optim, Part, Reply

CLIENT = "mood-0"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def head(config: Any, kind: str = "train", **changes: Any) -> dict[str, Any]:
    made = {"kind": kind, "client": CLIENT, "round": 1, "run": "run", "attempt": 1, "since": 0, "keep": 0}
    return {**made, "terms": terms_of(config), "patience": 60, **changes}


@pytest.fixture
def fedit(tmp_path: Path) -> tuple[Any, Any]:
    config = flower_sites.server_config(sites.config(tmp_path, method="fedit"))
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    hello = codec.decode(Hello, worker.answer(Parcel(head(config, "query.hello"))).blob)
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    return config, codec.encode(ins)


def refusal(folder: Path, parcel: Parcel, **sections: Any) -> str:
    answer = flower_sites.workers(folder, [CLIENT], **sections)[CLIENT].answer(parcel)
    assert answer.blob == b""
    return str(answer.head["error"])


POLICIES = {
    "method": ({"methods": ["fedlease"]}, "does not run fedit, only fedlease"),
    "rank": ({"max_rank": 1}, "at most 1 rank, the run has 2"),
    "rounds": ({"max_rounds": 2}, "at most 2 rounds, the run has 3"),
    "steps": ({"max_steps": 2}, "would take 3 steps here, and this site allows 2"),
    "settings": ({"settings": {"train.epochs": [2, 3]}}, "wants train.epochs = [2, 3], the run has 1"),
    "upload": ({"upload": ["A"]}, "this site does not send B"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_site_did_not_agree_to_is_refused_there(name: str, fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    policy, reason = POLICIES[name]
    assert reason in refusal(tmp_path, Parcel(head(config), blob), policy=policy)


def test_metrics_usage_and_banks_are_sent_only_as_agreed(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    ask = Parcel(head(config, "evaluate", splits=["test"], usage=True), blob)
    assert "sends no metrics" in refusal(tmp_path, ask, policy={"upload_metrics": False})
    bank = Parcel(head(config, "query.bank"), blob)
    kept = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    assert kept.answer(bank).blob == b""
    assert (kept.state / "run" / "export" / "bundle.safetensors").exists()
    given = flower_sites.workers(tmp_path, [CLIENT], policy={"upload_bank": True})[CLIENT]
    assert given.answer(bank).blob


def test_how_the_rows_use_the_experts_stays_where_that_was_agreed() -> None:
    reply = Reply({}, 3, {"loss": 0.5, "importance": {"q": 1.0}, "use": {"one": 0.5}})
    assert without_usage(Policy(), reply) == reply
    assert without_usage(Policy(upload_usage=False), reply) == Reply({}, 3, {"loss": 0.5})


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "shell"}, "knows no 'shell'"),
    "run": ({"run": "../../etc"}, "cannot name a folder"),
    "attempt": ({"attempt": "1"}, "attempt is no int"),
    "round": ({"round": 10**9}, "takes part in rounds 1 to 1000"),
    "client": ({"client": "size-0"}, "this is mood-0, the message is for size-0"),
    "terms": ({"terms": {}}, "not those that a coterie server sends"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_message_that_makes_no_sense_is_refused(name: str, fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, blob = fedit
    change, reason = HEADS[name]
    assert reason in refusal(tmp_path, Parcel({**head(config), **change}, blob))
    assert "cannot decode" in refusal(tmp_path, Parcel(head(config), b"junk"))


def test_another_version_is_refused(fedit: tuple[Any, bytes], tmp_path: Path) -> None:
    config, _ = fedit
    terms = {**terms_of(config), "coterie": "9.9"}
    assert "install the same version" in refusal(tmp_path, Parcel(head(config, "query.hello", terms=terms)))


def test_the_terms_hold_neither_paths_nor_addresses_nor_data(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="fedlease")
    config = flower_sites.server_config(path, federation={"host": "10.1.2.3", "keys": "secret-keys"})
    text = json.dumps(terms_of(config))
    for word in ("10.1.2.3", "secret-keys", "clients", "path", "folder"):
        assert word not in text
    assert hash_of(terms_of(config)) != hash_of(terms_of(flower_sites.server_config(path, lora={"rank": 3})))


def test_steps_are_counted_as_training_takes_them() -> None:
    assert steps_of(Optim(batch_size=4, epochs=2), 9) == 6
    assert steps_of(Optim(batch_size=4, epochs=2, accumulate=2), 9) == 4
    assert steps_of(Optim(steps=7), 9) == 7


def test_the_fingerprint_of_a_base_is_that_of_its_files(tmp_path: Path) -> None:
    sites.config(tmp_path)
    book, model = tmp_path / "book.json", tmp_path / "model"
    first = fingerprint(str(model), book)
    assert fingerprint(str(model), book) == first == fingerprint(str(model), tmp_path / "other.json")
    weights = model / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    os.utime(weights, ns=(1, 1))
    assert fingerprint(str(model), book) != first


# the socket ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    folder.chmod(0o700)
    return folder / "worker"


def answering(worker: Any, place: Path) -> threading.Thread:
    thread = threading.Thread(target=serve_forever, args=(worker, place), daemon=True)
    thread.start()
    while not place.exists():
        pass
    return thread


class Echo:
    def answer(self, parcel: Parcel) -> Parcel:
        return Parcel({"heard": parcel.head}, parcel.blob)


def test_a_worker_answers_over_its_socket(place: Path) -> None:
    answering(Echo(), place)
    for blob in (b"", b"x" * 3_000_000):
        assert hand_over(str(place), Parcel({"n": 1}, blob), 20) == Parcel({"heard": {"n": 1}}, blob)
    with socket.socket(socket.AF_UNIX) as rude:  # hangs up in the middle
        rude.connect(str(place))
        rude.sendall(b"\x01\x02")
    assert hand_over(str(place), Parcel({"n": 2}), 20).head == {"heard": {"n": 2}}


def test_only_its_user_can_open_the_socket(place: Path) -> None:
    with listening(place):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
    place.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="others may enter"):
        listening(place)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_is_turned_away(place: Path) -> None:
    heard: list[Parcel] = []

    class Listens(Echo):
        def answer(self, parcel: Parcel) -> Parcel:
            heard.append(parcel)
            return super().answer(parcel)

    answering(Listens(), place)
    place.parent.chmod(0o711)
    place.parent.parent.chmod(0o711)
    place.chmod(0o666)  # as if both modes had been lost
    child = os.fork()
    if child == 0:
        code = 0
        try:
            os.setuid(65534)
            hand_over(str(place), Parcel({"n": 1}), 5)
        except (OSError, BrokenParcelError):
            code = 7
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert heard == []


def test_half_a_parcel_is_an_error() -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, Parcel({"a": 1}, b"blob"))
        assert receive(other) == Parcel({"a": 1}, b"blob")
        one.sendall(b"\xff" * 12)
        with pytest.raises(BrokenParcelError, match="its head would have"):
            receive(other)


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
        assert "error" not in worker.answer(Parcel(head(config, kind, splits=["test"]), blob)).head
    worker.answer(Parcel({"kind": "awful street", "round": "great"}))
    try:
        raise KeyError("awful great street")
    except KeyError as fault:
        _without_text(type(fault), fault, fault.__traceback__)
    text = logged.text
    assert "train of round 1: done" in text
    assert "KeyError at" in text
    for job in sites.JOBS.values():
        for word in (*job[0], *job[1]):
            assert f" {word}" not in text


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
    assert "7 train" in found["data"].value or "train" in found["data"].value
    assert "targets, SHA-256" in found["model"].value
    path.write_text(text + "[policy]\nmax_rank = 1\nmax_steps = 1\n")
    failed = {check.name for check in check_site(path, run, insecure=True) if not check.ok}
    assert failed == {"server", "policy", "steps per round"}
    path.write_text(text.replace("train.jsonl", "gone.jsonl"))
    failed = {check.name for check in check_site(path, run, insecure=True) if not check.ok}
    assert failed == {"server", "data"}


def test_the_servers_config_needs_no_rows(tmp_path: Path) -> None:
    config = federation_config({"federation": {"sites": ["a", "b"]}, "method": {"name": "fedit"}})
    assert [client.id for client in config.data.clients] == ["a", "b"]
    with pytest.raises(CoterieError, match=r"\[federation\] unknown key 'deadlin'; did you mean 'deadline'"):
        federation_config({"federation": {"deadlin": 3}})


def test_instructions_survive_the_way(fedit: tuple[Any, bytes]) -> None:
    assert codec.decode(Instruction, fedit[1]).tensors
    assert isinstance(Worker(flower_sites.site_settings(Path("."), CLIENT), Path(".")).state, Path)
