"""A site's disk: full, or with its state deleted while the site runs. And the export that is written later."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import sites
from coterie import codec, files
from coterie.adapters.bundle import read_bundle
from coterie.config.sections import Config
from coterie.deploy import site
from coterie.deploy.agreement import terms_of
from coterie.deploy.hello import Hello
from coterie.deploy.processes import private_files
from coterie.deploy.site_export import export
from coterie.deploy.worker import Worker
from coterie.flower.local_socket import hand_over
from coterie.flower.message import Message
from coterie.types import CoterieError

CLIENT = "mood-0"
FULL = "the site's disk is full: free some space there"
SITE = """
[site]
id = "mood-0"
server = "127.0.0.1:1"
state = "states/mood-0"
[model]
path = "model"
[data]
train = "clients/mood-0/train.jsonl"
test = "clients/mood-0/test.jsonl"
validation = "clients/mood-0/validation.jsonl"
[engine]
device = "cpu"
threads = 1
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def message(config: Config, kind: str, body: bytes = b"", rnd: int = 1, keep: int = 0) -> Message:
    head = {
        "kind": kind,
        "client": CLIENT,
        "round": rnd,
        "run": "run",
        "attempt": 1,
        "since": 0,
        "keep": keep,
        "kept_rounds": [],
    }
    return Message({**head, "terms": terms_of(config), "patience": 60, "splits": ["test"]}, body)


@pytest.fixture
def started(tmp_path: Path) -> tuple[Config, Worker, bytes]:
    """The server's config, a worker that has met the server, and an instruction for round 1."""
    config = flower_sites.server_config(sites.config(tmp_path, method="fedit"))
    worker = flower_sites.workers(tmp_path, [CLIENT])[CLIENT]
    hello = codec.decode(Hello, worker.answer(message(config, "query.hello")).body)
    method = flower_sites.method_of(config)
    ins = method.configure(method.init(hello.spec, [hello.info]), [hello.info], 1)[CLIENT]
    (tmp_path / "site.toml").write_text(SITE, encoding="utf-8")
    return config, worker, codec.encode(ins)


@contextmanager
def full_disk(code: int = errno.ENOSPC) -> Iterator[None]:
    """Nothing can be written."""

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        yield


def test_a_full_disk_is_said_to_be_one_and_the_site_takes_part_again(started: tuple[Config, Worker, bytes]) -> None:
    config, worker, ins = started
    with full_disk():
        assert worker.answer(message(config, "train", ins)).head["error"] == FULL
    with full_disk(errno.EROFS):
        error = worker.answer(message(config, "train", ins)).head["error"]
        assert error == "the site cannot read or write one of its files (Read-only file system): see site.log there"
    assert "error" not in worker.answer(message(config, "train", ins)).head


def test_a_full_disk_costs_no_evaluation(started: tuple[Config, Worker, bytes]) -> None:
    config, worker, ins = started
    assert "error" not in worker.answer(message(config, "train", ins)).head
    with full_disk():
        assert "error" not in worker.answer(message(config, "evaluate", ins)).head


@pytest.mark.parametrize("evaluated", [True, False], ids=["kept before", "kept in memory"])
def test_an_export_that_a_full_disk_prevented_is_written_later(
    evaluated: bool, started: tuple[Config, Worker, bytes], tmp_path: Path
) -> None:
    config, worker, ins = started
    assert "error" not in worker.answer(message(config, "train", ins)).head
    if evaluated:
        worker.answer(message(config, "evaluate", ins))
    with full_disk():
        error = worker.answer(message(config, "query.bank", ins)).head["error"]
    assert error == f"{FULL}; `coterie site export` there writes the bundle later"
    if not evaluated:
        with pytest.raises(CoterieError, match="has no instruction of any run"):
            export(tmp_path / "site.toml")
        worker.catch_up()  # as it does when it has nothing else to do
    later = export(tmp_path / "site.toml")
    assert later == tmp_path / "states" / CLIENT / "run" / "export"
    bank, info = read_bundle(later)
    shutil.rmtree(later)
    assert "error" not in worker.answer(message(config, "query.bank", ins)).head
    expected, about = read_bundle(later)
    assert info == about
    assert info.round == 1
    assert codec.encode(bank) == codec.encode(expected)


