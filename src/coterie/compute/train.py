"""One client's training in one round: its batches, streams, loss, optimiser and checks, whoever runs the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.data.tasks import Batch, Example, batches
from coterie.nn.bank import Pass
from coterie.ops.streams import stream, stream_seed
from coterie.requests import Optim, Train, Trained
from coterie.types import CoterieError, Key

_CHECK_EVERY = 16  # optimiser steps between looks at the losses: a look waits for the device


@dataclass
class Course:
    """A client's way through the steps of a round. An engine starts it, and for each step: runs the model on every
    batch of :meth:`begin` after :meth:`prepare`, calls ``backward`` on :meth:`loss`, then :meth:`clip`, lets the
    :class:`Optimisers` step, and calls :meth:`end`.

    Raises :class:`CoterieError` that names client and step when a loss is not finite.
    """

    place: Workplace
    client: ClientData
    rnd: int
    request: Train
    groups: list[list[list[Example]]] = field(init=False)  # the micro-batches of every step
    parameters: list[nn.Parameter] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of each step: [2], the task's and the load-balance loss
    counts: list[int] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        if self.request.hold_out:
            examples, _ = self.place.divided(self.client, "train", self.request.hold_out)
        else:
            examples = self.place.examples(self.client, "train")
        self.groups = list(self._groups(examples, self.request.optim, self.request.purpose))

    @property
    def done(self) -> bool:
        return self.step == len(self.groups)

    @property
    def pace(self) -> Pace:
        """Courses of one pace, begun together, have the same learning rate at every step."""
        return Pace(self.request.optim, self.rnd, len(self.groups))

    def start(self, parameters: Mapping[Key, nn.Parameter], now: Pass) -> None:
        """Train these parameters, whose layers share ``now``."""
        self.parameters, self.now = list(parameters.values()), now
        now.training = True

    def begin(self) -> list[Batch]:
        """The batches of the next step, on the CPU."""
        micro = [self.place.task.collate(part) for part in self.groups[self.step]]
        self.counts.append(sum(batch.count for batch in micro))
        self._found: list[Tensor] = []
        return micro

    def prepare(self, i: int, mask: Tensor | None) -> None:
        """Set the pass for batch ``i`` of the step; ``mask`` [b, t] marks its real tokens (None: all count)."""
        request = self.request
        number = self.step * request.optim.accumulate + i
        purpose = self.rnd, self.client.info.id, request.purpose, "dropout", number
        self.now.seed = stream_seed(self.place.seed, *purpose)
        self.now.mask = mask
        self.now.balance = [] if request.balance else None

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What to call ``backward`` on: the batch's part of the mean loss over the labels of the whole step, and of the
        load-balance loss (its mean over the batches)."""
        balance_of = self.request.balance
        loss = self.place.task.loss(logits, batch) / self.counts[-1]
        found = list(self.now.balance or ())  # gradient checkpointing runs the layers again, which adds to it
        micro = len(self.groups[self.step])
        balance = torch.stack(found).sum() / micro if found else loss.new_zeros(())
        weight = balance_of.weight if balance_of else 0.0
        self._found.append(torch.stack([loss.detach(), balance.detach()]))
        return loss + weight * balance if found else loss

    def clip(self) -> None:
        """What is to be done with the step's gradients before the optimiser takes them."""
        self.losses.append(torch.stack(self._found).sum(0))
        if self.request.optim.clip > 0:
            clip_grad_norm_(self.parameters, self.request.optim.clip)

    def end(self) -> None:
        """The end of a step, after the optimiser's: look at the losses now and then."""
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        if self.step % _CHECK_EVERY == 0 or self.done:
            self._check_finite()

    def result(self, tensors: Mapping[Key, Tensor]) -> Trained:
        """The answer, with the trained ``tensors``. Raises :class:`CoterieError` where one holds no finite value."""
        self._check_trained(tensors)
        seen = [example for group in self.groups for part in group for example in part]
        loss, balance = _means(self.losses, self.counts)
        return Trained(tensors, loss, len(seen), sum(len(e.ids) for e in seen), len(self.groups), balance)

    def _groups(self, examples: list[Example], optim: Optim, purpose: str) -> Iterator[list[list[Example]]]:
        """The micro-batches of every optimiser step of the round."""
        number, epoch = 0, 0
        while epoch < optim.epochs or optim.steps:
            order = stream(self.place.seed, self.rnd, self.client.info.id, purpose, "batches", epoch)
            parts = batches(examples, optim.batch_size, order)
            for i in range(0, len(parts), optim.accumulate):
                yield parts[i : i + optim.accumulate]
                number += 1
                if number == optim.steps:
                    return
            epoch += 1

    def _check_finite(self) -> None:
        start = max(0, self.step - _CHECK_EVERY)
        finite = torch.isfinite(torch.stack(self.losses[start:])).all(dim=1)
        if not bool(finite.all()):
            step = start + int((~finite).nonzero()[0]) + 1
            raise CoterieError(
                f"client {self.client.info.id}: the loss is not finite at step {step} of round {self.rnd}; "
                "lower [train] learning_rate or [lora] alpha, or look at this client's data"
            )

    def _check_trained(self, tensors: Mapping[Key, Tensor]) -> None:
        """A gradient may overflow where the loss did not: nothing of that may be kept or sent."""
        if broken := [str(key) for key, value in tensors.items() if not bool(torch.isfinite(value).all())]:
            raise CoterieError(
                f"client {self.client.info.id}: round {self.rnd} left values in {broken[0]} that are not finite; "
                "lower [train] learning_rate or [lora] alpha, or look at this client's data"
            )


class Pace(NamedTuple):
    """All that a learning rate depends on."""

    optim: Optim
    rnd: int
    steps: int

    def rate(self, step: int) -> float:
        """The learning rate at ``step`` (from 0) of round ``rnd`` (from 1)."""
        decayed = self.optim.learning_rate * self.optim.round_decay ** (self.rnd - 1)
        return decayed * _factor(self.optim.schedule, step, self.steps)


@dataclass(frozen=True)
class Optimisers:
    """A fresh optimiser for every pace of courses that begin together: one step of it serves all that have the pace.

    Those without gradients, because they have ended, stay as they are.
    """

    by_pace: Mapping[Pace, torch.optim.Optimizer]

    @staticmethod
    def of(courses: Sequence[Course], fused: bool = False) -> Optimisers:
        """``fused``: each in one kernel; else torch's choice."""
        parameters: dict[Pace, list[nn.Parameter]] = {}
        for course in courses:
            parameters.setdefault(course.pace, []).extend(course.parameters)
        return Optimisers({pace: _optimizer(pace, found, fused) for pace, found in parameters.items() if found})

    def step(self, courses: Sequence[Course]) -> None:
        """One step of these courses."""
        for pace, number in {course.pace: course.step for course in courses if course.parameters}.items():
            for group in self.by_pace[pace].param_groups:
                group["lr"] = pace.rate(number)
            self.by_pace[pace].step()


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


def _means(losses: Sequence[Tensor], counts: Sequence[int]) -> tuple[float, float]:
    """The mean over all labels seen of the steps' means over ``counts`` labels; the mean over steps of the balance."""
    task, balance = torch.stack(list(losses)).cpu().double().unbind(1)
    return float((task * torch.tensor(counts)).sum()) / sum(counts), float(balance.mean())
