"""A dataset of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from coterie.data.files import Record, table_of
from coterie.data.rows import SPLITS
from coterie.data.settings import Columns
from coterie.data.sources import Dataset
from coterie.types import CoterieError

PREFIX = "hub"
USAGE = "hub:NAME, hub:OWNER/NAME or hub:OWNER/NAME/CONFIG: a dataset of the Hugging Face hub; hub:./PATH: a folder"


def load(rest: str, root: Path, columns: Columns) -> tuple[Dataset, ...]:
    """The dataset ``[OWNER/]NAME`` or ``OWNER/NAME/CONFIG``, or that of a path that starts with ``.`` or ``/``.

    A split whose labels are all withheld (-1, as in GLUE's test files) is left out, with a note in the manifest. Raises
    :class:`CoterieError` where ``datasets`` is not installed or finds nothing, and where there is no training split.
    """
    try:
        import datasets
    except ImportError as fault:
        raise CoterieError(f"the dataset 'hub:{rest}' needs a package: pip install datasets") from fault
    path, config = _address(rest, root)
    retries = logging.getLogger("huggingface_hub")  # it logs two lines for each of its five attempts
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        splits = datasets.load_dataset(path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        here = f"; for a folder write hub:./{rest}, or ./{rest} for one with train.jsonl"
        fix = "" if rest.startswith((".", "/")) else here
        raise CoterieError(f"cannot load the dataset 'hub:{rest}': {fault}{fix}") from fault
    finally:
        retries.setLevel(level)
    if "train" not in splits:
        raise CoterieError(f"the dataset 'hub:{rest}' has no split 'train'; its splits are {', '.join(splits)}")
    names = getattr(splits["train"].features.get(columns.label), "names", None)
    tables, notes = {}, []
    for split in SPLITS:
        if split in splits and _withheld(splits[split], columns.label):
            notes.append(f"the {split} split has no labels (all are -1) and was left out")
        elif split in splits:
            tables[split] = table_of(f"hub:{rest} {split}", _named(splits[split].to_list(), columns.label, names))
    notes += [f"the split {split} was not used" for split in splits if split not in SPLITS]
    return (Dataset(Path(config or path).name, tables, tuple(names) if names else None, tuple(notes)),)


def _address(rest: str, root: Path) -> tuple[str, str | None]:
    """What ``load_dataset`` takes: a path or a name, and a config."""
    if rest.startswith((".", "/")):
        return str((root / rest).resolve()), None
    owner, _, tail = rest.partition("/")
    name, _, config = tail.partition("/")
    return f"{owner}/{name}" if name else owner, config or None


class _Split(Protocol):
    """What is used of a ``datasets.Dataset``."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, column: str) -> Sequence[object]: ...


def _withheld(split: _Split, label: str) -> bool:
    return label in split.column_names and len(split) > 0 and set(split[label]) == {-1}


def _named(records: Sequence[Record], label: str, names: Sequence[str] | None) -> Sequence[Record]:
    """The records with label names for the hub's numbers; other values stay."""
    name: dict[object, str] = dict(enumerate(names or ()))
    return [{**record, label: name.get(record[label], record[label])} for record in records] if name else records
