"""The study's claims: each system against its published form and the three best baselines, with one test for all.

A claim is a pair of variants on one federation. Its p-value is that of a permutation test over clients; Holm's rule
adjusts it for all claims of the table, on whichever federation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.comparison.paired import against
from coterie.comparison.record import Against, Figures, Record
from coterie.comparison.tables import MISSING, p_value, signed
from coterie.comparison.variants import contenders
from coterie.ops.metrics import better
from coterie.ops.statistics import holm

SYSTEMS = {
    "fedlease": ("fedlease:distance=B",),
    "fedamole": (
        "fedamole:clients_per_expert=2", "fedamole:embed=after:embed_rows=held_out:prototype=experts:inertia=0",
    ),
}  # fmt: skip  # a system, and the forms of it that are nearer to the paper
_BASELINES = 3
_HEAD = ("federation", "method", "against", "points", "ahead", "p (Holm)", "bytes", "operations")


@dataclass(frozen=True)
class Claim:
    """A system and what it is held against, on one federation; ``metric`` is what the difference is of."""

    federation: str
    mine: Figures
    other: Figures
    metric: str
    found: Against


def claims_of(records: Mapping[str, Record]) -> list[Claim]:
    """The claims of all federations, with p-values that are adjusted for all of them."""
    claims = [claim for federation, record in records.items() for claim in _claims(federation, record)]
    adjusted = holm({str(i): claim.found.p for i, claim in enumerate(claims)})
    return [replace(claim, found=replace(claim.found, p_holm=adjusted[str(i)])) for i, claim in enumerate(claims)]


def best_baselines(record: Record) -> list[str]:
    """The three best methods by validation that are neither ours nor a reference; of equals, those named first."""
    ours = {name.partition(":")[0] for name in SYSTEMS}
    means = {v: row.validation for v, row in contenders(record.variants).items() if row.method not in ours}
    known = [(v, mean) for v, mean in means.items() if mean is not None]
    return [v for v, _ in sorted(known, key=lambda pair: pair[1], reverse=_more(record))[:_BASELINES]]


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
            if other and found:
                yield Claim(federation, mine, other, record.primary, found)


def _cells(claim: Claim) -> list[str]:
    found, metric = claim.found, claim.metric
    low, high = (signed(value, metric) for value in found.interval)
    ahead = f"{_seeds_ahead(claim)} of {len(found.seeds)} seeds, {found.wins} of {_clients(found)} clients"
    return [
        claim.federation, claim.mine.title, claim.other.title, f"{signed(found.difference, metric)} [{low}, {high}]",
        ahead, p_value(found), _times(claim.mine.bytes, claim.other.bytes), _operations(claim),
    ]  # fmt: skip


def _seeds_ahead(claim: Claim) -> int:
    """The seeds with which the system's mean is better."""
    other = {run.seed: run.mean for run in claim.other.runs}
    pairs = ((run.mean, other.get(run.seed)) for run in claim.mine.runs)
    return sum(a is not None and b is not None and better(claim.metric, a, b) for a, b in pairs)


def _clients(found: Against) -> int:
    return found.wins + found.losses + found.ties


def _operations(claim: Claim) -> str:
    """The ratio of the operations of training, over the seeds where both are known."""
    other = {run.seed: run.gflop for run in claim.other.runs if run.gflop}
    pairs = [(run.gflop, other[run.seed]) for run in claim.mine.runs if run.gflop and run.seed in other]
    return _times(sum(mine for mine, _ in pairs), sum(theirs for _, theirs in pairs))


def _times(mine: float | None, other: float | None) -> str:
    """How many times of the other's cost."""
    if not mine or not other:
        return MISSING
    ratio = mine / other
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _more(record: Record) -> bool:
    return better(record.primary, 1.0, 0.0)
