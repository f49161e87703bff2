"""Shows a pool of adapters: who uses which, where the active experts go, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coterie.methods.findings import Adapter, Quotas
from coterie.report import plots
from coterie.report.modules import layers_and_matrices
from coterie.report.plots import Curve, Picture, natural
from coterie.report.read import Run
from coterie.report.tables import Table
from coterie.requests import Usage
from coterie.types import SHARED

FINDING = Quotas


def show(quotas: Quotas, run: Run) -> Iterator[Picture | Table]:
    """Quotas by layer and matrix, use by client, importance and use by round, and where the pool comes from."""
    matrices = layers_and_matrices(quotas.sizes)
    active, sizes = ({matrices[m]: n for m, n in of.items() if m in matrices} for of in (quotas.active, quotas.sizes))
    note = "Experts that a token uses at a time, of those that the matrix has."
    if active != sizes:
        yield Picture("quotas", "Where the active experts go", plots.quota_map(active, sizes), note)
    usage = sorted(run.usage.items(), key=lambda item: natural(item[0]))
    use = {client: adapter_use(of, quotas.adapters) for client, of in usage}
    if any(use.values()):
        note = "Each adapter's share of the gates' weight on the client's test rows, over all matrices."
        figure = plots.adapter_use(use, list(quotas.adapters))
        yield Picture("adapter-use", "Which client uses which adapter", figure, note)
    yield from _by_round(run.history(Quotas), matrices)
    if quotas.budgets:
        run_budget = sum(quotas.active.values()) / len(quotas.active)
        rows = [(client, budget, run_budget) for client, budget in sorted(quotas.budgets.items())]
        yield Table("Budgets of clients", ["client", "active experts per matrix", "the run's"], rows)
    yield Table("Pool of adapters", ["", ""], _rows(quotas))


def adapter_use(usage: Usage, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """Each adapter's share of the routed weight over all modules."""
    sums = dict.fromkeys(adapters, 0.0)
    for use in usage.values():
        for expert, weight in zip(use.expert, use.weight, strict=False):
            for name, (first, rank) in adapters.items():
                if expert != SHARED and first <= expert < first + rank:
                    sums[name] += weight
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def _by_round(after: Mapping[int, Quotas], matrices: Mapping[str, tuple[str, str]]) -> Iterator[Picture]:
    importance, use = (
        _lines({rnd: _by_matrix(of, matrices) for rnd, of in after.items()}),
        _lines({rnd: of.use for rnd, of in after.items()}),
    )
    if any(len(curve) > 1 for curve in importance.values()):
        figure = plots.lines_by_round(importance, label="importance", percent=False)
        yield Picture("importance", "Importance of the matrices by round", figure, "Mean over the layers.")
    if any(len(curve) > 1 for curve in use.values()):
        figure = plots.lines_by_round(use, label="share of the gates' weight")
        yield Picture("adapter-use-by-round", "Use of the adapters by round", figure, "Mean over the clients.")


def _by_matrix(quotas: Quotas, matrices: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """The mean importance over the layers."""
    values: dict[str, list[float]] = {}
    for module, value in quotas.importance.items():
        values.setdefault(matrices.get(module, ("", module))[1], []).append(value)
    return {matrix: sum(of) / len(of) for matrix, of in values.items()}


def _lines(after: Mapping[int, Mapping[str, float]]) -> dict[str, Curve]:
    """A curve for every name, with a point for each round in which it was measured again."""
    curves: dict[str, list[tuple[int, float]]] = {}
    before: Mapping[str, float] = {}
    for rnd, values in sorted(after.items()):
        if values != before:
            for name, value in values.items():
                curves.setdefault(name, []).append((rnd, value))
        before = values
    return dict(curves)


def _rows(quotas: Quotas) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("adapters", list(quotas.adapters)), ("SHA-256", quotas.pool)]
    rows.append(("importance measured by", list(quotas.measured_by)))
    return [*rows, ("taken out of use", list(quotas.dropped))]
