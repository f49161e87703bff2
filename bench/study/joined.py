"""Joins what a machine has just measured to the published figures, so that a study can grow method by method.

A method that was run again replaces its published figures. Which method is best, and every paired comparison with it,
is computed anew over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.comparison.figures import best_of
from coterie.comparison.paired import against_best
from coterie.comparison.record import Figures, Record, read_record, write_record
from coterie.files import read_json, write_json
from coterie.runs.entries import plain
from coterie.types import CoterieError

MADE = "made"  # where each method was run: its machine and commit


def join(published: Record, new: Record) -> Record:
    """``published`` with the methods of ``new``. Raises :class:`CoterieError` where they do not belong together."""
    clients = {client for row in new.variants.values() for client in row.clients}
    for name, row in published.variants.items():
        if set(row.clients) != clients or published.primary != new.primary:
            raise CoterieError(f"the published {name} is of another federation; --anew starts without it")
    if published.target != new.target:
        raise CoterieError(f"published rounds are to {published.target}, these to {new.target}: run with that target")
    rows = {name: replace(row, against=None) for name, row in {**published.variants, **new.variants}.items()}
    means = {name: row.validation for name, row in rows.items()}
    best = best_of(means, new.primary)
    assert best is not None  # a study is tuned on validation data
    return replace(
        new,
        variants=against_best(rows, means, best, new.primary),
        best=best,
        missing=(*(entry for entry in published.missing if entry.variant not in new.variants), *new.missing),
        clusters={**published.clusters, **new.clusters},
    )


def publish(measured: Path, published: Path, anew: bool = False) -> Record:
    """Join the record in ``measured`` to that in ``published``, or replace it if ``anew``, and write the latter."""
    new, old = read_record(measured), None if anew else read_record(published)
    if new is None:
        raise CoterieError(f"{measured} has no comparison; run the study first")
    made, before = (_made(published), old.variants) if old else ({}, {})
    here = {"machine": plain(new.machine), "commit": new.commit}
    made |= {name: here for name, row in new.variants.items() if not _same(row, before.get(name))}
    record = join(old, new) if old else new
    write_record(published, record)
    write_json(published, {**read_json(published, "run the study again"), MADE: made})
    return record


def _same(row: Figures, before: Figures | None) -> bool:
    """Whether ``row`` is what was published ``before``: of runs that the machine still has, and did not do again."""
    return before is not None and replace(row, against=None) == replace(before, against=None)


def _made(published: Path) -> Mapping[str, Any]:
    """Where each published method was run; a file without that has one place for all."""
    content = read_json(published, "run the study again")
    everywhere = {"machine": content["machine"], "commit": content["commit"]}
    return dict(content.get(MADE) or dict.fromkeys(content["variants"], everywhere))
