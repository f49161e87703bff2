"""``coterie serve``: starts a SuperLink and the run in it, and restarts either if it dies; the run then continues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coterie.config.load import check_config, differences
from coterie.config.sections import Config
from coterie.deploy.attempt import begin_attempt
from coterie.deploy.events import Finished, Stopped
from coterie.deploy.journal import JOURNAL, Journal, Reader
from coterie.deploy.metrics import exporter
from coterie.deploy.onboard import check_newcomers
from coterie.deploy.processes import private_files
from coterie.deploy.superlink import SuperLink, check_server_keys
from coterie.experiment import rounds_of
from coterie.files import write_json
from coterie.runs.cost import unprotected, unprotected_by_delta
from coterie.runs.events import CheckpointSaved, Listener, Note
from coterie.runs.folder import another_config, check_folder, lock_folder, plain, read_config
from coterie.runs.summary import SUMMARY, Summary, read_summary
from coterie.types import ClientId, CoterieError

_POLL = 0.5  # seconds between reads of the journal
_STATUS_PAUSE = 15.0  # seconds between two status requests to Flower, each of which takes a process
_HOME = "flower"


def serve(
    config: Config,
    folder: Path,
    *,
    root: Path,
    resume: bool = False,
    insecure: bool = False,
    superlink: str | None = None,
    onboard: Sequence[ClientId] = (),
    listen: Listener = lambda event: None,
) -> Summary:
    """Run the federation of ``config`` in ``folder`` to its end and return its summary.

    ``superlink`` is the address of one that is running already. ``onboard``: the run is finished, and these sites join
    it now (:mod:`coterie.deploy.onboard`). Raises :class:`CoterieError`; the last checkpoint is kept.
    """
    _check(config, folder, resume or bool(onboard))
    if onboard:
        check_newcomers(folder, onboard)
    elif (folder / SUMMARY).exists():
        listen(Note(f"{folder} is finished; nothing to do"))
        return read_summary(folder / SUMMARY)
    _check_cost(config, folder, root)
    keys = _keys(config, root, insecure)
    settings = config.federation
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)  # every site's tensors pass through it
    link = SuperLink((folder / _HOME).resolve(), settings.host, settings.port, keys, superlink)
    with ExitStack() as stack:
        stack.enter_context(private_files())
        stack.enter_context(lock_folder(folder / _HOME))
        if settings.metrics_port:
            stack.enter_context(exporter(folder, settings.metrics_port))
        write_json(folder / "config.json", {"root": str(root.resolve()), "config": plain(config)})
        stack.callback(link.stop)
        Supervisor(link, folder, settings.restarts, listen, onboard).run()
    return read_summary(folder / SUMMARY)


def _keys(config: Config, root: Path, insecure: bool) -> Path | None:
    """The folder of the server's keys, checked; None without keys."""
    if insecure and config.secure_aggregation.enabled:
        raise CoterieError(
            "[secure_aggregation] needs the sites' keys, which --insecure leaves out; make them: `coterie keys init`"
        )
    if insecure:
        return None
    keys = (root / config.federation.keys).resolve()
    check_server_keys(keys)
    return keys


def _check(config: Config, folder: Path, resume: bool) -> None:
    """Check as for any run, except that who takes part, and when, may change between two attempts."""
    if resume and (folder / "config.json").exists():
        old = plain(check_config(read_config(folder)[0]))  # keys that are new since have their defaults
        if changed := differences(old, {**plain(config), "federation": old["federation"], "data": old["data"]}):
            raise another_config(folder, old, changed)
        return
    check_folder(folder, config, resume=False)  # a service starts a new run with --resume too


def _check_cost(config: Config, folder: Path, root: Path) -> None:
    """Refuse a guarantee that protects nobody before the sites join, as far as it shows without their rows.

    A run that has begun is the server's to judge, which knows whether it has released anything.
    """
    if not config.privacy.active or (folder / "config.json").exists():
        return
    sites = dict.fromkeys(config.federation.sites, 0)
    if config.privacy.by_row or not sites:
        fault = unprotected_by_delta(config.privacy, sites)
    else:
        fault = unprotected(config.make_method(root), sites, rounds_of(config))
    if fault:
        raise CoterieError(str(fault))


@dataclass
class Supervisor:
    """Brings one run to its end: starts a SuperLink and a Flower run, and restarts them when they die."""

    link: SuperLink
    folder: Path
    restarts: int
    listen: Listener
    onboard: Sequence[ClientId] = ()
    committed: int = 0  # the newest round whose checkpoint this process saw

    def run(self) -> None:
        """Start attempts until the federation is finished.

        Raises :class:`CoterieError` if the server stopped with an error, and once the restarts are used up: that many
        in a row with no new checkpoint between them.
        """
        reader = Reader(self.folder / JOURNAL)
        for _ in reader.new():
            pass  # what earlier attempts wrote
        journal, left = Journal(self.folder / JOURNAL), self.restarts
        while True:
            before = self.committed
            failure = self._attempt(reader)
            if failure is None:
                return
            left = (left if self.committed == before else self.restarts) - 1
            if left < 0:
                raise CoterieError(
                    f"{failure}, once more than [federation] restarts = {self.restarts} allows without a new "
                    f"checkpoint. See {self.link.log}; continue with --resume"
                )
            journal(Note(f"{failure}; starting again"))
            self._pass_on(reader)

    def _attempt(self, reader: Reader) -> str | None:
        """One SuperLink and one Flower run; None once the federation is finished, else what died."""
        self.link.connect()
        if not self.link.alive() or not self.link.answers():
            self.link.stop()
            self.link.start()
        try:
            begin_attempt(self.folder, self.link.register(), self.onboard)
            run = self.link.submit(self.folder)
        except CoterieError:
            if self.link.alive():
                raise
            return "the SuperLink died"
        return self._watch(run, reader)

    def _watch(self, run: str, reader: Reader) -> str | None:
        """As :meth:`_attempt`, of a Flower run that was submitted."""
        checked, journal = time.monotonic(), Journal(self.folder / JOURNAL)
        while True:
            for refused in self.link.refused():
                journal(refused)
            if self._pass_on(reader):
                return None
            if not self.link.alive():
                return "the SuperLink died"
            if time.monotonic() - checked > _STATUS_PAUSE:
                checked = time.monotonic()
                status = self._status(run)
                if status.startswith("finished") and not self._pass_on(reader):
                    return f"the Flower run ended ({status})"
                if status == "finished:completed":
                    return None
            time.sleep(_POLL)

    def _status(self, run: str) -> str:
        try:
            return self.link.status(run)
        except CoterieError as fault:
            self.listen(Note(str(fault)))
            return "unknown"

    def _pass_on(self, reader: Reader) -> bool:
        """Pass on what happened since; whether the run is finished.

        Raises :class:`CoterieError` if the server stopped with an error.
        """
        for _, event in reader.new():
            self.listen(event)
            match event:
                case CheckpointSaved():
                    self.committed = max(self.committed, event.round)
                case Stopped():
                    raise CoterieError(event.error)
                case Finished():
                    return True
        return False
