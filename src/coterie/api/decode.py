"""Writes texts of different clients together: rows join and leave between the steps of decoding.

A step is one pass over the last token of every row that is being written. New rows first have a pass over their
prompts (prefill); their keys and values then join the cache of the others. Every row sees its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from coterie.api.cache import RowCache
from coterie.api.experts import Gates, token_experts, watched
from coterie.api.faults import FAULTS, broken, not_a_number, where
from coterie.api.growing import GrowingText
from coterie.api.jobs import Generate, Job, Piece, RequestError, Written
from coterie.api.prompts import prompt_ids
from coterie.api.served import Served
from coterie.api.trial import check_decoding
from coterie.ops.sampling import generator_of, next_token, penalised

_PREFILL = 4096  # tokens of a pass over several prompts, with their padding
_SHOWN = 2048  # tokens of a text whose experts are shown


@dataclass(eq=False)
class _Row:
    """A text that is being written: its prompt, the tokens so far, and what is known of its end."""

    job: Job
    request: Generate
    prompt: list[int]
    most: int
    random: torch.Generator
    text: GrowingText
    made: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    gates: Gates = field(default_factory=Gates)


@dataclass
class Decoding:
    """The engine of a base that generates. At most ``rows`` texts are written at once, each of at most ``longest``
    tokens; the prompt may have ``prompt_tokens``. ``report`` is that of the worker."""

    served: Served
    rows: int
    longest: int = 1024
    prompt_tokens: int = 4096
    report: Callable[[str], None] = lambda _: None
    _new: list[_Row] = field(default_factory=list)
    _running: list[_Row] = field(default_factory=list)
    _cache: RowCache | None = None
    _wrote: bool = False  # in the last step
    _ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        check_decoding(self.served)
        of_model: int | list[int] | None = self.served.base.model.generation_config.eos_token_id
        own = of_model if isinstance(of_model, list) else [of_model]  # training puts the tokenizer's after a completion
        self._ends = frozenset(end for end in (*own, self.served.base.tokenizer.eos_token_id) if end is not None)

    @property
    def room(self) -> int:
        """How many more texts it takes."""
        return self.rows - self.busy

    @property
    def busy(self) -> int:
        """The number of texts that are being written."""
        return len(self._new) + len(self._running)

    def admit(self, job: Job) -> None:
        """Tokenise the prompt of ``job``. Raises :class:`RequestError` for one that is too long."""
        request = job.request
        if not isinstance(request, Generate):
            raise RequestError(
                "this model writes text; use /v1/chat/completions or /v1/completions", 400, "wrong_route"
            )
        ids = prompt_ids(self.served.base.tokenizer, request.prompt)
        most, text = self._most(request, len(ids)), GrowingText(request.stop)
        if request.experts and len(ids) + most > _SHOWN:
            raise RequestError(f"experts are shown of at most {_SHOWN} tokens", 400, "too_many", "experts")
        self._new.append(_Row(job, request, ids, most, generator_of(request.seed), text))

    def drop(self, over: set[Job]) -> None:
        """Forget jobs that are over."""
        self._new = [row for row in self._new if row.job not in over]
        self._keep([row for row in self._running if row.job not in over])

    def step(self) -> list[Job]:
        """Read the next prompts, or write one token more of every text: in turns. Returns the jobs that ended."""
        if self._new and (self._wrote or not self._running):
            self._join()
        else:
            self._decode()
        ended = [row for row in self._running if row.finish]
        self._keep([row for row in self._running if not row.finish])
        for row in ended:
            self._end(row)
        return [row.job for row in ended]

    def fail(self, fault: RequestError) -> list[Job]:
        """End every job with ``fault``. Returns them."""
        jobs = [row.job for row in (*self._new, *self._running)]
        for job in jobs:
            job.end(fault)
        self._new, self._running, self._cache = [], [], None
        return jobs

    def _most(self, request: Generate, prompt: int) -> int:
        """How many tokens the text may have."""
        if prompt > self.prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt} tokens; this service takes {self.prompt_tokens}", 400, "prompt_too_long"
            )
        limit = self.served.base.longest
        room = self.longest if limit is None else limit - prompt
        if room < 1 or (request.max_tokens or 0) > room:
            raise RequestError(
                f"the prompt has {prompt} tokens and max_tokens is {request.max_tokens}; together the model takes "
                f"{limit}",
                400,
                "context_length_exceeded",
                "max_tokens" if room >= 1 else None,
            )
        return request.max_tokens or min(room, self.longest)

    def _join(self) -> None:
        """A pass over the prompts of the first new rows, which then run with the others."""
        number = self._fitting()
        new = sorted(self._new[:number], key=lambda row: row.request.client)
        self._wrote = False
        width, device = max(len(row.prompt) for row in new), self.served.base.device
        pad = self.served.base.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in new], device=device)
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in new], device=device)
        cache = RowCache.empty(mask)
        self._pass(new, cache, ids)
        every = [*self._running, *new]
        order = sorted(range(len(every)), key=lambda i: every[i].request.client)
        self._cache = cache if self._cache is None else self._cache.joined(cache, order)
        self._running, self._new = [every[i] for i in order], self._new[number:]  # only now: `fail` ends rows of both

    def _fitting(self) -> int:
        """How many of the new rows share the next pass: at least one, and no more than padding makes worth while."""
        width = 0
        for number, row in enumerate(self._new):
            width = max(width, len(row.prompt))
            if number and (number + 1) * width > _PREFILL:
                return number
        return len(self._new)

    def _decode(self) -> None:
        """A pass over the last token of every row."""
        self._wrote = True
        if self._cache is None:
            return
        self._cache.extend()
        ids = torch.tensor([row.made[-1:] for row in self._running], device=self.served.base.device)
        self._pass(self._running, self._cache, ids)

    def _pass(self, rows: Sequence[_Row], cache: RowCache, ids: Tensor) -> None:
        with watched(self.served, any(row.request.experts for row in rows)) as passed:
            logits = cache.run(self.served, [row.request.client for row in rows], ids)
        for i, row in enumerate(rows):
            try:
                if row.request.experts:
                    row.gates.add(passed, i, slice(-len(row.prompt) if not row.made else -1, None))
                self._continue(row, logits[i])
            except FAULTS as fault:  # of this row's own: the others go on
                self._break(row, fault)

    def _continue(self, row: _Row, logits: Tensor) -> None:
        """Choose the next token of ``row``, send what is final of its text, and see whether it ends."""
        model, tokenizer = self.served.base.model, self.served.base.tokenizer
        penalty = model.generation_config.repetition_penalty or 1.0
        if bool(logits.isnan().any()):  # a damaged bank: no reason to end the others
            row.finish = "stop"
            row.job.end(not_a_number())
            return
        logits = penalised(logits, [*row.prompt, *row.made], penalty)
        token = next_token(logits, row.request.temperature, row.request.top_p, row.random)
        row.made.append(token)
        if token in self._ends:
            row.finish = "stop"
        elif len(row.made) >= row.most:
            row.finish = "length"
        if row.request.stream or row.request.stop or row.finish:
            whole = tokenizer.decode(row.made, skip_special_tokens=True)
            piece = row.text.grow(whole, last=row.finish is not None)
            row.finish = "stop" if row.text.stopped else row.finish
            if piece and row.request.stream:
                row.job.deliver(Piece(piece))

    def _end(self, row: _Row) -> None:
        """Deliver the text of ``row``, unless it ended with a fault."""
        if row.job.ended:
            return
        try:
            row.job.end(self._written(row))
        except FAULTS as fault:
            self._break(row, fault)

    def _break(self, row: _Row, fault: BaseException) -> None:
        self.report(f"a text could not be continued: {where(fault)}")
        row.finish = "stop"
        row.job.end(broken())

    def _written(self, row: _Row) -> Written:
        assert row.finish is not None
        experts = None
        if row.request.experts:  # the last token was made, but never read
            ids = [*row.prompt, *row.made[:-1]]
            experts = token_experts(self.served, row.request.client, row.gates, ids)
        return Written(row.text.sent, row.finish, len(row.prompt), len(row.made), experts)

    def _keep(self, rows: list[_Row]) -> None:
        """Go on with these of the rows that run."""
        if len(rows) == len(self._running):
            return
        kept = [i for i, row in enumerate(self._running) if row in rows]
        self._cache = self._cache.kept(kept) if self._cache is not None and kept else None
        self._running = rows
