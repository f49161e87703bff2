"""``coterie serve``: a SuperLink, the run in it, and patience: what dies is started again and goes on where it was."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coterie.config.load import differences
from coterie.config.sections import Config
from coterie.deploy.journal import JOURNAL, Journal, Reader
from coterie.deploy.metrics import exporter
from coterie.deploy.superlink import SuperLink, check_server_keys
from coterie.files import read_json, write_json
from coterie.runs.folder import check_folder, held, plain, read_run
from coterie.runs.rounds import Listener
from coterie.types import ClientId, CoterieError, Json

DEAL = "deal.json"  # what the server of the next attempt starts from
_POLL = 0.5  # seconds between looks into the journal
_ASK = 15.0  # seconds between questions to Flower, each of which takes a process
_HOME = "flower"


def serve(
    config: Config,
    folder: Path,
    *,
    root: Path,
    resume: bool = False,
    insecure: bool = False,
    superlink: str | None = None,
    listen: Listener = lambda event: None,
) -> dict[str, Json]:
    """Run the federation of ``config`` in ``folder`` to its end and return its summary.

    ``superlink`` is the address of one that runs already. Raises :class:`CoterieError`; the last checkpoint stands.
    """
    _check(config, folder, resume)
    if (folder / "summary.json").exists():
        listen({"event": "note", "text": f"{folder} is finished; nothing to do"})
        return _summary(folder)
    keys = None if insecure else (root / config.federation.keys).resolve()
    if keys is not None:
        check_server_keys(keys)
    settings = config.federation
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)  # every site's tensors pass through it
    link = SuperLink((folder / _HOME).resolve(), settings.host, settings.port, keys, superlink)
    with ExitStack() as stack:
        stack.enter_context(held(folder / _HOME))
        if settings.metrics_port:
            stack.enter_context(exporter(folder, settings.metrics_port))
        write_json(folder / "config.json", {"root": str(root.resolve()), "config": plain(config)})
        stack.callback(link.stop)
        Supervisor(link, folder, settings.restarts, listen).run()
    return _summary(folder)


def _check(config: Config, folder: Path, resume: bool) -> None:
    """As of any run, but who takes part, and when, may be changed between two attempts."""
    if resume and (folder / "config.json").exists():
        old, _ = read_run(folder)
        mine = {**plain(config), "federation": old.get("federation", {}), "data": old.get("data", {})}
        if changed := differences(old, mine):
            raise CoterieError(
                f"{folder} was started with another config; it differs in {', '.join(changed)}: restore these, "
                "or start a new run with --out"
            )
        return
    check_folder(folder, config, resume=False)  # with --resume a run that has not begun begins: services restart so


@dataclass
class Supervisor:
    """Sees one run to its end: starts a SuperLink and a Flower run, and new ones where they died."""

    link: SuperLink
    folder: Path
    restarts: int
    listen: Listener
    committed: int = 0  # the newest round that this process saw a checkpoint of

    def run(self) -> None:
        """Raises :class:`CoterieError` for what the server said, and once the restarts are used up: so many in a row,
        with no new checkpoint between them."""
        reader = Reader(self.folder / JOURNAL)
        for _ in reader.new():
            pass  # what earlier attempts wrote
        journal, left = Journal(self.folder / JOURNAL), self.restarts
        while True:
            before = self.committed
            why = self._attempt(reader)
            if why is None:
                return
            left = (left if self.committed == before else self.restarts) - 1
            if left < 0:
                raise CoterieError(
                    f"{why}, once more than [federation] restarts = {self.restarts} allows without a new checkpoint. "
                    f"See {self.link.log}; go on with --resume"
                )
            journal({"event": "note", "text": f"{why}; starting again"})
            self._hear(reader)

    def _attempt(self, reader: Reader) -> str | None:
        """One SuperLink and one Flower run; None once the federation is finished, else what died."""
        self.link.connect()
        if not self.link.alive() or not self.link.answers():
            self.link.stop()
            self.link.start()
        try:
            _write_deal(self.folder, self.link.register())
            run = self.link.submit(self.folder)
        except CoterieError:
            if self.link.alive():
                raise
            return "the SuperLink died"
        asked = time.monotonic()
        while True:
            if self._hear(reader):
                return None
            if not self.link.alive():
                return "the SuperLink died"
            if time.monotonic() - asked > _ASK:
                asked = time.monotonic()
                status = self._status(run)
                if status.startswith("finished") and not self._hear(reader):
                    return f"the Flower run ended ({status})"
                if status == "finished:completed":
                    return None
            time.sleep(_POLL)

    def _status(self, run: str) -> str:
        try:
            return self.link.status(run)
        except CoterieError as fault:
            self.listen({"event": "note", "text": str(fault)})
            return "unknown"

    def _hear(self, reader: Reader) -> bool:
        """Pass on what happened since; whether the run is finished. Raises what the server stopped for."""
        for event in reader.new():
            self.listen(event)
            if event["event"] == "checkpoint":
                self.committed = max(self.committed, event["round"])
            if event["event"] == "stopped":
                raise CoterieError(str(event["error"]))
            if event["event"] == "finished":
                return True
        return False


def _write_deal(folder: Path, keys: Mapping[str, ClientId]) -> None:
    """A new attempt of the run, with an id that the sites keep its personal state under."""
    path = folder / DEAL
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run, attempt = old.get("run") or f"{folder.name[:60]}-{secrets.token_hex(8)}", old.get("attempt", 0) + 1
    write_json(path, {"run": run, "attempt": attempt, "keys": dict(keys)})


def _summary(folder: Path) -> dict[str, Json]:
    found: dict[str, Json] = read_json(folder / "summary.json")
    return found
