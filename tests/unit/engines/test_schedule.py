"""Work on several devices at once, and reading and writing the disk beside it: in order, ended cleanly on a fault."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from coterie.compute.workplace import StoppedError, Workplace
from coterie.engines.schedule import disk_thread, run_on
from workplaces import make_workplace

WAIT = 20.0  # seconds, in which anything here happens; on any machine


def workplaces(number: int) -> list[Workplace]:
    first = make_workplace()
    return [Workplace(first.base, first.task, i, stop=first.stop) for i in range(number)]


def ours_running() -> list[str]:
    """The threads of workplaces and of the disk; libraries that load a model leave some of their own."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("workplace-", "disk"))]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Any:
    yield
    assert not ours_running()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_order_whoever_is_faster(number: int) -> None:
    plan = [list(range(i, 9, number)) for i in range(number)]
    seen: dict[int, list[int]] = {}

    def work(workplace: Workplace, of: int) -> int:
        seen.setdefault(workplace.seed, []).append(of)
        if workplace.seed == 0 and number > 1:
            time.sleep(0.01)
        return of * of

    made = list(run_on(workplaces(number), plan, work))
    assert made == [of * of for of in range(9)]
    assert seen == dict(enumerate(plan))


def test_places_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=WAIT)
    assert list(run_on(workplaces(2), [[0], [1]], lambda workplace, of: both.wait() * 0 + of)) == [0, 1]


def stubborn(workplace: Workplace) -> None:
    """Work that goes on until it is told to stop."""
    if not workplace.stop.wait(WAIT):
        unstopped.append(workplace)  # an error here would be heard by nobody
    raise StoppedError


unstopped: list[Workplace] = []


@pytest.fixture(autouse=True)
def _all_are_told_to_stop() -> Iterator[None]:
    unstopped.clear()
    yield
    assert not unstopped


def test_the_first_fault_ends_all() -> None:
    begun: list[int] = []

    def work(workplace: Workplace, of: int) -> None:
        begun.append(of)
        if of == 1:
            raise ValueError("no")
        stubborn(workplace)

    here = workplaces(2)
    with pytest.raises(ValueError, match="no"):
        list(run_on(here, [[0, 2, 4], [1, 3]], work))
    assert sorted(begun) in ([0, 1], [0, 1, 3]), "what was not begun is not begun"
    assert list(run_on(here, [[0], [1]], lambda workplace, of: workplace.stop.is_set())) == [False, False]


def test_whoever_listens_no_more_ends_all() -> None:
    def work(workplace: Workplace, of: int) -> int:
        if of == 1:
            stubborn(workplace)
        return of

    with closing(run_on(workplaces(2), [[0, 2], [1, 3]], work)) as made:
        assert next(made) == 0


def test_an_interrupt_ends_all() -> None:
    def work(workplace: Workplace, of: int) -> None:
        if of == 0:
            time.sleep(0.1)  # until the other has begun, too
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        stubborn(workplace)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_on(workplaces(2), [[0], [1]], work))
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_next_is_fetched_meanwhile() -> None:
    fetched = {number: threading.Event() for number in range(4)}

    def fetch(number: int) -> int:
        fetched[number].set()
        return 10 * number

    with disk_thread([[0, 2], [1, 3]], fetch) as moving:
        assert moving.take(0) == 0
        assert fetched[2].wait(WAIT)
        assert not fetched[1].is_set()
        assert not fetched[3].is_set()
        assert [moving.take(number) for number in (1, 2, 3)] == [10, 20, 30]


def test_a_fault_in_fetching_is_raised_where_it_is_needed() -> None:
    def fetch(number: int) -> int:
        if number == 1:
            raise ValueError("damaged")
        return number

    with disk_thread([[0, 1]], fetch) as moving:
        assert moving.take(0) == 0
        with pytest.raises(ValueError, match="damaged"):
            moving.take(1)


def test_all_is_written_once_the_block_has_ended() -> None:
    written: list[int] = []

    def save(number: int) -> None:
        time.sleep(0.001)
        written.append(number)

    with disk_thread([[]], int) as moving:
        for number in range(100):
            moving.write(lambda number=number: save(number))  # type: ignore[misc]
    assert written == list(range(100))


def test_a_write_that_fails_is_not_kept_silent() -> None:
    def full() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), disk_thread([[]], int) as moving:
        moving.write(full)


def test_a_fault_of_the_block_is_the_one_that_is_raised() -> None:
    def full() -> None:
        raise OSError("disk full")

    def block() -> None:
        with disk_thread([[]], int) as moving:
            moving.write(full)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        block()
