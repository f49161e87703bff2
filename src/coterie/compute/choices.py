"""Candidates that share their prompt: it passes the base once, and every candidate then continues from its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from coterie.compute.passes import Passes
from coterie.compute.statistics import Collector
from coterie.compute.workplace import StoppedError
from coterie.data.examples import Example, answers_of, completion_losses, prompts_of
from coterie.nn.prompt_cache import PromptCache


class Choosing(Protocol):
    """A client's rows whose candidates are scored."""

    collector: Collector | None

    @property
    def examples(self) -> Sequence[Example]: ...

    def add_losses(self, rows: Sequence[int], number: int, losses: Tensor) -> None:
        """Add the losses [b] of candidate ``number`` of ``rows``; of a row without that candidate, any number."""


def share_prompts(passes: Passes, cache: PromptCache, clients: Sequence[Choosing]) -> None:
    """Score all candidates of every client; the clients share their passes, as many rows as in any evaluation."""
    size = passes.workplace.rows_of_each(len(clients))
    orders = [_by_length(client.examples) for client in clients]
    for start in range(0, max(map(len, orders), default=0), size):
        rows = {i: order[start : start + size] for i, order in enumerate(orders) if order[start : start + size]}
        _score(passes, cache, {i: clients[i] for i in rows}, rows)


def _score(passes: Passes, cache: PromptCache, clients: dict[int, Choosing], rows: Mapping[int, Sequence[int]]) -> None:
    """Score the candidates of some ``rows`` of each client, by the client's number."""
    workplace, active = passes.workplace, list(clients)
    examples = {i: [client.examples[row] for row in rows[i]] for i, client in clients.items()}
    pad = workplace.task.tokenizer.pad_token_id
    model = workplace.base.model

    joined = passes.join(active, [prompts_of(examples[i], pad) for i in active], left=True)
    passes.choose(joined)
    for at, client in enumerate(clients.values()):
        _collect(client, joined.mask(at, padding=False))
    if workplace.stop.is_set():
        raise StoppedError
    with workplace.autocast():
        prompts = cache.read(model, joined.inputs)
    for number in range(max(len(e.choices) for of in examples.values() for e in of)):
        answers = passes.join(active, [answers_of(examples[i], number, pad) for i in active])
        passes.choose(answers)
        for at, (i, client) in enumerate(clients.items()):
            _collect(client, answers.mask(at, padding=False), [e.label == number for e in examples[i]])
        with workplace.autocast():
            logits = torch.cat([prompts.logits.unsqueeze(1), cache.follow(model, prompts, answers.inputs)], dim=1)
        for at, (i, client) in enumerate(clients.items()):
            part = answers.parts[at]
            first = at * answers.rows
            own = logits[first : first + part.labels.shape[0], : part.labels.shape[1]]
            client.add_losses(rows[i], number, completion_losses(own, part))


def _collect(client: Choosing, mask: Tensor | None, right: Sequence[bool] | None = None) -> None:
    """Prepare for a pass whose tokens ``mask`` [rows, tokens] marks; of answers, those of the ``right`` ones count."""
    if client.collector is None:
        return
    assert mask is not None
    if right is not None:
        counts = torch.tensor(right, device=mask.device).unsqueeze(1)
        mask = torch.cat([mask[: len(right)] * counts, torch.zeros_like(mask[len(right) :])])
    client.collector.begin_pass(mask, mask.sum())


def _by_length(examples: Sequence[Example]) -> list[int]:
    """The numbers of the rows, by the length of their prompts."""
    return sorted(range(len(examples)), key=lambda i: examples[i].prompt)
