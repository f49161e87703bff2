"""What a method finds, as types: clusters of clients, an assignment of experts, quotas, an error, notes.

:meth:`~coterie.methods.base.Method.describe` returns findings. :func:`to_json` writes them side by side into one
mapping, ``describe`` in ``metrics.jsonl`` and ``summary.json``, and :func:`from_json` reads them back. The report
chooses its pictures by the type of a finding: any method that finds :class:`Clusters` has the pictures of clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, NamedTuple, Protocol, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from coterie.types import ClientId, Number

Count = Annotated[int, Field(ge=0)]
CLOSE_CHOICE = 0.02  # silhouettes that differ by less can change places with the seed


class Finding(Protocol):
    """A result that a method reports about the federation."""

    def to_json(self) -> dict[str, object]:
        """Its part of ``describe`` in JSON, by name."""


F = TypeVar("F", bound=Finding)


@dataclass(frozen=True)
class Clusters:
    """Clients in clusters: ``members`` has the number of each client's cluster.

    ``silhouettes`` has the mean silhouette, -1 to 1, of every number of clusters that was tried. ``distances`` [n, n]
    are those between the clients in ``order``, whose tree has this ``linkage``. ``grounds`` says how the clusters were
    chosen where silhouettes alone do not.
    """

    members: Annotated[Mapping[ClientId, int], Field(alias="clusters", min_length=1)]
    silhouettes: Mapping[int, Number] = field(default_factory=dict)
    order: Sequence[ClientId] = ()
    distances: Sequence[Sequence[Number]] = ()
    linkage: str = "average"
    grounds: str = ""

    @property
    def number(self) -> int:
        """How many clusters there are."""
        return len(set(self.members.values()))

    @property
    def has_tree(self) -> bool:
        """Whether the clusters are a cut of the distances' tree."""
        return self.linkage not in ("kmeans", "spectral")

    @property
    def margin(self) -> float | None:
        """The silhouette of the chosen number less the best other one; None where fewer than two were compared."""
        scores = self._scores
        others = [score for k, score in scores.items() if k != self.number]
        return scores[self.number] - max(others) if self.number in scores and others else None

    @property
    def choice(self) -> str:
        """How the number of clusters was chosen, and how sure that is; empty where nothing was tried."""
        if self.grounds:
            return self.grounds
        scores, chosen = self._scores, f"{self.number} cluster{'s' * (self.number != 1)}"
        ranked = sorted((k for k in scores if k != self.number), key=lambda k: (-scores[k], k))
        if not ranked:
            return f"{chosen}: silhouette {scores[self.number]:.3f}" if scores else ""
        best = f"{scores[ranked[0]]:.3f} with {ranked[0]}"
        if self.margin is None:
            return f"{chosen}; the best silhouette is {best}"
        text = f"{chosen}: silhouette {scores[self.number]:.3f}; the next best is {best}"
        if self.margin >= CLOSE_CHOICE:
            return text
        return f"{text}. That is a close choice (margin {self.margin:.3f}): another seed may change it"

    @property
    def _scores(self) -> dict[int, float]:
        return {k: score for k, score in self.silhouettes.items() if math.isfinite(score)}

    def to_json(self) -> dict[str, object]:
        return {
            "clusters": dict(self.members),
            "silhouettes": {str(k): score for k, score in self.silhouettes.items()},
            "order": list(self.order),
            "distances": [list(row) for row in self.distances],
            "linkage": self.linkage,
        } | ({"grounds": self.grounds} if self.grounds else {})


@dataclass(frozen=True)
class ExpertPool:
    """The pool that experts are assigned from: the number of experts in a module's pool, limits, and the rule."""

    experts: Count
    clients_per_expert: int | None = None
    max_experts: int | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Assignment:
    """Which experts of a pool each client holds: ``experts[module][client]`` has their numbers."""

    experts: Annotated[Mapping[str, Mapping[ClientId, Sequence[Count]]], Field(alias="assignment", min_length=1)]
    pool: ExpertPool | None = None

    def to_json(self) -> dict[str, object]:
        experts = {module: {c: list(of) for c, of in clients.items()} for module, clients in self.experts.items()}
        pool = {name: value for name, value in asdict(self.pool).items() if value is not None} if self.pool else {}
        return {"assignment": experts} | ({"pool": pool} if pool else {})


