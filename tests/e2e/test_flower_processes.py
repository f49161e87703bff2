"""Federations of real processes on loopback, with what goes wrong in them: `make test-flower`."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

import sites
from coterie.deploy.keys import site_key
from flower_processes import Processes, experts, in_process, newest_state, processes, write_site

pytestmark = [pytest.mark.flower, pytest.mark.slow]
A, B, STRANGER = "mood-0", "size-0", "place-0"


def same_as_in_process(made: Processes) -> None:
    whole = in_process(made.folder, (A, B))
    assert experts(made.run) == experts(whole)
    assert newest_state(made.run) == newest_state(whole)
    for client in (A, B):
        (kept,) = (made.folder / f"state-{client}").glob("run-*/personal")
        name = max(p.name for p in (whole / "personal" / client).iterdir())
        assert (kept / client / name).read_bytes() == (whole / "personal" / client / name).read_bytes()


def test_tls_with_a_site_a_worker_the_superlink_and_the_server_killed(tmp_path: Path) -> None:
    """Ends with the experts of the same federation in process, bit for bit."""
    settings = "wait = 600\ndeadline = 600\ngreeting = 400"
    run = "rounds = 6\nevaluate_every = 6"
    with processes(tmp_path, [A, B], insecure=False, run=run, federation=settings) as made:
        done = made.coterie("keys", "init", "keys", "--sites", f"{A},{B}", "--host", "127.0.0.1")
        assert done.returncode == 0, done.stderr
        (tmp_path / "foreign").mkdir()
        site_key(tmp_path / "foreign" / "key")
        port = int(re.search(r"port = (\d+)", (tmp_path / "serve.toml").read_text())[1])  # type: ignore[index]
        write_site(tmp_path, STRANGER, port, "foreign/key")
        made.serve()
        for site in (A, B, STRANGER):  # a key that nobody registered
            made.join(site)
        made.event("round", round=1)
        log = tmp_path / f"state-{STRANGER}" / "supernode.log"
        made.until(lambda: log.exists() and "Failed to activate SuperNode" in log.read_text(), "refusal of a stranger")
        made.end(STRANGER)

        made.next("start")
        made.descendant(A, "worker_process import work").kill()
        made.descendant(B, "supernode_command").kill()
        made.next("start")
        made.descendant("serve", "superlink_command").kill()
        made.event("attempt", attempt=2)
        made.next("start")
        made.kill("serve")
        made.until(lambda: not listens(port), "end of the SuperLink of a server that was killed")
        assert not (made.run / "summary.json").exists()
        made.serve("--resume")
        made.finished()

        events = made.lines()
        assert {e["client"] for e in events if e["event"] == "joined"} == {A, B}
        assert [e["failed"] for e in events if e["event"] == "round" and e["failed"]] == []
        assert max(e["attempt"] for e in events if e["event"] == "attempt") == 3
        assert "ready" in (tmp_path / f"state-{A}" / "site.log").read_text()
        assert (tmp_path / f"state-{A}" / "site.log").read_text().count("ready, process") == 2
        said = made.coterie("status", "run").stdout
        assert "finished; 6 of 6 rounds done" in said
        assert f"{A}" in said
        no_text_of_the_data(tmp_path)
        same_as_in_process(made)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def no_text_of_the_data(folder: Path) -> None:
    words = {word for names, examples in sites.JOBS.values() for word in (*names, *examples)} - {
        "size",
        "place",
        "city",
    }
    logs = [path for path in folder.glob("state-*/*.log") if path.stat().st_size]
    assert len(logs) >= 4
    for path in logs:
        found = set(re.findall(r"[a-z]+", path.read_text(errors="replace").lower())) & (words - {"big", "good", "bad"})
        assert not found, path
