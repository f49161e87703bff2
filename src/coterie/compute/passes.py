"""Forward passes through the frozen base, with the bank of one client on it or with those of many.

Clients that share passes have their rows in one batch. What each gets is what it would get alone, within floating
point. One client alone is the reference: its batches go through the model as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.compute.workplace import StoppedError, Workplace
from coterie.data.examples import Batch
from coterie.data.outputs import Hidden, Output
from coterie.nn.attach import attached_layers
from coterie.nn.attach_many import attached_many
from coterie.nn.build import BankLayers
from coterie.nn.many import ManyPass
from coterie.nn.rows import RowMask
from coterie.nn.split_head import SplitHead, token_losses


@dataclass(frozen=True)
class Joined:
    """The batches of the clients ``active`` as one: ``inputs`` [c*rows, tokens], on the device.

    Each client has as many rows as the largest batch (smaller ones are filled up with copies), of as many tokens as the
    longest row. ``parts`` are the clients' own batches; ``real`` [c, rows, tokens] marks their tokens, ``own`` their
    padding too (None: all). ``segments`` [c*rows, tokens]: as :attr:`Batch.segments`, of packed rows.
    """

    active: Sequence[int]
    inputs: Mapping[str, Tensor]
    parts: Sequence[Batch]
    rows: int
    tokens: int
    real: Tensor
    own: Tensor | None
    segments: Tensor | None = None

    @property
    def prompt(self) -> Tensor:
        """[c*rows, tokens]: as :attr:`Batch.prompt`, and 0 in the rows and tokens that were added."""
        if self.own is None:
            return self.parts[0].prompt
        marks = torch.zeros_like(self.own)
        for number, part in enumerate(self.parts):
            marks[number, : part.mask.shape[0], : part.mask.shape[1]] = part.prompt
        return marks.flatten(0, 1)

    def mask(self, number: int, padding: bool) -> Tensor | None:
        """The tokens [rows, tokens] of the client with that number in ``active`` that count in statistics; None: all.

        ``padding``: those of its own padding too.
        """
        marks = self.own if padding else self.real
        return None if marks is None else marks[number]


@dataclass(frozen=True)
class Passes:
    """Passes through the base of ``workplace`` with clients' banks on it.

    ``row_mask`` has the tokens that stand for their rows. ``many`` says which clients' rows a pass holds; None: one
    client's.
    """

    workplace: Workplace
    row_mask: RowMask
    many: ManyPass | None = None
    targets: Collection[str] = ()

    def join(self, active: Sequence[int], batches: Sequence[Batch], left: bool = False) -> Joined:
        """One batch each of the clients with the numbers ``active``. ``left``: padded on the left, for generation."""
        device = self.workplace.device
        if self.many is None:
            (batch,) = (batch.to(device) for batch in batches)
            rows, tokens = batch.mask.shape
            return Joined(active, batch.inputs, [batch], rows, tokens, batch.mask.unsqueeze(0), None, batch.segments)
        sizes = [tuple(batch.mask.shape) for batch in batches]
        rows, tokens = (max(size[axis] for size in sizes) for axis in (0, 1))
        pads = {"input_ids": self.workplace.task.tokenizer.pad_token_id}
        inputs = {
            name: torch.cat(
                [_filled(batch.inputs[name], rows, tokens, pads.get(name, 0), left) for batch in batches]
            ).to(device, non_blocking=True)
            for name in batches[0].inputs
        }
        own = torch.zeros(len(batches), rows, tokens, dtype=torch.long)
        for number, (b, t) in enumerate(sizes):
            own[number, :b, tokens - t if left else 0 : tokens if left else t] = 1
        own = own.to(device, non_blocking=True)
        masks = torch.cat([_filled(batch.mask, rows, tokens, 0, left) for batch in batches]).to(device)
        parts = [batch.segments for batch in batches if batch.segments is not None]
        segments = torch.cat([_filled(part, rows, tokens, 0, left) for part in parts]).to(device) if parts else None
        real = masks.view_as(own) * own
        return Joined(active, inputs, [batch.to(device) for batch in batches], rows, tokens, real, own, segments)

    def in_step(self, streams: Sequence[Iterator[Batch]]) -> Iterator[Joined]:
        """The first batches of all clients' streams, then the second batches of those that have one, and so on."""
        for batches in zip_longest(*streams):
            active = [i for i, batch in enumerate(batches) if batch is not None]
            yield self.join(active, [batch for batch in batches if batch is not None])

    def choose(self, joined: Joined) -> None:
        """Prepare for a pass of ``joined``."""
        self.row_mask.prompt, self.row_mask.segments = None, joined.segments
        if self.many is not None:
            sizes = [(part.mask.shape[0], part.mask.shape[1]) for part in joined.parts]
            self.many.choose(joined.active, joined.rows, joined.tokens, sizes, joined.real.device)

    def outputs(self, joined: Joined) -> list[Output]:
        """Every active client's own logits for its own rows and tokens, or what enters the head."""
        self.choose(joined)
        if self.row_mask.used:
            self.row_mask.prompt = joined.prompt
        flat = joined.segments is not None and self.workplace.base.packs_flat
        inputs = {name: of.view(1, -1) for name, of in joined.inputs.items()} if flat else joined.inputs
        output = output_of(self.workplace, inputs, self.targets, self.row_mask)
        if flat:
            output = _in_rows(output, len(joined.parts) * joined.rows)
        if self.many is None:
            return [output]
        if isinstance(output, Hidden):
            return [replace(output, values=values) for values in self.many.split(output.values)]
        return [*self.many.split(output)]


