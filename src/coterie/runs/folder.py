"""The folder of a run: whether it may be used, what is written there first, who works in it, and a full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from coterie.config.load import check_config, differences, flat
from coterie.config.sections import Config
from coterie.files import read_json, remove_parts, write_json
from coterie.runs.checkpoint import newest_round
from coterie.types import CoterieError

REPORT = "report.html"


class FolderInUse(CoterieError):  # noqa: N818
    """Another process is working there."""


_LOCK = ".lock"


def check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raises :class:`CoterieError` for a folder in use, or one without the run to resume.

    The run to resume has the same config, or fewer rounds.
    """
    if folder.exists() and not folder.is_dir():
        raise CoterieError(f"{folder} is a file; name a folder with --out")
    exists = (folder / "config.json").exists()
    if not resume:
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            what = "contains a run" if exists else "is not empty"
            raise CoterieError(f"{folder} {what}; continue with --resume, or name another folder with --out")
        return
    if not exists:
        raise CoterieError(f"there is no run to resume in {folder}; start it without --resume")
    old, _ = read_config(folder)
    before = plain(check_config(old))  # keys that are new since have their defaults
    changed = differences(before, plain(config))
    if changed == ["run.rounds"]:
        if config.run.rounds > check_config(old).run.rounds:
            return  # more rounds: see runs/extend.py
        raise CoterieError(
            f"{folder} is a run of {check_config(old).run.rounds} rounds, and a run can have more but not fewer; "
            "give a higher run.rounds, or start a new run with --out"
        )
    if changed:
        raise another_config(folder, before, changed)


def another_config(folder: Path, before: Mapping[str, object], changed: Sequence[str]) -> CoterieError:
    """The error for a run to resume whose config ``before`` differs in the keys ``changed``."""
    has = dict(flat(before))
    values = ", ".join(f"{key} = {textwrap.shorten(json.dumps(has.get(key)), 60)}" for key in changed)
    return CoterieError(
        f"{folder} was started with another config; it differs in {', '.join(changed)}: restore these ({values}; a "
        "default may have changed since), or start a new run with --out"
    )


def claim(folder: Path, config: Config, root: Path, manifest: Mapping[str, object], resume: bool) -> None:
    """Write the resolved config and the manifest, or check that the data are those that the run started with."""
    as_json, path = json.loads(json.dumps(manifest)), folder / "manifest.json"
    remove_parts(folder)
    if not resume:
        write_json(folder / "config.json", {"root": str(root.resolve()), "config": plain(config)})
    if not path.exists():
        write_json(path, as_json)
    elif read_json(path) != as_json:
        raise CoterieError(
            f"the data are not those that {folder} started with (see manifest.json); restore them, or start a new run"
        )


def read_config(folder: Path) -> tuple[dict[str, object], Path]:
    """The raw config of the run in ``folder``, and the folder that its paths start at.

    Raises :class:`CoterieError` where there is no run, and for a file that is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CoterieError(f"there is no run in {folder}")
    content = read_json(path)
    config, root = (content.get(name) for name in ("config", "root")) if isinstance(content, dict) else (None, None)
    if not isinstance(config, dict) or not isinstance(root, str):
        raise CoterieError(f"{path} is damaged: it has no config and root; restore it, or start a new run with --out")
    return config, Path(root)


def plain(config: Config) -> dict[str, dict[str, object]]:
    """The config as JSON: its sections, and the settings in each."""
    content: dict[str, dict[str, object]] = json.loads(config.model_dump_json())
    return content


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep others out of ``folder`` for the length of a ``with`` block: two runs there would undo each other.

    Raises :class:`FolderInUse` where another process uses it. The lock of a killed process is released.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / _LOCK, folder):
        yield


@contextmanager
def lock_file(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock ``path`` for the length of a ``with`` block. Raises :class:`FolderInUse` of ``folder``."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise FolderInUse(f"another process is using {folder}; wait for it or stop it") from fault
        yield


def lock_in(folder: Path) -> int | None:
    """Which file the lock of ``folder`` is, by its number on the disk; None where there is none."""
    try:
        return (folder / _LOCK).stat().st_ino
    except FileNotFoundError:
        return None


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into a :class:`CoterieError` that says what is kept."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        newest = newest_round(folder / "checkpoints")
        kept = f"the checkpoint of round {newest} is kept" if newest is not None else "there is no checkpoint yet"
        raise CoterieError(
            f"the disk is full ({fault.filename or folder}); {kept}; free some space, then continue with --resume"
        ) from fault
