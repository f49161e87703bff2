"""Runs the service: the models, the worker's thread and uvicorn."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn

from coterie.api.app import make_app
from coterie.api.decode import Decoding
from coterie.api.encode import Encoding
from coterie.api.faults import where
from coterie.api.guard import LOG
from coterie.api.keys import Keys, read_keys
from coterie.api.limits import Limits
from coterie.api.protocol import PatientProtocol
from coterie.api.served import Served, client_folders, served
from coterie.api.worker import Worker
from coterie.types import CoterieError

_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HEAD_BYTES = 16 * 1024  # of a request's line and headers
_STOP_SECONDS = 10  # for answers that are under way when the service stops


@dataclass(frozen=True)
class Service:
    """What to serve, and where. ``dtype`` is the base's; ``certificate`` and ``private_key`` are PEM files for TLS."""

    run: Path
    clients: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    base: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Ready:
    """A service whose models are loaded and whose port is open. ``address`` is where a browser finds it."""

    server: uvicorn.Server
    socket: socket.socket
    models: Served
    address: str

    def run(self) -> None:
        """Answer requests until SIGINT, SIGTERM, or ``server.should_exit``."""
        self.server.run(sockets=[self.socket])


@contextmanager
def ready(service: Service) -> Iterator[Ready]:
    """Load the models, start the thread that computes, and open the port, for a ``with`` block.

    Raises :class:`CoterieError` for a host other than this machine's own without keys, a port that is taken, and what
    :func:`~coterie.api.served.served` and :func:`~coterie.api.keys.read_keys` raise.
    """
    open_to_all = service.keys is None
    _check(service, open_to_all)
    names = tuple(client_folders(service.run, service.clients))
    keys = Keys() if service.keys is None else read_keys(service.keys, names)  # before the models: they take long
    with (
        _listening(service.host, service.port) as sock,
        served(service.run, service.clients, base=service.base, device=service.device, dtype=service.dtype) as models,
    ):
        worker = worker_for(models, service.limits)
        hosts = (*_NAMES, service.host.lower()) if open_to_all else None
        app = make_app(models, worker, keys, service.limits, hosts)
        worker.start()
        try:
            scheme = "https" if service.certificate else "http"
            host = f"[{service.host}]" if ":" in service.host else service.host
            address = f"{scheme}://{host}:{sock.getsockname()[1]}/"
            yield Ready(uvicorn.Server(config_for(app, service)), sock, models, address)
        finally:
            worker.stop()


def worker_for(models: Served, limits: Limits, report: Callable[[str], None] = LOG.error) -> Worker:
    """The worker with the engine that the models need."""
    if models.generates:
        decoding = Decoding(models, limits.rows, limits.max_tokens, limits.prompt_tokens, report)
        return Worker(decoding, limits.waiting, report)
    return Worker(Encoding(models, limits.rows, report), limits.waiting, report)


def _check(service: Service, open_to_all: bool) -> None:
    if open_to_all and not _is_loopback(service.host):
        raise CoterieError(
            f"without keys the models are for this machine only, and {service.host} is not; make a file of keys with "
            "`coterie api-key NAME` and give it as --keys"
        )
    if (service.certificate is None) != (service.private_key is None):
        raise CoterieError("TLS takes both --certificate and --private-key")


def _is_loopback(host: str) -> bool:
    """Whether every address of ``host`` is this machine's own."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as fault:
        raise CoterieError(f"--host {host}: no such host") from fault
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=512)
    except OSError as fault:
        raise CoterieError(f"--host {host} --port {port}: {fault.strerror}; choose another") from fault
    with sock:
        yield sock


def config_for(app: object, service: Service) -> uvicorn.Config:
    """How uvicorn runs the application."""
    protocol = type("Protocol", (PatientProtocol,), {"head_seconds": service.limits.read_seconds})
    quiet = logging.getLogger("uvicorn.error")
    quiet.setLevel(logging.ERROR)
    if not any(isinstance(each, _WithoutText) for each in quiet.filters):
        quiet.addFilter(_WithoutText())
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.connections,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_STOP_SECONDS,
        ssl_certfile=service.certificate,
        ssl_keyfile=service.private_key,
    )


class _WithoutText(logging.Filter):
    """An exception's text may quote a request: the log has its type and where it was raised."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = "a request failed: %s", (where(record.exc_info[1]),)
            record.exc_info = record.exc_text = None
        return True
