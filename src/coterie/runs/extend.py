"""More rounds for a run: the same as if it had been started with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.files import write_json
from coterie.runs import checkpoint as checkpoints
from coterie.runs.folder import REPORT, plain, read_config
from coterie.runs.summary import SUMMARY
from coterie.types import CoterieError


def rounds_before(folder: Path, config: Config) -> int | None:
    """The rounds that the run in ``folder`` was to have, where ``config`` has more of them; else None."""
    raw, _ = read_config(folder)
    before = check_config(raw).run.rounds
    return before if config.run.rounds > before else None


def extend(folder: Path, config: Config, before: int, state: type[object]) -> None:
    """Make a run of ``before`` rounds, finished or not, one of ``config``, which has more.

    The last round of a run is another one than the rest: it is always evaluated, and a method may do things for the
    last time in it, or leave them out. So where it is done already, it is undone, and will be done again. Raises
    :class:`CoterieError` where the checkpoint before it cannot be used, and changes nothing then.
    """
    done = folder / "checkpoints"
    if checkpoints.newest_round(done) == before:
        try:
            checkpoints.load(done, before - 1, state)
        except checkpoints.CorruptCheckpointError as fault:
            raise CoterieError(
                f"{folder} cannot be extended: round {before}, which was the last one, has to be done again, and the "
                f"checkpoint of round {before - 1} cannot be used ({fault}); start a new run with --out"
            ) from fault
    (folder / SUMMARY).unlink(missing_ok=True)  # first: a run with a summary is finished
    (folder / REPORT).unlink(missing_ok=True)
    for exports in ("experts", "clients"):
        shutil.rmtree(folder / exports, ignore_errors=True)
    checkpoints.forget_after(done, before - 1)
    _, root = read_config(folder)
    write_json(folder / "config.json", {"root": str(root), "config": plain(config)})
