"""The trackers that a run's figures can go to: TensorBoard, MLflow, Weights & Biases and trackio.

Each writes to files on this machine. MLFLOW_TRACKING_URI, WANDB_MODE and trackio's own variables are honoured: with
them, the figures go where they say.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coterie.config.sections import Tracker
from coterie.types import CoterieError

Numbers = Mapping[str, float]  # by name, as in "test accuracy/mean"
_PROJECT = "coterie"
_METRICS, _PARAMS = 1_000, 100  # the most that MLflow takes at once
_PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic"}


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked: its folder, its settings by dotted key, and whether it goes on."""

    folder: Path
    settings: Mapping[str, object]
    resumed: bool

    @property
    def name(self) -> str:
        """What a tracker calls it: its folder, and the one above, which a comparison names."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}"


class Sink(Protocol):
    """Where figures go. ``failed``: the run ends with an error."""

    def log(self, numbers: Numbers, rnd: int) -> None: ...

    def close(self, failed: bool = False) -> None: ...


def check_tracker(name: Tracker) -> None:
    """Raise :class:`CoterieError` where what ``name`` needs is not installed."""
    if importlib.util.find_spec(name) is None:
        raise CoterieError(f'[run] tracking = ["{name}"] needs a package: pip install {_PACKAGES.get(name, name)}')


@contextmanager
def opened(name: Tracker, run: Tracked) -> Iterator[Sink]:
    """The sink of the tracker ``name``, open for a ``with`` block. Raises :class:`CoterieError` where it cannot start.

    A tracker's own errors pass through later on: :func:`faults_of` names them.
    """
    check_tracker(name)
    try:
        sink = _OPEN[name](run)
    except faults_of(name) as fault:
        raise CoterieError(f"{name} cannot start ({_line(fault)}); see what it needs, or leave it out") from fault
    failed = True
    try:
        yield sink
        failed = False
    finally:
        with suppress(*faults_of(name)):
            sink.close(failed)


def faults_of(name: Tracker) -> tuple[type[Exception], ...]:
    """What ``name`` raises where it cannot write."""
    own = {"mlflow": ("mlflow.exceptions", "MlflowException"), "wandb": ("wandb.errors", "Error")}
    usual = (OSError, RuntimeError, ValueError)
    return (*usual, getattr(importlib.import_module(own[name][0]), own[name][1])) if name in own else usual


def _line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


@dataclass(frozen=True)
class _TensorBoard:
    writer: Any

    def log(self, numbers: Numbers, rnd: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, rnd)
        self.writer.flush()

    def close(self, failed: bool = False) -> None:
        self.writer.close()


def _tensorboard(run: Tracked) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    return _TensorBoard(SummaryWriter(str(run.folder / "tensorboard")))


@dataclass(frozen=True)
class _MLflow:
    client: Any
    run: str

    def log(self, numbers: Numbers, rnd: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        made = [Metric(name, value, now, rnd) for name, value in numbers.items()]
        for start in range(0, len(made), _METRICS):
            self.client.log_batch(self.run, metrics=made[start : start + _METRICS])

    def close(self, failed: bool = False) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


def _mlflow(run: Tracked) -> Sink:
    """A run in a database of its own, or where MLFLOW_TRACKING_URI says; a run that goes on has one there already."""
    for name in ("mlflow", "alembic"):  # each says at length that it makes tables
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}")
    known = client.get_experiment_by_name(_PROJECT)
    experiment = known.experiment_id if known else client.create_experiment(_PROJECT)
    folder = str(run.folder.resolve())
    if run.resumed and (before := client.search_runs([experiment], f"tags.folder = '{folder}'", max_results=1)):
        return _MLflow(client, before[0].info.run_id)
    made = client.create_run(experiment, run_name=run.name, tags={"folder": folder})
    params = [Param(name, str(value)) for name, value in run.settings.items()]
    for start in range(0, len(params), _PARAMS):
        client.log_batch(made.info.run_id, params=params[start : start + _PARAMS])
    return _MLflow(client, made.info.run_id)


@dataclass(frozen=True)
class _Run:
    """A run of wandb or trackio."""

    run: Any

    def log(self, numbers: Numbers, rnd: int) -> None:
        self.run.log(dict(numbers), step=rnd)

    def close(self, failed: bool = False) -> None:
        with redirect_stdout(io.StringIO()):  # trackio says that it ends
            self.run.finish()


def _wandb(run: Tracked) -> Sink:
    """A run in ``folder/wandb``, offline unless WANDB_MODE says otherwise; ``wandb sync`` sends it later."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True)
    made = wandb.init(
        project=_PROJECT, name=run.name, dir=str(run.folder), config=dict(run.settings), settings=quiet,
        mode=os.environ.get("WANDB_MODE", "offline"), id=_id(run), resume="allow", reinit="create_new",
    )  # fmt: skip
    return _Run(made)


def _trackio(run: Tracked) -> Sink:
    """A run in trackio's own folder, or where its variables say."""
    with redirect_stdout(io.StringIO()):
        import trackio

        made = trackio.init(
            project=_PROJECT, name=run.name, config=dict(run.settings), resume="allow" if run.resumed else "never",
            embed=False, auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip
    return _Run(made)


def _id(run: Tracked) -> str:
    """What wandb knows the run by, kept in the folder so that a run that goes on is the same one there."""
    path = run.folder / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(6).hex(), encoding="ascii")
    return path.read_text(encoding="ascii")


_OPEN: Mapping[Tracker, Callable[[Tracked], Sink]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}
