"""Between the event loop and the worker's thread: submits a job, and waits for its events or for the client to go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from coterie.api.jobs import Encode, Encoded, Event, Generate, GoneError, Job, Piece, RequestError, Written
from coterie.api.keys import Caller
from coterie.api.limits import Limits
from coterie.api.worker import Worker

T = TypeVar("T")


@dataclass
class Desk:
    """Takes requests in, for each key as many as the limits allow at once."""

    worker: Worker
    limits: Limits
    _of_key: Counter[str] = field(default_factory=Counter)

    async def whole(self, request: Request, caller: Caller, work: Encode | Generate) -> tuple[Encoded, ...] | Written:
        """The answer in one piece. Raises :class:`RequestError` where there is none, and :class:`GoneError`."""
        with self._one_of(caller), self._job(work) as events:
            return await _unless_gone(request, _last(events))

    async def pieces(self, request: Request, caller: Caller, work: Generate) -> AsyncIterator[Piece | Written]:
        """The answer as it grows. Raises :class:`RequestError` where it ends early, and :class:`GoneError` for a client
        that hangs up before it begins. Close it to cancel the job."""
        with self._one_of(caller), self._job(work) as events:
            event = await _unless_gone(request, events.get())
            while True:
                if isinstance(event, RequestError):
                    raise event
                assert isinstance(event, Piece | Written)
                yield event
                if isinstance(event, Written):
                    return
                event = await events.get()

    @contextmanager
    def _one_of(self, caller: Caller) -> Iterator[None]:
        """Count one more request of the caller. Raises :class:`RequestError` where it has too many."""
        if self._of_key[caller.name] >= self.limits.per_key:
            raise RequestError(
                f"this key has {self.limits.per_key} requests under way; wait for an answer", 429, "rate_limited",
                retry_after=1,
            )  # fmt: skip
        self._of_key[caller.name] += 1
        try:
            yield
        finally:
            self._of_key[caller.name] -= 1

    @contextmanager
    def _job(self, work: Encode | Generate) -> Iterator[asyncio.Queue[Event]]:
        """The events of a job that is submitted now, and is cancelled at the end of the ``with`` block."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:  # in the worker's thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(work, time.monotonic() + self.limits.seconds, deliver)
        self.worker.submit(job)
        try:
            yield events
        finally:
            job.cancelled.set()


async def _unless_gone(request: Request, answer: Coroutine[None, None, T]) -> T:
    """What ``answer`` returns. Raises :class:`GoneError` if the client hangs up first."""
    gone, made = asyncio.ensure_future(_hung_up(request)), asyncio.ensure_future(answer)
    try:
        await asyncio.wait({gone, made}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise GoneError
        return made.result()
    finally:
        gone.cancel()
        made.cancel()


async def _last(events: asyncio.Queue[Event]) -> tuple[Encoded, ...] | Written:
    while isinstance(event := await events.get(), Piece):
        pass
    if isinstance(event, RequestError):
        raise event
    return event


async def _hung_up(request: Request) -> None:
    """Return when the client has closed the connection. Its body is read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
