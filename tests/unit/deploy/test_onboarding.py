"""Sites that come after the end of a federation, in process: what they get, what they send, what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import coterie
import flower_sites
import pools
import sites
from coterie.adapters.bundle import read_bundle
from coterie.artifacts.onboard import onboard as onboard_from_folder
from coterie.deploy import server
from coterie.deploy.attempt import begin_attempt, read_attempt
from coterie.deploy.events import Exchanged, Onboarded, Refused
from coterie.deploy.journal import JOURNAL, read_journal
from coterie.deploy.keys import init_keys
from coterie.deploy.onboard import check_newcomers
from coterie.deploy.status import status_of, took_part
from coterie.files import write_json
from coterie.flower.app import GridTransport
from coterie.runs.folder import plain
from coterie.types import CoterieError
from grid import InProcessGrid

FIRST, LATE = ["mood-0", "place-0", "size-0"], "mood-1"
TELLING = ("journal", JOURNAL, "attempt.json", "base.json")  # what a start of the server writes


def start(
    folder: Path, there: list[str], newcomers: list[str], policy: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """Start the server once more over the sites that are there; returns the run's folder.

    ``changes`` are of the run's config. With secure aggregation every site has its own key.
    """
    torch.set_num_threads(1)
    federation = {"sites": FIRST, "wait": 0.3, "greeting": 0.0}
    config = flower_sites.server_config(folder / "run.toml", federation=federation, **changes)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", {"root": str(folder), "config": plain(config)})
    begin_attempt(out, {}, newcomers)
    staff = flower_sites.workers(folder, there, policy=dict(policy or {}))
    for name, worker in staff.items() if config.secure_aggregation.enabled else ():
        keys = {"key": f"keys/sites/{name}", "peers": "keys/sites"}
        worker.site = worker.site.model_copy(update={"site": worker.site.site.model_copy(update=keys)})
    grid = InProcessGrid({11 + i: staff[c].answer for i, c in enumerate(there)})
    transport = GridTransport(grid, pause=0.01)
    server.main(transport, {"folder": str(out)})
    return out


@pytest.fixture(autouse=True)
def _no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_end_with_parent", lambda: None)


def results(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in TELLING and not path.name.endswith("lock")
    }


ROWS = {"unit": "example", "clip": 0.5, "noise_multiplier": 1.0}
CLIENTS = {"unit": "client", "clip": 0.1, "noise_multiplier": 1.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedlease": ("fedlease", {}),
    "fedamole": ("fedamole", {}),
    "smartfed": ("smartfed", {"method": {"pool": pools.for_tiny(), "active": 3}}),
    "secure sums": ("fedit", {"secure_aggregation": {"enabled": True}}),
    "noise at the server": ("fedit", {"privacy": CLIENTS}),
    "noise at the sites": ("fedit", {"privacy": {**CLIENTS, "noise_at": "client"}}),
    "noise in training": ("fedit", {"privacy": ROWS, "lora": {"dropout": 0.0}}),
    "shared heads": ("fedit", {"task": {"head": "shared"}}),
}


@pytest.mark.parametrize(("method", "changes"), SETTINGS.values(), ids=SETTINGS)
def test_a_late_site_gets_by_message_what_onboard_gives_from_the_servers_files(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    sites.config(tmp_path, method=method)
    init_keys(tmp_path / "keys", [*FIRST, LATE], ["127.0.0.1"])
    if "privacy" in changes:
        changes = {**changes, "run": {"export": "last"}}
    out = start(tmp_path, FIRST, [], **changes)
    before = results(out)
    assert {"summary.json", "config.json"} <= before.keys()
    start(tmp_path, [LATE, FIRST[0]], [LATE], **changes)
    assert results(out) == before
    events = [entry.event for entry in read_journal(out)]
    (joined,) = [event for event in events if isinstance(event, Onboarded)]
    assert joined.client == LATE
    shown = set() if "privacy" in changes else {"loss", "accuracy"}
    assert joined.before.keys() == joined.after.keys() >= shown
    assert bool(joined.before) == bool(shown)
    (sent,) = [event for event in events if isinstance(event, Exchanged) and event.kind == "query.onboard"]
    assert sent.bytes_up < 2_000 < sent.bytes_down  # numbers alone
    refused = {event.reason for event in events if isinstance(event, Refused)}
    assert refused == {f"the run is finished, and only {LATE} can join it now; {FIRST[0]} is not among these"}
    status = status_of(read_journal(out))
    assert (status.phase, took_part(status.sites[LATE])) == ("finished", f"joined after {joined.round}")

    bundle = tmp_path / "states" / LATE / read_attempt(out).run / "export"
    local = onboard_from_folder(out, tmp_path / "clients" / LATE, tmp_path / "local")
    assert local.after.keys() >= {"loss", "accuracy"}  # with [privacy] too: it stays at the site
    assert not shown or local.after == joined.after
    ours, theirs = read_bundle(bundle)[0], read_bundle(tmp_path / "local")[0]
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(value, theirs.tensors[key]) for key, value in ours.tensors.items())
    assert len(coterie.load(bundle).predict([{"text": "awful"}])) == 1


def test_a_site_sends_no_metrics_and_takes_no_step_that_it_did_not_agree_to(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    out = start(tmp_path, FIRST, [])
    start(tmp_path, [LATE], [LATE], policy={"upload_metrics": False})
    with pytest.raises(CoterieError, match=r"not onboarded: mood-1: round \d+ would take .*\[policy\] max_steps"):
        start(tmp_path, [LATE], [LATE], policy={"max_steps": 2})
    (joined,) = [entry.event for entry in read_journal(out) if isinstance(entry.event, Onboarded)]
    assert (joined.before, joined.after) == ({}, {})
    assert joined.trained > 0


def test_a_site_that_does_not_come_is_named_and_the_others_join(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    out = start(tmp_path, FIRST, [])
    with pytest.raises(CoterieError, match=r"west: not connected within 0\.3 s.*Start again with --onboard west"):
        start(tmp_path, [LATE], ["west", LATE])
    assert [entry.event.client for entry in read_journal(out) if isinstance(entry.event, Onboarded)] == [LATE]
    for names, why in ((["Mood-0"], "mood-0 took part in this run"), (["../x"], "not a valid site id")):
        with pytest.raises(CoterieError, match=why):
            check_newcomers(out, names)
    (out / "summary.json").unlink()
    with pytest.raises(CoterieError, match="is not finished, and --onboard is for sites that come after the end"):
        check_newcomers(out, [LATE])
