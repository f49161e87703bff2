"""The splits of a client or a dataset: cuts those that are missing, takes as many rows as the config sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from coterie.data.rows import SPLITS, Row
from coterie.data.settings import DataSettings
from coterie.ops.streams import stream_seed
from coterie.types import DataError

T = TypeVar("T")


def complete(splits: Mapping[str, Sequence[T]], settings: DataSettings, seed: int, of: str) -> dict[str, Sequence[T]]:
    """All three splits: one that is missing is cut from the training rows, at random.

    ``of`` names the client or dataset, in errors and in the random stream.
    """
    rows = list(splits["train"])
    order = np.random.default_rng(stream_seed(seed, "cut", of)).permutation(len(rows))
    done = {split: splits.get(split, ()) for split in SPLITS}
    start = 0
    for split, fraction in (("test", settings.test_fraction), ("validation", settings.validation_fraction)):
        if split not in splits and fraction > 0:
            end = start + max(1, round(fraction * len(rows)))
            done[split] = [rows[i] for i in np.sort(order[start:end])]
            start = end
    if start >= len(rows):
        raise DataError(
            f"{of}: {len(rows)} training row(s) are too few to cut other splits from; give files for validation and "
            "test, or set data.validation_fraction and data.test_fraction to 0"
        )
    done["train"] = [rows[i] for i in np.sort(order[start:])]
    return done


def rows_per_client(settings: DataSettings) -> dict[str, int]:
    """``data.<split>_rows`` by split; 0: all."""
    return {"train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows}


def choose(split: str, rows: Sequence[Row], settings: DataSettings, seed: int, client: str) -> tuple[Row, ...]:
    """``data.<split>_rows`` of the client's rows, at random."""
    wanted = rows_per_client(settings)[split]
    if wanted > len(rows):
        raise DataError(f"client {client} has {len(rows)} {split} rows, and data.{split}_rows is {wanted}; lower it")
    order = np.random.default_rng(stream_seed(seed, "choose", client, split)).permutation(len(rows))
    return tuple(rows[i] for i in np.sort(order[: wanted or len(rows)]))
