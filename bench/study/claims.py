"""The study's claims: each system against its published form and the three best baselines, with one test for all.

A claim is a pair of variants on one federation. Its p-value is that of a permutation test over clients; Holm's rule
adjusts it for all claims of the table, on whichever federation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.comparison.paired import against
from coterie.comparison.record import Against, Figures, Record, RunFigures
from coterie.comparison.tables import MISSING, p_value, signed
from coterie.comparison.variants import contenders, title_of
from coterie.ops.metrics import better
from coterie.ops.statistics import holm

# Each system, and the forms of it that are nearer to the paper, with their titles; the last one is the paper's.
SYSTEMS = {
    "fedlease": {"fedlease:distance=B": "FedLEASE, clusters of B"},
    "fedamole": {
        "fedamole:clients_per_expert=2": "FedAMoLE, two clients per expert",
        "fedamole:embed=after:embed_rows=held_out:prototype=experts:inertia=0": "FedAMoLE as published",
    },
}
_TITLES = {variant: title for forms in SYSTEMS.values() for variant, title in forms.items()}
_BASELINES = 3
_DIGITS = 9  # of a mean: equal means may differ in the last bit
_HEAD = ("federation", "method", "against", "points", "ahead", "p (Holm)", "bytes", "operations")


@dataclass(frozen=True)
class Claim:
    """A system and what it is held against, on one federation; ``metric`` is what the difference is of.

    ``other`` and ``found`` are None where there are no figures of the variant ``name`` with the same seeds.
    """

    federation: str
    mine: Figures
    name: str
    metric: str
    other: Figures | None = None
    found: Against | None = None


def claims_of(records: Mapping[str, Record]) -> list[Claim]:
    """The claims of all federations, with p-values that are adjusted for all of them."""
    claims = [claim for federation, record in records.items() for claim in _claims(federation, record)]
    adjusted = holm({str(i): claim.found.p for i, claim in enumerate(claims) if claim.found})
    return [
        replace(claim, found=replace(claim.found, p_holm=adjusted[str(i)])) if claim.found else claim
        for i, claim in enumerate(claims)
    ]


def named(record: Record) -> Record:
    """``record`` with the titles of this page."""
    rows = {variant: replace(row, title=_title(variant)) for variant, row in record.variants.items()}
    return replace(record, variants=rows)


def common_seeds(record: Record) -> set[int]:
    """The seeds that every method has: means over other seeds are not alike."""
    return set.intersection(*({run.seed for run in row.runs} for row in record.variants.values()))


def best_baselines(record: Record) -> list[str]:
    """The three best methods by validation, over the seeds that all have, that are neither ours nor a reference.

    Of equals, those named first.
    """
    seeds, others = common_seeds(record), contenders(record.variants)
    means = {v: _validation(row, seeds) for v, row in others.items() if row.method not in SYSTEMS}
    known = [(v, mean) for v, mean in means.items() if mean is not None]
    more = better(record.primary, 1.0, 0.0)
    return [v for v, _ in sorted(known, key=lambda pair: pair[1], reverse=more)[:_BASELINES]]


def table(claims: Sequence[Claim]) -> str:
    """The claims in Markdown."""
    lines: list[Iterable[str]] = [_HEAD, ["---"] * len(_HEAD), *map(_cells, claims)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _claims(federation: str, record: Record) -> Iterable[Claim]:
    for system, forms in SYSTEMS.items():
        if system not in record.variants:
            continue
        mine = record.variants[system]
        for name in (*forms, *best_baselines(record)):
            other = record.variants.get(name)
            found = against(mine, other, name, record.primary) if other else None
            yield Claim(federation, mine, name, record.primary, other, found)


def _validation(row: Figures, seeds: set[int]) -> float | None:
    """The mean over ``seeds``."""
    found = [run.validation for run in row.runs if run.seed in seeds and run.validation is not None]
    return sum(found) / len(found) if found else None


def _cells(claim: Claim) -> list[str]:
    found, metric, names = claim.found, claim.metric, [claim.federation, claim.mine.title, _title(claim.name)]
    if found is None:
        return [*names, "not run", *[MISSING] * (len(_HEAD) - len(names) - 1)]
    low, high = (signed(value, metric) for value in found.interval)
    pairs = _pairs(claim)
    seeds = sum(better(metric, *(round(run.mean or 0.0, _DIGITS) for run in pair)) for pair in pairs)
    clients = found.wins + found.losses + found.ties
    return [
        *names, f"{signed(found.difference, metric)} [{low}, {high}]",
        f"{seeds} of {len(pairs)} seeds, {found.wins} of {clients} clients", p_value(found),
        _times([(mine.bytes_up + mine.bytes_down, other.bytes_up + other.bytes_down) for mine, other in pairs]),
        _times([(mine.gflop, other.gflop) for mine, other in pairs if mine.gflop and other.gflop]),
    ]  # fmt: skip


def _title(variant: str) -> str:
    return _TITLES.get(variant) or title_of(variant)


def _pairs(claim: Claim) -> list[tuple[RunFigures, RunFigures]]:
    """The runs of both with the same seed."""
    others = {run.seed: run for run in (claim.other.runs if claim.other else ())}
    return [(run, others[run.seed]) for run in claim.mine.runs if run.seed in others]


def _times(costs: Sequence[tuple[float, float]]) -> str:
    """How many times of the other's cost, over all pairs."""
    mine, other = (sum(column) for column in zip(*costs, strict=True)) if costs else (0.0, 0.0)
    if not mine or not other:
        return MISSING
    ratio = mine / other
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
