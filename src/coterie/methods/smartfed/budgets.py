"""SmartFed's budgets: how many experts a client activates per matrix on average, and the quotas that follow from it.

The run's budget is ``[method] active``. ``[method] budgets`` sets another for single clients, and a site may lower its
own (``[site] active``): the smaller one counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coterie.methods.smartfed.settings import SmartFedSettings
from coterie.ops.quota import RULES
from coterie.types import ClientId, ClientInfo, CoterieError, Key, Reply

BUDGET = "active"  # in an instruction's info and in the reply's: the client's budget, where it is not the run's
_FIX = 'set [method] sparse = true or router = "paper"'


def active_fault(settings: SmartFedSettings) -> str:
    """Why no client can activate fewer experts than the run; "" if one can."""
    if settings.routes_all:
        fix = 'set [method] router = "paper"' if settings.router == "mixing" else _FIX
        return f'with router = "{settings.router}" every expert is active; {fix}, or leave it out'
    return ""


def check_budgets(settings: SmartFedSettings, clients: Sequence[ClientInfo]) -> None:
    """Raises :class:`CoterieError` for ``[method] budgets`` that cannot work."""
    if unknown := sorted(settings.budgets.keys() - {c.id for c in clients}):
        raise CoterieError(f"[method] budgets names {unknown[0]!r}, which is not a client of this run; remove it")
    if settings.budgets and (fault := active_fault(settings)):
        raise CoterieError(f"[method] budgets: {fault}")


def budget_of(settings: SmartFedSettings, client: ClientInfo) -> int | None:
    """The budget of ``client``; None if it is the run's."""
    ours = settings.budgets.get(client.id, settings.active)
    budget = ours if client.active is None else min(ours, client.active)
    return None if budget == settings.active else budget


def budgets_of(settings: SmartFedSettings, clients: Sequence[ClientInfo]) -> dict[ClientId, int]:
    """The budgets of those of ``clients`` whose budget is not the run's."""
    found = {client.id: budget_of(settings, client) for client in clients}
    return {client: budget for client, budget in sorted(found.items()) if budget is not None}


def reported(before: Mapping[ClientId, int], replies: Mapping[ClientId, Reply]) -> dict[ClientId, int]:
    """The budgets ``before``, with those that the clients of ``replies`` trained with."""
    now = {c: reply.info[BUDGET] for c, reply in replies.items() if BUDGET in reply.info}
    return dict(sorted({**{c: budget for c, budget in before.items() if c not in replies}, **now}.items()))


def present(budgets: Mapping[ClientId, int], clients: Sequence[ClientInfo]) -> dict[ClientId, int]:
    """Those of ``budgets`` whose clients are among ``clients``."""
    here = {client.id for client in clients}
    return {client: budget for client, budget in budgets.items() if client in here}


def quotas_of(
    settings: SmartFedSettings,
    routers: Mapping[Key, Tensor],
    importance: Mapping[str, float],
    active: int | None = None,
) -> dict[str, int]:
    """The quota of each matrix, from a budget of ``active`` experts per matrix on average; None: the run's.

    Before importance is known all are alike. No matrix has fewer than ``[method] floor``, or than ``active`` where
    that is smaller.
    """
    sizes = {key.module: len(value) for key, value in sorted(routers.items())}
    if settings.routes_all:
        return sizes
    active = active or settings.active
    measured, floor = [importance.get(module, 0.0) for module in sizes], min(settings.floor, active)
    rule = settings.quota if importance else "uniform"
    quotas = RULES[rule](measured, list(sizes.values()), active * len(sizes), floor)
    return dict(zip(sizes, quotas, strict=True))
