"""A folder with the files train, validation and test (.jsonl, .csv or .parquet), and maybe an info.json.

``info.json`` may give ``"labels"``, the label names in order, and ``"group"``, the domain of the rows. Either may be
null, and other keys are for people.
"""

from __future__ import annotations

from pathlib import Path

from coterie.data.files import READERS, RowTable, read_table
from coterie.data.rows import SPLITS
from coterie.data.settings import Columns
from coterie.data.sources import Dataset, usages
from coterie.text import parse_json
from coterie.types import DataError

PREFIX = "folder"
USAGE = "PATH: a folder with train.jsonl, .csv or .parquet, maybe validation, test, and info.json with the labels"


def load(rest: str, root: Path, columns: Columns) -> tuple[Dataset, ...]:
    """The dataset in the folder ``rest``.

    Raises :class:`DataError` for a missing folder, and for missing or duplicate split files.
    """
    return (read_folder((root / rest).resolve()),)


def read_folder(path: Path) -> Dataset:
    """The dataset in a folder, named after the folder."""
    if not path.is_dir():
        ways = "; ".join(usages())
        raise DataError(f"{path}: no such folder. A dataset is one of {ways}")
    tables: dict[str, RowTable] = {}
    for file in sorted(path.iterdir()):
        if file.stem in SPLITS and file.stem in tables:
            other = Path(tables[file.stem].source).name
            raise DataError(f"{path}: two files of {file.stem} rows, {other} and {file.name}; keep one")
        if file.stem in SPLITS:
            tables[file.stem] = read_table(file, file.stem)
        elif file.suffix.lower() in READERS:
            raise DataError(f"{file}: the name is not that of a split; call the file one of {', '.join(SPLITS)}")
    if "train" not in tables:
        raise DataError(f"{path}: no file of training rows; it is called train{' or train'.join(READERS)}")
    labels, group = _info(path / "info.json")
    return Dataset(path.name, tables, labels, group=group)


def _info(file: Path) -> tuple[tuple[str, ...] | None, str | None]:
    """The labels and the group in an ``info.json``; None for what it does not give."""
    if not file.exists():
        return None, None
    try:
        info = parse_json(file.read_text(encoding="utf-8"))
        labels, group = info.get("labels"), info.get("group")
    except (ValueError, AttributeError) as fault:
        raise DataError(f"{file}: not a JSON object such as {{'labels': ['no', 'yes']}}: {fault}") from fault
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise DataError(f"{file}: labels is {labels!r}, not a list of names or null")
    if group is not None and not (isinstance(group, str) and group.strip()):
        raise DataError(f"{file}: group is {group!r}, not a name or null")
    return None if labels is None else tuple(labels), group
