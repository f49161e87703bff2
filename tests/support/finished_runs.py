"""A run of three rounds over a handful of rows, made once for all tests of a process that only read it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

import sites
from coterie.experiment import run


@cache
def fedlease() -> Path:
    """The folder of FedLEASE's run over ``mood-0, size-0, place-0, mood-1, size-1``; its model has a card."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = sites.config(folder, method="fedlease")
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# the base\n", encoding="utf-8")
    run(path, folder / "out")
    return folder / "out"
