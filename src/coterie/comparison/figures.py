"""The figures of a comparison, from the summaries and events of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from coterie.comparison.commit import commit
from coterie.comparison.cross import read_cross
from coterie.comparison.jobs import Missing
from coterie.comparison.newcomers import read_newcomers
from coterie.comparison.paired import against_best, table_of
from coterie.comparison.record import Figures, Reached, Record, RunFigures
from coterie.comparison.tuning import Choice
from coterie.comparison.variants import contenders, title_of
from coterie.methods.findings import Clusters, find
from coterie.ops.metrics import better
from coterie.ops.statistics import bootstrap_interval, seed_interval
from coterie.runs.events import METRICS, Evaluated, RoundDone, read_events
from coterie.runs.summary import Summary
from coterie.types import ClientId

Results = dict[str, dict[int, Summary]]  # variant -> seed -> summary
_SHARE = 0.95  # of the best validation mean: the target


@dataclass(frozen=True)
class Done:
    """A run that has finished: its folder and its summary."""

    folder: Path
    summary: Summary


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison has: finished runs by variant and seed, what tuning chose, and missing runs."""

    done: Mapping[str, Mapping[int, Done]]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    missing: Sequence[Missing] = ()

    @property
    def results(self) -> Results:
        """The summary of every run, by variant and seed."""
        return {variant: {seed: run.summary for seed, run in runs.items()} for variant, runs in self.done.items()}


def record_of(comparison: Comparison, target: float | None = None) -> Record:
    """The record of a comparison with at least one finished run. ``target`` is a mean to reach, by default one derived
    from the best variant."""
    summaries = [run.summary for runs in comparison.done.values() for run in runs.values()]
    primary, last = summaries[-1].primary, summaries[-1]
    means = {v: _mean([_of(run.summary, "validation") for run in runs.values()]) for v, runs in comparison.done.items()}
    best = best_of(means, primary)
    aim = target if target is not None else _target(means[best], primary) if best else None
    figures = {v: _figures(v, runs, aim) for v, runs in comparison.done.items()}
    if best is not None:
        figures = against_best(figures, means, best, primary)
    return Record(
        primary=primary,
        variants={v: replace(row, tuned=comparison.choices.get(v)) for v, row in figures.items()},
        best=best,
        target=aim,
        missing=comparison.missing,
        clusters=_clusters(comparison.results),
        versions=last.versions,
        machine=last.machine,
        commit=commit(),
    )


def best_of(means: Mapping[str, float | None], metric: str) -> str | None:
    """The contender with the best mean, the first of equals; None where no mean is known."""
    best: tuple[str, float] | None = None
    for variant, mean in contenders(means).items():
        if mean is not None and (best is None or better(metric, mean, best[1])):
            best = variant, mean
    return best[0] if best else None


def clusters_of(results: Results) -> tuple[str, Clusters] | None:
    """The first variant that finds clusters of clients, and those of its first seed."""
    for variant, by_seed in results.items():
        if clusters := find(next(iter(by_seed.values())).findings, Clusters):
            return variant, clusters
    return None


def curves(comparison: Comparison) -> dict[str, list[tuple[int, float]]]:
    """By title: the mean test metric over clients and seeds, by round."""
    by_variant = {}
    for variant, runs in comparison.done.items():
        values: dict[int, list[float]] = {}
        for run in runs.values():
            for event in evaluations(run.folder):
                if "test" in event.mean:
                    values.setdefault(event.round, []).append(event.mean["test"][run.summary.primary])
        by_variant[title_of(variant)] = [(rnd, float(np.mean(row))) for rnd, row in sorted(values.items())]
    return by_variant


def evaluations(folder: Path) -> list[Evaluated]:
    """The evaluations of a run, by round; of a round that was logged twice (a killed run, resumed) the last counts."""
    events = [event for event in read_events(folder / METRICS) if isinstance(event, Evaluated)]
    return [event for _, event in sorted({event.round: event for event in events}.items())]


def bytes_by_round(folder: Path) -> dict[int, int]:
    """By round: the bytes that all clients of a run had sent and received up to then."""
    events = {event.round: event for event in read_events(folder / METRICS) if isinstance(event, RoundDone)}
    total, by_round = 0, {}
    for rnd, event in sorted(events.items()):
        total += sum(entry.bytes_up + entry.bytes_down for entry in event.clients.values())
        by_round[rnd] = total
    return by_round


