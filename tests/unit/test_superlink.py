"""A SuperLink that somebody else started, a command of Flower's that does not answer, and who may look and listen."""

from __future__ import annotations

import stat
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flower_sites
import sites
from coterie.engines import flower
from coterie.federation import superlink
from coterie.federation.journal import JOURNAL, Journal, Reader
from coterie.federation.processes import flower_environment
from coterie.federation.serve import Supervisor, serve
from coterie.federation.superlink import SuperLink
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
        Journal(tmp_path / JOURNAL)({"event": "finished"})
        return {"run-id": "7"}

    monkeypatch.setattr(SuperLink, "answers", lambda self: True)
    monkeypatch.setattr(SuperLink, "register", lambda self: {})
    monkeypatch.setattr(SuperLink, "_flwr", flwr)
    Supervisor(link, tmp_path, 0, lambda event: None).run()
    where = {"address": "10.1.2.3:9092", "root-certificates": str(keys / "ca.crt")}
    assert asked == [("run", where)]
    assert link.process is None


def test_a_round_that_ended_gives_the_restarts_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def attempt(self: Supervisor, reader: Reader) -> str:
        tried.append(len(tried))
        if len(tried) == 3:
            Journal(tmp_path / JOURNAL)({"event": "round", "round": 1})
            self._hear(reader)
        return "the SuperLink died"

    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    with pytest.raises(CoterieError, match="started again 2 times without a round"):
        Supervisor(SuperLink(tmp_path, "127.0.0.1", 1, None), tmp_path, 2, lambda event: None).run()
    assert len(tried) == 5  # two, and after the round of the third two again


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
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):
        monkeypatch.setenv(name, "1")
    made = flower_environment(tmp_path)
    assert not [name for name in made if name.startswith("FLWR_INTERNAL_GRPC")]
    assert made["FLWR_HOME"] == str(tmp_path)


def test_a_supernode_looks_sooner_for_a_while_after_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import cli, start_client_internal

    found, slept, now = iter([None, 7, None]), list[float](), [1000.0]

    def supernode() -> None:
        """Flower's loop: three looks, and at last one after a long time without a message."""
        for seconds in (0.0, 0.0, 100.0):
            now[0] += seconds
            start_client_internal._pull_and_store_message()  # type: ignore[call-arg]
            start_client_internal.time.sleep(3)  # type: ignore[attr-defined]
        now[0] += 30.0
        start_client_internal.time.sleep(3)  # type: ignore[attr-defined]
        start_client_internal.time.sleep(0.1)  # type: ignore[attr-defined]

    monkeypatch.setattr(cli, "flower_supernode", supernode)
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", lambda: next(found))
    monkeypatch.setattr(start_client_internal, "time", None)
    monkeypatch.setattr(flower, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append))
    flower.supernode_command()
    assert slept == [3, 0.5, 0.5, 3, 0.1]
