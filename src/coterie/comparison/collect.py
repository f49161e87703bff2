"""Collects the finished runs of a comparison from its folder: those of this call and those of earlier ones."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path

from coterie.comparison.figures import Comparison, Done, record_of
from coterie.comparison.jobs import Job, Missing, finished, missed
from coterie.comparison.record import RECORD, Record, read_record, write_record
from coterie.comparison.tuning import SEED, Choice
from coterie.comparison.variants import Point, config_for
from coterie.config.load import Raw
from coterie.runs.summary import SUMMARY
from coterie.types import CoterieError


def update(
    raw: Raw,
    folder: Path,
    root: Path,
    jobs: Sequence[Job],
    choices: Mapping[str, Choice],
    missing: Sequence[Missing],
    target: float | None,
) -> Comparison:
    """Collect the comparison in ``folder``, and write ``compare.json`` where a run has finished.

    One process at a time, so that none forgets what another has just written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".compare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        comparison = collect(raw, folder, root, jobs, choices, missing)
        if comparison.done:
            write_record(folder / RECORD, record_of(comparison, target))
    return comparison


def collect(
    raw: Raw,
    folder: Path,
    root: Path,
    jobs: Sequence[Job],
    choices: Mapping[str, Choice],
    missing: Sequence[Missing],
) -> Comparison:
    """The comparison in ``folder``: the runs of ``jobs`` that have finished, also in other processes, and earlier ones.

    Earlier runs are those in ``compare.json`` whose config is still the same. Of a variant of ``jobs``, those with
    other tuned settings are left out. ``missing`` has what is known of runs without a result.
    """
    record = read_record(folder / RECORD)
    points = {job.variant: job.point for job in jobs}
    earlier, changed = _earlier(record, points, raw, folder, root)
    names = {job.name for job in jobs}
    done: dict[str, dict[int, Done]] = {}
    for job in [*jobs, *(job for job in earlier if job.name not in names)]:
        ended = finished(job)
        if ended is None and job.name not in names and (job.folder / SUMMARY).exists():
            ended = missed(job, "other config", "it has had fewer rounds; name its method and seed to continue it")
        if ended and ended.summary:
            done.setdefault(job.variant, {})[job.seed] = Done(job.folder, ended.summary)
        elif ended and ended.missing:
            changed.append(ended.missing)
    rows = record.variants if record else {}
    # Of a run that had another config for a while, what it was tuned to is left, and not what else was tried.
    known = {job.variant: Choice(job.point, SEED, {}) for job in earlier if job.point}
    known |= {v: row.tuned for v, row in rows.items() if row.tuned}
    here = {*points, *(entry.variant for entry in missing)}
    before = [entry for entry in (record.missing if record else ()) if entry.variant not in here]
    return Comparison(
        {variant: dict(sorted(runs.items())) for variant, runs in done.items()},
        {v: choice for v, choice in {**_other(known, points), **choices}.items() if v in done},
        _still_missing([*missing, *changed, *before], done),
    )


def _other(known: Mapping[str, Choice], points: Mapping[str, Point]) -> dict[str, Choice]:
    """What is known of variants that are not compared now."""
    return {variant: choice for variant, choice in known.items() if variant not in points}


def _earlier(
    record: Record | None, points: Mapping[str, Point], raw: Raw, folder: Path, root: Path
) -> tuple[list[Job], list[Missing]]:
    """The runs that ``record`` names, and those of them that the config cannot make any more."""
    if record is None:
        return [], []
    entries = [
        (variant, run.seed, row.tuned.settings if row.tuned else ())
        for variant, row in record.variants.items()
        for run in row.runs
    ]
    entries += [(entry.variant, entry.seed, entry.settings) for entry in record.missing if entry.why == "other config"]
    jobs: list[Job] = []
    changed: list[Missing] = []
    for variant, seed, point in entries:
        if points.get(variant, point) != point:
            continue
        try:
            jobs.append(Job(variant, seed, point, config_for(raw, variant, seed, point), folder, root))
        except CoterieError as fault:
            changed.append(Missing(variant, seed, point, "other config", str(fault)))
    return jobs, changed


def _still_missing(entries: Sequence[Missing], done: Mapping[str, Mapping[int, Done]]) -> list[Missing]:
    """``entries`` without runs that have finished, each run once: its first."""
    left = {(e.variant, e.seed, e.settings): e for e in reversed(entries) if e.seed not in done.get(e.variant, {})}
    return [*reversed(left.values())]
