"""The long-lived process of a site's worker, on a socket that only its user can open."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

from coterie.config.load import load_site
from coterie.deploy.processes import PRIVATE
from coterie.deploy.site_log import log, write_log
from coterie.deploy.worker import Worker
from coterie.flower.local_socket import listening, receive, send, user_of
from coterie.flower.message import BrokenMessageError

_IDLE_SECONDS = 30.0  # without a message before the worker tries again to write what a full disk did not take
_SECONDS = 60.0  # in which a message has to arrive once its sender is connected


def work(site_file: str, socket_path: str) -> None:
    """Answer messages until this process is ended. Nothing is loaded before the first one."""
    os.umask(PRIVATE)
    worker = Worker(load_site(Path(site_file)), Path(site_file).resolve().parent)
    worker.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_log(worker.state)
    serve_forever(worker, Path(socket_path))


def serve_forever(worker: Worker, path: Path) -> None:
    """Answer every connection of this user to the socket at ``path``, one after another."""
    with listening(path) as listener:
        listener.settimeout(_IDLE_SECONDS)
        log.info("ready, process %d", os.getpid())
        while True:
            try:
                link, _ = listener.accept()
            except TimeoutError:
                worker.catch_up()
                continue
            with link:
                _serve_one(worker, link)


def _serve_one(worker: Worker, link: socket.socket) -> None:
    try:
        if user_of(link) != os.getuid():
            log.warning("another user tried to connect")
            return
        link.settimeout(_SECONDS)
        message = receive(link)
        if _abandoned(link):
            log.info("skipped a message whose sender has given up")
            return
        send(link, worker.answer(message))
    except (OSError, BrokenMessageError) as fault:
        log.warning("a connection failed: %s", type(fault).__name__)


def _abandoned(link: socket.socket) -> bool:
    """Whether the sender closed the connection after waiting too long behind another message."""
    ready, _, _ = select.select([link], [], [], 0)
    return bool(ready) and link.recv(1, socket.MSG_PEEK) == b""
