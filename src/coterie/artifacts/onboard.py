"""``coterie onboard``: a client that was not there gets a model of the run, on its own rows and with experts frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coterie.adapters.model import unclear_columns
from coterie.artifacts.load import reading_of
from coterie.compute.client import LocalCompute
from coterie.compute.join import EPOCHS, Joined, join
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.files import READERS
from coterie.data.rows import ClientData
from coterie.data.settings import ClientFiles, Columns, DataSettings
from coterie.experiment import about_export, set_threads, write_own
from coterie.runs.exported import exported
from coterie.runs.folder import read_config
from coterie.types import ClientId, CoterieError


def onboard(
    folder: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    client: ClientId = "",
    epochs: int = EPOCHS,
    columns: Columns | None = None,
    base: str | None = None,
    device: str | None = None,
) -> Joined:
    """Give the client whose files are in the folder ``data`` a model of the finished run in ``folder``.

    ``data`` holds ``train.jsonl`` (or .csv, .parquet), and ``validation`` and ``test`` beside it if there are any, in
    the columns of the run; ``columns`` replace these. The method finds its experts (:meth:`Method.onboard`). They are
    frozen, and its router and head train for ``epochs``. Its bundle is written to the folder ``out``, which must be new
    or empty. The run stays as it is.
    Raises :class:`CoterieError` for a run without the checkpoint of what it exported, for a method that no client can
    join, for bad rows, and where the datasets of the run have different columns and ``columns`` are not given.
    """
    path, target = Path(folder), Path(out)
    if target.exists() and any(target.iterdir()):
        raise CoterieError(f"{target} is not empty; name another folder")
    raw, root = read_config(path)
    config = _placed(check_config(raw), base, device)
    method = config.make_method(root)
    start = exported(path, method.State)
    columns = columns or reading_of(path, "")[0]
    if columns is None:
        raise unclear_columns("")
    own = _rows(config, columns, Path(data), client or Path(data).resolve().name)
    set_threads(config)
    workplace = workplaces(config, root, {})[0]
    compute = LocalCompute(workplace, own, start.rnd + 1)
    joined = join(method, start.state, compute, epochs)
    about = about_export(config, root, start.rnd, config.run.export)
    write_own(target, joined.bank, about, workplace.base.spec, own.info)
    return joined


def _placed(config: Config, base: str | None, device: str | None) -> Config:
    if base:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    return config.on(device) if device else config


def _rows(config: Config, columns: Columns, folder: Path, client: ClientId) -> ClientData:
    """The rows of the client's own files, read as the run reads its clients'."""
    files: Mapping[str, str | None] = {split: _file(folder, split) for split in ("train", "validation", "test")}
    if files["train"] is None:
        raise CoterieError(f"{folder} has no training rows; put a file train.jsonl (or .csv, .parquet) there")
    entry = ClientFiles(id=client, train=files["train"], validation=files["validation"], test=files["test"])
    kept = ("labels", "validation_fraction", "test_fraction", "duplicates")
    settings = DataSettings(clients=(entry,), columns=columns, **{name: getattr(config.data, name) for name in kept})
    (own,) = load_data(settings, config.task.kind, config.run.seed, Path.cwd()).clients
    return own


def _file(folder: Path, split: str) -> str | None:
    return next((str((folder / f"{split}{e}").resolve()) for e in READERS if (folder / f"{split}{e}").is_file()), None)
