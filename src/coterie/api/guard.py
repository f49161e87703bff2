"""Around every request: limits on its body and its time, headers of its answer, a line in the log, and counts.

The log and the counts hold the route, the status and the name of the key: nothing that a request says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.api.answers import error
from coterie.api.jobs import RequestError
from coterie.api.limits import Limits
from coterie.api.metrics import Metrics

LOG = logging.getLogger("coterie.api")
ROUTES = frozenset(
    [
        *("/", "/health", "/metrics", "/v1/models", "/v1/classify", "/v1/embeddings", "/v1/completions"),
        "/v1/chat/completions",
    ]
)
_GRACE = 5.0  # seconds that an answer may take longer than its job, to be sent
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_NO_CONTENT = b"default-src 'none'; frame-ancestors 'none'"
ABORT = "coterie.abort"  # of a request's scope: closes its connection at once


@dataclass
class Guard:
    """An ASGI application around another one. ``hosts`` are the names that the service answers to; None: any."""

    app: ASGIApp
    limits: Limits
    metrics: Metrics
    hosts: frozenset[str] | None = None
    clock: Callable[[], float] = time.monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self.limits)
        started, route = self.clock(), _route(scope["path"])
        try:
            async with asyncio.timeout(self.limits.seconds + self.limits.read_seconds + _GRACE):
                await self._handle(scope, exchange)
        except TimeoutError:
            scope.get(ABORT, _nothing)()  # the client does not read its answer
            exchange.status = exchange.status or 504
        finally:
            seconds, status = self.clock() - started, exchange.status or 499
            self.metrics.ended(route, status, seconds)
            who = scope.get("coterie.caller", "-")
            LOG.info("%s %s %d %.0f ms key %s", _method(scope["method"]), route, status, 1000 * seconds, who)

    async def _handle(self, scope: Scope, exchange: _Exchange) -> None:
        fault = self._refused(scope)
        if fault is None:
            await self.app(scope, exchange.receive, exchange.send)
        else:
            await respond(fault)(scope, exchange.receive, exchange.send)

    def _refused(self, scope: Scope) -> RequestError | None:
        """Why a request is refused by its headers alone."""
        headers = dict(scope["headers"])
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            # a page of another site, whose name was made to mean this machine
            return RequestError("this service answers to localhost only; start it with --keys to use a name", 421)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.limits.body_bytes:
            return _too_large(self.limits)
        return None


@dataclass
class _Exchange:
    """The two ends of a request: counts what is received, and notes the status that is sent."""

    receive_: Receive
    send_: Send
    limits: Limits
    status: int = 0
    received: int = 0
    whole: bool = False
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = asyncio.get_running_loop().time() + self.limits.read_seconds

    async def receive(self) -> Message:
        """A part of the request. Raises :class:`RequestError` for one that is too large or comes too slowly."""
        if self.whole:
            return await self.receive_()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive_()
        except TimeoutError:
            raise RequestError("the request did not arrive in time", 408, "slow_request") from None
        self.received += len(message.get("body", b""))
        if self.received > self.limits.body_bytes:
            raise _too_large(self.limits)
        self.whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            mine = [(name, value) for name, value in message.get("headers", []) if name != b"cache-control"]
            if not any(name == b"content-security-policy" for name, _ in mine):
                mine.append((b"content-security-policy", _NO_CONTENT))
            message = {**message, "headers": [*mine, *_HEADERS]}
        await self.send_(message)


def respond(fault: RequestError) -> JSONResponse:
    """The answer to a request that is refused."""
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if fault.status in (408, 413, 421):
        headers["Connection"] = "close"  # what is left of the request is not read
    return JSONResponse(error(fault), fault.status, headers)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(f"the body may have {limits.body_bytes:,} bytes", 413, "body_too_large")


def _route(path: str) -> str:
    """The route of a path, for the log and the counts: no text that a client chose."""
    if path in ROUTES:
        return path
    return "/v1/models/..." if path.startswith("/v1/models/") else "other"


def _method(name: str) -> str:
    return name if name in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "OTHER"


def _host(header: bytes) -> str:
    """The name in a Host header, without the port."""
    host = header.decode("latin-1").lower()
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _nothing() -> None: ...