def _figures(variant: str, by_seed: Mapping[int, Done], target: float | None) -> Figures:
    runs = [_run(seed, run, target) for seed, run in by_seed.items()]
    first = next(iter(by_seed.values())).summary
    groups = {client: row.group for client, row in first.clients.items()}
    return figures_of(variant, runs, first.method or variant.partition(":")[0], first.evaluated, groups)


def figures_of(
    variant: str, runs: Sequence[RunFigures], method: str, evaluated: str, groups: Mapping[ClientId, str | None]
) -> Figures:
    """The figures of a variant over at least one run, without those that need other variants."""
    means = [run.mean for run in runs]
    known = [mean for mean in means if mean is not None]
    whole = len(known) == len(means)
    table = table_of(runs, None)
    reached = [run.target for run in runs if run.target is not None]
    return Figures(
        title=title_of(variant),
        method=method,
        evaluated=evaluated,
        seeds=[run.seed for run in runs],
        mean=_mean(means),
        std=float(np.std(known, ddof=1)) if whole and len(known) > 1 else 0.0,
        interval=seed_interval(known) if whole else None,
        client_interval=bootstrap_interval(table) if table.size else None,
        validation=_mean([run.validation for run in runs]),
        worst=_mean([run.worst for run in runs]),
        p10=_mean([run.p10 for run in runs]),
        bytes=float(np.mean([run.bytes_up + run.bytes_down for run in runs])),
        seconds=float(np.mean([run.seconds for run in runs])),
        target_round=float(np.mean([r.round for r in reached])) if len(reached) == len(runs) else None,
        target_bytes=float(np.mean([r.bytes for r in reached])) if len(reached) == len(runs) else None,
        clients={client: _mean([run.clients.get(client) for run in runs]) for client in groups},
        groups=groups,
        runs=runs,
        home=_mean([run.home for run in runs]),
        beyond=_mean([run.beyond for run in runs]),
        newcomers=_mean([run.newcomers for run in runs]),
        gflop=_mean([run.gflop for run in runs]),
    )


def _run(seed: int, run: Done, target: float | None) -> RunFigures:
    summary = run.summary
    worst = summary.worst
    cross = read_cross(run.folder)
    home, beyond = (cross.means(summary.primary) if cross else None) or (None, None)
    joined = read_newcomers(run.folder)
    tail = "p90" if better(summary.primary, 0.0, 1.0) else "p10"
    return RunFigures(
        seed=seed,
        folder=run.folder.name,
        rounds=summary.rounds,
        best_round=summary.best_round,
        mean=_of(summary, "test"),
        validation=_of(summary, "validation"),
        worst=_known(worst.value) if worst else None,
        worst_client=worst.client if worst else None,
        p10=_known(summary.percentiles.get(tail)),
        clients={client: _known(row.test.get(summary.primary)) for client, row in summary.clients.items()},
        bytes_up=summary.bytes.up,
        bytes_down=summary.bytes.down,
        seconds=summary.seconds,
        target=_reached(run, target) if target is not None else None,
        home=home,
        beyond=beyond,
        newcomers=joined.mean(summary.primary) if joined else None,
        gflop=summary.gflop or None,
    )


def _reached(run: Done, target: float) -> Reached | None:
    metric = run.summary.primary
    spent = bytes_by_round(run.folder)
    for event in evaluations(run.folder):
        value = event.mean.get("validation", {}).get(metric)
        if value is not None and (value == target or better(metric, value, target)):
            return Reached(event.round, spent.get(event.round, 0))
    return None


def _target(best: float | None, metric: str) -> float | None:
    """95% of the best mean; of a loss, the loss that is 5% above it."""
    if best is None:
        return None
    return best / _SHARE if better(metric, 0.0, 1.0) else best * _SHARE


def _clusters(results: Results) -> dict[str, dict[ClientId, int]]:
    """The clusters of every variant that finds some, with its first seed."""
    by_variant = {v: find(next(iter(runs.values())).findings, Clusters) for v, runs in results.items()}
    return {variant: dict(clusters.members) for variant, clusters in by_variant.items() if clusters}


def _of(summary: Summary, split: str) -> float | None:
    return _known(summary.mean.get(split, {}).get(summary.primary))


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
