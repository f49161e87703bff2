"""Secure sums whose noise their clients add in parts, in this process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pools
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import method_named
from coterie.methods.robust import Group
from coterie.methods.secure import SecureAggregationSettings
from coterie.runs.agreed import Agreed
from coterie.runs.secure import Simulated, simulated, summed
from coterie.secure.steps import Ask, in_process
from coterie.types import Instruction, Key, Reply
from few_rounds import OPTIM, SETTINGS
from secure_sums import vanishing

ON = SecureAggregationSettings(enabled=True)
PRIVACY = PrivacySettings(unit="client", noise_at="sum", clip=0.5, noise_multiplier=2.0, noise_source="seeded")
WITH: dict[str, dict[str, Any]] = {
    "fedlease": {"allocation": "random", "max_experts": 2, "experts": 2, "warmup_rounds": 1},
    "fedamole": {"assignment": "static", "clients_per_expert": 3, "experts": 4, "max_experts": 4},
}


def made(name: str, privacy: PrivacySettings = PRIVACY, secure: SecureAggregationSettings = ON) -> Method[Any]:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny()} if name == "smartfed" else {}
    plan = Plan(rank=2, alpha=4, dropout=0.0, optim=OPTIM, rounds=2, secure=secure, privacy=privacy)
    return kind(kind.Settings(**{**SETTINGS.get(name, {}), **WITH.get(name, {}), **pool}), plan)


def gone(opener: Simulated, away: Mapping[str, Collection[str]]) -> Simulated:
    class Vanishing(Simulated):
        def ask(self, parties: Any) -> Ask:
            return vanishing(in_process(parties), away)

    return Vanishing(opener.settings, noise=opener.noise)


def opened(
    method: Method[Any],
    moved: Mapping[str, Mapping[Key, Tensor]],
    groups: Sequence[Group],
    away: Mapping[str, Collection[str]] | None = None,
    source: Any = None,
) -> Agreed:
    """What sums of ``groups`` make of clients that moved from 0 as far as ``moved``."""
    replies = {c: Reply(dict(tensors), 1) for c, tensors in moved.items()}
    starts = {c: {key: torch.zeros_like(value) for key, value in of.items()} for c, of in moved.items()}
    sent = {c: Instruction() for c in replies}
    opener = simulated(method)
    assert opener.noise is not None
    opener = gone(replace(opener, noise=replace(opener.noise, source=source or opener.noise.source)), away or {})
    return summed(method, opener, groups, replies, starts, sent, dict.fromkeys(replies, 1), 1)


def clients(number: int) -> list[str]:
    return [f"c{i:02d}" for i in range(number)]
