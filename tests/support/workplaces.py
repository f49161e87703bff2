"""A base, a client and a bank for tests of the training loop: tiny, random, in float64 unless asked."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tiny
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData, PromptRow, Row, TextRow
from coterie.data.tasks import Classification, Generation
from coterie.nn.base import Base, load_base
from coterie.requests import Optim, Train, Trained
from coterie.types import Bank, ClientInfo

LABELS = 3
RATE = 0.05  # of sgd
TOKENIZER = tiny.tokenizer()
TEXTS = ["ab", "a longer text", "x", "some more words here", "two words", "abc abc abc", "q", "the end", "y z", "w"]


@cache
def loaded(arch: str, dtype: torch.dtype) -> Base:
    with tempfile.TemporaryDirectory() as folder:
        tiny.folder(Path(folder), arch)
        return load_base(folder, "classification" if arch in tiny.ENCODERS else "generation", dtype=dtype)


def make_workplace(arch: str = "bert", dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> Workplace:
    """A base of its own: what one test does to it, no other sees."""
    base = loaded(arch, dtype)
    base = replace(base, model=copy.deepcopy(base.model))
    task = Classification(TOKENIZER, 32) if base.kind == "classification" else Generation(TOKENIZER, 32, 6)
    return Workplace(base, task, seed, **settings)


def client_of(workplace: Workplace, name: str = "north", number: int = 8) -> ClientData:
    """A client whose training, validation and test rows are all other ones."""
    made: list[Row] = [
        TextRow(text, i % LABELS) if workplace.base.kind == "classification" else PromptRow(text, " " + text[::-1])
        for i, text in enumerate(TEXTS)
    ]
    splits = {"train": tuple(made[:number]), "validation": tuple(made[::-1][:4]), "test": tuple(made[1::2])}
    return ClientData(ClientInfo(name, number), splits)


def plain_bank(workplace: Workplace, dropout: float = 0.0, **changes: Any) -> Bank:
    """One random expert of rank 4 and a random head, in the base's dtype."""
    dtype = next(workplace.base.model.parameters()).dtype
    made = tiny.bank(workplace.base.spec.targets, dropout=dropout, dtype=dtype, **changes)
    head = {key: value.to(dtype) for key, value in tiny.head(workplace.base.model, LABELS).items()}
    return Bank({**made.tensors, **head}, made.gate, made.scaling, dropout)


def sgd(steps: int, accumulate: int = 1) -> Optim:
    """Plain gradient descent, so that a step is -RATE * gradient."""
    return Optim(
        optimizer="sgd", learning_rate=RATE, schedule="constant", weight_decay=0.0, clip=0.0, steps=steps,
        batch_size=8 // accumulate, accumulate=accumulate,
    )  # fmt: skip


def train(workplace: Workplace, bank: Bank, optim: Optim, rnd: int = 1, **of: Any) -> Trained:
    client = of.pop("client", None) or client_of(workplace)
    return LocalCompute(workplace, client, rnd).train(Train(bank, frozenset(bank.tensors), optim, **of))


def largest_difference(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def equal_bits(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
