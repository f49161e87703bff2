"""Answers rows with a model: those of a window sorted by length, in batches, and handed out in their own order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from coterie.data.conversations import unanswered
from coterie.data.examples import Example, answers_of, candidate, completion_losses, prompts_of
from coterie.data.files import RowTable
from coterie.data.parse import CHOICES, parse
from coterie.data.rows import ChoiceRow, Row
from coterie.data.settings import Columns
from coterie.data.tasks import Classification, Generation, MultipleChoice
from coterie.inference.answers import Answer, ChoiceAnswer, LabelAnswer, Rejected, TextAnswer
from coterie.inference.generate import new_tokens, texts_of
from coterie.inference.records import Located, Read
from coterie.nn.placement import input_device
from coterie.nn.pretrained import PreTrainedModel
from coterie.nn.prompt_cache import PromptCache
from coterie.nn.rows import RowMask
from coterie.types import CoterieError, DataError

BATCHES = 32  # in a window: rows of similar length share a batch, and no more rows are in memory than this
T = TypeVar("T")


@dataclass(frozen=True)
class Predictor:
    """A model with what it takes to answer rows: the task, the labels, the columns' names.

    ``row_mask`` is that of the bank on the model, for a gate that weighs whole rows. ``batch_size`` is in rows, or in
    candidates of multiple choice, which share their prompt through the ``prompt_cache`` of the base, if it has one.
    """

    model: PreTrainedModel
    task: Classification | Generation | MultipleChoice
    labels: tuple[str, ...] | None
    columns: Columns = field(default_factory=Columns)
    batch_size: int = 16
    row_mask: RowMask = field(default_factory=RowMask)
    prompt_cache: PromptCache | None = None

    def answers(self, rows: Iterable[Read]) -> Iterator[tuple[Read, Answer | Rejected]]:
        """Every row with its answer, or with the reason why there is none, in the rows' order.

        Raises :class:`CoterieError` for columns that the settings do not allow in this task.
        """
        for window in _batched(rows, BATCHES * self.batch_size):
            read = [self._encoded(row) for row in window]
            good = [found for found in read if not isinstance(found, Rejected)]
            with torch.no_grad():
                answers = iter(self._answer(good))
            for row, found in zip(window, read, strict=True):
                yield row, found if isinstance(found, Rejected) else next(answers)

    def _encoded(self, row: Read) -> tuple[Row, Example] | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            parsed = self._row(row)
            example = self.task.encode_prompt(parsed) if isinstance(self.task, Generation) else self.task.encode(parsed)
        except DataError as fault:
            text = str(fault)
            return Rejected(text if text.startswith(row.where) else f"{row.where}: {text}")
        return parsed, example

    def _row(self, row: Located) -> Row:
        """The row as a run's files are read, with a label in the place of the one to be found."""
        columns, record, labels = self.columns, dict(row.record), self.labels
        match self.task:
            case Classification():
                labels = ("0", "1")
                record[columns.label] = 0
            case Generation():
                record |= unanswered(record, columns)
            case MultipleChoice():
                own = columns.choices is not None or record.get(CHOICES)
                if not own and not labels:
                    raise DataError(
                        f"{row.where}: the row has no {CHOICES}, and the client has no labels to choose from"
                    )
                record[columns.label] = 0 if own or not labels else labels[0]
        table = _OneRow(row.where, [record], "")
        rows, _ = parse({"train": table}, columns, self.task.kind, labels)
        return rows["train"][0]

    def _answer(self, rows: Sequence[tuple[Row, Example]]) -> list[Answer]:
        match self.task:
            case Classification():
                return list(self._labels(self.task, [example for _, example in rows]))
            case Generation():
                return list(self._texts(self.task, [example for _, example in rows]))
            case MultipleChoice():
                return list(self._choices(self.task, rows))

    def _labels(self, task: Classification, examples: Sequence[Example]) -> Iterator[LabelAnswer]:
        def of(batch: Sequence[Example]) -> Iterable[Sequence[float]]:
            collated = task.collate(batch).to(input_device(self.model))
            logits: Tensor = self.model(**collated.inputs).logits
            return [row.tolist() for row in logits.float().softmax(-1).cpu()]

        for row in self._by_length(examples, lambda e: len(e.ids), of):
            names = self.labels or tuple(map(str, range(len(row))))
            best = max(range(len(row)), key=row.__getitem__)
            yield LabelAnswer(names[best], dict(zip(names, row, strict=True)))

    def _texts(self, task: Generation, examples: Sequence[Example]) -> Iterator[TextAnswer]:
        def of(batch: Sequence[Example]) -> Iterable[str]:
            prompts = {name: value.to(input_device(self.model)) for name, value in task.pad_prompts(batch).items()}
            return texts_of(task, new_tokens(self.model, task, prompts))

        return map(TextAnswer, self._by_length(examples, lambda e: len(e.ids), of))

    def _choices(self, task: MultipleChoice, rows: Sequence[tuple[Row, Example]]) -> Iterator[ChoiceAnswer]:
        examples = [example for _, example in rows]
        cache = self.prompt_cache and self.prompt_cache.up_to(task.max_length)
        scores = self._after_prompts(task, examples, cache) if cache else self._whole(task, examples)
        for (row, _), own in zip(rows, scores, strict=True):
            assert isinstance(row, ChoiceRow)
            best = own.index(min(own))
            yield ChoiceAnswer(row.choices[best].strip(), best, tuple(-loss for loss in own))

    def _after_prompts(
        self, task: MultipleChoice, examples: Sequence[Example], cache: PromptCache
    ) -> list[list[float]]:
        """The mean loss per token of every candidate; those of a row share its prompt's keys and values."""
        pad = task.tokenizer.pad_token_id

        def of(batch: Sequence[Example]) -> list[list[float]]:
            prompts = cache.read(self.model, prompts_of(batch, pad).to(input_device(self.model)).inputs)
            made: list[list[float]] = [[] for _ in batch]
            for number in range(max(len(e.choices) for e in batch)):
                answers = answers_of(batch, number, pad).to(input_device(self.model))
                after = cache.follow(self.model, prompts, answers.inputs)
                losses = completion_losses(torch.cat([prompts.logits.unsqueeze(1), after], dim=1), answers).tolist()
                for own, e, loss in zip(made, batch, losses, strict=True):
                    own += [loss / len(e.choices[number])] if number < len(e.choices) else []
            return made

        return self._by_length(examples, lambda e: e.prompt, of)

    def _whole(self, task: MultipleChoice, examples: Sequence[Example]) -> Iterator[list[float]]:
        """The same, each candidate with its prompt in a row of its own."""

        def of(batch: Sequence[Example]) -> Iterable[float]:
            collated = task.collate(batch).to(input_device(self.model))
            if self.row_mask.used:
                self.row_mask.prompt = collated.prompt
            losses = completion_losses(self.model(**collated.inputs, use_cache=False).logits, collated)
            self.row_mask.prompt = None
            return (losses.cpu() / torch.tensor([len(e.ids) - e.prompt for e in batch])).tolist()

        all_candidates = [candidate(e, i) for e in examples for i in range(len(e.choices))]
        losses = iter(self._by_length(all_candidates, lambda e: len(e.ids), of))
        for example in examples:
            yield [next(losses) for _ in example.choices]

    def _by_length(
        self, items: Sequence[Example], length: Callable[[Example], int], of: Callable[[Sequence[Example]], Iterable[T]]
    ) -> list[T]:
        """What ``of`` makes of each item, in the items' order, from batches of items of similar length."""
        order = sorted(range(len(items)), key=lambda i: length(items[i]))
        made = [result for some in _batched(order, self.batch_size) for result in of([items[i] for i in some])]
        at = {i: position for position, i in enumerate(order)}
        return [made[at[i]] for i in range(len(items))]


@dataclass(frozen=True)
class _OneRow(RowTable):
    """A table of one row, which says itself where it is."""

    def where(self, row: int) -> str:
        return self.source


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of ``size``; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def located(rows: Iterable[object]) -> Iterator[Located]:
    """Rows of a program, each a mapping from column to value. Raises :class:`CoterieError` for anything else."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise CoterieError(f'rows[{number}] is {row!r}; a row is a mapping such as {{"text": "..."}}')
        yield Located(row, f"rows[{number}]")
