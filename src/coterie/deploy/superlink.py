"""Flower's SuperLink: starting and ending it, submitting runs to it, all through Flower's own programs."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from coterie.deploy.events import Refused
from coterie.deploy.keys import key_digest, known_sites
from coterie.deploy.processes import flower_environment, start, stop, tail
from coterie.files import read_json_as, write_atomic
from coterie.flower.refused import RefusedKeys
from coterie.types import ClientId, CoterieError, Json

_BOOK = TypeAdapter(dict[str, Json])
_START_SECONDS = 60.0
_COMMAND_SECONDS = 120.0
_NAME = "coterie"
_SUPERLINK = "from coterie.flower.commands import superlink_command; superlink_command()"
_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "coterie-federation"
version = "1.0.0"
description = "The rounds of a Coterie run"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "coterie"

[tool.flwr.app.components]
serverapp = "coterie_server:app"
clientapp = "coterie.flower.app:client_app"

[tool.flwr.app.config]
folder = {folder}
"""
_SERVER = """from coterie.flower.app import server_app
from coterie.deploy.server import main

app = server_app(main)
"""


@dataclass
class SuperLink:
    """A SuperLink on ``host:port`` with its files in ``home``; ``keys`` is None for one without TLS.

    ``address`` is that of a SuperLink that somebody else started: it is used, and never stopped.
    """

    home: Path
    host: str
    port: int
    keys: Path | None
    address: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _refused: RefusedKeys = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._refused = RefusedKeys(self.home)
        for _ in self._refused.new():
            pass  # of an earlier start

    @property
    def log(self) -> Path:
        return self.home / "superlink.log"

    @property
    def local(self) -> str:
        """The address at which this machine's own programs reach it."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return self.address or f"{host}:{self.port}"

    def start(self) -> None:
        """Start it, unless somebody else did, and wait until it answers. Raises :class:`CoterieError`."""
        if self.address is None:
            args = [sys.executable, "-P", "-c", _SUPERLINK, "--host", self.host, "--port", str(self.port)]
            args += ["--database", str(self.home / "state.db"), "--disable-runtime-dependency-installation"]
            self.process = start([*args, *self._security()], flower_environment(self.home), self.log)
        end = time.monotonic() + _START_SECONDS
        while not self.answers():
            if not self.alive() or time.monotonic() > end:
                self.stop()
                raise CoterieError(
                    f"no SuperLink answers at {self.local}; is the port in use? End of {self.log}:\n{tail(self.log)}"
                )
            time.sleep(0.2)

    def _security(self) -> list[str]:
        if self.keys is None:
            return ["--insecure"]
        files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
        return [
            *(part for flag, name in files.items() for part in (flag, str(self.keys / name))),
            "--enable-supernode-auth",
        ]

    def connect(self) -> None:
        """Write the SuperLink's address to the file that Flower's programs read."""
        trust = (
            "insecure = true" if self.keys is None else f"root-certificates = {json.dumps(str(self.keys / 'ca.crt'))}"
        )
        text = f'[superlink]\ndefault = "{_NAME}"\n\n[superlink.{_NAME}]\naddress = "{self.local}"\n{trust}\n'
        write_atomic(self.home / "config.toml", text.encode())

    def answers(self) -> bool:
        """Whether its health endpoint answers."""
        scheme = "http" if self.keys is None else "https"
        trust = ssl.create_default_context(cafile=str(self.keys / "ca.crt")) if self.keys else None
        try:
            with urllib.request.urlopen(f"{scheme}://{self.local}/health", timeout=5, context=trust) as page:
                return bool(page.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def alive(self) -> bool:
        """Whether the process still runs; somebody else's SuperLink is assumed to."""
        return self.address is not None or (self.process is not None and self.process.poll() is None)

    def stop(self) -> None:
        """End it, if it is ours."""
        if self.process is not None:
            stop(self.process)
            self.process = None

    def register(self) -> dict[str, ClientId]:
        """Register the key of every site, and unregister those of sites that were removed; the site by key digest."""
        if self.keys is None:
            return {}
        sites = known_sites(self.keys)
        if not sites:
            raise CoterieError(f"{self.keys / 'sites'} contains no site's key; add one with `coterie keys add`")
        book = self.home / "registered.json"
        fix = "delete it, and the SuperLink's other files beside it"
        done = read_json_as(book, _BOOK, fix) if book.exists() else {}
        wanted = {key_digest(path): path for path in sites.values()}
        for digest, node in [(d, n) for d, n in done.items() if d not in wanted]:
            self._flwr("supernode", "unregister", str(node), _NAME)
            del done[digest]
        for digest, path in wanted.items():
            if digest not in done:
                done[digest] = self._flwr("supernode", "register", str(path), _NAME).get("node-id")
            write_atomic(book, json.dumps(done).encode())
        return {digest: path.stem for digest, path in wanted.items()}

    def refused(self) -> Iterator[Refused]:
        """The nodes that it refused for their key since the last call, if it is ours."""
        sites = {} if self.keys is None else {key_digest(path): name for name, path in known_sites(self.keys).items()}
        for refusal in self._refused.new():
            if refusal.known:
                reason = (
                    f"the key of {sites.get(refusal.key, 'a registered site')} is in use by another node; one that "
                    "takes its place, after a crash, is let in within about a minute"
                )
            else:
                reason = "its key is registered for no site; add it with `coterie keys add`, and start the server again"
            yield Refused(f"with the key {refusal.key[:12]}", reason)

    def submit(self, folder: Path) -> str:
        """Submit a Flower run that continues the run in ``folder``; returns its id."""
        app = self.home / "app"
        text = _PYPROJECT.replace("{folder}", json.dumps(str(folder.resolve())))
        write_atomic(app / "pyproject.toml", text.encode())
        write_atomic(app / "coterie_server.py", _SERVER.encode())
        return str(self._flwr("run", str(app), _NAME)["run-id"])

    def status(self, run: str) -> str:
        """Flower's status of a run, such as ``running`` or ``finished:completed``."""
        rows = self._flwr("list", _NAME, "--run-id", run).get("runs", [])
        return str(rows[0]["status"]) if rows else "unknown"

    def _flwr(self, *args: str) -> dict[str, Json]:
        """The JSON that ``flwr`` prints. Raises :class:`CoterieError` with its own message if it fails."""
        command = [str(Path(sys.executable).parent / "flwr"), *args, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=flower_environment(self.home),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as fault:
            raise CoterieError(f"flwr {args[0]} gave no answer within {_COMMAND_SECONDS:g} s") from fault
        result = _json_in(done.stdout)
        if done.returncode or not result.get("success"):
            message = str(result.get("error-message") or (done.stdout + done.stderr)).strip()[-600:]
            raise CoterieError(f"flwr {args[0]} failed: {message}")
        return result


def _json_in(output: str) -> dict[str, Json]:
    """The JSON object that ``output`` ends with, after anything that Flower prints first; empty if there is none."""
    start_at = output.find("{")
    try:
        parsed: dict[str, Json] = json.loads(output[start_at:]) if start_at >= 0 else {}
    except ValueError:
        return {}
    return parsed


def check_server_keys(keys: Path) -> None:
    """Raises :class:`CoterieError` for a key folder that a server cannot use."""
    missing = [name for name in ("ca.crt", "server.crt", "server.key") if not (keys / name).is_file()]
    if missing:
        raise CoterieError(
            f"{keys} has no {', '.join(missing)}; make keys with `coterie keys init {keys}`, or use --insecure for a "
            "federation without TLS and without authentication"
        )
    if (keys / "server.key").stat().st_mode & 0o077:
        raise CoterieError(f"other users can read {keys / 'server.key'}; run `chmod 600 {keys / 'server.key'}`")
