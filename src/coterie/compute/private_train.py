"""Training that hides every row (``[privacy] unit = "example"``): one client's DP-SGD, on what it trains alone.

A step draws each row by itself, with the same probability. The gradient of a row is that of its own loss: the mean over
its labels, which no other row changes. All that trains is one vector for the cut: A, B, router and head, a head that
stays on the client too, because what it learns shows in the next step's gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.compute.micro_batches import MicroBatch
from coterie.compute.preferences import dpo_of
from coterie.compute.train import Training
from coterie.data.examples import Batch, Example
from coterie.data.outputs import Output
from coterie.methods.row_privacy import RowPrivacy
from coterie.nn.per_row import PerRow, watch_head
from coterie.requests import Trained
from coterie.types import CoterieError, Key, Part


@dataclass(kw_only=True)
class PrivateTraining(Training):
    """One client's training in one round, of which ``private`` says how it is hidden.

    ``total`` is the sum of the cut gradients of the step so far. Raises :class:`CoterieError` for what would make a
    row's gradient depend on other rows, and for more than is accounted for.
    """

    private: RowPrivacy
    total: dict[Key, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()
        if tables := [name for name, layer in self.layers.layers.items() if layer.table is not None]:
            raise CoterieError(_fault(f"{tables[0]} has a router of one row for each expert, which all rows share"))
        keys = {id(parameter): key for key, parameter in self.layers.parameters.items() if key.part is Part.HEAD}
        for head in self.layers.heads.values():
            watch_head(head, keys, lambda: self.layers.now.per_row)

    def _check(self) -> None:
        """Raise :class:`CoterieError` for a request that the accounting does not cover."""
        request = self.request
        faults = {
            "the load-balance loss mixes rows; set [method] balance = 0": request.balance and request.balance.weight,
            "dropout of a row goes by its place in the batch; set [lora] dropout = 0": request.bank.dropout,
            "packing puts rows together; set [train] packing = false": request.optim.packing,
            'it trains on rows and not on pairs; set [task] objective = "likelihood"': dpo_of(self.workplace.task),
            "it trains on the rows of one client": request.rows_of,
            "it trains on all rows; set none aside ([method] embed_rows)": request.hold_out,
            "the steps are those of [train] and no others": request.optim != self.private.optim,
            "layers that run again count twice; set [model] gradient_checkpointing = false": any(
                getattr(module, "gradient_checkpointing", False) for module in self.workplace.base.model.modules()
            ),
        }
        for why, wrong in faults.items():
            if wrong:
                raise CoterieError(_fault(why))

    def _steps(self, examples: Mapping[int, list[Example]]) -> Iterator[list[MicroBatch]]:
        """The micro-batches of every step: those of the rows that it draws, which may be none."""
        (rows,) = examples.values()
        optim, private = self.request.optim, self.private
        if len(rows) != private.rows:
            raise CoterieError(_fault(f"the noise is for {private.rows} rows, and there are {len(rows)}"))
        for step in range(optim.steps_on(len(rows))):
            values = private.noise.uniform(len(rows), *self._purpose(step), "rows")
            drawn = [row for row, value in zip(rows, values.tolist(), strict=True) if value * len(rows) <= private.lot]
            size = optim.batch_size
            yield [(0, drawn[i : i + size]) for i in range(0, len(drawn), size)]

    def _purpose(self, step: int) -> tuple[str | int, ...]:
        return self.client.info.id, self.rnd, self.request.purpose, step

    def begin_pass(self, number: int, mask: Tensor | None) -> None:
        super().begin_pass(number, mask)
        self.layers.now.balance = None
        rows = len(self.steps[self.step][number])
        held = rows if mask is None else len(mask)  # more where a client of the same pass has more
        self.layers.now.per_row = PerRow(rows, padding=held - rows)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """The sum over rows of the mean loss of each row's labels."""
        if batch.labels.ndim == 1:
            loss = self.workplace.task.loss(output, batch)
        else:
            row = batch.before_labels // batch.labels.shape[1]
            counts = torch.bincount(row, minlength=len(batch.labels))
            loss = (batch.losses(output) / counts.index_select(0, row)).sum()
        self._parts.append(torch.stack([loss.detach() / self.private.lot, loss.new_zeros(())]))
        return loss

    def end_pass(self) -> None:
        """Add the cut gradients of the pass's rows to the step's."""
        rows, self.layers.now.per_row = self.layers.now.per_row, None
        if rows is not None:
            for key, value in rows.clipped(self.private.clip).items():
                self.total[key] = self.total[key] + value if key in self.total else value

    def clip(self) -> None:
        """Turn the sum of the step's cut gradients into a noisy mean over the lot: the gradient for the optimiser."""
        private = self.private
        if not self._parts:  # no row was drawn
            self._parts.append(torch.zeros(2, device=self.workplace.device))
        for key, parameter in sorted(self.layers.parameters.items()):
            noise = private.noise.normal(tuple(parameter.shape), *self._purpose(self.step), str(key))
            noisy = private.multiplier * private.clip * noise.to(parameter.device)
            if key in self.total:
                noisy = noisy + self.total[key].view(parameter.shape).double()
            parameter.grad = torch.empty_like(parameter).copy_(noisy / private.lot)  # strides that kernels ask for
        self.total = {}
        if (penalty := self.penalties.loss()) is not None:  # of the tensors alone: it says nothing of the rows
            penalty.backward()
        super().clip()

    def result(self, tensors: Mapping[Key, Tensor]) -> Trained | CoterieError:
        """The trained ``tensors``, or why there are none. What training measured beside them has no noise: it is 0."""
        made = super().result(tensors)
        if isinstance(made, CoterieError):
            return made
        return Trained(made.tensors, 0.0, self.private.rows, 0, made.steps)

    def _loss_fault(self) -> CoterieError | None:
        return None  # whether the loss is a number depends on the rows, and has no noise


def _fault(why: str) -> str:
    return f'[privacy] unit = "example" does not work here: {why}'
