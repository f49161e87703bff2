"""Tasks: how rows become tokens and batches, and what the loss is.

A task knows the tokenizer, and of the model only its logits. All tasks have the same interface: ``encode`` a row once,
``collate`` examples into a padded batch, and ``loss``, a sum over what counts (examples in classification, otherwise
tokens of the completion or of the right candidate), so that the caller divides once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from coterie.data.chat import ChatTokenizer, TrainedTurns, fit, gaps, prompt_ids, render
from coterie.data.dpo import Dpo
from coterie.data.examples import (
    IGNORE,
    Batch,
    Example,
    after_prompt,
    candidate,
    completion_losses,
    length,
    padded_inputs,
    wide,
)
from coterie.data.outputs import Hidden, Output
from coterie.data.parse import listing
from coterie.data.rows import ChatRow, ChoiceRow, GenerationRow, PreferenceRow, PromptRow, Row, TextRow
from coterie.ops.sampling import GREEDY, NEW_TOKENS, Sampling
from coterie.ops.scores import DEFAULT
from coterie.types import DataError, TaskKind


class Tokenizer(ChatTokenizer, Protocol):
    """What tasks use of a Hugging Face tokenizer."""

    @property
    def pad_token_id(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> Mapping[str, list[int]]: ...

    def batch_decode(self, ids: Tensor, *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True)
class Classification:
    """Text or a pair of texts to one of the client's labels; cross entropy, summed over examples."""

    tokenizer: Tokenizer
    max_length: int = 128
    kind: Literal["classification"] = field(default="classification", init=False)

    def encode(self, row: Row) -> Example:
        assert isinstance(row, TextRow)
        out = self.tokenizer(row.text, row.text_pair, truncation=True, max_length=self.max_length)
        ids, cut = tuple(out["input_ids"]), 0
        if len(ids) == self.max_length:  # it may have been cut
            cut = len(self.tokenizer(row.text, row.text_pair, verbose=False)["input_ids"]) - len(ids)
        types = tuple(out["token_type_ids"]) if "token_type_ids" in out else None
        return Example(ids, types, label=row.label, cut=cut)

    def collate(self, examples: Sequence[Example]) -> Batch:
        inputs = padded_inputs(examples, self.tokenizer.pad_token_id, left=False)
        return Batch(inputs, torch.tensor([e.label for e in examples]), len(examples))

    def loss(self, output: Output, batch: Batch) -> Tensor:
        assert isinstance(output, Tensor)
        return functional.cross_entropy(wide(output), batch.labels, reduction="sum")


