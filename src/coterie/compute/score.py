"""Answers ``Score``: mean loss and metrics of a bank on a split, for one client alone or for many in the same passes.

A :class:`Scoring` hands out batches sorted by length, takes the model's outputs for them in the same order, and has the
scores at the end. It does not know whose rows share its passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from coterie.compute.choices import share_prompts
from coterie.compute.generate import completions
from coterie.compute.passes import Passes, evaluating, on_base
from coterie.compute.statistics import Collector
from coterie.compute.workplace import Workplace
from coterie.data.examples import Batch, Example, candidate, completion_losses
from coterie.data.outputs import Output
from coterie.data.rows import ClientData, GenerationRow
from coterie.data.tasks import Generation, Task
from coterie.nn.build import BankLayers, build_layers
from coterie.ops.metrics import classification_metrics, perplexity
from coterie.ops.scores import text_metrics
from coterie.requests import Sample, Score, Scored
from coterie.types import Bank


def score(scorings: Sequence[Scoring]) -> list[Scored]:
    """What each client's bank scores; the clients share their passes.

    Raises :class:`~coterie.nn.many.UnlikeError` for banks that cannot share them.
    """
    if not scorings:
        return []
    workplace, size = scorings[0].workplace, scorings[0].workplace.rows_of_each(len(scorings))
    with on_base(workplace, [scoring.layers for scoring in scorings]) as passes, evaluating(workplace.base.model):
        cache, choosing = workplace.prompt_cache, [each for each in scorings if isinstance(each, ChoiceScoring)]
        if cache and choosing:
            share_prompts(passes, cache, choosing)
        else:
            _pass_whole(passes, scorings, size)
        observed = [scoring.collector.result() if scoring.collector else None for scoring in scorings]
        texts = _texts(passes, scorings)
    results = [scoring.result(made) for scoring, made in zip(scorings, texts, strict=True)]
    return [replace(result, observed=usage) for result, usage in zip(results, observed, strict=True)]


def _pass_whole(passes: Passes, scorings: Sequence[Scoring], size: int) -> None:
    """Pass every client's batches of ``size`` whole rows."""
    for joined in passes.in_step([scoring.batches(size) for scoring in scorings]):
        for at, i in enumerate(joined.active):
            scorings[i].begin_pass(joined.parts[at], joined.mask(at, padding=False))
        for i, of, output in zip(joined.active, joined.parts, passes.outputs(joined), strict=True):
            scorings[i].add(of, output)


def _texts(passes: Passes, scorings: Sequence[Scoring]) -> list[list[str] | None]:
    """The completions of each client, or None if they are not scored."""
    if not any(scoring.generates for scoring in scorings):
        return [None] * len(scorings)
    prompts = [scoring.prompts if scoring.generates else [] for scoring in scorings]
    texts = completions(passes, prompts, [scoring.client.info.id for scoring in scorings])
    return [text if scoring.generates else None for scoring, text in zip(scorings, texts, strict=True)]