def test_an_export_of_a_round_whose_state_is_gone_is_refused(
    started: tuple[Config, Worker, bytes], tmp_path: Path
) -> None:
    config, worker, ins = started
    worker.answer(message(config, "train", ins))
    worker.answer(message(config, "evaluate", ins))
    for rnd in (2, 3):
        assert "error" not in worker.answer(message(config, "train", ins, rnd, keep=rnd - 1)).head
    with pytest.raises(CoterieError, match=r"has the state of round 3, but no longer that of round 1: .*join the run"):
        export(tmp_path / "site.toml", "run")
    received = tmp_path / "states" / CLIENT / "run" / "received"
    received.write_bytes(received.read_bytes()[:-1])
    with pytest.raises(CoterieError, match=r"received is damaged .*join the run to receive it again"):
        export(tmp_path / "site.toml")
    with pytest.raises(CoterieError, match="no instruction of the run other"):
        export(tmp_path / "site.toml", "other")


# a state that is deleted under a running site ------------------------------------------------------------------------


def modes(folder: Path) -> set[tuple[bool, str]]:
    """Whether a folder, and the mode, of ``folder`` and of everything in it."""
    return {(path.is_dir(), oct(path.stat().st_mode & 0o777)) for path in [folder, *folder.rglob("*")]}


def until(true: Any, what: str) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    pytest.fail(f"{what} within a minute")


def test_a_deleted_state_ends_what_uses_it_and_is_made_again_for_its_user_alone(tmp_path: Path) -> None:
    state, args = tmp_path / "state", [sys.executable, "-c", "import time; time.sleep(600)"]
    child = site.Child("child", args, dict(os.environ), state / "child.log")

    def once() -> int:
        """Take part until the state is deleted; returns the process that ran."""
        part = threading.Thread(target=site.take_part, args=(state, [child]))
        part.start()
        until(lambda: child.process is not None, "no child started")
        assert (state / "child.log").exists()
        assert modes(state) == {(True, "0o700"), (False, "0o600")}
        process = child.process
        assert process is not None
        shutil.rmtree(state)
        part.join(30)
        assert not part.is_alive()
        assert process.poll() is not None
        return process.pid

    with private_files():
        assert once() != once()


@pytest.mark.slow
def test_a_worker_makes_its_folders_again_for_its_user_alone(
    started: tuple[Config, Worker, bytes], tmp_path: Path
) -> None:
    config, _, ins = started
    room = tmp_path / "room"
    room.mkdir(mode=0o700)
    state, path = tmp_path / "states" / CLIENT, str(room / "w")
    shutil.rmtree(state)  # made in this process
    process = subprocess.Popen([sys.executable, "-P", "-c", site._WORKER, str(tmp_path / "site.toml"), path])
    try:
        until(lambda: Path(path).exists(), "no worker")
        for _ in range(2):
            assert "error" not in hand_over(path, message(config, "train", ins), 60).head
            assert "error" not in hand_over(path, message(config, "query.bank", ins), 60).head
            made = [p.name for p in state.rglob("*")]
            assert {"attempt.json", "bundle.safetensors", "000001.safetensors"} <= {*made}
            assert modes(state) == {(True, "0o700"), (False, "0o600")}
            shutil.rmtree(state)
    finally:
        process.kill()
        process.wait()


# why a process of the site ended -------------------------------------------------------------------------------------

REFUSED = """INFO:     Uvicorn running on http://127.0.0.1:35387 (Press CTRL+C to quit)
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.
The SuperNode could not establish a connection to the SuperLink.
"""


def test_a_site_says_that_the_server_refuses_its_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On the terminal and in site.log, from what Flower wrote since the process was started."""
    state = tmp_path / "state"
    args = [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(1)", REFUSED]
    child = site.Child("supernode", args, dict(os.environ), state / "supernode.log", site.why_a_supernode_ended)
    part = threading.Thread(target=site.take_part, args=(state, [child]))
    part.start()
    until(lambda: child.failures, "it did not end")
    shutil.copy(state / "site.log", tmp_path / "site.log")
    shutil.rmtree(state)
    part.join(30)
    line = "supernode ended with 1: the server refuses this site's key. Either it is not registered there, and whoever "
    assert line in (tmp_path / "site.log").read_text()
    assert line in capfd.readouterr().err


def test_the_reason_is_at_the_end_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "supernode.log"
    path.write_text(REFUSED.replace("2004", "8"))  # of an earlier process
    child = site.Child("supernode", [], {}, path, site.why_a_supernode_ended, _log_at=path.stat().st_size)
    with path.open("a") as file:
        file.write("a line of the log\n" * 20_000 + REFUSED.replace("2004", "9"))
    assert child._why().endswith("[code: 9] Failed to activate SuperNode.")
    path.write_text(path.read_text()[: child._log_at])
    assert child._why() == "", "nothing was written since"


def test_otherwise_it_says_what_flower_said() -> None:
    assert site.why_a_supernode_ended(REFUSED.replace("2004", "9")) == (
        "Failed to initialize the connection to the SuperLink. [code: 9] Failed to activate SuperNode."
    )
    assert site.why_a_supernode_ended("Killed\n") == ""
