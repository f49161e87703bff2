"""TensorBoard logs of a run, on request: ``[run] tensorboard = true`` (extra ``tracking``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from coterie.runs.rounds import Listener
from coterie.types import CoterieError, Json


def check_tensorboard() -> None:
    """Raises :class:`CoterieError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise CoterieError("[run] tensorboard needs TensorBoard: pip install tensorboard")


def tensorboard(folder: Path) -> Listener:
    """A listener that writes losses, bytes, and mean and single metrics by round below ``folder/tensorboard``."""
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def listen(event: dict[str, Json]) -> None:
        rnd = event.get("round", 0)
        if event["event"] == "round":
            for client, entry in event["clients"].items():
                for name in ("loss", "bytes_up", "bytes_down"):
                    if name in entry:
                        writer.add_scalar(f"{name}/{client}", entry[name], rnd)
        if event["event"] == "evaluation":
            for split, metrics in event["mean"].items():
                for name, value in metrics.items():
                    writer.add_scalar(f"{split} {name}/mean", value, rnd)
            for client, by_split in event["clients"].items():
                for split, metrics in by_split.items():
                    for name, value in metrics.items():
                        writer.add_scalar(f"{split} {name}/{client}", value, rnd)
            writer.flush()

    return listen
