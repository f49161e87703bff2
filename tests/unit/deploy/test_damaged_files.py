"""What a server and a site keep of a run: each damaged file is named, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import tiny
from coterie import codec
from coterie.deploy.attempt import begin_attempt, read_attempt
from coterie.deploy.base_digest import files_digest
from coterie.deploy.private_site import Releases
from coterie.deploy.received import newest_received
from coterie.deploy.secure_site import note_opened
from coterie.engines.store import ClientStates, PersonalStore
from coterie.methods.privacy import PrivacySettings
from coterie.types import CoterieError, Instruction
from secure_sums import session

WRONG = ["", "null", "1", "[]", "[[]]", '"a"', '{"run": null}', '{"1": {"instruction": "x"}}', '{"1": []}', "\xff", "{"]


def refused(path: Path, text: str, read: Callable[[], object], fix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CoterieError, match=f"{path.name}.* is damaged.*; {fix}"):
        read()


@pytest.mark.parametrize("text", WRONG)
def test_files_of_a_run_at_the_server_and_at_a_site(text: str, tmp_path: Path) -> None:
    refused(tmp_path / "attempt.json", text, lambda: read_attempt(tmp_path), "restore it")
    refused(tmp_path / "attempt.json", text, lambda: begin_attempt(tmp_path, {}), "restore it")
    opened = tmp_path / "opened.json"
    refused(opened, text, lambda: note_opened(opened, session(4), ("s0", "s1"), "sent"), "delete the folder of the run")
    received = tmp_path / "run" / "received"
    refused(received, f"{text}\n", lambda: newest_received(tmp_path), "join the run")
    body = codec.encode(Instruction({}, {})).decode("latin-1")
    refused(received, f"{text}\n{body}", lambda: newest_received(tmp_path), "join the run")


@pytest.mark.parametrize("text", WRONG)
def test_the_digest_of_a_base(text: str, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    refused(tmp_path / "base.json", text, lambda: files_digest(str(base), tmp_path / "base.json"), "delete it")


@pytest.mark.parametrize("text", WRONG)
def test_replies_with_a_sites_own_noise(text: str, tmp_path: Path) -> None:
    method = SimpleNamespace(plan=SimpleNamespace(privacy=PrivacySettings()))
    releases = Releases(tmp_path, cast(Any, method), 3, cast(Any, None))
    head = SimpleNamespace(rnd=1, terms={})
    path = tmp_path / "released" / "000001"
    refused(path, f"{text}\n", lambda: releases.check(cast(Any, head), b""), "leave the run")


@pytest.mark.parametrize("damage", [b"", b"\xff" * 99, None])
def test_a_state_that_is_put_back_with_a_reply(damage: bytes | None, tmp_path: Path) -> None:
    hidden = PrivacySettings(unit="example", clip=1.0, noise_multiplier=1.0)
    method = SimpleNamespace(plan=SimpleNamespace(privacy=hidden))
    client = SimpleNamespace(id="a", states=ClientStates(PersonalStore(tmp_path)))
    path = tmp_path / "released" / "000001"
    path.parent.mkdir()
    path.write_bytes(b"{}\n")
    if damage is not None:
        path.with_suffix(".personal").write_bytes(damage)
    with pytest.raises(CoterieError, match=r"released/000001\.personal of the run at this site is damaged; restore it"):
        Releases(tmp_path, cast(Any, method), 3, cast(Any, client)).answered(1)
