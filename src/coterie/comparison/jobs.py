"""One run of a comparison: reused if it has finished, resumed if it was cut short, skipped while others run it.

A run that fails is reported and does not stop the others.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coterie.comparison.variants import Point, folder_of
from coterie.config.sections import Config
from coterie.experiment import run
from coterie.runs.events import Listener
from coterie.runs.extend import rounds_before
from coterie.runs.folder import FolderInUse, check_folder, lock_file
from coterie.runs.summary import SUMMARY, Summary, read_summary
from coterie.types import CoterieError

Watch = Callable[[int, str], AbstractContextManager[Listener]]  # makes a run's listener, from its rounds and its label
Why = Literal["failed", "does not fit", "in use", "other config", "tuning"]

# What a method with a bug can raise, and a device without memory: the other runs of a long comparison go on.
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, CoterieError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


def silent(rounds: int, label: str) -> AbstractContextManager[Listener]:
    """Shows nothing."""
    return nullcontext(lambda event: None)


@dataclass(frozen=True)
class Job:
    """A run to carry out in a folder below ``above``. Relative paths in its config start at ``root``."""

    variant: str
    seed: int
    point: Point
    config: Config
    above: Path
    root: Path

    @property
    def name(self) -> str:
        """The name of its folder."""
        return folder_of(self.variant, self.seed, self.point)

    @property
    def folder(self) -> Path:
        return self.above / self.name

    @property
    def label(self) -> str:
        """What it is called in logs."""
        settings = f" {' '.join(self.point)}" if self.point else ""
        return f"{self.variant}{settings} seed {self.seed}"

    @property
    def log(self) -> Path:
        """Where what a failed run wrote is kept."""
        return self.above / f"{self.name}.log"


@dataclass(frozen=True)
class Missing:
    """A run without results, and the reason."""

    variant: str
    seed: int
    settings: Point
    why: Why
    reason: str


@dataclass(frozen=True)
class Ended:
    """A job and its result: a summary, or why there is none. ``reused``: the run had finished before."""

    job: Job
    result: Summary | Missing
    reused: bool = False

    @property
    def summary(self) -> Summary | None:
        return self.result if isinstance(self.result, Summary) else None

    @property
    def missing(self) -> Missing | None:
        return self.result if isinstance(self.result, Missing) else None


def missed(job: Job, why: Why, reason: str) -> Ended:
    """``job`` without a result."""
    return Ended(job, Missing(job.variant, job.seed, job.point, why, reason))


def finished(job: Job) -> Ended | None:
    """The result of a job whose run has finished; None where it has not, or has had fewer rounds and can go on.

    A run with another config is no result.
    """
    if not (job.folder / SUMMARY).exists():
        return None
    try:
        check_folder(job.folder, job.config, resume=True)
        if rounds_before(job.folder, job.config) is not None:
            return None
        return Ended(job, read_summary(job.folder / SUMMARY), reused=True)
    except CoterieError as fault:
        return missed(job, "other config", str(fault))


def run_here(jobs: Sequence[Job], watch: Watch) -> Generator[Ended, None, None]:
    """Run ``jobs`` one after another in this process. They share what is loaded."""
    cache: dict[str, object] = {}
    for job in jobs:
        yield locked(job, lambda job: _run_here(job, watch, cache))


def locked(job: Job, work: Callable[[Job], Ended]) -> Ended:
    """``work`` on a job that no other process works on, and that none has finished meanwhile."""
    job.above.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(job.above / f".{job.name}.lock", job.folder):
            return finished(job) or work(job)
    except FolderInUse as fault:
        return missed(job, "in use", str(fault))


def _run_here(job: Job, watch: Watch, cache: dict[str, object]) -> Ended:
    resume = (job.folder / "config.json").exists()
    try:
        with watch(job.config.run.rounds, job.label) as listen:
            summary = run(job.config, job.folder, root=job.root, resume=resume, listen=listen, cache=cache)
        return Ended(job, summary)
    except FolderInUse as fault:
        return missed(job, "in use", str(fault))
    except CoterieError as fault:
        return failed(job, str(fault))
    except FAULTS as fault:
        job.log.write_text(traceback.format_exc(), encoding="utf-8")
        return missed(job, "failed", f"{type(fault).__name__}: {fault} (see {job.log})")


def failed(job: Job, reason: str) -> Ended:
    """A job that ended with an error for the user. One that never began does not fit the task."""
    return missed(job, "failed" if (job.folder / "config.json").exists() else "does not fit", reason)
