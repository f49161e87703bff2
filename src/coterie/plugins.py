"""What installed packages add to Coterie, found through their entry points.

A package adds a method, a gate, a dataset source, an engine or a score by naming it in its ``pyproject.toml``:

    [project.entry-points."coterie.methods"]
    fedmedian = "coterie_fedmedian:FedMedian"

The groups are ``coterie.methods``, ``coterie.gates``, ``coterie.sources``, ``coterie.engines`` and
``coterie.scores``. The name on the left is the one that a config uses. Nothing is imported until it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from coterie.types import CoterieError


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group``, by name. Raises :class:`CoterieError` where two packages use the same name."""
    by_name: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = by_name.setdefault(point.name, point)
        if other.value != point.value:
            raise CoterieError(
                f"two packages add {point.name!r} to {group}: {package_of(other)} and {package_of(point)}; "
                "uninstall one of them"
            )
    return dict(sorted(by_name.items()))


def load(point: EntryPoint) -> Any:
    """What ``point`` names. Raises :class:`CoterieError` that names the package where that cannot be imported."""
    try:
        return point.load()
    except (ImportError, AttributeError) as fault:
        raise CoterieError(
            f"the package {package_of(point)} adds {point.name!r} to {point.group}, but {point.value} cannot be "
            f"imported: {fault}"
        ) from fault


def check_new(group: str, own: Iterable[str]) -> None:
    """Raise :class:`CoterieError` where an installed package uses a name of Coterie's ``own``."""
    if taken := sorted(installed(group).keys() & set(own)):
        point = installed(group)[taken[0]]
        raise CoterieError(
            f"the package {package_of(point)} adds {taken[0]!r} to {group}, which Coterie has already; rename it there"
        )


def package_of(point: EntryPoint) -> str:
    """The name of the package that adds ``point``."""
    return point.dist.name if point.dist else point.value
