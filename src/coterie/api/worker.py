"""The thread that computes: it takes jobs from a bounded queue, and owns the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from coterie.api.faults import FAULTS, broken, where
from coterie.api.jobs import Job, RequestError


def _stopped() -> RequestError:
    return RequestError("the service is stopping", 503, "stopping", retry_after=5)


class Engine(Protocol):
    """What computes jobs in steps. ``room`` is how many more rows it takes, ``busy`` how many it works on."""

    @property
    def room(self) -> int: ...

    @property
    def busy(self) -> int: ...

    def admit(self, job: Job) -> None: ...

    def drop(self, over: set[Job]) -> None: ...

    def step(self) -> list[Job]: ...

    def fail(self, fault: RequestError) -> list[Job]: ...


@dataclass
class Worker:
    """Runs ``engine`` in a thread. At most ``waiting`` jobs wait for it.

    ``report`` is called with what is worth a line in the log; it never quotes a request.
    """

    engine: Engine
    waiting: int
    report: Callable[[str], None] = lambda _: None
    steps: int = 0
    _queue: deque[Job] = field(default_factory=deque)
    _running: set[Job] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopping: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="coterie-api", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step. Jobs that did not end get a fault."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def queued(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many jobs are being computed."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue ``job``. Raises :class:`RequestError` where the queue is full, or the worker does not run."""
        with self._changed:
            if not self.alive:
                raise _stopped()
            if len(self._queue) >= self.waiting:
                raise RequestError(
                    "the service has as many requests as it can queue; try again", 503, "busy", retry_after=2
                )
            self._queue.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._take():
                self._step()
        finally:  # whatever ended it: nobody waits for an answer that will not come
            with self._changed:
                self._stopping = True
                left = [*self._queue, *self._running]
                self._queue.clear()
                self._running.clear()
            for job in left:
                job.end(_stopped())

    def _take(self) -> bool:
        """Wait for work, drop what is over, and give the engine what it has room for. False: stop."""
        with self._changed:
            while not (self._queue or self._running or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            now = time.monotonic()
            over = {job for job in self._running if job.over(now)}
            self._running -= over
            self._queue = deque(job for job in self._queue if not job.over(now))
        self.engine.drop(over)
        while self.engine.room > 0 and (job := self._next()) is not None:
            self._admit(job)
        return True

    def _next(self) -> Job | None:
        with self._changed:
            return self._queue.popleft() if self._queue else None

    def _admit(self, job: Job) -> None:
        self._running.add(job)
        try:
            self.engine.admit(job)
        except RequestError as fault:
            self._running.discard(job)
            job.end(fault)
        except FAULTS as fault:
            self.report(f"a request could not be read: {where(fault)}")
            self._running.discard(job)
            job.end(broken())

    def _step(self) -> None:
        if self.engine.busy:
            try:
                self._running -= set(self.engine.step())
            except FAULTS as fault:
                self.report(f"a pass failed: {where(fault)}")
                self._running -= set(self.engine.fail(broken()))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.steps += 1
        if self._running and not self.engine.busy:
            self._abandon()

    def _abandon(self) -> None:
        """End the jobs that the engine does not work on and has not ended: a bug there, and nobody may wait for it."""
        self.report(f"the engine lost requests: {len(self._running)}")
        self.engine.fail(broken())
        for job in self._running:
            job.end(broken())
        self._running.clear()
