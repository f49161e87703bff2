"""``coterie join``: a site's SuperNode and its worker, kept alive. ``coterie site check``: whether they would work."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType

from coterie.config import Config, check_config, load_raw, load_site
from coterie.deployment import SiteSettings
from coterie.doctor import Check
from coterie.engines import local
from coterie.federation.keys import check_private
from coterie.federation.processes import flower_environment, free_port, start, stop
from coterie.federation.terms import check_policy, config_at, steps_of, terms_of
from coterie.federation.worker import Worker, fingerprint, serve_forever
from coterie.machine import environment, version
from coterie.nn.base import resolve
from coterie.run_folder import held
from coterie.types import CoterieError

log = logging.getLogger("coterie.site")
_FLOWER = "1.41.0"
_CLIENTAPP = "#!{python}\nfrom coterie.engines.flower import clientapp_command\n\nclientapp_command()\n"
_WORKER = "import sys; from coterie.federation.site import work; work(sys.argv[1], sys.argv[2])"
_BACKOFF = (0.0, 1.0, 5.0, 15.0, 60.0)  # seconds before a process that died is started again
_CALM = 300.0  # seconds after which a start counts as a success
_LOG_BYTES, _LOG_FILES = 5_000_000, 3


def load(path: Path) -> tuple[SiteSettings, Path]:
    """The settings of a SITE.toml and the folder that its paths start at."""
    return load_site(path), path.resolve().parent


def work(path: str, door: str) -> None:
    """The worker's process: loads nothing before it is asked, and answers until it is ended."""
    site, root = load(Path(path))
    worker = Worker(site, root)
    worker.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = RotatingFileHandler(worker.state / "site.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    sys.excepthook = _without_text
    serve_forever(worker, Path(door))


def _without_text(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Log where the worker failed, and not what it said: a message may quote a row."""
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    log.error("the worker failed with %s at %s", kind.__name__, " < ".join(reversed(where)))


@dataclass
class Child:
    """A process that is started again when it dies."""

    name: str
    args: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started: float = 0.0
    failures: int = 0

    def keep(self) -> None:
        """Start it if it does not run, later and later where it dies at once."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None:
            if time.monotonic() - self.started > _CALM:
                self.failures = 0
            self.failures += 1
            log.warning("%s ended with %s; starting it again", self.name, self.process.returncode)
            stop(self.process)
            self.process = None
        if time.monotonic() - self.started >= _BACKOFF[min(self.failures, len(_BACKOFF) - 1)]:
            self.process = start(self.args, self.env, self.log)
            self.started = time.monotonic()

    def end(self) -> None:
        if self.process is not None:
            stop(self.process)
            self.process = None


def join(path: Path, insecure: bool = False) -> None:
    """Run the site until it is stopped. Raises :class:`CoterieError` for what would keep it from working."""
    site, root = load(path)
    _raise_first(_key_checks(site, root, insecure))
    state = (root / site.site.state).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    with ExitStack() as stack:
        stack.enter_context(held(state))
        # A path of a socket may have about 100 characters, so it is not in the state folder.
        doors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coterie-")))
        door = doors / "worker"
        children = [_worker(path, state, door), _supernode(site, root, state, doors, door, insecure)]
        for child in children:
            stack.callback(child.end)
        while True:
            for child in children:
                child.keep()
            time.sleep(0.5)


def _worker(path: Path, state: Path, door: Path) -> Child:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return Child("worker", [sys.executable, "-c", _WORKER, str(path.resolve()), str(door)], env, state / "worker.log")


def _supernode(site: SiteSettings, root: Path, state: Path, doors: Path, door: Path, insecure: bool) -> Child:
    """Flower's SuperNode, with a ClientApp command of ours before Flower's own on its path."""
    command = doors / "flwr-clientapp"
    command.write_text(_CLIENTAPP.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o700)
    env = flower_environment(state / "flower")
    env["PATH"] = os.pathsep.join([str(doors), env["PATH"]])
    args = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", site.site.server]
    args += ["--port", str(free_port()), "--node-config", f'socket="{door}"']
    if insecure:
        args.append("--insecure")
    else:
        args += ["--root-certificates", str((root / site.site.ca).resolve())]
        args += ["--auth-supernode-private-key", str((root / site.site.key).resolve())]
    return Child("supernode", args, env, state / "supernode.log")


# site check ----------------------------------------------------------------------------------------------------------


def check(path: Path, config: Path | None = None, insecure: bool = False) -> Iterator[Check]:
    """Every check in turn: versions, keys, server, data and model; with the server's ``config`` whether all fits it.

    Without one, data and model are tried with the defaults of a classification.
    """
    site, root = load(path)
    yield Check("site", site.site.id)
    found = version("flwr")
    yield Check(
        "flwr", found or "not installed", found == _FLOWER, "" if found == _FLOWER else f"pip install flwr=={_FLOWER}"
    )
    for name, number in environment()["versions"].items():
        yield Check(name, str(number))
    yield from _key_checks(site, root, insecure)
    yield _server_check(site, root, insecure)
    run, fault = _run_config(site, config)
    if run is None:
        yield fault
        return
    yield from _policy_checks(site, run)
    yield from _data_and_model(site, root, run)


def _run_config(site: SiteSettings, config: Path | None) -> tuple[Config | None, Check]:
    try:
        raw = load_raw(config) if config is not None else {}
        served = check_config({**raw, "data": {"clients": [{"id": site.site.id, "train": "at the site"}]}})
        return config_at(site, terms_of(served)), Check("config", str(config))
    except CoterieError as fault:
        return None, Check("config", str(fault), False, "ask the server's people for their config file")


def _key_checks(site: SiteSettings, root: Path, insecure: bool) -> Iterator[Check]:
    if insecure:
        yield Check("keys", "none: --insecure; others can read and change what is sent", True)
        return
    for name, value in (("key", site.site.key), ("ca", site.site.ca)):
        if not value:
            fix = f"set [site] {name}, or type --insecure on a network that nobody else is on"
            yield Check(name, "not set", False, fix)
        elif not (root / value).is_file():
            yield Check(
                name, f"{root / value} is not there", False, f"ask the server's people for it, or mend [site] {name}"
            )
        elif name == "key":
            try:
                yield Check(name, f"SHA-256 {check_private(root / value)[:16]}")
            except CoterieError as fault:
                yield Check(name, str(fault), False, "make one with `coterie keys site`")
        else:
            yield _ca_check(root / value)


def _ca_check(path: Path) -> Check:
    try:
        ssl.create_default_context(cafile=str(path))
    except (ssl.SSLError, OSError) as fault:
        return Check("ca", f"{path} is no certificate: {fault}", False, "ask the server's people for ca.crt")
    return Check("ca", str(path))


def _server_check(site: SiteSettings, root: Path, insecure: bool) -> Check:
    """Whether the server is there, and is who its certificate says."""
    host, _, port = site.site.server.rpartition(":")
    fix = "see whether `coterie serve` runs there, and whether a firewall is between"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as plain:
            if insecure:
                return Check("server", f"{site.site.server} is there")
            trust = ssl.create_default_context(cafile=str(root / site.site.ca))
            with trust.wrap_socket(plain, server_hostname=host.strip("[]")) as secure:
                return Check("server", f"{site.site.server} is there, {secure.version()}")
    except ssl.SSLError as fault:
        return Check(
            "server", f"{site.site.server}: {fault.reason or fault}", False, "the certificate is another's; ask"
        )
    except (OSError, ValueError) as fault:
        return Check("server", f"{site.site.server}: {fault}", False, fix)


def _policy_checks(site: SiteSettings, run: Config) -> Iterator[Check]:
    try:
        check_policy(site.policy, run)
    except CoterieError as fault:
        yield Check("policy", str(fault), False, "change [policy], or ask the server's people to change theirs")
    else:
        yield Check("policy", f"allows {run.method['name']}, rank {run.lora.rank}, {run.run.rounds} rounds")


def _data_and_model(site: SiteSettings, root: Path, run: Config) -> Iterator[Check]:
    worker = Worker(site, root)
    try:
        federation = worker.federation(run)
    except CoterieError as fault:
        yield Check("data", str(fault), False, "mend the files or [data]")
        return
    (client,) = federation.clients
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in client.splits.items())
    yield Check("data", f"{counts} rows; labels {', '.join(client.info.labels or ()) or 'none'}")
    steps, bound = steps_of(run.train, client.info.num_train), site.policy.max_steps
    yield Check(
        "steps per round", f"{steps} of {bound}", steps <= bound, "" if steps <= bound else "raise [policy] max_steps"
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            engine = local.make(run, federation, Path(folder), root, {})
            base = fingerprint(resolve(run.model.path, root), Path(folder) / "base.json")
    except CoterieError as fault:
        yield Check("model", str(fault), False, "mend [model], or ask which model the federation uses")
        return
    yield Check("model", f"{len(engine.spec.targets)} targets, SHA-256 {base}")


def _raise_first(checks: Iterator[Check]) -> None:
    for found in checks:
        if not found.ok:
            raise CoterieError(f"[site] {found.name}: {found.value}; {found.fix}")
