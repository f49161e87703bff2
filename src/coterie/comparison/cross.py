"""Evaluation beyond home: every client's model on the test rows of every client with the same labels.

The models are those in the run's bundles: of the round that validation chose, or as ``[run] export`` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from coterie.adapters.bundle import read_bundle
from coterie.comparison.afterwards import digest, read_kept
from coterie.compute.client import LocalCompute
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, FederatedData
from coterie.experiment import set_threads
from coterie.files import read_json_as, write_json
from coterie.ops.metrics import Metrics
from coterie.requests import Score
from coterie.runs.entries import plain
from coterie.runs.folder import read_config
from coterie.runs.summary import SUMMARY, read_summary
from coterie.types import ClientId, CoterieError, Number

CROSS = "cross.json"


@dataclass(frozen=True)
class Cross:
    """The metrics of the model of one client (first key) on the test rows of another (second key), after ``round``.

    ``round`` is None where the run is older than the record of what it exported.
    """

    round: int | None
    summary: str
    metrics: Mapping[ClientId, Mapping[ClientId, Mapping[str, Number]]]

    def means(self, metric: str) -> tuple[float, float] | None:
        """The mean of the models at home and that on others' rows, of the clients that have others with their labels.

        Every client counts once, whatever the number of others. None where there are no such clients.
        """
        by_client = {
            client: (on[client][metric], float(np.mean([of[metric] for other, of in on.items() if other != client])))
            for client, on in self.metrics.items()
            if client in on and len(on) > 1
        }
        if not by_client:
            return None
        home, beyond = np.mean(list(by_client.values()), axis=0)
        return float(home), float(beyond)


_CROSS, _MANIFEST = TypeAdapter(Cross), TypeAdapter(dict[str, object])


def read_cross(folder: Path) -> Cross | None:
    """What :func:`evaluate_cross` wrote in a run's folder; None where it has not, or the run has changed since."""
    return read_kept(folder / CROSS, _CROSS, "compare with --cross again")


def evaluate_cross(folder: Path, cache: dict[str, object]) -> Cross:
    """Score every client's bundle of the finished run in ``folder``, write ``cross.json`` there and return it.

    ``cache`` keeps the base for further runs. Raises :class:`CoterieError` for data that are not the run's, and for a
    bundle that is missing or damaged.
    """
    raw, root = read_config(folder)
    config = check_config(raw)
    set_threads(config)
    federation = data_of(folder, config, root)
    workplace = workplaces(config, root, cache)[0]
    tested = [client for client in federation.clients if client.info.num_test]
    banks = {client.info.id: read_bundle(folder / "clients" / client.info.id)[0] for client in federation.clients}
    by_client: dict[ClientId, dict[ClientId, Metrics]] = {client: {} for client in banks}
    for on in tested:
        of = _alike(on, federation.clients)
        scores = LocalCompute(workplace, on, config.run.rounds).score(Score([banks[c] for c in of], split="test"))
        for client, scored in zip(of, scores, strict=True):
            by_client[client][on.info.id] = {**scored.metrics, "loss": scored.loss}
    cross = Cross(read_summary(folder / SUMMARY).exported_round, digest(folder), by_client)
    write_json(folder / CROSS, plain(cross))
    return cross


def data_of(folder: Path, config: Config, root: Path) -> FederatedData:
    """The data of the run in ``folder``, loaded again. Raises :class:`CoterieError` where they have changed since."""
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    now, then = json.loads(json.dumps(federation.manifest)), read_json_as(folder / "manifest.json", _MANIFEST)
    if now != then:
        before = then.get("clients")
        new = ", ".join(sorted(set(now["clients"]) - set(before if isinstance(before, dict) else now["clients"])))
        what = f"{new} came after it; move the new rows to another folder" if new else "see manifest.json; restore them"
        raise CoterieError(f"the data are not those of {folder}: {what}")
    return federation


def _alike(on: ClientData, clients: tuple[ClientData, ...]) -> list[ClientId]:
    """The clients that have the same labels."""
    return [client.info.id for client in clients if client.info.labels == on.info.labels]
