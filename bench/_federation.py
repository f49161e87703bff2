"""What the benches of whole rounds share: made clients, a config, and a run whose rounds are timed by phase."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.engines.local import LocalEngine
from coterie.experiment import Opened, open_run, rounds_of
from coterie.ops.streams import stream
from coterie.runs.events import Event
from coterie.runs.rounds import Runner

LABELS = ("no", "yes")
# Words of one token each. The label of a row is said by words of its job: four jobs, so that clusters can be found.
FILLER = ("the", "of", "and", "to", "in", "was", "for", "with", "on", "at", "by", "from", "his", "her", "this", "that")
MARKERS = (
    (("river", "lake", "sea"), ("stone", "sand", "rock")),
    (("piano", "song", "music"), ("paint", "paper", "book")),
    (("horse", "dog", "cat"), ("car", "train", "ship")),
    (("winter", "snow", "ice"), ("summer", "sun", "fire")),
)


@dataclass(frozen=True)
class Size:
    """How much there is of everything: clients, rows of each, mean words of a row, optimiser steps, rows of a step; and
    what it runs on: the device, and ``minilm`` or a folder of a model in bfloat16."""

    clients: int
    train: int
    test: int
    words: int = 22
    steps: int = 8
    batch: int = 8
    device: str = "cpu"
    model: str = "minilm"


def made_clients(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Write the rows of every client; returns the entries of ``[data] clients``. Client i has job i modulo 4."""
    entries = []
    for number in range(size.clients):
        job, name = number % len(MARKERS), f"client-{number:04d}"
        entry: dict[str, Any] = {"id": name, "group": f"job-{job}", "labels": LABELS}
        for split, rows in (("train", size.train), ("test", size.test)):
            lines = [json.dumps(_row(job, stream(0, "bench rows", name, split, i), size.words)) for i in range(rows)]
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(line + "\n" for line in lines))
            entry[split] = path.name
        entries.append(entry)
    return entries


def _row(job: int, draw: torch.Generator, words: int) -> dict[str, Any]:
    """A row of half to one and a half times ``words`` words, three of which say its label."""

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=draw))

    label = number(2)
    text = [FILLER[number(len(FILLER))] for _ in range(words // 2 + number(words + 1) - 3)]
    for word in MARKERS[job][label]:
        text.insert(number(len(text) + 1), word)
    return {"text": " ".join(text), "label": label}


def config_of(entries: Sequence[dict[str, Any]], size: Size, **sections: dict[str, Any]) -> Config:
    """A checked config for those clients, a LoRA on query and value; ``sections`` add keys or replace them."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": size.model, "max_length": 64, "dtype": "float32" if size.model == "minilm" else "bfloat16"},
        "data": {"clients": list(entries), "validation_fraction": 0.0},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.05},
        "train": {"batch_size": size.batch, "steps": size.steps},
        "engine": {"device": size.device, "threads": torch.get_num_threads()},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    return check_config(raw)


@dataclass
class Timed:
    """A run that is taken round by round, as ``coterie run`` takes it: codec, checks, checkpoint and all.

    ``phases`` holds the seconds of the rounds: ``train`` to the end of the averaging, ``evaluate``, ``save``.
    """

    opened: Opened
    folder: Path
    state: Any = None
    rnd: int = 0
    phases: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def opening(config: Config, folder: Path, root: Path, cache: dict[str, Any] | None = None) -> Timed:
        folder.mkdir()
        return Timed(open_run(config, folder, root, {} if cache is None else cache), folder)

    @property
    def engine(self) -> LocalEngine:
        engine = self.opened.engine
        assert isinstance(engine, LocalEngine)
        return engine

    @property
    def clients_per_pass(self) -> int:
        """How many clients share a forward pass."""
        return self.engine.together.clients_per_batch if self.engine.together else 1

    def round(self) -> None:
        """The next round."""
        if self.rnd == 0:
            self.state = self.opened.method.init(self.engine.spec, self.engine.clients)
        marks = {"start": time.perf_counter()}

        def listen(event: Event) -> None:
            marks[event.event] = time.perf_counter()

        runner = Runner(self.opened.method, self.opened.engine, rounds_of(self.opened.config), self.folder, listen)
        self.rnd += 1
        self.state = runner._round(self.state, self.rnd)
        evaluated = marks.get("evaluation", marks["round"])
        self.phases.append(
            {
                "train": marks["round"] - marks["start"],
                "evaluate": evaluated - marks["round"],
                "save": marks["checkpoint"] - evaluated,
            }
        )