@dataclass(frozen=True)
class Generation:
    """A completion after a prompt, or a conversation; cross entropy of the assistant's tokens, summed over them.

    A prompt goes through the tokenizer's chat template if there is one; otherwise the completion follows the prompt
    directly. The end-of-text token is part of the completion. A row that is too long loses tokens at the start of its
    prompt, then at the end of its completion. A conversation is cut likewise: its last turn that counts is the
    completion. ``turns``: whether all turns of the assistant count, or the last.
    ``scores``: names of the scores of generated text, if it ``generates``, and ``sampling`` how it does.
    With ``dpo`` it learns from pairs of answers (:meth:`collate_pairs`); without, the chosen answer of a pair is its
    completion.
    """

    tokenizer: Tokenizer
    max_length: int = 128
    max_new_tokens: int = NEW_TOKENS
    generates: bool = False
    turns: TrainedTurns = "all"
    scores: tuple[str, ...] = DEFAULT
    dpo: Dpo | None = None
    sampling: Sampling = GREEDY
    kind: Literal["generation"] = field(default="generation", init=False)

    def encode(self, row: Row) -> Example:
        if isinstance(row, PreferenceRow):
            return self._encode_pair(row) if self.dpo else self.encode(row.chosen)
        if self.dpo is not None:
            raise DataError('[task] objective = "dpo" learns from preferences, and this row has one answer alone')
        if isinstance(row, ChatRow):
            rendered = render(self.tokenizer, row.turns, self.turns)
            kept = fit(rendered, self.max_length)
            return Example(kept.ids, prompt=kept.spans[0][0], skipped=gaps(kept), cut=len(rendered.ids) - len(kept.ids))
        assert isinstance(row, PromptRow)
        whole, before = self.completion_ids(row.completion), self.prompt_ids(row)
        completion = whole[: self.max_length - 1]
        prompt = before[-(self.max_length - len(completion)) :]
        ids = (*prompt, *completion)
        return Example(ids, prompt=len(prompt), cut=len(before) + len(whole) - len(ids))

    def _encode_pair(self, row: PreferenceRow) -> Example:
        """Both answers after the same prompt, which is cut to the longer one."""
        (before, first), (other, second) = map(self._parted, (row.chosen, row.rejected))
        if before != other:
            raise DataError("the chat template renders what comes before the answers differently for each of them")
        prompt, answers = after_prompt(before, (first, second), self.max_length)
        if answers[0] == answers[1]:
            raise DataError(
                f"both answers have the same first {self.max_length - 1} tokens, and no others count; raise [model] "
                "max_length"
            )
        cut = 2 * (len(before) - len(prompt)) + len(first) + len(second) - sum(map(len, answers))
        return Example((*prompt, *answers[0]), prompt=len(prompt), choices=answers, cut=cut)

    def _parted(self, row: PromptRow | ChatRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a prompt and of its answer."""
        if isinstance(row, PromptRow):
            return tuple(self.prompt_ids(row)), self.completion_ids(row.completion)
        rendered = render(self.tokenizer, row.turns, "last")
        start, end = rendered.spans[-1]
        if not start:
            raise DataError("the chat template puts no token before the assistant's answer, so it follows nothing")
        return rendered.ids[:start], rendered.ids[start:end]

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a completion and the end of text. At most ``max_length`` - 1 of them count."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        completion = (*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end)
        if not completion:
            raise DataError(f"the completion {text!r} has no token")
        return completion

    def prompt_ids(self, row: GenerationRow) -> list[int]:
        """The tokens that the completion follows: of a conversation, those before the assistant's last turn."""
        if isinstance(row, PreferenceRow):
            return self.prompt_ids(row.chosen)
        if isinstance(row, ChatRow):
            return prompt_ids(self.tokenizer, row.turns[: row.last])
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": row.prompt}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self.plain_ids(row.prompt)

    def plain_ids(self, text: str) -> list[int]:
        """The tokens of a prompt that goes through no chat template."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text; the completion still follows
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return ids or [next(start for start in starts if start is not None)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        inputs = padded_inputs(examples, self.tokenizer.pad_token_id, left=False)
        labels = inputs["input_ids"].clone()
        for row, example in enumerate(examples):
            labels[row, : example.prompt] = IGNORE
            labels[row, len(example.ids) :] = IGNORE
            for start, end in example.skipped:
                labels[row, start:end] = IGNORE
        return Batch(inputs, labels, sum(len(e.ids) - e.prompt - length(e.skipped) for e in examples))

    def collate_pairs(self, examples: Sequence[Example], reference: Tensor) -> Batch:
        """Both answers of each pair after its prompt, as two rows, with the ``reference`` of each pair [n, 2]."""
        batch = self.collate([candidate(example, number) for example in examples for number in (0, 1)])
        return replace(batch, count=len(examples), reference=reference)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        if self.dpo is not None and batch.reference is not None:
            return self.dpo.loss(self.dpo.margins(completion_losses(output, batch), batch.reference))
        if isinstance(output, Hidden):
            return batch.losses(output).sum()
        flat = wide(output[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(flat, batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")

    def collate_prompts(self, rows: Sequence[GenerationRow]) -> Mapping[str, Tensor]:
        """Prompts padded on the left, for generation."""
        return self.pad_prompts([self.encode_prompt(row) for row in rows])

    def encode_prompt(self, row: Row) -> Example:
        """The tokens of the row's prompt alone, the last ``max_length`` - 1 of them."""
        assert isinstance(row, GenerationRow)
        return Example(tuple(self.prompt_ids(row)[-max(1, self.max_length - 1) :]))

    def pad_prompts(self, prompts: Sequence[Example]) -> Mapping[str, Tensor]:
        """Encoded prompts padded on the left [b, t]."""
        return padded_inputs(prompts, self.tokenizer.pad_token_id, left=True)


@dataclass(frozen=True)
class MultipleChoice:
    """Chooses among a row's candidates after its prompt: the one with the least mean loss per token.

    The mean loss of candidate y after prompt x is -(1/|y|) sum_i log p(y_i | x, y_<i), with the end of text as part of
    y, as FedAMoLE (2411.19128) evaluates SNLI. Training is that of :class:`Generation` on the right candidate. All
    candidates of a row follow the same prompt: where a row is too long, the prompt is cut to the longest candidate.
    """

    tokenizer: Tokenizer
    max_length: int = 128
    kind: Literal["multiple_choice"] = field(default="multiple_choice", init=False)
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def encode(self, row: Row) -> Example:
        assert isinstance(row, ChoiceRow)
        whole = tuple(map(self._completion_ids, row.choices))
        before = self._after.prompt_ids(PromptRow(row.prompt, ""))
        prompt, choices = after_prompt(before, whole, self.max_length)
        if len(set(choices)) < len(choices):
            raise DataError(
                f"two candidates have the same tokens, of {listing(row.choices)}: candidates are cut to their first "
                f"{self.max_length - 1} tokens; raise [model] max_length"
            )
        ids = (*prompt, *choices[row.answer])
        cut = len(before) + len(whole[row.answer]) - len(ids)
        return Example(ids, label=row.answer, prompt=len(prompt), choices=choices, cut=cut)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._after.collate(examples)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return self._after.loss(output, batch)

    @property
    def _after(self) -> Generation:
        return Generation(self.tokenizer, self.max_length)

    def _completion_ids(self, choice: str) -> tuple[int, ...]:
        """The tokens of a candidate, cached because most rows share their candidates."""
        if choice not in self._known:
            self._known[choice] = self._after.completion_ids(choice)
        return self._known[choice]


Task = Classification | Generation | MultipleChoice


def make_task(
    kind: TaskKind,
    tokenizer: Tokenizer,
    max_length: int,
    max_new_tokens: int = NEW_TOKENS,
    generates: bool = False,
    turns: TrainedTurns = "all",
    scores: Sequence[str] = DEFAULT,
    dpo: Dpo | None = None,
    sampling: Sampling = GREEDY,
) -> Task:
    """The task of that kind."""
    match kind:
        case "classification":
            return Classification(tokenizer, max_length)
        case "generation":
            return Generation(tokenizer, max_length, max_new_tokens, generates, turns, tuple(scores), dpo, sampling)
        case "multiple_choice":
            return MultipleChoice(tokenizer, max_length)
