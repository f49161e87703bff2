"""``coterie.load``: a client's model of a run, or one for someone new, with what the run's config says of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from coterie.adapters.about import About
from coterie.adapters.bundle import BUNDLE_FILE
from coterie.adapters.model import ClientModel, Placing, adapted_modules, model_of, path_of, read_client
from coterie.artifacts.newcomer import newcomer_bundle
from coterie.config.check import checked
from coterie.config.load import section_of
from coterie.config.sections import TaskSettings
from coterie.data.settings import Columns, DataSettings
from coterie.files import read_json
from coterie.methods.parts import start_head
from coterie.methods.plan import Plan
from coterie.nn.base import spec_at
from coterie.nn.placement import DeviceMap
from coterie.nn.quantised import Quantize
from coterie.runs.folder import read_config
from coterie.types import Bank, ClientInfo, CoterieError, Part


def load(
    folder: Path | str,
    client: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantize = "none",
    device_map: DeviceMap | None = None,
) -> ClientModel:
    """The model of a run's client, of a bundle, or, of a run without ``client``, the model for someone new.

    ``base`` is the base's folder or hub name, by default the one that the bundle names. ``dtype``, ``quantize`` ("nf4",
    "int8") and ``device_map`` (as in transformers; ``device`` then counts for nothing) are those of the base; the bank
    stays in float32.

    The model for someone new has what all clients have in common (:func:`newcomer_bank`), and their head if all have
    the same labels. For other ``labels`` it has a head that is not trained.
    A text to classify is cut where evaluation cut it, in a pipeline with ``truncation=True``.
    Raises :class:`CoterieError` for a folder without bundles, an unknown client, a newcomer whose labels are not known,
    and a base that is missing, that has other weights, or that the bundle does not fit.
    """
    path, placing = Path(folder), Placing(device, dtype, quantize, device_map)
    if client is None and not (path / BUNDLE_FILE).is_file() and any((path / "clients").glob(f"*/{BUNDLE_FILE}")):
        loaded = _newcomer(path, labels, base, placing)
    elif labels is not None:
        raise CoterieError("labels are for someone new: the model of a client has its own; leave out one of the two")
    else:
        loaded = model_of(*read_client(path, client), base, placing)
    columns, tokens = reading_of(path, loaded.client)
    return replace(loaded, columns=columns, max_new_tokens=tokens or loaded.max_new_tokens)


def _newcomer(folder: Path, labels: Sequence[str] | None, base: str | None, placing: Placing) -> ClientModel:
    bank, about = newcomer_bundle(folder)
    if labels is not None and about.task != "classification":
        raise CoterieError(
            f"labels are for classification, and {folder} is of {about.task.replace('_', ' ')}; leave them out"
        )
    if about.task != "classification" or (labels is None and about.labels is not None):
        return model_of(bank, about, base, placing)
    if labels is None:
        raise CoterieError(
            f"the clients of {folder} have different labels: name one of them with client=..., or, for someone new, "
            'give the labels, as in labels=("no", "yes"); their head is not trained'
        )
    if about.labels == tuple(labels):
        return model_of(bank, about, base, placing)
    return model_of(with_fresh_head(bank, about, base, labels), replace(about, labels=tuple(labels)), base, placing)


def with_fresh_head(bank: Bank, about: About, base: str | None, labels: Sequence[str]) -> Bank:
    """``bank`` with a head for ``labels`` as a client starts with, in place of its own."""
    if len(set(labels)) < max(2, len(labels)):
        raise CoterieError(f"labels are two or more different names, not {tuple(labels)}")
    spec = spec_at(path_of(about, base), about.task, adapted_modules(bank))
    head = start_head(spec, Plan(), ClientInfo("newcomer", 0, labels=tuple(labels)))
    others = {key: value for key, value in bank.tensors.items() if key.part is not Part.HEAD}
    return replace(bank, tensors={**others, **head})


def reading_of(folder: Path, client: str) -> tuple[Columns | None, int | None]:
    """How the run in ``folder`` reads the rows of ``client`` (:func:`columns_of`), and the most tokens it generates.

    The default columns and None where the folder holds a bundle alone, without the config of a run.
    """
    if not (folder / "config.json").is_file():
        return Columns(), None
    raw, _ = read_config(folder)
    task = checked(TaskSettings, section_of(raw, "task"), "task")
    data = section_of(raw, "data")
    if not data:
        return Columns(), task.max_new_tokens
    return columns_of(checked(DataSettings, data, "data"), client, _manifest(folder)), task.max_new_tokens


@dataclass(frozen=True)
class Rows:
    """The files that rows come from, each with its SHA-256."""

    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The part of a run's manifest that says from which files the rows of each client, and of each dataset, come."""

    clients: Mapping[str, Rows] = field(default_factory=dict)
    datasets: Mapping[str, Rows] = field(default_factory=dict)

    def datasets_of(self, client: str) -> list[int]:
        """The numbers of the datasets that the rows of ``client`` come from; of all of them for an unknown client."""
        files = self.clients[client].files.keys() if client in self.clients else None
        return [i for i, rows in enumerate(self.datasets.values()) if files is None or rows.files.keys() & files]


def columns_of(data: DataSettings, client: str, manifest: Manifest) -> Columns | None:
    """The columns' names in the rows of ``client``: its own, those of its datasets, or those of all.

    None where its datasets have different ones, or where ``manifest`` does not say which datasets it has.
    """
    own = [files.columns or data.columns for files in data.clients if files.id == client]
    if own or not data.datasets:
        return own[0] if own else data.columns
    by_entry = [(None if isinstance(entry, str) else entry.columns) or data.columns for entry in data.datasets]
    if len(manifest.datasets) == len(by_entry):  # else an entry stands for several datasets
        by_entry = [by_entry[i] for i in manifest.datasets_of(client)] or by_entry
    return by_entry[0] if all(columns == by_entry[0] for columns in by_entry) else None


def _manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if not path.is_file():
        return Manifest()
    try:
        return TypeAdapter(Manifest).validate_python(read_json(path))
    except ValidationError as fault:
        raise CoterieError(f"{path} is damaged ({fault.errors()[0]['msg']}); restore it") from fault
