"""The worker: a bounded queue, faults that end one job alone, and nothing left waiting when it stops."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from api_runs import make_run
from coterie.api.cache import RowCache
from coterie.api.decode import Decoding
from coterie.api.jobs import Event, Generate, Job, RequestError, Written
from coterie.api.served import served
from coterie.api.worker import Worker

torch.set_num_threads(1)


class Waiting:
    """An engine that computes nothing until it is told to: jobs end with the next step after ``go``."""

    def __init__(self, rows: int = 2, fault: Exception | None = None) -> None:
        self.jobs: list[Job] = []
        self.rows, self.fault, self.go = rows, fault, threading.Event()

    @property
    def room(self) -> int:
        return self.rows - len(self.jobs)

    @property
    def busy(self) -> int:
        return len(self.jobs)

    def admit(self, job: Job) -> None:
        if isinstance(job.request, Generate) and job.request.prompt == "refuse":
            raise RequestError("refused", 400)
        self.jobs.append(job)

    def drop(self, over: set[Job]) -> None:
        self.jobs = [job for job in self.jobs if job not in over]

    def step(self) -> list[Job]:
        self.go.wait(0.01)
        if self.fault is not None:
            raise self.fault
        if not self.go.is_set():
            return []
        ended, self.jobs = self.jobs, []
        for job in ended:
            job.end(Written("", "stop", 1, 1))
        return ended

    def fail(self, fault: RequestError) -> list[Job]:
        ended, self.jobs = self.jobs, []
        for job in ended:
            job.end(fault)
        return ended


@contextmanager
def running(engine: Waiting | Decoding, waiting: int = 2) -> Iterator[Worker]:
    worker = Worker(engine, waiting, report=lambda text: said.append(text))
    said: list[str] = []
    worker.said = said  # type: ignore[attr-defined]
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def ask(worker: Worker, prompt: str = "a", seconds: float = 60) -> tuple[Job, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    job = Job(Generate(0, prompt, 3), time.monotonic() + seconds, events.put)
    worker.submit(job)
    return job, events


def until(condition: object) -> None:
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    engine = Waiting(rows=2)
    with running(engine, waiting=2) as worker:
        logs = [ask(worker)[1] for _ in range(2)]
        until(lambda: worker.running == 2)
        logs += [ask(worker)[1] for _ in range(2)]
        with pytest.raises(RequestError, match="as many requests as it can queue") as caught:
            ask(worker)
        assert (caught.value.status, caught.value.retry_after) == (503, 2)
        engine.go.set()
        assert all(isinstance(log.get(timeout=10), Written) for log in logs)
        until(lambda: worker.running == worker.queued == 0)


def test_a_job_that_nobody_waits_for_is_dropped_in_the_queue_and_in_the_engine() -> None:
    engine = Waiting(rows=1)
    with running(engine) as worker:
        (first, log), (second, other) = ask(worker), ask(worker)
        until(lambda: engine.busy == 1 and worker.queued == 1)
        second.cancelled.set()
        first.cancelled.set()
        until(lambda: engine.busy == worker.queued == worker.running == 0)
        assert log.empty()
        assert other.empty()


def test_a_job_that_waits_too_long_is_late() -> None:
    with running(Waiting(rows=1)) as worker:
        _, log = ask(worker, seconds=0.05)
        fault = log.get(timeout=10)
        assert isinstance(fault, RequestError)
        assert fault.status == 504


def test_a_refused_job_leaves_the_others_alone() -> None:
    engine = Waiting(rows=2)
    with running(engine) as worker:
        (_, kept), (_, refused) = ask(worker), ask(worker, "refuse")
        assert isinstance(refused.get(timeout=10), RequestError)
        engine.go.set()
        assert isinstance(kept.get(timeout=10), Written)


def test_a_pass_that_fails_ends_its_jobs_and_says_where_without_the_text() -> None:
    engine = Waiting(fault=RuntimeError("the private text of a request"))
    with running(engine) as worker:
        fault = ask(worker)[1].get(timeout=10)
        assert isinstance(fault, RequestError)
        assert fault.status == 500
        assert "private" not in str(fault)
        (line,) = worker.said  # type: ignore[attr-defined]
        assert "private" not in line
        assert "RuntimeError at" in line
        engine.fault = None
        engine.go.set()
        assert isinstance(ask(worker)[1].get(timeout=10), Written)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_ends_nobody_waits_for_ever() -> None:
    engine = Waiting(rows=1, fault=MemoryError("a bug"))
    with running(engine) as worker:
        faults = [ask(worker)[1].get(timeout=10)]
        assert [isinstance(fault, RequestError) and fault.status for fault in faults] == [503]
        until(lambda: not worker.alive)
        with pytest.raises(RequestError, match="stopping"):
            ask(worker)


def test_stopping_ends_what_runs_and_what_waits() -> None:
    with running(Waiting(rows=1)) as worker:
        logs = [ask(worker)[1] for _ in range(2)]
    faults = [log.get(timeout=10) for log in logs]
    assert [isinstance(fault, RequestError) and fault.status for fault in faults] == [503, 503]


def test_it_decodes(tmp_path: Path) -> None:
    with served(make_run(tmp_path, "llama")) as models, running(Decoding(models, rows=2), waiting=8) as worker:
        logs = [ask(worker, prompt)[1] for prompt in ("a", "b c", "d", "e f g")]
        assert all(isinstance(log.get(timeout=30), Written) for log in logs)
        assert worker.steps >= 3


def test_a_pass_over_new_prompts_that_fails_ends_their_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    with served(make_run(tmp_path, "llama")) as models:
        engine = Decoding(models, rows=4)
        with running(engine, waiting=8) as worker:
            with monkeypatch.context() as patch:
                patch.setattr(RowCache, "run", full)
                faults = [ask(worker, prompt)[1].get(timeout=10) for prompt in ("a", "b c")]
            assert [isinstance(fault, RequestError) and fault.code for fault in faults] == ["internal_error"] * 2
            until(lambda: worker.running == engine.busy == 0)
            assert isinstance(ask(worker)[1].get(timeout=30), Written)
        assert all("the engine lost" not in line for line in worker.said)  # type: ignore[attr-defined]


def test_jobs_that_the_engine_lost_get_a_fault() -> None:
    class Losing(Waiting):
        def step(self) -> list[Job]:
            self.jobs = []
            return []

    with running(Losing()) as worker:
        fault = ask(worker)[1].get(timeout=10)
        assert isinstance(fault, RequestError)
        assert fault.code == "internal_error"
        until(lambda: worker.running == 0)
        assert worker.said == ["the engine lost requests: 1"]  # type: ignore[attr-defined]
