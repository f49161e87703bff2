"""A SuperLink that somebody else started, a command of Flower's that does not answer, and who may look and listen."""

from __future__ import annotations

import socket
import stat
import subprocess
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import flower_sites
import sites
from coterie.deploy import superlink
from coterie.deploy.events import Finished
from coterie.deploy.journal import JOURNAL, Journal, Reader, read_journal
from coterie.deploy.keys import init_keys, key_digest
from coterie.deploy.processes import flower_environment
from coterie.deploy.serve import Supervisor, serve
from coterie.deploy.status import status_of
from coterie.deploy.superlink import SuperLink
from coterie.flower.refused import RefusedKey, RefusedKeys
from coterie.runs.events import CheckpointSaved, Event, RoundDone
from coterie.types import CoterieError


def test_flowers_programs_are_told_of_a_superlink_that_others_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers already, so that nothing is started; the run is submitted to it all the same."""
    keys = tmp_path / "keys"
    link = SuperLink(tmp_path / "flower", "127.0.0.1", 1, keys, "10.1.2.3:9092")
    asked = []

    def flwr(self: SuperLink, command: str, *args: str) -> dict[str, Any]:
        asked.append((command, tomllib.loads((self.home / "config.toml").read_text())["superlink"]["coterie"]))
        Journal(tmp_path / JOURNAL)(Finished())
        return {"run-id": "7"}

    monkeypatch.setattr(SuperLink, "answers", lambda self: True)
    monkeypatch.setattr(SuperLink, "register", lambda self: {})
    monkeypatch.setattr(SuperLink, "_flwr", flwr)
    Supervisor(link, tmp_path, 0, lambda event: None).run()
    where = {"address": "10.1.2.3:9092", "root-certificates": str(keys / "ca.crt")}
    assert asked == [("run", where)]
    assert link.process is None


@pytest.mark.parametrize(
    ("checkpoints", "attempts"),
    [([None, None, 1], 5), ([1, 1, 1, 1, 1], 3), ([1, 2, 1, 2], 4), ([1, 2, 3, 4], 6)],
    ids=["late", "the same again", "back and again", "further each time"],
)
def test_only_a_new_checkpoint_gives_the_restarts_back(
    checkpoints: list[int | None], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, made = 0, iter(checkpoints)

    def attempt(self: Supervisor, reader: Reader) -> str:
        """A server that dies after some round's events; the round itself may be one that was done before."""
        nonlocal tried
        tried += 1
        journal, rnd = Journal(tmp_path / JOURNAL), next(made, None)
        journal(RoundDone(9))
        if rnd is not None:
            journal(CheckpointSaved(rnd))
        self._pass_on(reader)
        return "the SuperLink died"

    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    with pytest.raises(CoterieError, match=r"the SuperLink died, once more than \[federation\] restarts = 2 allows"):
        Supervisor(SuperLink(tmp_path, "127.0.0.1", 1, None), tmp_path, 2, lambda event: None).run()
    assert tried == attempts


@pytest.mark.parametrize("dies", [True, False])
def test_a_superlink_that_dies_before_the_run_is_submitted_is_started_again(
    dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(self: SuperLink, folder: Path) -> str:
        raise CoterieError("flwr run failed: the SuperLink is unavailable")

    monkeypatch.setattr(SuperLink, "start", lambda self: None)
    monkeypatch.setattr(SuperLink, "alive", lambda self: not dies)
    monkeypatch.setattr(SuperLink, "answers", lambda self: True)
    monkeypatch.setattr(SuperLink, "submit", submit)
    with pytest.raises(CoterieError, match="^the SuperLink died, once more" if dies else "^flwr run failed"):
        Supervisor(SuperLink(tmp_path, "127.0.0.1", 1, None), tmp_path, 1, lambda event: None).run()


def test_a_metrics_port_that_is_taken_is_named_and_nothing_is_begun(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        config = flower_sites.server_config(sites.config(tmp_path), federation={"metrics_port": port})
        with pytest.raises(CoterieError, match=rf"\[federation\] metrics_port = {port}: Address already in use"):
            serve(config, tmp_path / "run", root=tmp_path, insecure=True)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_command_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any, timeout: float, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("flwr", timeout)

    monkeypatch.setattr(superlink.subprocess, "run", hang)
    with pytest.raises(CoterieError, match="flwr list gave no answer within 120 s"):
        SuperLink(tmp_path, "127.0.0.1", 1, None).status("7")


def test_the_servers_run_folder_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EndedError(Exception): ...

    def run(self: Supervisor) -> None:
        raise EndedError

    monkeypatch.setattr(Supervisor, "run", run)
    config, folder = flower_sites.server_config(sites.config(tmp_path)), tmp_path / "runs" / "one"
    for resume in (False, True):
        with pytest.raises(EndedError):
            serve(config, folder, root=tmp_path, resume=resume, insecure=True)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o755)


def test_flower_opens_no_second_port_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor lets a request from elsewhere say that it comes from this machine, which may do everything."""
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    made = flower_environment(tmp_path)
    assert not [name for name in made if name.startswith(("FLWR_INTERNAL_GRPC", "FORWARDED"))]
    assert made["FLWR_HOME"] == str(tmp_path)


def test_who_is_refused_for_a_key_is_named_in_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run never hears of these nodes: the SuperLink's process notes them, and `coterie serve` passes it on."""
    init_keys(tmp_path / "keys", ["north"], ["127.0.0.1"])
    (tmp_path / "flower").mkdir()
    book = RefusedKeys(tmp_path / "flower")
    book.add(RefusedKey("earlier", False))
    link = SuperLink(tmp_path / "flower", "127.0.0.1", 1, tmp_path / "keys")
    book.add(RefusedKey(key_digest(tmp_path / "keys" / "sites" / "north.pub"), True))
    book.add(RefusedKey("e24c476b935a9f21", False))
    monkeypatch.setattr(SuperLink, "alive", lambda self: False)
    heard: list[Event] = []
    assert Supervisor(link, tmp_path, 0, heard.append)._watch("7", Reader(tmp_path / JOURNAL)) == "the SuperLink died"
    notes = status_of(read_journal(tmp_path)).notes
    north = key_digest(tmp_path / "keys" / "sites" / "north.pub")[:12]
    assert notes == [
        f"node with the key {north} was refused: the key of north is in use by another node; one that takes its place, "
        "after a crash, is let in within about a minute",
        "node with the key e24c476b935a was refused: its key is registered for no site; add it with `coterie keys "
        "add`, and start the server again",
    ]
    assert len(heard) == 2
