"""``coterie join``: keeps a site's SuperNode and its worker running. Loads no model library itself."""

from __future__ import annotations

import logging
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from coterie.config.deployment import SiteSettings
from coterie.config.load import load_site
from coterie.deploy.keys import check_private
from coterie.deploy.processes import flower_environment, free_port, private_files, start, stop
from coterie.deploy.site_log import logging_to
from coterie.machine import Check
from coterie.runs.folder import lock_folder, lock_in
from coterie.text import plain_text
from coterie.types import CoterieError

log = logging.getLogger("coterie.site")
_CLIENTAPP = "#!{python}\nfrom coterie.flower.commands import clientapp_command\n\nclientapp_command()\n"
_SUPERNODE = "from coterie.flower.commands import supernode_command; supernode_command()"
_WORKER = "import sys; from coterie.deploy.worker_process import work; work(sys.argv[1], sys.argv[2])"
_SOCKET = "worker"
_KEY_REFUSED = "[code: 2004]"  # Flower's, of a SuperNode that could not be activated
_LOG_BYTES = 200_000  # of the end of a log, where the reason is
# Seconds before a process that died is started again. For about a minute Flower refuses a second SuperNode with a key.
_BACKOFF = (0.0, 1.0, 5.0, *(10.0,) * 9, 60.0)
_CALM = 300.0  # seconds that a process has to run for its earlier failures to be forgotten


def load(path: Path) -> tuple[SiteSettings, Path]:
    """The settings of a SITE.toml, and the folder that its paths are relative to."""
    return load_site(path), path.resolve().parent


@dataclass
class Child:
    """A process that is started again when it dies."""

    name: str
    args: list[str]
    env: dict[str, str]
    log: Path
    explain: Callable[[str], str] = lambda text: ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log_at: int = 0  # bytes of the log when it was started
    started: float = 0.0
    failures: int = 0

    def keep(self) -> None:
        """Start it if it is not running; wait longer each time if it dies at once."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None:
            if time.monotonic() - self.started > _CALM:
                self.failures = 0
            self.failures += 1
            log.warning("%s ended with %s%s; starting it again", self.name, self.process.returncode, self._why())
            stop(self.process)
            self.process = None
        if time.monotonic() - self.started >= _BACKOFF[min(self.failures, len(_BACKOFF) - 1)]:
            self._log_at = self.log.stat().st_size if self.log.exists() else 0
            self.process = start(self.args, self.env, self.log)
            self.started = time.monotonic()

    def _why(self) -> str:
        """What it has written to its log says of why it ended."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._log_at, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            reason = self.explain(file.read().decode("utf-8", "replace"))
        return f": {reason}" if reason else ""

    def end(self) -> None:
        if self.process is not None:
            stop(self.process)
            self.process = None


def join(path: Path, insecure: bool = False) -> None:
    """Run the site until it is stopped. Raises :class:`CoterieError` if it cannot start."""
    site, root = load(path)
    _raise_first(key_checks(site, root, insecure))
    state = (root / site.site.state).resolve()
    # The path of a socket has at most about 100 characters, so it is not in the state folder.
    with private_files(), tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        while True:
            children = [_worker(path, state, Path(temporary)), _supernode(site, root, state, Path(temporary), insecure)]
            take_part(state, children)
            log.warning(
                "%s was deleted while this site was running; it is made again, empty. What the site kept of its runs "
                "is lost: it starts afresh with its next message",
                state,
            )


def take_part(state: Path, children: Sequence[Child]) -> None:
    """Keep ``children`` running until the folder ``state``, or the lock in it, is deleted."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(state))
        except CoterieError as fault:
            raise CoterieError(f"{fault} (two sites on one machine need a [site] state each)") from fault
        stack.enter_context(logging_to(state))
        for child in children:
            stack.callback(child.end)
        lock = lock_in(state)
        while lock_in(state) == lock:
            for child in children:
                child.keep()
            time.sleep(0.5)


def _worker(path: Path, state: Path, temporary: Path) -> Child:
    args = [sys.executable, "-P", "-c", _WORKER, str(path.resolve()), str(temporary / _SOCKET)]
    return Child("worker", args, {**os.environ, "TOKENIZERS_PARALLELISM": "false"}, state / "worker.log")


def _supernode(site: SiteSettings, root: Path, state: Path, temporary: Path, insecure: bool) -> Child:
    """Flower's SuperNode, with our own ClientApp command before Flower's on its path."""
    command = temporary / "flwr-clientapp"
    command.write_text(_CLIENTAPP.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o700)
    env = flower_environment(state / "flower")
    env["PATH"] = os.pathsep.join([str(temporary), env["PATH"]])
    args = [sys.executable, "-P", "-c", _SUPERNODE, "--superlink", site.site.server]
    args += ["--port", str(free_port()), "--node-config", f'socket="{temporary / _SOCKET}"']
    if insecure:
        args.append("--insecure")
    else:
        args += ["--root-certificates", str((root / site.site.ca).resolve())]
        args += ["--auth-supernode-private-key", str((root / site.site.key).resolve())]
    return Child("supernode", args, env, state / "supernode.log", why_a_supernode_ended)


def why_a_supernode_ended(text: str) -> str:
    """Why, in what it wrote: the server refuses its key, or what Flower says after its exit code; empty if nothing."""
    if _KEY_REFUSED in text:
        return (
            "the server refuses this site's key. Either it is not registered there, and whoever runs the server adds "
            "it with `coterie keys add`; or another process uses it, which after a crash ends within about 60 s"
        )
    _, exit_code, after = text.partition("Exit Code:")
    lines = [plain_text(line.strip()) for line in after.splitlines()[1:3]] if exit_code else []
    return " ".join(line for line in lines if line)


def key_checks(site: SiteSettings, root: Path, insecure: bool) -> Iterator[Check]:
    """Check that the site has what TLS and node authentication need."""
    if insecure:
        yield Check("keys", "none, with --insecure: others can read and change what is sent", True)
        return
    for name, value in (("key", site.site.key), ("ca", site.site.ca)):
        if not value:
            fix = f"set [site] {name}, or use --insecure on a private network"
            yield Check(name, "not set", False, fix)
        elif not (root / value).is_file():
            fix = f"ask whoever runs the server for it, or correct [site] {name}"
            yield Check(name, f"{root / value} does not exist", False, fix)
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
        return Check("ca", f"{path} is not a certificate: {fault}", False, "ask whoever runs the server for ca.crt")
    return Check("ca", str(path))


def _raise_first(checks: Iterator[Check]) -> None:
    for check in checks:
        if not check.ok:
            raise CoterieError(f"[site] {check.name}: {check.value}; {check.fix}")
