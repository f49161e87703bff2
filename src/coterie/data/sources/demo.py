"""Made-up text of four organisations with four jobs, so that a demonstration needs no download.

Each job has a small grammar. A message with the label L is the grammar's ``message`` with ``{core}`` replaced by a
sentence of L and ``{aside}`` by a remark in the words of another label, so that single words mislead and the sentence
must be read. The same name always gives the same rows, and no sentence is in two splits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from coterie.data.files import table_of
from coterie.data.settings import Columns
from coterie.data.sources import Dataset
from coterie.data.sources.demo_grammars import GRAMMARS
from coterie.ops.streams import stream_seed
from coterie.types import CoterieError

PREFIX = "demo"
USAGE = "demo, or demo:clinic, demo:bank, demo:shop, demo:city: made-up text of four organisations, or of one"
ROWS = {"train": 1000, "validation": 400, "test": 600}

SYMBOL = re.compile(r"{([\w-]+)}")  # stands for one of its alternatives

Grammar = Mapping[str, list[str]]


def load(rest: str, root: Path, columns: Columns) -> tuple[Dataset, ...]:
    """The job named ``rest``, or all of them. Raises :class:`CoterieError` for an unknown name."""
    if rest and rest not in GRAMMARS:
        raise CoterieError(f"unknown dataset 'demo:{rest}'; there are {', '.join(f'demo:{job}' for job in GRAMMARS)}")
    return tuple(_dataset(job, columns) for job in ([rest] if rest else GRAMMARS))


def _dataset(job: str, columns: Columns) -> Dataset:
    labels = _grammar(GRAMMARS[job])["labels"]
    rows = iter(messages(job, sum(ROWS.values())))
    splits = {
        split: [
            {columns.text: text, columns.label: label} for _, (text, label) in zip(range(count), rows, strict=False)
        ]
        for split, count in ROWS.items()
    }
    return Dataset(job, {split: table_of(f"demo:{job} {split}", r) for split, r in splits.items()}, tuple(labels))


def messages(job: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``count`` different messages of a job, each with its label; every label about as often."""
    grammar = _grammar(GRAMMARS[job])
    numbers = np.random.default_rng(stream_seed(seed, "demo", job))
    labels: dict[str, str] = {}  # by message
    while len(labels) < count:
        label = grammar["labels"][int(numbers.integers(len(grammar["labels"])))]
        labels.setdefault(_message(grammar, label, numbers), label)
    return list(labels.items())


def _grammar(text: str) -> Grammar:
    """The alternatives of each symbol. The symbols of the line ``once`` keep their first text throughout a message."""
    lines = re.sub(r"\n +", " ", text).strip().split("\n")
    return {name: [a.strip() for a in rest.split("|")] for name, rest in (line.split(": ", 1) for line in lines)}


def _message(grammar: Grammar, label: str, numbers: np.random.Generator) -> str:
    others = [name for name in grammar["labels"] if name != label]
    other = others[int(numbers.integers(len(others)))]
    symbols = {**grammar, "core": grammar[label], "aside": grammar[f"aside-{other}"]}
    written: dict[str, str] = {}

    def write(symbol: str) -> str:
        if symbol in written:
            return written[symbol]
        options = symbols[symbol]
        text = SYMBOL.sub(lambda match: write(match[1]), options[int(numbers.integers(len(options)))])
        if symbol in grammar.get("once", []):
            written[symbol] = text
        return text

    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), write("message"))
