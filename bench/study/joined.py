"""Joins what a machine has just measured to the published figures, so that a study can grow by methods and by seeds.

A run replaces the published one of its method and seed. A method with another learning rate replaces all that is
published of it. Which method is best, and every paired comparison with it, is computed anew over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.comparison.figures import best_of, evaluations, figures_of
from coterie.comparison.paired import against_best
from coterie.comparison.record import Figures, Record, read_record, write_record
from coterie.comparison.tables import settings_of
from coterie.files import read_json, write_json
from coterie.methods.findings import Clusters, find
from coterie.runs.entries import plain
from coterie.runs.summary import SUMMARY, read_summary
from coterie.types import CoterieError

Curves = Mapping[str, Mapping[str, Mapping[str, float]]]
ByRun = Mapping[str, Mapping[str, Any]]  # by method and seed
PLACES, MADE = "places", "made"  # machines with commits; by method and seed: the number of its place
AGAIN = "run the study again"
BY_ROUND = "by_round"  # by method, seed and round: the mean validation metric
CLUSTERS = "clusters_by_seed"  # by method and seed: the number of each client's cluster, where a method has clusters


def check_rounds(published: Record, rounds: int) -> None:
    """Raises :class:`CoterieError` where the published runs do not have so many rounds: one table has one number."""
    other = {run.rounds for row in published.variants.values() for run in row.runs} - {rounds}
    if other:
        raise CoterieError(f"published runs have {min(other)} rounds, the config {rounds}: --anew starts without them")


def join(published: Record, new: Record) -> Record:
    """``published`` with the methods of ``new``. Raises :class:`CoterieError` where they do not belong together."""
    clients = {client for row in new.variants.values() for client in row.clients}
    for name, row in published.variants.items():
        if set(row.clients) != clients or published.primary != new.primary:
            raise CoterieError(f"the published {name} is of another federation; --anew starts without it")
    if published.target != new.target:
        raise CoterieError(f"published rounds are to {published.target}, these to {new.target}: run with that target")
    names = dict.fromkeys((*published.variants, *new.variants))
    rows = {name: _row(name, published.variants.get(name), new.variants.get(name)) for name in names}
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


def publish(measured: Path, published: Path, methods: Sequence[str], anew: bool = False) -> Record:
    """Join ``methods`` of the record in ``measured`` to those in ``published``, or replace these if ``anew``.

    ``measured`` may hold more, from earlier calls; what is published of those may be newer.
    """
    new, old = read_record(measured), None if anew else read_record(published)
    if new is None:
        raise CoterieError(f"{measured} has no comparison; run the study first")
    new = replace(new, variants={name: row for name, row in new.variants.items() if name in methods})
    record = join(old, new) if old else new
    places, made = _made(published) if old else ([], {})
    here = {"machine": plain(new.machine), "commit": new.commit}
    places += [here] if here not in places else []
    before = {(name, run.seed): run for name, row in (old.variants if old else {}).items() for run in row.runs}
    now = {(name, run.seed): run for name, row in record.variants.items() for run in row.runs}
    by_run = {
        run: made[run[0]][str(run[1])] if now[run] == before.get(run) else places.index(here) for run in sorted(now)
    }
    found = {name: {str(seed): place for (of, seed), place in by_run.items() if of == name} for name in record.variants}
    earlier = read_json(published, AGAIN) if old else {}
    more = {
        name: _joined(earlier.get(name, {}), of(new, measured.parent), found)
        for name, of in ((BY_ROUND, _curves), (CLUSTERS, _clusters))
    }
    write_record(published, record)
    write_json(published, {**read_json(published, AGAIN), PLACES: places, MADE: found, **more})
    return record


def curves_of(published: Path) -> Curves:
    """What the runs of a published study had reached on validation data, by method, seed and round."""
    return read_json(published, AGAIN).get(BY_ROUND, {})


def _curves(record: Record, above: Path) -> Curves:
    """The same of the runs of ``record``, whose folders are below ``above``."""
    runs = [(name, run) for name, row in record.variants.items() for run in row.runs]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in runs:
        means = {str(event.round): event.mean["validation"] for event in evaluations(above / run.folder)}
        found.setdefault(name, {})[str(run.seed)] = {rnd: mean[record.primary] for rnd, mean in means.items()}
    return found


def _clusters(record: Record, above: Path) -> ByRun:
    """The clusters that the runs of ``record`` have found, whose folders are below ``above``."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in record.variants.items():
        for run in row.runs:
            path = above / run.folder / SUMMARY
            clusters = find(read_summary(path).findings, Clusters) if path.exists() else None
            if clusters:
                found.setdefault(name, {})[str(run.seed)] = dict(clusters.members)
    return found


def _joined(old: ByRun, new: ByRun, made: Mapping[str, Mapping[str, int]]) -> ByRun:
    """``new`` where it has something of a run that is published, else ``old``."""
    both = {name: {**old.get(name, {}), **new.get(name, {})} for name in made}
    kept = {name: {seed: of for seed, of in both[name].items() if seed in made[name]} for name in made}
    return {name: of for name, of in kept.items() if of}


def _row(name: str, old: Figures | None, new: Figures | None) -> Figures:
    """The figures of a method over the runs of both."""
    if old is None or new is None or settings_of(old) != settings_of(new):
        row = new or old
        assert row is not None
        return replace(row, against=None)
    runs = {run.seed: run for run in (*old.runs, *new.runs)}
    row = figures_of(name, [runs[seed] for seed in sorted(runs)], new.method, new.evaluated, new.groups)
    return replace(row, tuned=new.tuned if new.tuned and new.tuned.tried else old.tuned)


def _made(published: Path) -> tuple[list[Any], Mapping[str, Mapping[str, int]]]:
    """The places, and by method and seed the number of its place."""
    content = read_json(published, AGAIN)
    return list(content[PLACES]), content[MADE]
