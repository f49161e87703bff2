"""Runs work on several devices at once, and reads and writes the disk beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Generic, TypeVar

from coterie.compute.workplace import Workplace

T = TypeVar("T")
_WAITING = 64  # states of clients that may wait to be written


def run_on(
    workplaces: Sequence[Workplace], plan: Sequence[Sequence[int]], work: Callable[[Workplace, int], T]
) -> Generator[T, None, None]:
    """The results of ``work`` for the numbers from 0 on, in order. ``plan`` says which numbers each workplace does.

    One workplace works in this thread, several in a thread each. The first fault in any, or an interrupt here, ends
    all: each workplace stops before its next forward pass, and unfinished work is lost.
    """
    if len(workplaces) == 1:
        for number in plan[0]:
            yield work(workplaces[0], number)
        return
    finished: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
    results: dict[int, T] = {}
    upcoming = 0
    _resume(workplaces)
    with ExitStack() as stack:
        stack.callback(_resume, workplaces)  # after the pools are joined
        pools = [stack.enter_context(ThreadPoolExecutor(1, f"workplace-{i}")) for i in range(len(workplaces))]
        stack.callback(_stop, workplaces, pools)  # before the pools are waited for
        for workplace, pool, numbers in zip(workplaces, pools, plan, strict=True):
            for number in numbers:
                pool.submit(_work, workplace, number, work).add_done_callback(partial(_finished, finished, number))
        for _ in range(sum(map(len, plan))):
            number, future = finished.get()
            results[number] = future.result()
            while upcoming in results:
                yield results.pop(upcoming)
                upcoming += 1


def _finished(queue: SimpleQueue[tuple[int, Future[T]]], number: int, future: Future[T]) -> None:
    queue.put((number, future))


def _work(workplace: Workplace, number: int, work: Callable[[Workplace, int], T]) -> T:
    with workplace.current():
        return work(workplace, number)


def _resume(workplaces: Sequence[Workplace]) -> None:
    for workplace in workplaces:
        workplace.stop.clear()


def _stop(workplaces: Sequence[Workplace], pools: Sequence[ThreadPoolExecutor]) -> None:
    """Stop the work that is under way."""
    for workplace in workplaces:
        workplace.stop.set()
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class DiskThread(Generic[T]):
    """A thread that fetches the inputs for a plan's numbers one ahead, and writes results in the background.

    ``after`` gives the number that the same workplace does next.
    """

    pool: ThreadPoolExecutor
    fetch: Callable[[int], T]
    after: dict[int, int]
    fetching: dict[int, Future[T]] = field(default_factory=dict)
    writing: deque[Future[object]] = field(default_factory=deque)

    def take(self, number: int) -> T:
        """The inputs for the number; starts to fetch those for the next. Raises what fetching them raised."""
        fetching = self.fetching.pop(number, None) or self.pool.submit(self.fetch, number)
        fetched = fetching.result()
        following = self.after.get(number)
        if following is not None:
            self.fetching[following] = self.pool.submit(self.fetch, following)
        return fetched

    def write(self, save: Callable[[], object]) -> None:
        """Call ``save`` in the thread. Waits where many calls are waiting; raises what an earlier call raised."""
        self.writing.append(self.pool.submit(save))
        if len(self.writing) > _WAITING:
            self.writing.popleft().result()


@contextmanager
def disk_thread(plan: Sequence[Sequence[int]], fetch: Callable[[int], T]) -> Iterator[DiskThread[T]]:
    """A :class:`DiskThread`, for the length of a ``with`` block. Once the block has ended, all writes are done.

    Raises what a write raised. Where the block raises, writes that have not begun are dropped.
    """
    after = {number: following for numbers in plan for number, following in pairwise(numbers)}
    pool = ThreadPoolExecutor(1, "disk")
    thread = DiskThread(pool, fetch, after)
    try:
        yield thread
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)
    for future in thread.writing:
        future.result()
