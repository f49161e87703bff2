"""Completions of prompts with the banks on the base, for one client alone or for many in a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coterie.compute.passes import Passes
from coterie.compute.workplace import Workplace
from coterie.data.examples import Batch
from coterie.data.rows import GenerationRow
from coterie.data.tasks import Generation
from coterie.inference.generate import new_tokens, texts_of
from coterie.ops.streams import stream
from coterie.types import ClientId


def completions(
    passes: Passes, prompts: Sequence[Sequence[GenerationRow]], clients: Sequence[ClientId]
) -> list[list[str]]:
    """The completion of every prompt of every client by the client's own bank; none for a client without prompts.

    Where texts are drawn, a row's stream comes from the run's seed, its client and its number: the same in every round.
    """
    workplace = passes.workplace
    task = workplace.task
    assert isinstance(task, Generation)
    texts: list[list[str]] = [[] for _ in prompts]
    size = -(-workplace.eval_batch_size // max(1, sum(map(bool, prompts))))
    for start in range(0, max(map(len, prompts), default=0), size):
        active = [i for i, rows in enumerate(prompts) if rows[start : start + size]]
        inputs = [_collated(workplace, task, prompts[i][start : start + size]) for i in active]
        joined = passes.join(active, [Batch(prompt, prompt["input_ids"], 0) for prompt in inputs], left=True)
        passes.choose(joined)
        rows = range(start, start + joined.rows)  # past a client's last row, copies of it fill the pass
        streams = [stream(workplace.seed, clients[i], "text", row) for i in active for row in rows]
        made = _complete(workplace, task, joined.inputs, streams if task.sampling.temperature > 0 else ())
        for at, (i, of) in enumerate(zip(active, joined.parts, strict=True)):
            texts[i] += made[at * joined.rows : at * joined.rows + len(of.labels)]
    return texts


def _collated(workplace: Workplace, task: Generation, rows: Sequence[GenerationRow]) -> Mapping[str, Tensor]:
    """The rows' prompts, padded on the left [b, t]."""
    with workplace.tokenising:
        return task.collate_prompts(rows)


def _complete(
    workplace: Workplace, task: Generation, inputs: Mapping[str, Tensor], streams: Sequence[torch.Generator]
) -> list[str]:
    """Completions of prompts that are padded on the left [b, t]; with ``streams``, drawn."""
    with workplace.autocast():
        tokens = new_tokens(workplace.base.model, task, inputs, streams)
    with workplace.tokenising:
        return texts_of(task, tokens)
