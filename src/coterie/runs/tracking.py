"""TensorBoard logs of a run, on request: ``[run] tensorboard = true`` (extra ``tracking``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.runs.events import Evaluated, Event, Listener, RoundDone
from coterie.types import CoterieError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Raises :class:`CoterieError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise CoterieError("[run] tensorboard needs TensorBoard: pip install tensorboard")


def tensorboard(folder: Path) -> Listener:
    """A listener that writes losses, bytes, and mean and single metrics by round below ``folder/tensorboard``."""
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def listen(event: Event) -> None:
        match event:
            case RoundDone():
                for client, entry in event.clients.items():
                    numbers = {"loss": entry.loss, "bytes_up": entry.bytes_up, "bytes_down": entry.bytes_down}
                    _write(writer, numbers, client, event.round)
            case Evaluated():
                for split, metrics in event.mean.items():
                    _write(writer, {f"{split} {name}": value for name, value in metrics.items()}, "mean", event.round)
                for client, scores in event.clients.items():
                    for split, metrics in scores.items():
                        _write(writer, {f"{split} {name}": v for name, v in metrics.items()}, client, event.round)
                writer.flush()

    return listen


def _write(writer: SummaryWriter, numbers: Mapping[str, float | None], who: str, rnd: int) -> None:
    for name, value in numbers.items():
        if value is not None:
            writer.add_scalar(f"{name}/{who}", value, rnd)