@contextmanager
def on_base(workplace: Workplace, layers: Sequence[BankLayers]) -> Iterator[Passes]:
    """The clients' banks on the base for the length of a ``with`` block; the last layer computes the first token alone
    where results stay the same.

    Raises :class:`~coterie.nn.many.UnlikeError` for banks that cannot share a pass.
    """
    model, cut = workplace.base.model, workplace.base.first_token
    targets = {name for each in layers for name in each.layers}
    with cut.only(model) if cut and cut.keeps_all_tokens(targets) else nullcontext():
        if len(layers) == 1:
            with attached_layers(model, layers[0]):
                yield Passes(workplace, layers[0].now.rows, None, targets)
            return
        with attached_many(model, layers) as many:
            row_mask = many.now.row_mask
            row_mask.used = row_mask.used or any(each.now.rows.used for each in layers)
            yield Passes(workplace, row_mask, many.now, targets)


def _in_rows(output: Output, rows: int) -> Output:
    """The output of rows that went through the model as one."""
    if isinstance(output, Hidden):
        return replace(output, values=output.values.view(rows, -1, output.values.shape[-1]))
    return output.view(rows, -1, output.shape[-1])


def output_of(
    workplace: Workplace, inputs: Mapping[str, Tensor], targets: Collection[str], row_mask: RowMask | None = None
) -> Output:
    """The model's logits with whatever is attached to ``targets``; what enters the head where they are too large.

    Raises :class:`StoppedError` once the workplace is stopped.
    """
    if workplace.task.kind == "classification":
        return logits_of(workplace, inputs)
    split = workplace.base.split_head
    chunk = workplace.chunk(inputs["input_ids"].numel(), split.vocabulary if split else workplace.base.vocabulary)
    if not chunk:
        return logits_of(workplace, inputs)
    if split is None or not split.leaves_head(targets):
        why = "a bank adapts it" if split else "its body and its head cannot be told apart"
        workplace.note(f"the model's logits are computed at once, not in chunks ([engine] loss_chunk): {why}")
        return logits_of(workplace, inputs)
    return _hidden_of(workplace, split, chunk, inputs, row_mask)


def _hidden_of(
    workplace: Workplace, split: SplitHead, chunk: int, inputs: Mapping[str, Tensor], row_mask: RowMask | None
) -> Hidden:
    """What enters the head, without the call of the whole model that ``row_mask`` follows."""
    if workplace.stop.is_set():
        raise StoppedError
    if row_mask is not None and row_mask.used:
        row_mask.attention, row_mask.continues = inputs.get("attention_mask"), False
    model = workplace.base.model

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        with workplace.autocast():
            return token_losses(hidden, labels, partial(split.logits, model), chunk)

    with workplace.autocast():
        return Hidden(split.hidden(model, inputs), losses)


def logits_of(workplace: Workplace, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits with whatever is attached. Raises :class:`StoppedError` once the workplace is stopped."""
    if workplace.stop.is_set():
        raise StoppedError
    with workplace.autocast():
        logits: Tensor = workplace.base.model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode: in training mode a model with gradient checkpointing generates without its
    cache, from the last token alone."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def _filled(values: Tensor, rows: int, tokens: int, pad: int, left: bool) -> Tensor:
    """``values`` [b, t] as [rows, tokens]: padded, and its last row repeated."""
    b, t = values.shape
    space = (tokens - t, 0) if left else (0, tokens - t)
    wide = functional.pad(values, space, value=pad)
    return wide if b == rows else torch.cat([wide, wide[-1:].expand(rows - b, -1)])
