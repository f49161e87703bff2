"""What runs in Flower's ServerApp: the rounds of a run folder, over the sites that are there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie import codec
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.rows import Federation
from coterie.deploy.agreement import hash_of, terms_of
from coterie.deploy.journal import JOURNAL, Journal, read_journal
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.serve import DEAL
from coterie.deploy.sites import Deal, Hello, Roster
from coterie.deploy.status import status_of, table_of
from coterie.experiment import Opened, finish, rounds_of, set_threads
from coterie.files import remove_parts, write_atomic, write_json
from coterie.flower.message import Transport
from coterie.report.page import SITES
from coterie.runs.checkpoint import newest_round
from coterie.runs.folder import full_disk_told, held, read_run
from coterie.runs.rounds import Runner
from coterie.types import ClientId, CoterieError, Json

_KNOWN = "sites.safetensors"
# A shared head is averaged over the sites that the method's state holds for it, and these are set when it starts.
_SHARED = 'with [task] head = "shared" nobody can join later'
_LAST_SECONDS = 5.0  # for Flower's own way out
_LOCK_SECONDS = 90.0  # for which the server of an earlier attempt may still be on its way out


def main(transport: Transport, run_config: Mapping[str, Any]) -> None:
    """Go on with the run in ``run_config["folder"]`` from its last checkpoint, to its end."""
    _end_with_parent()
    folder = Path(str(run_config["folder"]))
    journal = Journal(folder / JOURNAL)
    try:
        with ExitStack() as stack:
            _take(stack, folder)
            stack.enter_context(full_disk_told(folder))
            remove_parts(folder)
            run(transport, folder, journal)
    except CoterieError as fault:
        journal({"event": "stopped", "error": str(fault)})
        raise


def _end_with_parent() -> None:
    """End this process when Flower's process above it is gone.

    Flower's own way out waits for ever to send its last log lines to a SuperLink that is no more, and would keep the
    folder's lock all that time. Whatever is cut short here the checkpoints make good.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(_LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(transport: Transport, folder: Path, journal: Journal) -> dict[str, Json]:
    """The rounds that are still to do, and what a finished run leaves behind. Returns the summary."""
    raw, root = read_run(folder)
    config = check_config(raw)
    set_threads(config)
    method = config.make_method(root)
    deal = deal_of(config, json.loads((folder / DEAL).read_text(encoding="utf-8")))
    begun = newest_round(folder / "checkpoints") is not None
    known = _read_known(folder / _KNOWN) if begun else {}
    closed = method.newcomers or (_SHARED if config.task.head == "shared" else "")
    if closed and begun:
        deal = _closed(deal, known, closed)

    def note(event: dict[str, Json]) -> None:
        journal(event)
        if event["event"] in ("joined", "back"):
            _write_known(folder, roster.known, config)

    roster = Roster(transport, deal, note, known)
    engine = RemoteEngine(roster)
    journal({"event": "attempt", "attempt": deal.attempt, "sites": list(deal.sites)})
    roster.gather(config.federation.at_least, config.federation.wait)
    if closed:
        roster.deal = replace(deal, sites=tuple(c.id for c in engine.clients), closed=closed)
    _write_known(folder, roster.known, config)
    method.init(engine.spec, engine.clients)
    journal({"event": "ready", "folder": str(folder), "clients": len(engine.clients), "rounds": config.run.rounds})
    state = Runner(method, engine, rounds_of(config), folder, journal).run()
    write_sites(folder)
    summary = finish(Opened(config, method, engine, Federation((), {}), root), state, folder)
    journal({"event": "finished"})
    return summary


def write_sites(folder: Path) -> None:
    """What the report shows of the network, from the journal so far."""
    write_json(folder / SITES, table_of(status_of(read_journal(folder))))


def _closed(deal: Deal, members: Collection[ClientId], why: str) -> Deal:
    """The deal of a run that nobody can join any more but ``members``: those that it began with."""
    if new := sorted({*deal.sites} - {*members}):
        raise CoterieError(
            f"{', '.join(new)} cannot join now: {why}; take the new ones out of [federation] sites, or start a new run"
        )
    return replace(deal, sites=tuple(sorted({*members} & {*(deal.sites or members)})), closed=why)


def deal_of(config: Config, found: Mapping[str, Json]) -> Deal:
    """The deal of a run from its config and from what ``coterie serve`` wrote beside it."""
    terms, settings = terms_of(config), config.federation
    return Deal(
        found["run"],
        terms,
        hash_of(terms),
        found["attempt"],
        settings.sites,
        keys=found["keys"],
        deadline=settings.deadline,
        greeting=settings.greeting,
        base=settings.base,
    )


def _take(stack: ExitStack, folder: Path) -> None:
    """Take the lock of the folder; waits for a server that has lost its SuperLink and is on its way out."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            stack.enter_context(held(folder))
        except CoterieError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
        else:
            return


def _read_known(path: Path) -> dict[ClientId, Hello]:
    return codec.decode(dict[str, Hello], path.read_bytes()) if path.exists() else {}


def _write_known(folder: Path, known: Mapping[ClientId, Hello], config: Config) -> None:
    """Who ever said hello, for the next attempt; and the manifest: counts and label names, as the sites told them."""
    write_atomic(folder / _KNOWN, codec.encode(known))
    clients = {
        c: {
            "labels": list(h.info.labels) if h.info.labels else None,
            "rows": {"train": h.info.num_train, "validation": h.info.num_validation, "test": h.info.num_test},
            "base": h.base,
            "versions": dict(h.versions),
        }
        for c, h in sorted(known.items())
    }
    write_json(folder / "manifest.json", {"kind": config.task.kind, "seed": config.run.seed, "clients": clients})
