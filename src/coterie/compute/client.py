"""Answers one client's requests (train, score, observe) on a frozen base; :mod:`.course` says what training is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coterie.compute.importance import STATISTICS, gate_importance
from coterie.compute.score import OBSERVABLE, ChoiceTally, Sight, Tally
from coterie.compute.train import Course, Optimisers
from coterie.compute.workplace import StoppedError, Workplace, autocast
from coterie.data.rows import ClientData, PromptRow
from coterie.data.tasks import Batch, Example, Generation
from coterie.machine import native_bfloat16
from coterie.nn.attach import attached
from coterie.nn.bank import Pass
from coterie.ops.metrics import text_metrics
from coterie.ops.streams import stream
from coterie.requests import Observe, Observed, Score, Scored, Train, Trained
from coterie.types import Bank, Json


@dataclass
class LocalCompute:
    """Answers the requests of one client in one round, one at a time. ``trained`` is the bank it trained last."""

    place: Workplace
    client: ClientData
    rnd: int
    trained: Bank | None = None

    def train(self, request: Train) -> Trained:
        """Train the request's tensors on the client's training split.

        Raises :class:`CoterieError` that names client and step when a loss is not finite.
        """
        course = Course(self.place, self.client, self.rnd, request)
        with attached(self.place.base.model, request.bank, request.trainable) as bank:
            course.start(bank.parameters, bank.now)
            optimisers = Optimisers.of([course])
            while not course.done:
                for i, batch in enumerate([batch.to(self.place.device) for batch in course.begin()]):
                    course.prepare(i, None if request.balance and request.balance.padding else batch.mask)
                    course.loss(self._logits(batch, bank.now), batch).backward()
                course.clip()
                optimisers.step([course])
                course.end()
            return self.keep(request, course.result(bank.tensors()))

    def keep(self, request: Train, trained: Trained) -> Trained:
        """Remember the bank that training left."""
        self.trained = replace(request.bank, tensors={**request.bank.tensors, **trained.tensors})
        return trained

    def score(self, request: Score) -> list[Scored]:
        """Mean loss and metrics of every bank on the split."""
        return [self._score(bank, request) for bank in request.banks]

    def observe(self, request: Observe) -> Observed:
        """Gate usage, mean embeddings and modules' importance of the bank on the split."""
        sight = self.sight(request)
        with attached(self.place.base.model, request.bank) as bank, evaluating(self.place.base.model):
            sight.start(bank.now)
            for batch in sight.batches(self.place.eval_batch_size):
                sight.prepare(batch, None if request.padding else batch.mask.to(self.place.device))
                self._logits(batch.to(self.place.device), bank.now)
        return replace(sight.result(), importance=self._importance(request, sight))

    def _importance(self, request: Observe, sight: Sight) -> dict[str, dict[str, float]]:
        wanted = [name for name in STATISTICS if name in request.what]
        if not wanted:
            return {}
        place = self.place
        parts = (batch.to(place.device) for batch in sight.batches(place.eval_batch_size))
        return gate_importance(
            place.base.model, request.bank, parts, lambda b: place.task.loss(logits_of(place, b.inputs), b), wanted
        )

    def sight(self, request: Observe) -> Sight:
        """What adds up the statistics of a bank on a split. Raises :class:`ValueError` for unknown ones."""
        if unknown := set(request.what) - {*OBSERVABLE, *STATISTICS}:
            known = ", ".join(sorted({*OBSERVABLE, *STATISTICS}))
            raise ValueError(f"cannot observe {sorted(unknown)}; known: {known}")
        if request.hold_out:
            _, examples = self.place.divided(self.client, request.split, request.hold_out)
        else:
            examples = self.place.examples(self.client, request.split)
        return Sight(self.place.task, request, self._some(examples, request.examples))

    def _score(self, bank: Bank, request: Score) -> Scored:
        task, place, split, texts = self.place.task, self.place, request.split, None
        tally = self.tally(request)
        with attached(place.base.model, bank) as handle, evaluating(place.base.model):
            for batch in tally.batches(place.eval_batch_size):
                tally.add(batch, self._logits(batch.to(place.device), handle.now))
            handle.now.rows.prompt = None
            if isinstance(task, Generation) and task.generates and split == "test":
                texts = generate(place, task, self.prompts(split))
        return tally.result(None if texts is None else self.compared(split, texts))

    def tally(self, request: Score) -> Tally | ChoiceTally:
        """What adds up the scores of one bank."""
        examples = self._some(self.place.examples(self.client, request.split), request.examples)
        if self.place.task.kind == "multiple_choice":
            return ChoiceTally(self.place.task, examples, self.client.info.labels is not None)
        return Tally(self.place.task, examples)

    def prompts(self, split: str) -> list[PromptRow]:
        """The rows whose completions are generated."""
        return [row for row in self.client.splits[split] if isinstance(row, PromptRow)]

    def compared(self, split: str, texts: Sequence[str]) -> dict[str, float]:
        """The metrics of what was generated for :meth:`prompts`."""
        return text_metrics([row.completion for row in self.prompts(split)], texts)

    def _some(self, examples: list[Example], at_most: int) -> list[Example]:
        """``at_most`` of the examples (0: all), drawn by the run's seed, the round and the client."""
        if not 0 < at_most < len(examples):
            return examples
        draw = stream(self.place.seed, self.rnd, self.client.info.id, "some")
        return [examples[i] for i in torch.randperm(len(examples), generator=draw)[:at_most].tolist()]

    def _logits(self, batch: Batch, now: Pass) -> Tensor:
        """The model's logits with the bank that ``now`` steers."""
        if now.rows.used:
            now.rows.prompt = batch.prompt
        return logits_of(self.place, batch.inputs)


