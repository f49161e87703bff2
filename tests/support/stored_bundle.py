"""The bundle that is stored in the tests, its base, and how both were made: nothing in them is drawn at random.

``python tests/support/stored_bundle.py FOLDER`` writes the bundle of the present format.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import tiny
from coterie.adapters.about import About, Texts
from coterie.adapters.bundle import write_bundle
from coterie.nn.base import load_base
from coterie.nn.weights import digests, fingerprint
from coterie.types import NO_EXPERT, Bank, GateSpec, Key, Part

STORED = Path(__file__).parents[1] / "unit" / "adapters" / "bundles"  # a folder for each format, by its number
LABELS = ("calm", "urgent", "spam")
OVER = ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value")
TEXTS = ("the printer smokes", "a very long day indeed", "x")
TREATED = Texts("last", "dpo", 0.25, ("exact_match", "numeric"), 17, 0.5, 0.75, 11)  # no use to a classifier


def wave(step: float, *shape: int) -> Tensor:
    """0.3 sin(step i) for i = 1, 2, ..."""
    number = int(torch.tensor(shape).prod())
    return (0.3 * torch.sin(step * torch.arange(1, number + 1, dtype=torch.float64))).float().view(shape)


def base(folder: Path) -> Path:
    """A tiny BERT whose weights are waves, with its tokenizer."""
    made = tiny.model("bert", "bare")
    for number, (name, parameter) in enumerate(sorted(made.named_parameters())):
        plain = 1.0 if "LayerNorm.weight" in name else 0.0
        parameter.data = plain + wave(1 + number / 7, *parameter.shape)
    made.save_pretrained(folder)
    tiny.tokenizer(token_types=True).save_pretrained(folder)
    return folder


def bank() -> Bank:
    """FedLEASE's: three experts of rank 1 on two modules, a router of five slots, a head for three labels."""
    tensors: dict[Key, Tensor] = {}
    for number, name in enumerate(f"bert.{module}" for module in OVER):
        for expert in range(3):
            tensors[Key(name, expert, Part.A)] = wave(2 + number + expert / 5, 1, tiny.HIDDEN)
            tensors[Key(name, expert, Part.B)] = wave(3 + number + expert / 5, tiny.HIDDEN, 1)
        tensors[Key(name, NO_EXPERT, Part.ROUTER)] = wave(4 + number, 5, tiny.HIDDEN)
    tensors[Key("classifier.weight", NO_EXPERT, Part.HEAD)] = wave(5, 3, tiny.HIDDEN)
    tensors[Key("classifier.bias", NO_EXPERT, Part.HEAD)] = wave(6, 3)
    return Bank(tensors, GateSpec("slot_top_k", {"own": 1}), 2.0, 0.05)


def about(folder: Path) -> About:
    """What is said of the bundle; ``folder`` is the base's."""
    modules = [f"bert.{module}" for module in OVER]
    weights = fingerprint(digests(str(folder), modules), modules)
    return About("fedlease", 7, "best", "classification", "a/base", "", weights, 24, "north", LABELS, texts=TREATED)


def logits(folder: Path) -> list[list[float]]:
    """What the model of the bundle says of :data:`TEXTS`, to four digits, from its parts; ``folder`` is the base's."""
    from coterie.nn.attach import attached

    loaded = load_base(str(folder), "classification")
    with torch.no_grad(), attached(loaded.model, bank()):
        out = loaded.model(**loaded.tokenizer(list(TEXTS), return_tensors="pt", padding=True)).logits
    return [[round(value, 4) for value in row] for row in out.tolist()]


if __name__ == "__main__":
    place = base(Path(sys.argv[1]) / "base")
    write_bundle(Path(sys.argv[1]), bank(), about(place))
    print(logits(place))
