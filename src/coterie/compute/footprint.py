"""What a training step would take, by running it on tensors without numbers: bytes in use at once, and work.

The passes are those of :mod:`coterie.compute.train` and :mod:`coterie.compute.score`, so banks, gradient checkpointing,
packing and losses in chunks count as they do in a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from coterie.compute.heap import Block, Trace
from coterie.compute.optimisers import Optimisers
from coterie.compute.passes import evaluating, on_base
from coterie.compute.train import Training
from coterie.compute.workplace import Workplace
from coterie.data.examples import Example
from coterie.nn.build import build_layers
from coterie.types import Bank


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they exist: ``now``, and ``peak``.

    The weights of ``base`` do not count: an operation that returns a view of one makes no storage.
    ``blocks`` has each storage's number and bytes when it comes, and its number and 0 when it goes. ``made`` is the sum
    of all bytes, ``operations`` the number of those that made one, ``flops`` the products' work.
    torch's FlopCounterMode is not used: it tracks modules, and so keeps what gradient checkpointing drops.
    """

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        there = [] if base is None else [*base.parameters(), *base.buffers()]
        self.now = self.peak = self.made = self.operations = self.flops = 0
        self.blocks: list[Block] = []
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def reset(self) -> None:
        """Count :attr:`peak` from what is in use now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it returns."""
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.made += size
        self.operations += 1
        self.peak = max(self.peak, self.now)
        number = len(self.blocks)
        if size:
            self.blocks.append((number, size))
        weakref.finalize(storage, self._gone, key, size, number)

    def _gone(self, key: int, size: int, number: int) -> None:
        self._known.discard(key)
        self.now -= size
        if size:
            self.blocks.append((number, 0))


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step beside the base: the ``banks`` and their gradients, the ``optimiser``'s state, the
    ``batch``, and ``passes``, all that a forward and a backward pass hold at once. And the step's work: ``flops`` of
    its products, bytes that its operations ``made``, ``operations``. ``trace``: see :class:`LiveBytes`.
    """

    banks: int = 0
    optimiser: int = 0
    batch: int = 0
    passes: int = 0
    flops: int = 0
    made: int = 0
    operations: int = 0
    trace: Trace = field(default_factory=lambda: Trace(()))

    @property
    def total(self) -> int:
        return self.banks + self.optimiser + self.batch + self.passes


def training_footprint(trainings: Sequence[Training], mode: AbstractContextManager[object]) -> Footprint:
    """The first optimiser step of clients that share passes. ``mode``: as the base was made in, of
    :func:`~coterie.nn.unloaded.shapes_alone`; a null context for a base with numbers."""
    workplace = trainings[0].workplace
    live = LiveBytes(workplace.base.model)
    micro = [training.begin_step()[0].to(torch.device("cpu")) for training in trainings]  # what counts is found here
    with mode, live:
        layers = [build_layers(t.workplace.base.model, t.request.bank, t.request.trainable) for t in trainings]
        with on_base(workplace, layers) as passes:
            for training, built in zip(trainings, layers, strict=True):
                built.now.training = True
                training.layers, training.paces = built, {}
                training.paces = training._by_pace()
            banks = live.now
            live.operations = live.made = 0
            joined = passes.join(range(len(trainings)), micro)
            batch = live.now - banks
            live.reset()
            for at, training in enumerate(trainings):
                training.begin_pass(0, joined.mask(at, training.counts_padding))
            outputs = passes.outputs(joined)
            losses = [t.loss(output, of) for t, output, of in zip(trainings, outputs, joined.parts, strict=True)]
            begins = len(live.blocks)
            torch.stack(losses).sum().backward()
            ends = len(live.blocks)
            del outputs, losses
            made = live.peak - banks - batch
            before = live.now
            optimisers = Optimisers.of([pair for t in trainings for pair in t.paces.items()], fused=False)
            optimisers.step({pace: 0 for t in trainings for pace in t.paces})
            state = live.now - before
    trace = Trace([*live.blocks], begins, ends)
    return Footprint(banks, state, batch, made, live.flops, live.made, live.operations, trace)


def evaluation_footprint(
    workplace: Workplace, bank: Bank, examples: Sequence[Example], mode: AbstractContextManager[object]
) -> Footprint:
    """One pass of evaluation on ``examples`` with ``bank``; ``mode`` as in :func:`training_footprint`."""
    live = LiveBytes(workplace.base.model)
    batch = workplace.task.collate(examples).to(torch.device("cpu"))
    with mode, live:
        layers = build_layers(workplace.base.model, bank)
        with on_base(workplace, [layers]) as passes, evaluating(workplace.base.model):
            banks = live.now
            live.operations = live.made = 0
            joined = passes.join([0], [batch])
            size = live.now - banks
            live.reset()
            (output,) = passes.outputs(joined)
            workplace.task.loss(output, joined.parts[0])
            held = live.peak - banks - size
    return Footprint(banks, 0, size, held, live.flops, live.made, live.operations, Trace([*live.blocks]))
