"""What runs in Flower's ServerApp, over sites in process: who may join a run that has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Message

import flower_sites
import sites
from coterie.engines.flower import GridTransport, InProcessGrid
from coterie.federation import server
from coterie.federation.journal import JOURNAL, Journal, read_journal
from coterie.federation.serve import _write_deal
from coterie.files import write_json
from coterie.run_folder import plain
from coterie.types import CoterieError

FIRST, LATE = ["mood-0", "place-0", "size-0"], "mood-1"


class DiedError(Exception):
    """The server is gone."""


def attempt(folder: Path, there: list[str], listed: list[str], dies_in: str = "") -> None:
    """Start the server once more, with some sites there and some listed; it may die in a round."""
    torch.set_num_threads(1)
    federation = {"sites": listed, "at_least": 3, "wait": 5.0, "greeting": 0.0}
    changes: dict[str, Any] = {"task": {"head": "shared"}, "federation": federation}
    config = flower_sites.server_config(folder / "run.toml", **changes)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", {"root": str(folder), "config": plain(config)})
    _write_deal(out, {})
    staff = flower_sites.workers(folder, there)

    def spoil(node: int, message: Message) -> Message:
        if dies_in and message.metadata.group_id == dies_in:
            raise DiedError
        return message

    grid = InProcessGrid({11 + i: staff[c].answer for i, c in enumerate(there)}, spoil=spoil)
    server.run(GridTransport(grid, pause=0.01), out, Journal(out / JOURNAL))


@pytest.mark.parametrize("listed", [FIRST, []], ids=["sites by name", "any site"])
def test_nobody_joins_shared_heads_later_and_it_says_so(listed: list[str], tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    with pytest.raises(DiedError):
        attempt(tmp_path, FIRST, listed, dies_in="2")
    for _ in range(2):  # what the first try left behind must not let it in at the second
        with pytest.raises(CoterieError, match=r"mood-1 cannot join now: with \[task\] head = \"shared\""):
            attempt(tmp_path, [*FIRST, LATE], [*FIRST, LATE])
    attempt(tmp_path, [LATE, *FIRST], listed)
    events = read_journal(tmp_path / "out")
    assert events[-1]["event"] == "finished"
    assert {e["client"] for e in events if e["event"] in ("joined", "exchange")} == {*FIRST}
    assert {e["reason"] for e in events if e["event"] == "refused"} == {
        'mood-1 was not there at the start, and with [task] head = "shared" nobody can join later'
    }