@dataclass
class Scoring:
    """One bank of a client on a split: mean loss, and metrics of classification or perplexity.

    Raises :class:`CoterieError` where the client has no rows, or the bank does not fit the base.
    """

    workplace: Workplace
    client: ClientData
    rnd: int
    request: Score
    bank: Bank
    examples: Sequence[Example] = field(init=False)
    layers: BankLayers = field(init=False)
    collector: Collector | None = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    count: int = 0
    truth: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        examples = self.workplace.examples(self.client, self.request.split)
        self.examples = self.workplace.some(self.client, self.rnd, examples, self.request.examples)
        self.layers = build_layers(self.workplace.base.model, self.bank)
        self.collector = Collector(self.bank, self.layers.now, ("usage",)) if self.request.usage else None

    @property
    def task(self) -> Task:
        return self.workplace.task

    @property
    def generates(self) -> bool:
        """Whether completions are generated and scored too."""
        return isinstance(self.task, Generation) and self.task.generates and self.request.split == "test"

    @property
    def prompts(self) -> list[GenerationRow]:
        """The rows whose completions are generated."""
        return [row for row in self.client.splits[self.request.split] if isinstance(row, GenerationRow)]

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` examples, on the CPU."""
        return in_order(self.task, self.examples, size)

    def begin_pass(self, batch: Batch, mask: Tensor | None) -> None:
        """Prepare for a pass of this batch, in which ``mask`` marks its real tokens."""
        if self.collector:
            self.collector.begin_pass(mask, batch.mask.sum())

    def add(self, batch: Batch, output: Output) -> None:
        """Add the losses and predictions of a batch; nothing here waits for the device."""
        self.losses.append(self.task.loss(output, batch))
        self.count += batch.count
        if self.task.kind == "classification":
            assert isinstance(output, Tensor)
            self.truth.append(batch.labels)
            self.predicted.append(output.argmax(-1))

    def result(self, texts: Sequence[str] | None = None) -> Scored:
        """The scores, with the metrics of generated ``texts`` if there are any."""
        total = 0.0
        for loss_of_batch in torch.stack(self.losses).tolist():  # sum() rounds differently from Python 3.12 on
            total += loss_of_batch
        loss = total / self.count
        metrics: dict[str, float] = {}
        if texts is not None and isinstance(self.task, Generation):
            metrics = text_metrics([row.completion for row in self.prompts], texts, self.task.scores)
        metrics |= self.measured(loss)
        pairs = zip(self.prompts, texts or (), strict=False)
        samples = [Sample(row.prompt, row.completion, text) for row, text in islice(pairs, self.request.samples)]
        return Scored(loss, metrics, len(self.examples), samples=samples)

    def measured(self, loss: float) -> dict[str, float]:
        """The metrics beside the loss and those of generated texts."""
        if not self.truth:
            return {"perplexity": perplexity(loss)}
        return classification_metrics(torch.cat(self.truth).tolist(), torch.cat(self.predicted).tolist())


@dataclass
class ChoiceScoring(Scoring):
    """Accuracy of choosing among candidates: every candidate after its row's prompt; the prediction is the candidate
    with the lowest mean loss per token, the first on a tie. The loss is the mean per token of the right candidates.

    Macro-F1 and Matthews' correlation only where all rows have the same candidates; else positions are not classes.
    """

    passed: int = 0  # candidates whose passes have begun
    seen: list[tuple[int, int]] = field(default_factory=list)  # row and candidate of each loss

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` candidates, sorted by length, on the CPU."""
        for start in range(0, len(self.order), size):
            yield self.task.collate([candidate(self.examples[i], j) for i, j in self.order[start : start + size]])

    def begin_pass(self, batch: Batch, mask: Tensor | None) -> None:
        """Prepare for a pass of this batch; only tokens of right candidates count in the usage of the experts."""
        if self.collector:
            rows = self.order[self.passed : self.passed + len(batch.labels)]
            right = torch.tensor([j == self.examples[i].label for i, j in rows], device=batch.mask.device)
            assert mask is not None
            marks = torch.zeros_like(mask)
            marks[: len(rows)] = mask[: len(rows)] * right.unsqueeze(1)
            self.passed += len(rows)
            self.collector.begin_pass(marks, marks.sum())

    def add(self, batch: Batch, output: Output) -> None:
        """Count the losses of a batch."""
        losses = completion_losses(output, batch)
        self.seen += self.order[len(self.seen) : len(self.seen) + len(losses)]
        self.losses.append(losses)

    def add_losses(self, rows: Sequence[int], number: int, losses: Tensor) -> None:
        """Add the losses [b] of candidate ``number`` of ``rows``, of those that have one."""
        having = [at for at, row in enumerate(rows) if number < len(self.examples[row].choices)]
        self.seen += [(rows[at], number) for at in having]
        self.losses.append(losses if len(having) == len(rows) else losses[having])

    def result(self, texts: Sequence[str] | None = None) -> Scored:
        """The scores."""
        right = 0.0
        for (i, j), loss in zip(self.seen, torch.cat(self.losses).tolist(), strict=True):
            right += loss if j == self.examples[i].label else 0.0
        examples = self.examples
        metrics = classification_metrics([e.label for e in examples], self.chosen())
        if self.client.info.labels is None:
            metrics = {"accuracy": metrics["accuracy"]}
        return Scored(right / sum(len(e.choices[e.label]) for e in examples), metrics, len(examples))

    def chosen(self) -> list[int]:
        """The number of the candidate that each row's scores choose."""
        means = [[0.0] * len(e.choices) for e in self.examples]
        for (i, j), loss in zip(self.seen, torch.cat(self.losses).tolist(), strict=True):
            means[i][j] = loss / len(self.examples[i].choices[j])
        return [row.index(min(row)) for row in means]

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Row and candidate, by length."""
        examples = self.examples
        order = [(i, j) for i, e in enumerate(examples) for j in range(len(e.choices))]
        return sorted(order, key=lambda at: examples[at[0]].prompt + len(examples[at[0]].choices[at[1]]))


def in_order(task: Task, examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Batches of ``size`` examples, sorted by length, on the CPU."""
    by_length = sorted(examples, key=lambda e: len(e.ids))
    for i in range(0, len(by_length), size):
        yield task.collate(by_length[i : i + size])
