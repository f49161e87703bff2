"""The part of a report that shows a pool of adapters: who uses which, and where the active experts go (SmartFed)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from coterie.report import plots
from coterie.report.plots import Picture, natural
from coterie.types import SHARED, ClientId, Json

SHOWN = {"quotas", "sizes", "importance", "use", "adapters"}  # of what a method describes; pictures show them
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_DESCRIBED = {"quotas", "sizes", "adapters"}

Usage = Mapping[str, Mapping[str, Sequence[float]]]


def is_quotas(describe: Mapping[str, Json]) -> bool:
    """Whether a method describes quotas by module over adapters of a pool."""
    return all(isinstance(describe.get(name), dict) and describe[name] for name in _DESCRIBED)


def quota_pictures(
    describe: Mapping[str, Json], by_round: Mapping[int, Mapping[str, Json]], usage: Mapping[ClientId, Usage]
) -> Iterator[Picture]:
    """Quotas by layer and matrix, importance and use over the rounds, use by client.

    ``by_round`` holds what changed in the description in each round, ``usage`` the clients' gate usage by module.
    """
    places = _places(describe["sizes"])
    quotas, sizes = ({places[m]: n for m, n in describe[name].items() if m in places} for name in ("quotas", "sizes"))
    note = "Experts that a token uses at a time, of those that the matrix has."
    yield Picture("quotas", "Where the active experts go", plots.quota_map(quotas, sizes), note)
    curves: dict[str, list[tuple[int, float]]] = {}
    for rnd, values in _changes(by_round, "importance"):
        for matrix in dict.fromkeys(matrix for _, matrix in places.values()):
            of = [value for module, value in values.items() if places.get(module, ("", ""))[1] == matrix]
            if of:
                curves.setdefault(matrix, []).append((rnd, sum(of) / len(of)))
    if any(len(curve) > 1 for curve in curves.values()):
        figure = plots.accuracy_by_round(curves, label="importance", percent=False)
        yield Picture("importance", "Importance of the matrices by round", figure, "Mean over the layers.")
    shares: dict[str, list[tuple[int, float]]] = {}
    for rnd, values in _changes(by_round, "use"):
        for name, value in values.items():
            shares.setdefault(name, []).append((rnd, value))
    if any(len(curve) > 1 for curve in shares.values()):
        figure = plots.accuracy_by_round(shares, label="share of the gates' weight")
        yield Picture("adapter-use-by-round", "Use of the adapters by round", figure, "Mean over the clients.")
    adapters = list(describe["adapters"])
    use = {client: adapter_use(found, describe["adapters"]) for client, found in sorted(usage.items(), key=_by_name)}
    if any(use.values()):
        note = "Each adapter's share of the gates' weight on the client's test rows, over all matrices."
        yield Picture("adapter-use", "Which client uses which adapter", plots.adapter_use(use, adapters), note)


def adapter_use(usage: Usage, adapters: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Each adapter's share of the routed weight over all modules; ``adapters`` says first expert and rank."""
    sums = dict.fromkeys(adapters, 0.0)
    for row in usage.values():
        for expert, weight in zip(row.get("expert", ()), row.get("weight", ()), strict=False):
            for name, (first, rank) in adapters.items():
                if expert != SHARED and first <= expert < first + rank:
                    sums[name] += weight
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def _changes(by_round: Mapping[int, Mapping[str, Json]], name: str) -> Iterator[tuple[int, dict[str, float]]]:
    """The rounds in which a description by name changed, and what it changed to."""
    for rnd, change in sorted(by_round.items()):
        if isinstance(change.get(name), dict) and change[name]:
            yield rnd, change[name]


def _places(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The layer and the matrix of every module: ``("3", "query")`` for ``encoder.layer.3.attention.self.query``.

    A matrix is named in full where two of a layer end alike (BERT's ``output.dense`` and ``attention.output.dense``).
    """
    parts = {m: (match[1], match[2]) if (match := _LAYER.fullmatch(m)) else ("-", m) for m in modules}
    short = {rest: rest.rsplit(".", 1)[-1] for _, rest in parts.values()}
    several = {leaf for leaf in short.values() if list(short.values()).count(leaf) > 1}
    return {m: (layer, rest if short[rest] in several else short[rest]) for m, (layer, rest) in parts.items()}


def _by_name(item: tuple[str, Any]) -> Any:
    return natural(item[0])
