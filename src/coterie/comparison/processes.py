"""Carries out several runs of a comparison at the same time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock
from typing import TextIO

from pydantic import ValidationError

from coterie.comparison.jobs import Ended, Job, Watch, failed, locked, missed
from coterie.comparison.worker import END, TASK, End, Task
from coterie.machine import default_threads
from coterie.runs.events import Listener, from_json
from coterie.runs.folder import plain
from coterie.runs.summary import SUMMARY, read_summary

_PATIENCE = 30.0  # seconds that an interrupted run has to end, before it is killed


def run_apart(jobs: Sequence[Job], processes: int, watch: Watch) -> Generator[Ended, None, None]:
    """Run ``jobs``, ``processes`` at a time, and yield each as it ends.

    The processes share the cores, unless OMP_NUM_THREADS or the config sets the threads of each. Listeners are called
    from several threads. If the caller stops, so do the processes; finished rounds are kept.
    """
    children = _Children(processes)
    with ThreadPoolExecutor(processes) as pool:
        try:
            waiting = [pool.submit(locked, job, lambda job: _run_apart(job, children, watch)) for job in jobs]
            yield from (done.result() for done in as_completed(waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()


@dataclass
class _Children:
    """The processes that are at work."""

    number: int
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    stopped: bool = False
    lock: Lock = field(default_factory=Lock)

    def start(self, errors: TextIO) -> subprocess.Popen[str] | None:
        """A new worker process; None after :meth:`stop`."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, default_threads() // self.number))
        with self.lock:
            if self.stopped:
                return None
            child = subprocess.Popen(
                [sys.executable, "-m", "coterie.comparison.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the parent, which passes it on
            )
            self.running.add(child)
            return child

    def stop(self) -> None:
        """Interrupt every process, and wait for it."""
        with self.lock:
            self.stopped = True
            children = [child for child in self.running if child.poll() is None]
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            try:
                child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()


def _run_apart(job: Job, children: _Children, watch: Watch) -> Ended:
    with job.log.open("w", encoding="utf-8") as errors:
        child = children.start(errors)
        if child is None:
            return missed(job, "failed", "stopped before it began")
        with child, watch(job.config.run.rounds, job.label) as listen:
            end = _follow(child, job, listen)
    children.running.discard(child)
    if end is not None:
        job.log.unlink()
        return missed(job, "in use", end.reason) if end.in_use else failed(job, end.reason)
    if child.returncode != 0 or not (job.folder / SUMMARY).exists():
        return missed(job, "failed", f"{_how(child.returncode)} (see {job.log})")
    job.log.unlink()
    return Ended(job, read_summary(job.folder / SUMMARY))


def _follow(child: subprocess.Popen[str], job: Job, listen: Listener) -> End | None:
    """Give a process its task and pass its events on, to its end. Returns why there is no result, if it says so."""
    assert child.stdin is not None
    assert child.stdout is not None
    resume = (job.folder / "config.json").exists()
    task = Task(plain(job.config), str(job.root.resolve()), str(job.folder.resolve()), resume, os.getpid())
    try:
        with child.stdin:
            child.stdin.write(TASK.dump_json(task).decode())
    except BrokenPipeError:  # it died at once, and its log says why
        return None
    end = None
    for line in child.stdout:
        try:
            event = from_json(json.loads(line))
            if event is None:
                end = END.validate_json(line)
            else:
                listen(event)
        except (ValueError, ValidationError):  # the process was killed within a line
            break
    return end


def _how(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
    return f"the process ended with exit code {code}"
