"""What a method is configured with: its own settings, and the plan that the whole run shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from coterie.methods.privacy import PrivacySettings
from coterie.methods.robust import RobustSettings
from coterie.methods.secure import SecureAggregationSettings
from coterie.requests import Optim
from coterie.types import ClientId, Section


class MethodSettings(Section):
    """A method's own settings: the keys of ``[method]`` beside ``name``. Unknown keys are errors.

    A method with settings subclasses this; each setting is a pydantic field with a default and a description.
    """

    def located(self, root: Path) -> Self:
        """These settings with every relative path resolved against ``root``, the config's folder."""
        return self


@dataclass(frozen=True)
class Plan:
    """What every method gets besides its own settings. ``scaling`` is alpha / rank.

    ``ranks`` are those of clients with a rank of their own, by name or as a list over the sorted names; only methods
    with ``mixed_ranks`` get any (:mod:`coterie.methods.ranks`).
    """

    rank: int = 8
    ranks: Mapping[ClientId, int] | tuple[int, ...] = ()
    alpha: float = 16.0
    dropout: float = 0.05
    optim: Optim = field(default_factory=Optim)
    head: Literal["personal", "shared"] = "personal"
    rounds: int = 10
    seed: int = 0
    robust: RobustSettings = field(default_factory=RobustSettings)
    secure: SecureAggregationSettings = field(default_factory=SecureAggregationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)

    @property
    def max_rank(self) -> int:
        """The largest rank that a client may have."""
        if isinstance(self.ranks, Mapping):
            return max(self.rank, *self.ranks.values())
        return max(self.ranks, default=self.rank)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank
