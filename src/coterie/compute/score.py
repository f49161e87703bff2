"""Adds up what a client's forward passes give: scores of a bank on a split, how its tokens use the experts.

Each of them hands out batches sorted by length, takes what the model made of them in the same order, and has a result
at the end; who runs the model, and on whose rows besides, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.data.tasks import Batch, Example, Task, candidate, completion_losses
from coterie.nn.bank import Pass
from coterie.ops.metrics import classification_metrics, perplexity
from coterie.requests import ExpertUse, Observe, Observed, Scored
from coterie.types import NO_EXPERT, Bank, Key, Part

OBSERVABLE = {"usage", "embeddings", "directions"}


@dataclass
class Tally:
    """Mean loss and metrics of classification, or mean loss and perplexity of generation."""

    task: Task
    examples: Sequence[Example]
    losses: list[Tensor] = field(default_factory=list)
    count: int = 0
    truth: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` examples, on the CPU."""
        return _in_order(self.task, self.examples, size)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Count the logits of a batch; nothing here waits for the device."""
        batch = batch.to(logits.device)
        self.losses.append(self.task.loss(logits, batch))
        self.count += batch.count
        if self.task.kind == "classification":
            self.truth.append(batch.labels)
            self.predicted.append(logits.argmax(-1))

    def result(self, texts: Mapping[str, float] | None = None) -> Scored:
        """The scores, with the metrics of generated ``texts`` if there are any."""
        total = 0.0
        for loss_of_batch in torch.stack(self.losses).tolist():  # sum() rounds otherwise from Python 3.12 on
            total += loss_of_batch
        loss = total / self.count
        metrics = dict(texts or {})
        if self.truth:
            metrics |= classification_metrics(torch.cat(self.truth).tolist(), torch.cat(self.predicted).tolist())
        else:
            metrics["perplexity"] = perplexity(loss)
        return Scored(loss, metrics, len(self.examples))


@dataclass
class ChoiceTally:
    """Accuracy of choosing among candidates: every candidate after its row's prompt; the prediction is the candidate
    with the least mean loss per token, the first on a tie. The loss is the mean per token of the right candidates.

    Macro-F1 and Matthews' correlation only where all rows have ``same_candidates``: else a place means nothing.
    """

    task: Task
    examples: Sequence[Example]
    same_candidates: bool
    losses: list[Tensor] = field(default_factory=list)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` candidates, sorted by length, on the CPU."""
        order = self._order()
        for start in range(0, len(order), size):
            yield self.task.collate([candidate(self.examples[i], j) for i, j in order[start : start + size]])

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Count the logits of a batch."""
        self.losses.append(completion_losses(logits, batch.to(logits.device)))

    def result(self, texts: Mapping[str, float] | None = None) -> Scored:
        """The scores."""
        examples, right = self.examples, 0.0
        means = [[0.0] * len(e.choices) for e in examples]
        for (i, j), loss in zip(self._order(), torch.cat(self.losses).tolist(), strict=True):
            means[i][j] = loss / len(examples[i].choices[j])
            right += loss if j == examples[i].label else 0.0
        metrics = classification_metrics([e.label for e in examples], [row.index(min(row)) for row in means])
        if not self.same_candidates:
            metrics = {"accuracy": metrics["accuracy"]}
        return Scored(right / sum(len(e.choices[e.label]) for e in examples), metrics, len(examples))

    def _order(self) -> list[tuple[int, int]]:
        """Row and candidate, by length."""
        examples = self.examples
        order = [(i, j) for i, e in enumerate(examples) for j in range(len(e.choices))]
        return sorted(order, key=lambda at: examples[at[0]].prompt + len(examples[at[0]].choices[at[1]]))


@dataclass
class Sight:
    """How the tokens of a split use a bank's experts, and their mean embeddings."""

    task: Task
    request: Observe
    examples: Sequence[Example]
    tokens: int = 0

    def start(self, now: Pass) -> None:
        """Collect in the passes that ``now`` steers."""
        self.now = now
        now.usage = {} if "usage" in self.request.what else None
        now.embeddings = {} if "embeddings" in self.request.what else None
        now.directions = {} if "directions" in self.request.what else None
        now.rows.used = now.rows.used or now.directions is not None
        now.seen = {}

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` examples, on the CPU."""
        return _in_order(self.task, self.examples, size)

    def prepare(self, batch: Batch, mask: Tensor | None) -> None:
        """The next pass is of this batch, and of its tokens those that ``mask`` marks count (None: all)."""
        self.now.mask = mask
        self.tokens += batch.mask.numel() if self.request.padding else int(batch.mask.sum())

    def result(self) -> Observed:
        """The means over the tokens that each module saw."""
        sums, usage, seen = self.now.embeddings or {}, self.now.usage or {}, self.now.seen
        embeddings = {key: (value / seen[key.module]).float().cpu() for key, value in sorted(sums.items())}
        directions = {
            Key(module, NO_EXPERT, Part.EMBEDDING): (total / number).float().cpu()
            for module, (total, number) in sorted((self.now.directions or {}).items())
        }
        return Observed(_shares(self.request.bank, usage, seen), self.tokens, embeddings, directions)


def _in_order(task: Task, examples: Sequence[Example], size: int) -> Iterator[Batch]:
    by_length = sorted(examples, key=lambda e: len(e.ids))
    for i in range(0, len(by_length), size):
        yield task.collate(by_length[i : i + size])


def _shares(bank: Bank, usage: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, ExpertUse]:
    """Gate usage by module, from sums [2, e] over the tokens that it saw."""
    found = {}
    for module, counted in usage.items():
        weight, share = (counted / seen[module]).tolist()
        numbers = sorted(key.expert for key in bank.tensors if key.module == module and key.part is Part.A)
        found[module] = ExpertUse(weight, share, numbers)
    return found
