"""Clients that take no part in a run and join it afterwards (``[data] newcomers``), as ``coterie onboard`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from coterie.comparison.afterwards import digest, read_kept
from coterie.comparison.cross import data_of
from coterie.compute.client import LocalCompute
from coterie.compute.join import EPOCHS, join
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.experiment import set_threads
from coterie.files import write_json
from coterie.runs.entries import plain
from coterie.runs.exported import exported
from coterie.runs.folder import read_config
from coterie.types import ClientId, Number

NEWCOMERS = "newcomers.json"


@dataclass(frozen=True)
class Newcomers:
    """The metrics of each newcomer's model on its own test rows, before and after its router and head are trained."""

    round: int
    summary: str
    before: Mapping[ClientId, Mapping[str, Number]]
    after: Mapping[ClientId, Mapping[str, Number]]

    def mean(self, metric: str) -> float | None:
        """The mean over the newcomers, after training; None where they have no test rows."""
        values = [of[metric] for of in self.after.values() if metric in of]
        return float(np.mean(values)) if values else None


_NEWCOMERS = TypeAdapter(Newcomers)


def read_newcomers(folder: Path) -> Newcomers | None:
    """What :func:`onboard_newcomers` wrote in a run's folder; None where it has not, or the run has changed since."""
    return read_kept(folder / NEWCOMERS, _NEWCOMERS, "compare again")


def onboard_newcomers(folder: Path, cache: dict[str, object]) -> Newcomers:
    """Let every newcomer join the finished run in ``folder``, write ``newcomers.json`` there and return it.

    ``cache`` keeps the base for further runs. Raises :class:`CoterieError` for a method that no client can join, for
    data that are not the run's, and for a run without the checkpoint of what it exported.
    """
    raw, root = read_config(folder)
    config = check_config(raw)
    set_threads(config)
    method = config.make_method(root)
    start = exported(folder, method.State)
    late = data_of(folder, config, root).newcomers
    workplace = workplaces(config, root, cache)[0]
    joined = [join(method, start.state, LocalCompute(workplace, client, start.rnd + 1), EPOCHS) for client in late]
    before, after = ({each.client: getattr(each, name) for each in joined} for name in ("before", "after"))
    newcomers = Newcomers(start.rnd, digest(folder), before, after)
    write_json(folder / NEWCOMERS, plain(newcomers))
    return newcomers
