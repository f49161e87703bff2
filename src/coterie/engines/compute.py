"""The only training loop: answers one client's requests (train, score, observe) on a frozen base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from coterie.data.rows import ClientData, PromptRow
from coterie.data.tasks import Batch, Example, Generation, Task, batches, candidate, completion_losses
from coterie.engines.importance import STATISTICS, gate_importance
from coterie.evaluate import classification_metrics, perplexity, text_metrics
from coterie.machine import native_bfloat16
from coterie.nn.attach import Attached, attached
from coterie.nn.base import Base
from coterie.ops.streams import stream, stream_seed
from coterie.types import (
    Bank,
    CoterieError,
    HoldOut,
    Json,
    Key,
    Observe,
    Observed,
    Optim,
    Part,
    Score,
    Scored,
    Train,
    Trained,
)

_OBSERVABLE = {"usage", "embeddings", *STATISTICS}
_CHECK_EVERY = 16  # optimiser steps between looks at the losses: a look waits for the device


@dataclass
class Workplace:
    """What all clients of a process share: the base, the task, the seed, and every split tokenised once."""

    base: Base
    task: Task
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

    def divided(self, client: ClientData, split: str, hold_out: HoldOut) -> tuple[list[Example], list[Example]]:
        """The examples of a split that ``hold_out`` leaves, and those that it sets aside.

        Raises :class:`CoterieError` where it leaves none.
        """
        examples = self.examples(client, split)
        order = torch.randperm(len(examples), generator=stream(self.seed, client.info.id, "hold out", split)).tolist()
        aside = set(order[: hold_out.count(len(examples))])
        if len(aside) == len(examples):
            raise CoterieError(
                f"client {client.info.id} has {len(examples)} {split} row(s), and all of them are set aside "
                f"(a share of {hold_out.fraction:g}); give it more rows"
            )
        left = [example for i, example in enumerate(examples) if i not in aside]
        return left, [examples[i] for i in sorted(aside)]


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
        optim, task = request.optim, self.place.task
        if request.hold_out:
            examples, _ = self.place.divided(self.client, "train", request.hold_out)
        else:
            examples = self.place.examples(self.client, "train")
        groups = list(self._groups(examples, optim, request.purpose))
        losses: list[Tensor] = []  # of each step: [2], the task's and the load-balance loss
        counts: list[int] = []
        with attached(self.place.base.model, request.bank, request.trainable) as bank:
            parameters = list(bank.parameters.values())
            optimizer = make_optimizer(optim, parameters, self.rnd)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _factor(optim.schedule, i, len(groups)))
            bank.now.training = True
            for step, group in enumerate(groups):
                micro = [task.collate(part).to(self.place.device) for part in group]
                counts.append(sum(batch.count for batch in micro))
                losses.append(self._step(bank, micro, counts[-1], request, step))
                if optim.clip > 0:
                    clip_grad_norm_(parameters, optim.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                if (step + 1) % _CHECK_EVERY == 0 or step + 1 == len(groups):
                    self._check_finite(losses, step + 1)
            tensors = bank.tensors()
        self._check_trained(tensors)
        self.trained = replace(request.bank, tensors={**request.bank.tensors, **tensors})
        seen = [example for group in groups for part in group for example in part]
        loss, balance = _means(losses, counts)
        return Trained(tensors, loss, len(seen), sum(len(e.ids) for e in seen), len(groups), balance)

    def score(self, request: Score) -> list[Scored]:
        """Mean loss and metrics of every bank on the split."""
        return [self._score(bank, request.split, request.examples) for bank in request.banks]

    def observe(self, request: Observe) -> Observed:
        """Gate usage, mean embeddings and modules' importance of the bank on the split."""
        if unknown := set(request.what) - _OBSERVABLE:
            raise ValueError(f"cannot observe {sorted(unknown)}; known: {', '.join(sorted(_OBSERVABLE))}")
        if request.hold_out:
            _, chosen = self.place.divided(self.client, request.split, request.hold_out)
        else:
            chosen = self.place.examples(self.client, request.split)
        chosen, tokens = self._some(chosen, request.examples), 0
        with attached(self.place.base.model, request.bank) as bank, evaluating(self.place.base.model):
            bank.now.usage = {} if "usage" in request.what else None
            bank.now.embeddings = {} if "embeddings" in request.what else None
            for batch in self._in_order(request.split, chosen):
                bank.now.mask = None if request.padding else batch.mask
                self._logits(batch)
                tokens += batch.mask.numel() if request.padding else int(batch.mask.sum())
            sums, usage = bank.now.embeddings or {}, bank.now.usage or {}
        embeddings = {key: (value / tokens).float().cpu() for key, value in sorted(sums.items())}
        return Observed(_shares(request.bank, usage, tokens), tokens, embeddings, self._importance(request, chosen))

    def _importance(self, request: Observe, chosen: Sequence[Example]) -> dict[str, dict[str, float]]:
        wanted = [name for name in STATISTICS if name in request.what]
        if not wanted:
            return {}
        model, task, parts = self.place.base.model, self.place.task, self._in_order(request.split, chosen)
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

    def _step(self, bank: Attached, micro: Sequence[Batch], count: int, request: Train, step: int) -> Tensor:
        """Gradients of the mean loss over the ``count`` labels of all micro-batches, and of the load-balance loss
        (their mean over the micro-batches); returns both, [2]."""
        losses = []
        for i, batch in enumerate(micro):
            number = step * request.optim.accumulate + i
            purpose = self.rnd, self.client.info.id, request.purpose, "dropout", number
            bank.now.seed = stream_seed(self.place.seed, *purpose)
            bank.now.mask = None if request.balance and request.balance.padding else batch.mask
            bank.now.balance = [] if request.balance else None
            loss = self.place.task.loss(self._logits(batch), batch) / count
            found = list(bank.now.balance or ())  # gradient checkpointing runs the layers again, which adds to it
            balance = torch.stack(found).sum() / len(micro) if found else loss.new_zeros(())
            weight = request.balance.weight if request.balance else 0.0
            (loss + weight * balance if found else loss).backward()
            losses.append(torch.stack([loss.detach(), balance.detach()]))
        return torch.stack(losses).sum(0)

    def _check_finite(self, losses: Sequence[Tensor], done: int) -> None:
        start = max(0, done - _CHECK_EVERY)
        finite = torch.isfinite(torch.stack(list(losses[start:done]))).all(dim=1)
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

    def _score(self, bank: Bank, split: str, at_most: int) -> Scored:
        chosen = self._some(self.place.examples(self.client, split), at_most)
        task, total, count = self.place.task, 0.0, 0
        truth: list[int] = []
        predicted: list[int] = []
        metrics: dict[str, float] = {}
        with attached(self.place.base.model, bank), evaluating(self.place.base.model):
            if task.kind == "multiple_choice":
                return self._score_choices(chosen)
            for batch in self._in_order(split, chosen):
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
        return Scored(loss, metrics, len(chosen))

    def _score_choices(self, examples: Sequence[Example]) -> Scored:
        """Every candidate after its row's prompt, in batches sorted by length; the prediction is the candidate with
        the least mean loss per token, the first on a tie. The loss is the mean per token of the right candidates.

        Macro-F1 and Matthews' correlation only where all rows have the same candidates: else a place means nothing.
        """
        means, right = [[0.0] * len(e.choices) for e in examples], 0.0
        order = [(i, j) for i, e in enumerate(examples) for j in range(len(e.choices))]
        order.sort(key=lambda at: examples[at[0]].prompt + len(examples[at[0]].choices[at[1]]))
        for start in range(0, len(order), self.place.eval_batch_size):
            part = order[start : start + self.place.eval_batch_size]
            batch = self.place.task.collate([candidate(examples[i], j) for i, j in part]).to(self.place.device)
            for (i, j), loss in zip(part, completion_losses(self._logits(batch), batch).tolist(), strict=True):
                means[i][j] = loss / len(examples[i].choices[j])
                right += loss if j == examples[i].label else 0.0
        metrics = classification_metrics([e.label for e in examples], [row.index(min(row)) for row in means])
        if self.client.info.labels is None:
            metrics = {"accuracy": metrics["accuracy"]}
        return Scored(right / sum(len(e.choices[e.label]) for e in examples), metrics, len(examples))

    def _score_texts(self, task: Generation, split: str) -> dict[str, float]:
        rows = [row for row in self.client.splits[split] if isinstance(row, PromptRow)]
        texts = generate(self.place, task, rows)
        return text_metrics([row.completion for row in rows], texts)

    def _some(self, examples: list[Example], at_most: int) -> list[Example]:
        """``at_most`` of the examples (0: all), drawn by the run's seed, the round and the client."""
        if not 0 < at_most < len(examples):
            return examples
        draw = stream(self.place.seed, self.rnd, self.client.info.id, "some")
        return [examples[i] for i in torch.randperm(len(examples), generator=draw)[:at_most].tolist()]

    def _in_order(self, split: str, chosen: Sequence[Example] | None = None) -> Iterator[Batch]:
        """The split, or the examples chosen of it, in batches sorted by length."""
        found = self.place.examples(self.client, split) if chosen is None else chosen
        examples = sorted(found, key=lambda e: len(e.ids))
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


def _means(losses: Sequence[Tensor], counts: Sequence[int]) -> tuple[float, float]:
    """The mean over all labels seen of the steps' means over ``counts`` labels; the mean over steps of the balance."""
    task, balance = torch.stack(list(losses)).cpu().double().unbind(1)
    return float((task * torch.tensor(counts)).sum()) / sum(counts), float(balance.mean())


def _shares(bank: Bank, usage: Mapping[str, Tensor], tokens: int) -> dict[str, dict[str, list[float]]]:
    """Gate usage by module, from sums [2, e] over tokens."""
    found = {}
    for module, counted in usage.items():
        weight, share = (counted / tokens).tolist()
        numbers = sorted(key.expert for key in bank.tensors if key.module == module and key.part is Part.A)
        found[module] = {"weight": weight, "share": share, "expert": numbers}
    return found
