"""HTTP on one connection: uvicorn's, with a limit on how long a request's head may take to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from coterie.api.guard import ABORT


class PatientProtocol(H11Protocol):
    """Closes a connection whose next request is not there ``head_seconds`` after connecting or its first byte.

    A request's scope has :data:`~coterie.api.guard.ABORT`, which closes its connection at once.
    """

    head_seconds: ClassVar[float] = 15.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.access_log = False  # its lines hold whole paths with their queries
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._waiting is None and self._idle:
            self._wait()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            scope: MutableMapping[str, object] = self.scope  # type: ignore[assignment]
            scope[ABORT] = self.transport.abort
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _arrived(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
