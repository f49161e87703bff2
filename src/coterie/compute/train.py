"""Answers ``Train``: the steps of a round, for one client alone or for many in the same passes.

:func:`train_steps` is the whole loop. What belongs to one client (its batches, random streams, loss, clipping and
checks) is in its :class:`Training`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from coterie.compute.flops import active_flops, training_flops
from coterie.compute.micro_batches import MicroBatch, examples_by_head, micro_batches
from coterie.compute.optimisers import Optimisers, Pace
from coterie.compute.passes import Passes, on_base
from coterie.compute.penalties import Penalties
from coterie.compute.preferences import LogProbs, base_log_probs, dpo_of, pair_batch, passed_log_probs, tokens_of_pair
from coterie.compute.workplace import Steps, Workplace
from coterie.data.examples import Batch, Example
from coterie.data.outputs import Output
from coterie.data.packing import packed
from coterie.data.rows import ClientData
from coterie.nn.build import BankLayers, build_layers
from coterie.nn.placement import on_device
from coterie.ops.streams import stream_seed
from coterie.requests import Train, Trained
from coterie.types import CoterieError, Key

_CHECK_EVERY = 16  # optimiser steps between checks of the losses: a check waits for the device


def train(trainings: Sequence[Training]) -> list[Trained | CoterieError]:
    """What each client trained, or its fault: a loss or a tensor that is not finite.

    The clients share their passes; one alone is the reference. Raises :class:`~coterie.nn.many.UnlikeError` for banks
    that cannot share them.
    """
    if not trainings:
        return []
    ordered = sorted(trainings, key=lambda training: -len(training.steps))  # those with steps left come first
    with on_base(trainings[0].workplace, [training.layers for training in ordered]) as passes:
        compare(ordered, passes)
        train_steps(ordered, passes)
        tensors = {id(training): training.layers.tensors() for training in ordered}
    return [training.result(tensors[id(training)]) for training in trainings]


def compare(trainings: Sequence[Training], passes: Passes) -> None:
    """Note what the banks say of the pairs before the first step, where training compares with that."""
    if not any(training.compares_with_start for training in trainings):
        return
    for training in trainings:
        training.layers.now.training = False
    known = passed_log_probs(passes, [training.examples for training in trainings])
    for training, reference in zip(trainings, known, strict=True):
        training.layers.now.training, training.reference = True, reference


def train_steps(trainings: Sequence[Training], passes: Passes) -> None:
    """Every optimiser step of the clients, in step; those with the most steps come first.

    Losses are summed over clients, so that one backward pass gives each its own gradients. A client that has no step
    left, or a fault, takes no part: the optimiser leaves it as it is.
    """
    parameters = [each for training in trainings for each in training.paces.items()]
    optimisers = Optimisers.of(parameters, fused=passes.many is not None)
    while going := [i for i, training in enumerate(trainings) if training.going]:
        micro = {i: trainings[i].begin_step() for i in going}
        for number in range(max(map(len, micro.values()))):
            active = [i for i in going if number < len(micro[i])]
            joined = passes.join(active, [micro[i][number] for i in active])
            for at, i in enumerate(active):
                trainings[i].begin_pass(number, joined.mask(at, trainings[i].counts_padding))
            outputs = passes.outputs(joined)
            losses = [trainings[i].loss(mine, of) for i, mine, of in zip(active, outputs, joined.parts, strict=True)]
            torch.stack(losses).sum().backward()
            for i in active:
                trainings[i].end_pass()
        for i in going:
            trainings[i].clip()
        optimisers.step({pace: trainings[i].step for i in going for pace in trainings[i].paces})
        for i in going:
            trainings[i].end_step()
        passes.workplace.report(_steps([trainings[i] for i in going]))


def _steps(trainings: Sequence[Training]) -> Steps:
    names = tuple(training.client.info.id for training in trainings)
    return Steps(names, max(t.step for t in trainings), max(len(t.steps) for t in trainings))


@dataclass
class Training:
    """One client's training in one round.

    ``steps`` holds the examples of every micro-batch of every optimiser step, ``heads`` the number of the head that
    each goes through, ``layers`` the bank as layers for the base, ``paces`` the parameters by what their learning rate
    depends on: those of one pace, of any client, have the same rate. ``reference``: what pairs are compared with.
    Raises :class:`CoterieError` where there are no rows, or the bank does not fit the base.
    """

    workplace: Workplace
    client: ClientData
    rnd: int
    request: Train
    steps: list[list[list[Example]]] = field(init=False)
    heads: list[list[int]] = field(init=False)
    layers: BankLayers = field(init=False)
    penalties: Penalties = field(init=False)
    reference: LogProbs = field(default_factory=dict)
    paces: dict[Pace, list[nn.Parameter]] = field(init=False)
    losses: list[Tensor] = field(default_factory=list)  # of each step: [2], the task's and the load-balance loss
    counts: list[int] = field(default_factory=list)  # of each step: the labels
    step: int = 0
    fault: CoterieError | None = None

    def __post_init__(self) -> None:
        steps = list(self._steps(examples_by_head(self.workplace, self.client, self.request)))
        self.steps = [[examples for _, examples in micro] for micro in steps]
        self.heads = [[head for head, _ in micro] for micro in steps]
        self.layers = build_layers(self.workplace.base.model, self.request.bank, self.request.trainable)
        self.layers.now.training = True
        if self.request.optim.packing and self.counts_padding:
            raise CoterieError(
                "[train] packing leaves no padding, and the method counts it; leave out packing, or [method] padding"
            )
        self.penalties = Penalties.of(self.request, self.layers.parameters)
        self.paces = self._by_pace()
        dpo = dpo_of(self.workplace.task)
        if dpo is not None and dpo.reference == "base":
            for client in self._clients():
                self.reference = {**self.reference, **base_log_probs(self.workplace, client, "train")}

    def _clients(self) -> list[ClientData]:
        """The clients whose rows it trains on."""
        return [self.workplace.all_clients[name] for name in sorted(self.request.rows_of)] or [self.client]

    @property
    def compares_with_start(self) -> bool:
        """Whether pairs are compared with what the bank says of them before the first step."""
        dpo = dpo_of(self.workplace.task)
        return dpo is not None and dpo.reference == "round"

    @property
    def examples(self) -> list[Example]:
        """The examples of all steps, as often as they are trained on."""
        return [example for step in self.steps for examples in step for example in examples]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return list(self.layers.parameters.values())

    @property
    def going(self) -> bool:
        """Whether a step is left to take."""
        return self.fault is None and self.step < len(self.steps)

    def _by_pace(self) -> dict[Pace, list[nn.Parameter]]:
        """The parameters by what their learning rate depends on."""
        by_pace: dict[Pace, list[nn.Parameter]] = {}
        for key, parameter in self.layers.parameters.items():
            pace = Pace(self.request.optim, self.rnd, len(self.steps), self.request.rates.get(key, 1.0))
            by_pace.setdefault(pace, []).append(parameter)
        return by_pace

    @property
    def counts_padding(self) -> bool:
        """Whether padding counts in the load-balance loss."""
        return self.request.balance is not None and self.request.balance.padding

    def begin_step(self) -> list[Batch]:
        """The micro-batches of the next step, on the CPU."""
        task = self.workplace.task
        pairs = dpo_of(task) is not None
        micro = [
            pair_batch(task, examples, self.reference) if pairs else task.collate(examples)
            for examples in self.steps[self.step]
        ]
        if self.request.optim.packing:
            micro = [packed(batch, task.tokenizer.pad_token_id) for batch in micro]
        self.counts.append(sum(batch.count for batch in micro))
        self._parts: list[Tensor] = []
        return micro

    def begin_pass(self, number: int, mask: Tensor | None) -> None:
        """Prepare for a pass of micro-batch ``number``. ``mask`` [b, t] marks its real tokens; None: all count."""
        request = self.request
        in_round = self.step * request.optim.accumulate + number
        purpose = self.rnd, self.client.info.id, request.purpose, "dropout", in_round
        now = self.layers.now
        now.seed, now.mask = stream_seed(self.workplace.seed, *purpose), mask
        now.head = self.heads[self.step][number]
        now.balance = [] if request.balance else None

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """The batch's part of the mean loss over the labels of the whole step, of the load-balance loss (its mean over
        the micro-batches), and of the terms on the parameters alone."""
        balance, micro = self.request.balance, len(self.steps[self.step])
        loss = self.workplace.task.loss(output, batch) / self.counts[-1]
        parts = list(self.layers.now.balance or ())  # gradient checkpointing runs the layers again, which adds to it
        balanced = torch.stack(on_device(parts, loss.device)).sum() / micro if parts else loss.new_zeros(())
        weight = balance.weight if balance else 0.0
        self._parts.append(torch.stack([loss.detach(), balanced.detach()]))
        loss = loss + weight * balanced if parts else loss
        penalty = self.penalties.loss()
        return loss if penalty is None else loss + penalty.to(loss.device) / micro

    def end_pass(self) -> None:
        """Whatever follows the backward pass of a micro-batch: nothing."""

    def clip(self) -> None:
        """Note the step's loss, and clip its gradients."""
        self.losses.append(torch.stack(self._parts).sum(0))
        if self.request.optim.clip > 0:
            clip_grad_norm_(self.parameters, self.request.optim.clip)

    def end_step(self) -> None:
        """Drop the gradients after the optimiser's step; check the losses now and then."""
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        if self.step % _CHECK_EVERY == 0 or not self.going:
            self.fault = self._loss_fault()

    def result(self, tensors: Mapping[Key, Tensor]) -> Trained | CoterieError:
        """The answer, with the trained ``tensors``, or the client's fault."""
        if fault := self.fault or self._tensor_fault(tensors):
            return fault
        seen, pairs = self.examples, dpo_of(self.workplace.task) is not None
        loss, balance = _means(self.losses, self.counts)
        tokens = sum(tokens_of_pair(e) if pairs else len(e.ids) for e in seen)
        model = self.workplace.base.model
        flops, active = (tokens * count(model, self.request) for count in (training_flops, active_flops))
        return Trained(tensors, loss, len(seen), tokens, len(self.steps), balance, flops, active)

    def _steps(self, examples: Mapping[int, list[Example]]) -> Iterator[list[MicroBatch]]:
        """The micro-batches of every optimiser step of the round."""
        number, epoch, optim = 0, 0, self.request.optim
        purpose = self.workplace.seed, self.rnd, self.client.info.id, self.request.purpose, "batches"
        while epoch < optim.epochs or optim.steps:
            parts = micro_batches(examples, optim.batch_size, *purpose, epoch)
            for i in range(0, len(parts), optim.accumulate):
                yield parts[i : i + optim.accumulate]
                number += 1
                if number == optim.steps:
                    return
            epoch += 1

    def _loss_fault(self) -> CoterieError | None:
        start = max(0, self.step - _CHECK_EVERY)
        finite = torch.isfinite(torch.stack(self.losses[start:])).all(dim=1)
        if bool(finite.all()):
            return None
        step = start + int((~finite).nonzero()[0]) + 1
        return CoterieError(
            f"client {self.client.info.id}: the loss is not finite at step {step} of round {self.rnd}; "
            "lower [train] learning_rate or [lora] alpha, or look at this client's data"
        )

    def _tensor_fault(self, tensors: Mapping[Key, Tensor]) -> CoterieError | None:
        """A gradient may overflow where the loss did not; such tensors are neither kept nor sent."""
        broken = [str(key) for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
        if not broken:
            return None
        return CoterieError(
            f"client {self.client.info.id}: round {self.rnd} left values in {broken[0]} that are not finite; "
            "lower [train] learning_rate or [lora] alpha, or look at this client's data"
        )


def _means(losses: Sequence[Tensor], counts: Sequence[int]) -> tuple[float, float]:
    """The mean task loss over all labels (step i has ``counts[i]``), and the mean balance loss over steps."""
    task, balance = torch.stack(list(losses)).cpu().double().unbind(1)
    return float((task * torch.tensor(counts)).sum()) / max(1, sum(counts)), float(balance.mean())
