"""What runs in Flower's ServerApp: the rounds of a run folder, over the sites that are connected."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from coterie import codec
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.rows import FederatedData
from coterie.deploy.agreement import Agreement, terms_of
from coterie.deploy.attempt import Attempt, read_attempt, record_start
from coterie.deploy.base_digest import digest_here
from coterie.deploy.events import Finished, Joined, ServerStarted, Stopped
from coterie.deploy.head import digest_of
from coterie.deploy.hello import Hello
from coterie.deploy.journal import JOURNAL, Journal
from coterie.deploy.onboard import onboard
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.secure_server import RemoteSums
from coterie.deploy.sites import KNOWN, Sites, read_known
from coterie.deploy.status import write_sites
from coterie.experiment import Opened, finish, privacy_warnings, rounds_of, set_threads, tracked
from coterie.files import remove_parts, write_atomic, write_json
from coterie.flower.message import Transport
from coterie.methods.base import Method
from coterie.methods.parts import label_space
from coterie.runs.checkpoint import newest_round
from coterie.runs.cost import unprotected
from coterie.runs.events import Event, Ready
from coterie.runs.folder import explain_full_disk, lock_folder, read_config
from coterie.runs.rounds import Runner
from coterie.runs.summary import Summary
from coterie.types import ClientId, ClientInfo, CoterieError

_EXIT_SECONDS = 5.0  # in which Flower may end by itself
_LOCK_SECONDS = 90.0  # in which the server of an earlier attempt may still be ending


def main(transport: Transport, run_config: Mapping[str, object]) -> None:
    """Continue the run in ``run_config["folder"]`` from its last checkpoint to its end, or let sites join a finished
    one."""
    _end_with_parent()
    folder = Path(str(run_config["folder"]))
    journal = Journal(folder / JOURNAL)
    try:
        with ExitStack() as stack:
            _lock(stack, folder)
            stack.enter_context(explain_full_disk(folder))
            remove_parts(folder)
            attempt = read_attempt(folder)
            if attempt.onboard:
                config = check_config(read_config(folder)[0])
                agreement = replace(agreement_of(config, attempt), sites=tuple(attempt.onboard))
                onboard(transport, folder, journal, agreement)
            else:
                run(transport, folder, journal)
    except CoterieError as fault:
        journal(Stopped(str(fault)))
        raise


def _end_with_parent() -> None:
    """End this process when Flower's process above it is gone.

    Left to itself, Flower waits forever to send its last log lines to a SuperLink that is gone, and would keep the
    folder's lock all that time. The checkpoints make up for whatever is cut short here.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(_EXIT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(transport: Transport, folder: Path, journal: Journal) -> Summary:
    """Do the remaining rounds, and write what a finished run leaves behind. Returns the summary."""
    raw, root = read_config(folder)
    config = check_config(raw)
    set_threads(config)
    method = config.make_method(root)
    base = config.federation.base or digest_here(config, root, folder)
    agreement = replace(agreement_of(config, read_attempt(folder)), base=base, unprotected=_row_guard(method, config))
    begun = newest_round(folder / "checkpoints") is not None
    known = read_known(folder) if begun else {}
    closed = method.newcomers
    agreement = replace(agreement, spaces=_shared_spaces(config, known))
    if closed and begun:
        agreement = _closed(agreement, known, closed)

    def note(event: Event) -> None:
        journal(event)
        if isinstance(event, Joined):
            _write_known(folder, sites.known, config)

    sites = Sites(transport, agreement, note, known)
    engine = RemoteEngine(sites, started=partial(record_start, folder))
    opened = Opened(config, method, engine, FederatedData((), {}), root)
    journal(ServerStarted(agreement.attempt, agreement.sites))
    sites.gather(config.federation.at_least, config.federation.wait)
    sites.agreement = _once_begun(agreement, config, sites, closed)
    _write_known(folder, sites.known, config)
    warned = privacy_warnings(opened, begun)
    if not begun:  # later sites join a state that there is
        method.init(engine.spec, engine.clients)
    journal(Ready(len(engine.clients), config.run.rounds, str(folder)))
    hidden = RemoteSums(engine) if config.secure_aggregation.enabled else None
    with tracked(config, folder, begun, journal) as listen:
        runner = Runner(method, engine, rounds_of(config), folder, listen, sums=hidden, warned=warned)
        exported = runner.exported(runner.run())
    write_sites(folder)
    summary = finish(opened, exported, folder, journal, runner.private)
    journal(Finished())
    return summary


def _row_guard(method: Method, config: Config) -> Callable[[ClientInfo], str | None]:
    """Why a site's rows would have no protection in a run whose ``[privacy]`` counts rows; None where they have.

    One site with very many rows, or very few, is refused so, and does not stop the run of the others.
    """

    def fault(info: ClientInfo) -> str | None:
        if not config.privacy.by_row:
            return None
        if info.num_train < 1:
            return f"client {info.id} has no training rows"
        found = unprotected(method, {info.id: info.num_train}, rounds_of(config))
        return str(found) if found else None

    return fault


def _shared_spaces(config: Config, known: Mapping[ClientId, Hello]) -> tuple[str, ...]:
    """The label spaces that have a shared head once the run has begun with the sites ``known``."""
    shared = config.task.head == "shared"
    return tuple(sorted({label_space(hello.info) for hello in known.values()})) if shared else ()


def _once_begun(agreement: Agreement, config: Config, sites: Sites, closed: str) -> Agreement:
    """The agreement for those who come once the run has begun with ``sites``."""
    agreement = replace(agreement, spaces=_shared_spaces(config, sites.known))
    return replace(agreement, sites=tuple(c.id for c in sites.clients), closed=closed) if closed else agreement


def _closed(agreement: Agreement, members: Collection[ClientId], reason: str) -> Agreement:
    """The agreement of a run that only ``members``, the sites that it began with, can take part in."""
    if new := sorted({*agreement.sites} - {*members}):
        raise CoterieError(
            f"{', '.join(new)} cannot join now: {reason}; remove the new sites from [federation] sites, and let them "
            f"join after the end with --onboard {','.join(new)}"
        )
    return replace(agreement, sites=tuple(sorted({*members} & {*(agreement.sites or members)})), closed=reason)


def agreement_of(config: Config, attempt: Attempt) -> Agreement:
    """The agreement of a run, from its config and from what ``coterie serve`` wrote beside it."""
    terms, settings = terms_of(config), config.federation
    return Agreement(
        attempt.run,
        terms,
        digest_of(terms),
        attempt.number,
        settings.sites,
        keys=attempt.keys,
        deadline=settings.deadline,
        greeting=settings.greeting,
        max_rows=settings.max_rows,
        starts=attempt.earlier,
    )


def _lock(stack: ExitStack, folder: Path) -> None:
    """Take the folder's lock; waits for a server that has lost its SuperLink and is ending."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            stack.enter_context(lock_folder(folder))
        except CoterieError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
        else:
            return


def _write_known(folder: Path, known: Mapping[ClientId, Hello], config: Config) -> None:
    """Who ever joined, for the next attempt; and the manifest: counts and label names, as the sites reported them."""
    write_atomic(folder / KNOWN, codec.encode(known))
    clients = {
        c: {
            "labels": list(h.info.labels) if h.info.labels else None,
            "rows": {"train": h.info.num_train, "validation": h.info.num_validation, "test": h.info.num_test},
            "base": h.base,
            "versions": dict(h.versions),
        }
        | ({} if h.info.active is None else {"active": h.info.active})
        for c, h in sorted(known.items())
    }
    write_json(folder / "manifest.json", {"kind": config.task.kind, "seed": config.run.seed, "clients": clients})
