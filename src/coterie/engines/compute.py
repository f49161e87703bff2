"""The only training loop: answers one client's requests (train, score, observe) on a frozen base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from coterie.data.rows import ClientData, PromptRow
from coterie.data.tasks import Batch, Classification, Example, Generation, batches
from coterie.engines.importance import STATISTICS, gate_importance
from coterie.evaluate import classification_metrics, perplexity, text_metrics
from coterie.machine import native_bfloat16
from coterie.nn.attach import Attached, attached
from coterie.nn.base import Base
from coterie.ops.streams import stream, stream_seed
from coterie.types import Bank, CoterieError, Json, Key, Observe, Observed, Optim, Score, Scored, Train, Trained

_CHECK_EVERY = 16  # optimiser steps between looks at the losses: a look waits for the device


@dataclass
class Workplace:
    """What all clients of a process share: the base, the task, the seed, and every split tokenised once."""

    base: Base
    task: Classification | Generation
    seed: int
    eval_batch_size: int = 64
    precision: str = "float32"
    cache: dict[tuple[str, str], list[Example]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.base.model.parameters()).device

    def examples(self, client: ClientData, split: str) -> list[Example]:
        """The tokenised rows of a client's split. Raises :class:`CoterieError` where it has none."""
        key = client.info.id, split
        if key not in self.cache:
            if not client.splits.get(split):
                has = ", ".join(name for name, rows in client.splits.items() if rows)
                raise CoterieError(f"client {client.info.id} has no {split} rows; it has {has or 'none at all'}")
            self.cache[key] = [self.task.encode(row) for row in client.splits[split]]
        return self.cache[key]