class Adapter(NamedTuple):
    """The experts of one adapter of a pool: ``rank`` experts of rank 1, numbered from ``first``."""

    first: int
    rank: int


@dataclass(frozen=True)
class Quotas:
    """How many experts of a pool of adapters a token uses in each module, and how much each adapter is used.

    ``sizes`` has the number of experts of a module, ``active`` how many of them a token uses. ``use`` is the share of
    the gates' weight that goes to an adapter, ``importance`` that of a module as the clients in ``measured_by``
    measured it. ``dropped`` names the adapters that were taken out of use; ``pool`` is the SHA-256 of the pool.
    ``budgets`` has the clients that activate another number of experts per module, on average, than the run's.
    """

    adapters: Annotated[Mapping[str, Adapter], Field(min_length=1)]
    sizes: Annotated[Mapping[str, int], Field(min_length=1)]
    active: Annotated[Mapping[str, int], Field(alias="quotas", min_length=1)]
    importance: Mapping[str, Number] = field(default_factory=dict)
    measured_by: Sequence[ClientId] = ()
    use: Mapping[str, Number] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    pool: str = ""
    budgets: Mapping[ClientId, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        made: dict[str, object] = {
            "pool": self.pool,
            "adapters": {name: list(adapter) for name, adapter in self.adapters.items()},
            "sizes": dict(self.sizes),
            "quotas": dict(self.active),
            "importance": dict(self.importance),
            "measured_by": list(self.measured_by),
            "use": dict(self.use),
            "dropped": list(self.dropped),
        }
        return {**made, "budgets": dict(self.budgets)} if self.budgets else made


@dataclass(frozen=True)
class AggregationError:
    """What averaging A and B apart loses: |mean(BA) - mean(B) mean(A)| / |mean(BA)|; None before the first average.

    It is 0 for a method that averages products (FlexLoRA, FLoRA). FedEx-LoRA averages A and B apart, and its figure is
    what it then makes up for.
    """

    value: Annotated[float | None, Field(alias="aggregation_error")]

    def to_json(self) -> dict[str, object]:
        return {"aggregation_error": self.value}


@dataclass(frozen=True)
class Notes:
    """Texts that the user should read; those of the first state are shown when a run starts."""

    texts: Annotated[Sequence[str], Field(alias="notes")]

    def to_json(self) -> dict[str, object]:
        return {"notes": list(self.texts)}


@dataclass(frozen=True)
class Values:
    """Anything else, by name: numbers, texts, lists and mappings, shown as tables."""

    values: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        return dict(self.values)


_KINDS: tuple[type[Finding], ...] = (Clusters, Assignment, Quotas, AggregationError, Notes)


def to_json(findings: Iterable[Finding]) -> dict[str, object]:
    """``describe``: the JSON of all ``findings``, by name. Raises :class:`TypeError` where two have the same name."""
    described: dict[str, object] = {}
    for finding in findings:
        fields = finding.to_json()
        if twice := sorted(fields.keys() & described.keys()):
            raise TypeError(f"two findings are named {', '.join(map(repr, twice))}; each name may occur only once")
        described |= fields
    return described


def from_json(described: Mapping[str, object]) -> tuple[Finding, ...]:
    """The findings in ``describe``. Anything unknown, or of another shape, is in :class:`Values`."""
    typed = [finding for kind in _KINDS if (finding := read(kind, described)) is not None]
    known = {name for finding in typed for name in finding.to_json()}
    rest = {name: value for name, value in described.items() if name not in known}
    return (*typed, Values(rest)) if rest else tuple(typed)


def find(findings: Iterable[Finding], kind: type[F]) -> F | None:
    """The finding of a ``kind``, if there is one."""
    return next((finding for finding in findings if isinstance(finding, kind)), None)


def read(kind: type[F], described: Mapping[str, object]) -> F | None:
    """The finding of a ``kind`` in ``describe``; None if it is missing or has another shape."""
    try:
        finding: F = _adapter(kind).validate_python(described)
    except ValidationError:
        return None
    return finding


@cache
def _adapter(kind: type[F]) -> TypeAdapter[F]:
    return TypeAdapter(kind)
