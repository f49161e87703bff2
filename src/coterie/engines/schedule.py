"""Work on several devices at once, and what the disk holds read and written beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from coterie.compute.workplace import Workplace

T = TypeVar("T")
_WAITING = 64  # clients' states that may wait to be written


def on_places(
    places: Sequence[Workplace], plan: Sequence[Sequence[int]], work: Callable[[Workplace, int], T]
) -> Generator[T, None, None]:
    """What ``work`` makes of every number, in their order from 0 on. ``plan`` says which numbers each place does.

    One place works in this thread, several in a thread each. The first fault there, or an interrupt here, ends all:
    a place stops before its next forward pass, and what it had begun is given up.
    """
    if len(places) == 1:
        for number in plan[0]:
            yield work(places[0], number)
        return
    finished: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
    made: dict[int, T] = {}
    upcoming = 0
    _go_on(places)
    with ExitStack() as stack:
        stack.callback(_go_on, places)  # after the pools are joined
        pools = [stack.enter_context(ThreadPoolExecutor(1, f"place-{i}")) for i in range(len(places))]
        stack.callback(_stop, places, pools)  # before the pools are waited for
        for place, pool, numbers in zip(places, pools, plan, strict=True):
            for number in numbers:
                pool.submit(_work, place, number, work).add_done_callback(partial(_finished, finished, number))
        for _ in range(sum(map(len, plan))):
            number, future = finished.get()
            made[number] = future.result()
            while upcoming in made:
                yield made.pop(upcoming)
                upcoming += 1


def _finished(line: SimpleQueue[tuple[int, Future[T]]], number: int, future: Future[T]) -> None:
    line.put((number, future))


def _work(place: Workplace, number: int, work: Callable[[Workplace, int], T]) -> T:
    with place.current():
        return work(place, number)


def _go_on(places: Sequence[Workplace]) -> None:
    for place in places:
        place.stop.clear()


def _stop(places: Sequence[Workplace], pools: Sequence[ThreadPoolExecutor]) -> None:
    """End what is under way; where all is done, there is nothing to end."""
    for place in places:
        place.stop.set()
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Mover(Generic[T]):
    """Fetches what the numbers of a plan need in a thread of its own, one number ahead; and writes behind.

    ``after`` names the number that the same place does next.
    """

    pool: ThreadPoolExecutor
    fetch: Callable[[int], T]
    after: dict[int, int]
    coming: dict[int, Future[T]] = field(default_factory=dict)
    written: deque[Future[Any]] = field(default_factory=deque)

    def take(self, number: int) -> T:
        """What the number needs; from here on the next one's is fetched. Raises what fetching it raised."""
        mine = self.coming.pop(number, None) or self.pool.submit(self.fetch, number)
        found = mine.result()
        following = self.after.get(number)
        if following is not None:
            self.coming[following] = self.pool.submit(self.fetch, following)
        return found

    def write(self, save: Callable[[], Any]) -> None:
        """Have ``save`` done. Where many wait already, wait too; raises what an earlier one raised."""
        self.written.append(self.pool.submit(save))
        if len(self.written) > _WAITING:
            self.written.popleft().result()


@contextmanager
def mover(plan: Sequence[Sequence[int]], fetch: Callable[[int], T]) -> Iterator[Mover[T]]:
    """A :class:`Mover`, for the length of a ``with`` block. Once the block has ended, all that it was given is written.

    Raises what a write raised. Where the block raises, what is not yet under way is not written.
    """
    after = {number: following for numbers in plan for number, following in pairwise(numbers)}
    pool = ThreadPoolExecutor(1, "mover")
    made = Mover(pool, fetch, after)
    try:
        yield made
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)
    for future in made.written:
        future.result()
