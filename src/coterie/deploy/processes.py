"""Child processes: each in its own session, ended with its parent, and stopped by its id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from coterie.lifetime import end_with

PRIVATE = 0o077  # the umask of a site's and a server's processes: files are 0600, folders 0700, also if made again
_NOT_PASSED_ON = (  # they open unguarded ports, or let a remote request say that it is local
    "FLWR_INTERNAL_GRPC_CONTROL_API",
    "FLWR_INTERNAL_GRPC_FLEET_API",
    "FORWARDED_ALLOW_IPS",
)


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: their own home, no telemetry, no update check, this package on the path."""
    ours = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**{name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}, **ours}


@contextmanager
def private_files() -> Iterator[None]:
    """Within a ``with`` block, whatever this process and those that it starts make is for their user alone."""
    old = os.umask(PRIVATE)
    try:
        yield
    finally:
        os.umask(old)


def start(args: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program that writes to ``log``. On Linux it ends when this process does, however that happens."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with log.open("ab") as out:
        return subprocess.Popen(
            args,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: end_with(parent),
        )


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process and its session, and wait for it: to its children a zombie still looks alive.

    It is killed if it has not ended after ``patience`` seconds.
    """
    for how, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the leader left behind


def free_port() -> int:
    """A port of the loopback interface that is free."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