def generate(place: Workplace, task: Generation, rows: Sequence[PromptRow]) -> list[str]:
    """Greedy completions of the rows' prompts, in batches, with whatever bank is attached."""
    texts: list[str] = []
    for i in range(0, len(rows), place.eval_batch_size):
        texts += complete(place, task, prompts_of(place, task, rows[i : i + place.eval_batch_size]))
    return texts


def prompts_of(place: Workplace, task: Generation, rows: Sequence[PromptRow]) -> Mapping[str, Tensor]:
    """The rows' prompts, padded on the left [b, t]."""
    with place.tokenising:
        return task.collate_prompts(rows)


def complete(place: Workplace, task: Generation, prompts: Mapping[str, Tensor]) -> list[str]:
    """Greedy completions of prompts that are padded on the left [b, t], with whatever is attached."""
    inputs = {name: value.to(place.device) for name, value in prompts.items()}
    pad = task.tokenizer.pad_token_id
    model: Json = place.base.model
    ends = _ends(model.generation_config.eos_token_id, task.tokenizer.eos_token_id)
    with autocast(place):
        out = model.generate(
            **inputs, max_new_tokens=task.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    with place.tokenising:
        return list(task.tokenizer.batch_decode(new, skip_special_tokens=True))


def logits_of(place: Workplace, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits with whatever is attached. Raises :class:`StoppedError` where the place is to stop."""
    if place.stop.is_set():
        raise StoppedError
    with autocast(place):
        logits: Tensor = place.base.model(**inputs, use_cache=False).logits
    return logits


def _ends(of_model: int | list[int] | None, of_tokenizer: int | None) -> list[int] | None:
    """The tokens that end a text: the model's own, and the tokenizer's, which training puts after a completion."""
    own = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*own, of_tokenizer) if end is not None}) or None


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


def resolve_precision(setting: str, device: torch.device) -> str:
    """``auto`` as the precision that the device computes in by itself; any other setting as it is."""
    if setting != "auto":
        return setting
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else native_bfloat16()
    return "bfloat16" if native else "float32"
