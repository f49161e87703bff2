"""Classifies and embeds texts of different clients in shared passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from coterie.api.experts import Gates, token_experts, watched
from coterie.api.faults import FAULTS, broken, not_a_number, where
from coterie.api.jobs import Encode, Encoded, Job, RequestError
from coterie.api.served import Served
from coterie.data.examples import Example
from coterie.data.rows import TextRow
from coterie.data.tasks import Classification


@dataclass(eq=False)
class _Row:
    """One text of a job: its number there, and its tokens."""

    job: Job
    request: Encode
    number: int
    example: Example


@dataclass
class Encoding:
    """The engine of a base that classifies. At most ``rows`` texts share a pass. ``report`` is that of the worker."""

    served: Served
    rows: int
    report: Callable[[str], None] = lambda _: None
    _waiting: list[_Row] = field(default_factory=list)
    _made: dict[Job, dict[int, Encoded]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many more rows the next pass takes."""
        return self.rows - len(self._waiting)

    @property
    def busy(self) -> int:
        """The number of rows that wait for a pass."""
        return len(self._waiting)

    def admit(self, job: Job) -> None:
        """Tokenise the texts of ``job``. Raises :class:`RequestError` for what this base does not compute."""
        request = job.request
        if not isinstance(request, Encode):
            raise RequestError(
                "this model classifies texts and does not write any; use /v1/classify", 400, "wrong_route"
            )
        if request.want == "embedding" and not self.served.encoder:
            raise RequestError("the base of this model is no encoder, so it has no embeddings", 400, "wrong_route")
        task = Classification(self.served.base.tokenizer, self.served.longest_of(request.client))
        rows = [
            _Row(job, request, number, task.encode(TextRow(text, 0, pair)))
            for number, (text, pair) in enumerate(request.texts)
        ]
        self._made[job] = {}
        self._waiting += rows

    def drop(self, over: set[Job]) -> None:
        """Forget jobs that are over."""
        if over:
            self._waiting = [row for row in self._waiting if row.job not in over]
            self._made = {job: made for job, made in self._made.items() if job not in over}

    def step(self) -> list[Job]:
        """One pass over the first rows. Returns the jobs that ended."""
        chosen, self._waiting = self._waiting[: self.rows], self._waiting[self.rows :]
        chosen.sort(key=lambda row: row.request.client)
        ended = []
        for row, encoded in zip(chosen, self._answers(chosen), strict=True):
            made = self._made.get(row.job)
            if made is None:  # another text of the request failed
                continue
            if isinstance(encoded, RequestError):
                row.job.end(encoded)
            else:
                made[row.number] = encoded
                if len(made) < len(row.request.texts):
                    continue
                row.job.end(tuple(made[number] for number in range(len(made))))
            ended.append(row.job)
        self.drop(set(ended))
        return ended

    def fail(self, fault: RequestError) -> list[Job]:
        """End every job with ``fault``. Returns them."""
        jobs = list(self._made)
        for job in jobs:
            job.end(fault)
        self._waiting, self._made = [], {}
        return jobs

    def _answers(self, rows: Sequence[_Row]) -> list[Encoded | RequestError]:
        """What the model makes of ``rows``: one by one if their pass fails, so that the fault is of one text alone."""
        try:
            return [*self._pass(rows)]
        except FAULTS as fault:
            if len(rows) == 1:
                self.report(f"a text could not be encoded: {where(fault)}")
                return [broken()]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [answer for row in rows for answer in self._answers([row])]

    def _pass(self, rows: Sequence[_Row]) -> list[Encoded | RequestError]:
        """What the model makes of ``rows``, sorted by client."""
        served = self.served
        batch = Classification(served.base.tokenizer).collate([row.example for row in rows]).to(served.base.device)
        embeds = any(row.request.want == "embedding" for row in rows)
        shows = any(row.request.experts for row in rows)
        served.prepare([row.request.client for row in rows], batch.mask.shape[1])
        with torch.no_grad(), watched(served, shows) as passed:
            out = served.base.model(**batch.inputs, use_cache=False, output_hidden_states=embeds)
        logits = served.by_row(out.logits)
        vectors = _means(out.hidden_states[-1], batch.mask) if embeds else None
        return [self._encoded(row, i, logits[i], vectors, passed) for i, row in enumerate(rows)]

    def _encoded(
        self, row: _Row, i: int, logits: Tensor, vectors: Tensor | None, passed: dict[str, Tensor]
    ) -> Encoded | RequestError:
        embedding = row.request.want == "embedding" and vectors is not None
        values = vectors[i] if embedding and vectors is not None else logits.float().softmax(-1)
        if not bool(values.isfinite().all()):  # a damaged bank
            return not_a_number()
        experts, ids = None, row.example.ids
        if row.request.experts:
            gates = Gates()
            gates.add(passed, i, slice(len(ids)))
            experts = token_experts(self.served, row.request.client, gates, ids)
        return Encoded(tuple(values.tolist()), len(ids), row.example.cut > 0, experts)


def _means(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over each row's tokens, of length 1. Shapes: hidden [b, t, i], mask [b, t], result [b, i]."""
    weight = mask.unsqueeze(-1).float()
    return functional.normalize((hidden.float() * weight).sum(1) / weight.sum(1), dim=-1)