@dataclass(frozen=True)
class LocalCompute:
    """Answers the requests of one client in one round, one at a time."""

    place: Workplace
    client: ClientData
    rnd: int

    def train(self, request: Train) -> Trained:
        """Train the request's tensors on the client's training split.

        Raises :class:`CoterieError` that names client and step when a loss is not finite.
        """
        optim, task = request.optim, self.place.task
        examples = self.place.examples(self.client, "train")
        groups = list(self._groups(examples, optim, request.purpose))
        losses: list[Tensor] = []
        counts: list[int] = []
        with attached(self.place.base.model, request.bank, request.trainable) as bank:
            parameters = list(bank.parameters.values())
            optimizer = make_optimizer(optim, parameters, self.rnd)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _factor(optim.schedule, i, len(groups)))
            bank.now.training = True
            for step, group in enumerate(groups):
                micro = [task.collate(part).to(self.place.device) for part in group]
                counts.append(sum(batch.count for batch in micro))
                losses.append(self._step(bank, micro, counts[-1], optim, request.purpose, step))
                if optim.clip > 0:
                    clip_grad_norm_(parameters, optim.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                if (step + 1) % _CHECK_EVERY == 0 or step + 1 == len(groups):
                    self._check_finite(losses, step + 1)
            tensors = bank.tensors()
        self._check_trained(tensors)
        seen = [example for group in groups for part in group for example in part]
        return Trained(tensors, _mean(losses, counts), len(seen), sum(len(e.ids) for e in seen), len(groups))

    def score(self, request: Score) -> list[Scored]:
        """Mean loss and metrics of every bank on the split."""
        return [self._score(bank, request.split, request.examples) for bank in request.banks]

    def observe(self, request: Observe) -> Observed:
        """Gate usage of the bank on the split, padding left out, and the importance of its modules if asked for."""
        if unknown := set(request.what) - {"usage", *STATISTICS}:
            raise ValueError(f"cannot observe {sorted(unknown)}; known: usage, {', '.join(STATISTICS)}")
        tokens = 0
        with attached(self.place.base.model, request.bank) as bank, evaluating(self.place.base.model):
            bank.now.usage = {}
            for batch in self._in_order(request.split, request.examples):
                bank.now.mask = batch.mask
                self._logits(batch)
                tokens += int(batch.mask.sum())
            usage = bank.now.usage
        shares = {module: counted / tokens for module, counted in usage.items()}
        importance = self._importance(request)
        by_module = {m: {"weight": w.tolist(), "share": s.tolist()} for m, (w, s) in shares.items()}
        return Observed(by_module, tokens, importance)

    def _importance(self, request: Observe) -> dict[str, dict[str, float]]:
        wanted = [name for name in request.what if name in STATISTICS]
        if not wanted:
            return {}
        parts = self._in_order(request.split, request.examples)
        model, task = self.place.base.model, self.place.task
        return gate_importance(model, request.bank, parts, lambda b: task.loss(self._logits(b), b), wanted)

    def _groups(self, examples: list[Example], optim: Optim, purpose: str) -> Iterator[list[list[Example]]]:
        """The micro-batches of every optimiser step of the round."""
        number, epoch = 0, 0
        while epoch < optim.epochs or optim.steps:
            order = stream(self.place.seed, self.rnd, self.client.info.id, purpose, "batches", epoch)
            parts = batches(examples, optim.batch_size, order)
            for i in range(0, len(parts), optim.accumulate):
                yield parts[i : i + optim.accumulate]
                number += 1
                if number == optim.steps:
                    return
            epoch += 1

    def _step(
        self, bank: Attached, micro: Sequence[Batch], count: int, optim: Optim, purpose: str, step: int
    ) -> Tensor:
        """Gradients of the mean loss over the ``count`` labels of all micro-batches; returns that loss."""
        losses = []
        for i, batch in enumerate(micro):
            bank.now.seed = stream_seed(
                self.place.seed, self.rnd, self.client.info.id, purpose, "dropout", step * optim.accumulate + i
            )
            bank.now.mask = batch.mask
            loss = self.place.task.loss(self._logits(batch), batch) / count
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _check_finite(self, losses: Sequence[Tensor], done: int) -> None:
        start = max(0, done - _CHECK_EVERY)
        finite = torch.isfinite(torch.stack(list(losses[start:done])))
        if not bool(finite.all()):
            step = start + int((~finite).nonzero()[0]) + 1
            raise CoterieError(
                f"client {self.client.info.id}: the loss is not finite at step {step} of round {self.rnd}; "
                "lower [train] learning_rate or [lora] alpha, or look at this client's data"
            )

    def _check_trained(self, tensors: Mapping[Key, Tensor]) -> None:
        """A gradient may overflow where the loss did not: nothing of that may be kept or sent."""
        if broken := [str(key) for key, value in tensors.items() if not bool(torch.isfinite(value).all())]:
            raise CoterieError(
                f"client {self.client.info.id}: round {self.rnd} left values in {broken[0]} that are not finite; "
                "lower [train] learning_rate or [lora] alpha, or look at this client's data"
            )

    def _score(self, bank: Bank, split: str, examples: int = 0) -> Scored:
        task, total, count = self.place.task, 0.0, 0
        truth: list[int] = []
        predicted: list[int] = []
        metrics: dict[str, float] = {}
        with attached(self.place.base.model, bank), evaluating(self.place.base.model):
            for batch in self._in_order(split, examples):
                logits = self._logits(batch)
                total += float(task.loss(logits, batch))
                count += batch.count
                if task.kind == "classification":
                    truth += batch.labels.tolist()
                    predicted += logits.argmax(-1).tolist()
            if isinstance(task, Generation) and task.generates and split == "test":
                metrics = self._score_texts(task, split)
        loss = total / count
        metrics |= classification_metrics(truth, predicted) if truth else {"perplexity": perplexity(loss)}
        return Scored(loss, metrics, len(self._some(split, examples)))

    def _score_texts(self, task: Generation, split: str) -> dict[str, float]:
        rows = [row for row in self.client.splits[split] if isinstance(row, PromptRow)]
        texts = generate(self.place, task, rows)
        return text_metrics([row.completion for row in rows], texts)

    def _some(self, split: str, at_most: int) -> list[Example]:
        """The split's examples, or ``at_most`` of them (0: all) drawn by the run's seed, the round and the client."""
        examples = self.place.examples(self.client, split)
        if not 0 < at_most < len(examples):
            return examples
        draw = stream(self.place.seed, self.rnd, self.client.info.id, "some", split)
        return [examples[i] for i in torch.randperm(len(examples), generator=draw)[:at_most].tolist()]

    def _in_order(self, split: str, at_most: int = 0) -> Iterator[Batch]:
        """The split, or ``at_most`` examples of it, in batches sorted by length."""
        examples = sorted(self._some(split, at_most), key=lambda e: len(e.ids))
        size = self.place.eval_batch_size
        for i in range(0, len(examples), size):
            yield self.place.task.collate(examples[i : i + size]).to(self.place.device)

    def _logits(self, batch: Batch) -> Tensor:
        with autocast(self.place):
            logits: Tensor = self.place.base.model(**batch.inputs, use_cache=False).logits
        return logits


def generate(place: Workplace, task: Generation, rows: Sequence[PromptRow]) -> list[str]:
    """Greedy completions of the rows' prompts, in batches, with whatever bank is attached."""
    texts: list[str] = []
    for i in range(0, len(rows), place.eval_batch_size):
        inputs = {k: v.to(place.device) for k, v in task.collate_prompts(rows[i : i + place.eval_batch_size]).items()}
        pad = task.tokenizer.pad_token_id
        model: Json = place.base.model
        ends = _ends(model.generation_config.eos_token_id, task.tokenizer.eos_token_id)
        with autocast(place):
            out = model.generate(
                **inputs, max_new_tokens=task.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += task.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


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


def make_optimizer(optim: Optim, parameters: Sequence[nn.Parameter], rnd: int) -> torch.optim.Optimizer:
    """A fresh optimiser for round ``rnd`` (the first is 1), its learning rate decayed by the rounds before."""
    rate = optim.learning_rate * optim.round_decay ** (rnd - 1)
    if optim.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=optim.momentum, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=optim.weight_decay)


def resolve_precision(setting: str, device: torch.device) -> str:
    """``auto`` as the precision that the device computes in by itself; any other setting as it is."""
    if setting != "auto":
        return setting
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else native_bfloat16()
    return "bfloat16" if native else "float32"


def autocast(place: Workplace) -> AbstractContextManager[None]:
    """bfloat16 autocast, or nothing for float32."""
    return torch.autocast(place.device.type, torch.bfloat16, enabled=place.precision == "bfloat16")


def _factor(schedule: str, step: int, steps: int) -> float:
    match schedule:
        case "linear":
            return max(0.0, 1 - step / steps)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
        case _:
            return 1.0


def _mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """The mean over all labels seen of the steps' means over ``counts`` labels."""
    sums = torch.stack(list(losses)).cpu().double() * torch.tensor(counts)
    return float(sums.sum()) / sum(counts)
