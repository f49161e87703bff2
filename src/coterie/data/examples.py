"""Tokenised rows, and batches of them: padding, labels that count, random batches of similar length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from coterie.data.chat import Span
from coterie.data.outputs import Hidden, Output

IGNORE = -100  # the label of a token that does not count


@dataclass(frozen=True)
class Example:
    """One tokenised row. ``label`` is the class; ``prompt`` is the number of leading tokens that the loss leaves out.

    ``skipped``: tokens after those that the loss leaves out too, between the assistant's turns of a conversation.
    In multiple choice, ``choices`` holds the tokens of every candidate, and ``label`` is the number of the right one.
    Of preferences they are the answers, the chosen one first.
    ``cut`` is the number of tokens that the row lost because it is too long.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None
    label: int = 0
    prompt: int = 0
    choices: tuple[tuple[int, ...], ...] = ()
    skipped: tuple[Span, ...] = ()
    cut: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Batch:
    """Model inputs [b, t] padded to the longest row, ``labels`` [b] or [b, t], and how many labels count.

    ``reference``: of preferences, whose rows are the answers of each pair, the reference's log-probabilities of them
    [b / 2, 2]; ``count`` is then the number of pairs.
    ``labelled`` [n] numbers the tokens of b * t whose next token has a label that counts; None: not known yet.
    ``segments`` [b, t], where rows are packed: the number of each token's row in the batch row; 0: padding.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    count: int
    reference: Tensor | None = None
    labelled: Tensor | None = None
    segments: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """[b, t]: 1 for tokens, 0 for padding."""
        return self.inputs["attention_mask"] if self.segments is None else (self.segments > 0).long()

    @property
    def prompt(self) -> Tensor:
        """[b, t]: 1 for the tokens that the model is given: the whole row in classification, else the prompt."""
        return self.mask if self.labels.ndim == 1 else self.mask * (self.labels == IGNORE)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``. What counts is found before, because to find it there would wait for it."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labelled = None if self.labels.ndim == 1 else self.before_labels.to(device, non_blocking=True)
        reference = None if self.reference is None else self.reference.to(device, non_blocking=True)
        segments = None if self.segments is None else self.segments.to(device, non_blocking=True)
        return Batch(inputs, self.labels.to(device, non_blocking=True), self.count, reference, labelled, segments)

    @property
    def before_labels(self) -> Tensor:
        """``labelled``, found where it is not known."""
        if self.labelled is not None:
            return self.labelled
        counts = functional.pad(self.labels[:, 1:] != IGNORE, (0, 1))
        return counts.flatten().nonzero()[:, 0]

    def losses(self, output: Output) -> Tensor:
        """The cross entropy of each label that counts [n], in float32 at least."""
        before = self.before_labels
        labels = self.labels.flatten().index_select(0, before + 1)
        if isinstance(output, Hidden):
            return output.of(before, labels)
        width = self.labels.shape[1]
        return functional.cross_entropy(wide(output[before // width, before % width]), labels, reduction="none")


def after_prompt(
    prompt: Sequence[int], answers: Sequence[tuple[int, ...]], max_length: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A prompt and the answers that may follow it, in ``max_length`` tokens: long answers lose their last tokens, and
    the prompt then its first ones, as many as the longest answer needs."""
    cut = tuple(answer[: max_length - 1] for answer in answers)
    return tuple(prompt[-(max_length - max(map(len, cut))) :]), cut


def candidate(example: Example, number: int) -> Example:
    """The row's prompt with candidate ``number`` after it."""
    return replace(example, ids=(*example.ids[: example.prompt], *example.choices[number]))


def completion_losses(output: Output, batch: Batch) -> Tensor:
    """The sum of the losses of each row's labelled tokens [b], computed in float32 and summed in float64.

    Only the logits of those tokens are converted, and the sums do not depend on the rows' padding.
    """
    losses = batch.losses(output)
    by_row = torch.zeros(batch.labels.shape, dtype=torch.float64, device=losses.device)
    by_row.view(-1)[batch.before_labels] = losses.double()
    return by_row.sum(1)


def prompts_of(examples: Sequence[Example], pad: int) -> Batch:
    """The rows' prompts [b, t], padded on the left."""
    inputs = padded_inputs([Example(e.ids[: e.prompt]) for e in examples], pad, left=True)
    return Batch(inputs, inputs["input_ids"], 0)


def answers_of(examples: Sequence[Example], number: int, pad: int) -> Batch:
    """Candidate ``number`` of each row [b, t], or its first one where it has fewer. The labels [b, 1 + t] begin with
    the prompt's last token."""
    chosen = [Example(e.choices[number] if number < len(e.choices) else e.choices[0]) for e in examples]
    inputs = padded_inputs(chosen, pad, left=False)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    start = torch.full_like(labels[:, :1], IGNORE)
    return Batch(inputs, torch.cat([start, labels], dim=1), sum(len(e.ids) for e in chosen))


def batches(examples: Sequence[Example], size: int, generator: torch.Generator) -> list[list[Example]]:
    """Every example once, in random batches of similar length: sorted within random chunks of four batches."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    chunks = [order[i : i + 4 * size] for i in range(0, len(order), 4 * size)]
    by_length = [sorted(chunk, key=lambda i: len(examples[i].ids)) for chunk in chunks]
    made = [chunk[i : i + size] for chunk in by_length for i in range(0, len(chunk), size)]
    shuffled = torch.randperm(len(made), generator=generator).tolist()
    return [[examples[i] for i in made[j]] for j in shuffled]


def wide(logits: Tensor) -> Tensor:
    """In float32 at least: bfloat16 is too coarse for a softmax over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def length(spans: Sequence[Span]) -> int:
    """The tokens in the spans together."""
    return sum(end - start for start, end in spans)


def padded_inputs(examples: Sequence[Example], pad: int, left: bool) -> dict[str, Tensor]:
    """The model's inputs [b, t], padded with the token ``pad`` on the ``left`` or on the right."""
    width = max(len(e.ids) for e in examples)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        space = [fill] * (width - len(values))
        return [*space, *values] if left else [*values, *space]

    inputs = {
        "input_ids": torch.tensor([padded(e.ids, pad) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e.ids), 0) for e in examples]),
    }
    if all(e.types is not None for e in examples):
        inputs["token_type_ids"] = torch.tensor([padded(e.types or (), 0) for e in examples])
    return inputs
