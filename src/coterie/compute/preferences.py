"""Pairs of answers: what the reference of DPO says of them, computed once, and how a bank scores on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.compute.passes import Passes, evaluating
from coterie.compute.score import ChoiceScoring, Scoring
from coterie.compute.workplace import Workplace
from coterie.data.dpo import Dpo
from coterie.data.examples import Batch, Example, completion_losses
from coterie.data.outputs import Output
from coterie.data.rows import ClientData
from coterie.data.tasks import Generation, Task
from coterie.nn.rows import RowMask
from coterie.requests import Score
from coterie.types import Bank

LogProbs = Mapping[Example, tuple[float, float]]  # log p of the chosen and of the rejected answer of each pair


def dpo_of(task: Task) -> Dpo | None:
    """How the task learns from pairs of answers; None where it does not."""
    return task.dpo if isinstance(task, Generation) else None


def pair_batch(task: Task, examples: Sequence[Example], reference: LogProbs | None = None) -> Batch:
    """The batch of pairs with what the ``reference`` says of them; None: zeros."""
    assert isinstance(task, Generation)
    known = [(0.0, 0.0) if reference is None else reference[example] for example in examples]
    return task.collate_pairs(examples, torch.tensor(known, dtype=torch.float64))


def tokens_of_pair(example: Example) -> int:
    """The tokens of both answers, each with its prompt."""
    return 2 * example.prompt + sum(map(len, example.choices))


def base_log_probs(workplace: Workplace, client: ClientData, split: str) -> LogProbs:
    """What the base without a bank says of a client's pairs. Computed once in a run, for the client alone and all pairs
    of the split, so that it is the same whatever is trained on first."""
    examples, key = workplace.examples(client, split), (client.info.id, split)
    if key not in workplace.references:
        (known,) = passed_log_probs(Passes(workplace, RowMask()), [examples])
        workplace.references[key] = [known[example] for example in examples]
    return dict(zip(examples, workplace.references[key], strict=True))


def passed_log_probs(passes: Passes, clients: Sequence[Sequence[Example]]) -> list[LogProbs]:
    """What the base says of each client's pairs, with the banks on it that ``passes`` has; the clients share passes."""
    workplace = passes.workplace
    size = workplace.rows_of_each(2 * len(clients))
    ordered = [sorted(dict.fromkeys(examples), key=tokens_of_pair) for examples in clients]
    made: list[list[Tensor]] = [[] for _ in clients]
    with evaluating(workplace.base.model):
        for joined in passes.in_step([_batches(workplace.task, each, size) for each in ordered]):
            for i, part, output in zip(joined.active, joined.parts, passes.outputs(joined), strict=True):
                made[i].append(-completion_losses(output, part).view(-1, 2))
    return [
        {example: (chosen, rejected) for example, (chosen, rejected) in zip(each, torch.cat(of).tolist(), strict=True)}
        for each, of in zip(ordered, made, strict=True)
    ]


@dataclass
class PreferenceScoring(Scoring):
    """The mean loss of DPO against the base, ``reward_accuracy``, the share of pairs with a margin above 0, and
    ``margin``, the mean margin of rewards. The use of experts is that of the chosen answers."""

    reference: LogProbs = field(init=False)
    margins: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference = base_log_probs(self.workplace, self.client, self.request.split)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` answers, at least those of a pair, on the CPU."""
        by_length = sorted(self.examples, key=tokens_of_pair)
        return _batches(self.task, by_length, max(1, size // 2), self.reference)

    def begin_pass(self, batch: Batch, mask: Tensor | None) -> None:
        """Prepare for a pass of this batch; only tokens of chosen answers count in the usage of the experts."""
        if self.collector:
            assert mask is not None
            marks = torch.zeros_like(mask)
            marks[: len(batch.labels) : 2] = mask[: len(batch.labels) : 2]
            self.collector.begin_pass(marks, marks.sum())

    def add(self, batch: Batch, output: Output) -> None:
        """Add the margins of a batch."""
        dpo = dpo_of(self.task)
        assert dpo is not None
        assert batch.reference is not None
        margins = dpo.margins(completion_losses(output, batch), batch.reference)
        self.margins.append(margins)
        self.losses.append(dpo.loss(margins))
        self.count += batch.count

    def measured(self, loss: float) -> dict[str, float]:
        """The metrics beside the loss."""
        margins = torch.cat(self.margins)
        return {"reward_accuracy": float((margins > 0).double().mean()), "margin": float(margins.mean())}


def scoring_of(workplace: Workplace, client: ClientData, rnd: int, request: Score, bank: Bank) -> Scoring:
    """The scoring of one ``bank`` of ``request``, for the workplace's task. Raises as :class:`Scoring`."""
    if dpo_of(workplace.task):
        return PreferenceScoring(workplace, client, rnd, request, bank)
    kind = ChoiceScoring if workplace.task.kind == "multiple_choice" else Scoring
    return kind(workplace, client, rnd, request, bank)


def _batches(task: Task, examples: Sequence[Example], size: int, reference: LogProbs | None = None) -> Iterator[Batch]:
    """Batches of ``size`` pairs in order, on the CPU."""
    for start in range(0, len(examples), size):
        yield pair_batch(task, examples[start : start + size], reference)
