"""Collects the statistics of a bank's forward passes, during observation or during scoring."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.nn.bank import Pass
from coterie.requests import ExpertUse, Observed
from coterie.types import NO_EXPERT, Bank, Key, Part

COLLECTED = ("usage", "signed_usage", "embeddings", "directions")  # in passes that many clients may share


@dataclass
class Collector:
    """Collects ``what``, names of :data:`COLLECTED`, in the passes of ``bank`` that ``now`` steers."""

    bank: Bank
    now: Pass
    what: Collection[str]
    tokens: Tensor | int = 0

    def __post_init__(self) -> None:
        self.now.signed = "signed_usage" in self.what
        self.now.usage = {} if self.now.signed or "usage" in self.what else None
        self.now.embeddings = {} if "embeddings" in self.what else None
        self.now.directions = {} if "directions" in self.what else None
        self.now.rows.used = self.now.rows.used or self.now.directions is not None

    def begin_pass(self, mask: Tensor | None, tokens: Tensor | int) -> None:
        """Prepare for a pass: ``mask`` [b, t] marks the tokens that count (None: all), ``tokens`` is their number."""
        self.now.mask = mask
        self.tokens = self.tokens + tokens

    def result(self) -> Observed:
        """The means over the tokens that each module saw. This ends the collection."""
        now = self.now
        sums, usage, seen = now.embeddings or {}, now.usage or {}, now.seen
        embeddings = {key: (value / seen[key.module]).float().cpu() for key, value in sorted(sums.items())}
        directions = {
            Key(module, NO_EXPERT, Part.EMBEDDING): (total / rows).float().cpu()
            for module, (total, rows) in sorted((now.directions or {}).items())
        }
        now.usage = now.embeddings = now.directions = now.mask = None
        return Observed(_shares(self.bank, usage, seen), int(self.tokens), embeddings, directions)


def _shares(bank: Bank, usage: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, ExpertUse]:
    """Gate usage by module, from sums [2, e] over the tokens that it saw."""
    shares = {}
    for module, counted in usage.items():
        weight, share = (counted / seen[module]).tolist()
        numbers = sorted(key.expert for key in bank.tensors if key.module == module and key.part is Part.A)
        shares[module] = ExpertUse(weight, share, numbers)
    return shares
