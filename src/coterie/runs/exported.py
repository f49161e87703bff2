"""The state of the round that a finished run exported."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from coterie.runs import checkpoint
from coterie.runs.checkpoint import Checkpoint, CorruptCheckpointError
from coterie.runs.summary import SUMMARY, read_summary
from coterie.types import CoterieError

S = TypeVar("S")


def exported(folder: Path, state: type[S]) -> Checkpoint[S]:
    """The checkpoint of the round that the run in ``folder`` exported; ``state`` is the type of its method's state.

    Raises :class:`CoterieError` for a run that has not finished, and for one without that checkpoint.
    """
    if not (folder / SUMMARY).is_file():
        raise CoterieError(f"{folder} holds no finished run (no {SUMMARY}); give the folder of one")
    rnd = read_summary(folder / SUMMARY).exported_round
    if rnd is None:
        raise CoterieError(f"{folder / SUMMARY} does not say which round it exported: run it again")
    try:
        return checkpoint.load(folder / "checkpoints", rnd, state)
    except CorruptCheckpointError as fault:
        raise CoterieError(f"{folder} lacks the checkpoint of round {rnd}, which it exported ({fault})") from fault
