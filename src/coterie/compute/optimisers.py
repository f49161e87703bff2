"""Optimisers of one round, and the learning rate at each of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from coterie.requests import Optim


class Pace(NamedTuple):
    """All that a learning rate depends on."""

    optim: Optim
    rnd: int
    steps: int
    factor: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate at ``step`` (from 0) of round ``rnd`` (from 1)."""
        decayed = self.optim.learning_rate * self.optim.round_decay ** (self.rnd - 1)
        return decayed * self.factor * _factor(self.optim.schedule, step, self.steps)


@dataclass(frozen=True)
class Optimisers:
    """A fresh optimiser for every pace of clients that begin a round together: one step of it updates all of them.

    A client without gradients, because it has no step left, does not change: no moments, no weight decay.
    """

    by_pace: Mapping[Pace, torch.optim.Optimizer]

    @staticmethod
    def of(clients: Sequence[tuple[Pace, Sequence[nn.Parameter]]], fused: bool = False) -> Optimisers:
        """``fused``: each optimiser in one kernel; else torch's choice."""
        parameters: dict[Pace, list[nn.Parameter]] = {}
        for pace, trained in clients:
            parameters.setdefault(pace, []).extend(trained)
        return Optimisers({pace: _optimizer(pace, trained, fused) for pace, trained in parameters.items() if trained})

    def step(self, steps: Mapping[Pace, int]) -> None:
        """Take one step for each pace in ``steps``, which has the number of that step, from 0."""
        for pace, number in steps.items():
            if optimizer := self.by_pace.get(pace):
                for group in optimizer.param_groups:
                    group["lr"] = pace.rate(number)
                optimizer.step()


def _optimizer(pace: Pace, parameters: Sequence[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    optim, rate, kernel = pace.optim, pace.rate(0), True if fused else None
    if optim.optimizer == "sgd":
        momentum, decay = optim.momentum, optim.weight_decay
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay, fused=kernel)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=optim.weight_decay, fused=kernel)


def _factor(schedule: str, step: int, steps: int) -> float:
    match schedule:
        case "linear":
            return max(0.0, 1 - step / steps)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
        case _:
            return 1.0
