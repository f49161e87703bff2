"""``coterie.load``: a client's model of a run, with what the run's config says of its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coterie.adapters import model
from coterie.adapters.model import ClientModel
from coterie.config.check import checked
from coterie.config.load import section_of
from coterie.config.sections import TaskSettings
from coterie.data.settings import Columns, DataSettings
from coterie.runs.folder import read_config


def load(folder: Path | str, client: str | None = None, *, base: str | None = None, device: str = "cpu") -> ClientModel:
    """A client's model from a run's folder, or from the folder of a bundle.

    ``client`` names the client of a run; a folder that holds a bundle itself needs none. ``base`` is the base's folder
    or hub name, by default the one that the bundle names.
    A text to classify is cut where evaluation cut it, in a pipeline with ``truncation=True``.
    Raises :class:`CoterieError` for a folder without bundles, an unknown client, and a base that is missing, that has
    other weights, or that the bundle does not fit.
    """
    loaded = model.load(folder, client, base=base, device=device)
    columns, tokens = reading_of(Path(folder), loaded.client)
    return replace(loaded, columns=columns, max_new_tokens=tokens)


def reading_of(folder: Path, client: str) -> tuple[Columns, int]:
    """How the run in ``folder`` reads the rows of ``client``, and the most tokens that it generates.

    The defaults where the folder holds a bundle alone, without the config of a run.
    """
    if not (folder / "config.json").is_file():
        return Columns(), TaskSettings().max_new_tokens
    raw, _ = read_config(folder)
    task = checked(TaskSettings, section_of(raw, "task"), "task")
    data = section_of(raw, "data")
    return columns_of(checked(DataSettings, data, "data"), client) if data else Columns(), task.max_new_tokens


def columns_of(data: DataSettings, client: str) -> Columns:
    """The columns' names in the rows of ``client``: its own, those of the one dataset, or those of all."""
    own = [files.columns for files in data.clients if files.id == client]
    own += [entry.columns for entry in data.datasets if not isinstance(entry, str) and len(data.datasets) == 1]
    return next((columns for columns in own if columns is not None), data.columns)
