"""Answers the requests of many clients at once, their rows in one batch, and drives their programs together.

What a client is told is what :class:`~coterie.compute.client.LocalCompute` would tell it, within floating point: the
same batches, streams, losses, clipping and steps of each client. Losses are summed over clients, so that one backward
pass gives each its own gradients. What cannot share a batch is answered one client at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from coterie.compute.client import LocalCompute, complete, evaluating, logits_of, prompts_of
from coterie.compute.score import ChoiceTally, Sight, Tally
from coterie.compute.train import Course, Optimisers
from coterie.compute.workplace import Workplace
from coterie.data.tasks import Batch, Generation
from coterie.methods.base import answer
from coterie.nn.attach_many import AttachedMany, attached_many
from coterie.nn.build import BankLayers, build_layers
from coterie.nn.many import UnlikeError
from coterie.requests import Answer, ClientProgram, Observe, Observed, Request, Score, Scored, Train, Trained
from coterie.types import ClientResult, CoterieError

FAULTS = (CoterieError, torch.OutOfMemoryError)  # of one client; anything else is a fault of ours
Asked = tuple[LocalCompute, Request]
Note = Callable[[str], None]
_TOGETHER = {"usage", "embeddings", "directions"}  # the statistics that are collected for many clients in one pass


def drive_together(
    programs: Sequence[ClientProgram], computes: Sequence[LocalCompute], note: Note
) -> list[ClientResult | Exception]:
    """Run the programs to their ends in step: what each returns, or the fault that ended it.

    ``note`` hears what a user should know. What is no client's fault is raised, after the programs' ``finally`` blocks.
    """
    found: dict[int, ClientResult | Exception] = {}
    replies: dict[int, Answer | None] = dict.fromkeys(range(len(programs)))
    with ExitStack() as stack:
        for program in programs:
            stack.enter_context(closing(program))
        while replies:
            asked: dict[int, Request] = {}
            for i, reply in replies.items():
                try:
                    asked[i] = programs[i].send(reply)
                except StopIteration as stop:
                    found[i] = stop.value
                except FAULTS as fault:
                    found[i] = fault.with_traceback(None)
            told = answer_all([(computes[i], request) for i, request in asked.items()], note)
            found |= {i: one for i, one in zip(asked, told, strict=True) if isinstance(one, Exception)}
            replies = {i: one for i, one in zip(asked, told, strict=True) if not isinstance(one, Exception)}
    return [found[i] for i in range(len(programs))]


def answer_all(asked: Sequence[Asked], note: Note) -> list[Answer | Exception]:
    """The answer to each client's request, or its fault; requests of one kind are answered together."""
    told: dict[int, Answer | Exception] = {}
    for kind in dict.fromkeys(type(request) for _, request in asked):
        places = [i for i, (_, request) in enumerate(asked) if type(request) is kind]
        told |= zip(places, _halving([asked[i] for i in places], note), strict=True)
    return [told[i] for i in range(len(asked))]


def _halving(asked: list[Asked], note: Note) -> list[Answer | Exception]:
    """The answers to requests of one kind; where memory does not suffice for all at once, in halves."""
    if len(asked) == 1:
        return [_alone(asked[0], note)]
    try:
        return _together(asked, note)
    except UnlikeError:
        return [_alone(one, note) for one in asked]
    except torch.OutOfMemoryError:
        pass  # go on below, where the traceback no longer holds the tensors
    asked = [_fewer_rows(one) for one in asked]  # each of half as many clients would get twice as many
    half = -(-len(asked) // 2)
    note(f"out of memory with {len(asked)} clients in a batch: going on with {half}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [*_halving(asked[:half], note), *_halving(asked[half:], note)]


def _alone(asked: Asked, note: Note) -> Answer | Exception:
    """One client's answer or fault. A traceback holds the tensors of the pass: none is kept while others run."""
    compute, request = asked
    try:
        return answer(request, compute)
    except FAULTS as fault:
        found = fault.with_traceback(None)
    fewer = _fewer_rows(asked)
    if not isinstance(found, torch.OutOfMemoryError) or fewer is asked:
        return found
    rows = fewer[0].place.eval_batch_size
    note(f"out of memory evaluating client {compute.client.info.id}: going on with {rows} rows at once")
    return _alone(fewer, note)


def _fewer_rows(asked: Asked) -> Asked:
    """The same with half as many rows at once where that may be, which is in evaluation, but where padding counts."""
    compute, request = asked
    rows = compute.place.eval_batch_size
    if isinstance(request, Train) or (isinstance(request, Observe) and request.padding) or rows == 1:
        return asked
    return replace(compute, place=replace(compute.place, eval_batch_size=-(-rows // 2))), request


def _together(asked: list[Asked], note: Note) -> list[Answer | Exception]:
    match asked[0][1]:
        case Train():
            return [*train_together([(c, r) for c, r in asked if isinstance(r, Train)])]
        case Score():
            return [*score_together([(c, r) for c, r in asked if isinstance(r, Score)])]
        case Observe() if all(isinstance(r, Observe) and _TOGETHER.issuperset(r.what) for _, r in asked):
            return [*observe_together([(c, r) for c, r in asked if isinstance(r, Observe)])]
        case _:  # what this file does not know
            return [_alone(one, note) for one in asked]


def train_together(asked: Sequence[tuple[LocalCompute, Train]]) -> list[Trained | CoterieError]:
    """What :meth:`LocalCompute.train` returns or raises, for each."""
    found: dict[int, Trained | CoterieError] = {}
    lanes: list[tuple[int, Course, BankLayers]] = []
    for i, (compute, request) in enumerate(asked):
        try:
            course = Course(compute.place, compute.client, compute.rnd, request)
            lanes.append((i, course, build_layers(compute.place.base.model, request.bank, request.trainable)))
        except CoterieError as fault:
            found[i] = fault
    lanes.sort(key=lambda lane: -len(lane[1].groups))  # so that those with steps left come first
    courses = [course for _, course, _ in lanes]
    place = asked[0][0].place
    with attached_many(place.base.model, [fitted for *_, fitted in lanes]) as many:
        for _, course, fitted in lanes:
            course.start(fitted.parameters, fitted.now)
        optimisers = Optimisers.of(courses, fused=True)
        while going := [c for c, (i, course, _) in enumerate(lanes) if i not in found and not course.done]:
            _backward(place, many, courses, going)
            for c in going:
                courses[c].clip()
            optimisers.step([courses[c] for c in going])
            for c in going:
                try:
                    courses[c].end()
                except CoterieError as fault:
                    found[lanes[c][0]] = fault
        trained = {i: fitted.tensors() for i, _, fitted in lanes if i not in found}
    for i, course, _ in lanes:
        compute, request = asked[i]
        try:
            found[i] = found.get(i) or compute.keep(request, course.result(trained[i]))
        except CoterieError as fault:
            found[i] = fault
    return [found[i] for i in range(len(asked))]


def _backward(place: Workplace, many: AttachedMany, courses: Sequence[Course], going: Sequence[int]) -> None:
    """The gradients of the next step of the courses that are going."""
    micro = {c: courses[c].begin() for c in going}
    for number in range(max(map(len, micro.values()))):
        active = [c for c in going if number < len(micro[c])]
        batch = Merged.of([micro[c][number] for c in active], place)
        for c, real, own in zip(active, batch.real, batch.own_tokens, strict=True):
            balance = courses[c].request.balance
            courses[c].prepare(number, own if balance and balance.padding else real)
        logits = batch.logits(place, many, active)
        losses = [courses[c].loss(mine, of) for c, mine, of in zip(active, logits, batch.parts, strict=True)]
        torch.stack(losses).sum().backward()


def score_together(asked: Sequence[tuple[LocalCompute, Score]]) -> list[list[Scored] | CoterieError]:
    """What :meth:`LocalCompute.score` returns or raises, for each: first bank by first bank, then the second ones."""
    scored: list[list[Scored]] = [[] for _ in asked]
    faults: dict[int, CoterieError] = {}
    for number in range(max(len(request.banks) for _, request in asked)):
        lanes = [i for i, (_, r) in enumerate(asked) if number < len(r.banks) and i not in faults]
        chosen = [(asked[i][0], replace(asked[i][1], banks=[asked[i][1].banks[number]])) for i in lanes]
        for i, one in zip(lanes, _scores(chosen) if chosen else [], strict=True):
            if isinstance(one, CoterieError):
                faults[i] = one
            else:
                scored[i].append(one)
    return [faults.get(i) or one for i, one in enumerate(scored)]


def _scores(asked: Sequence[tuple[LocalCompute, Score]]) -> list[Scored | CoterieError]:
    """What each of them scores, with the one bank that each asks for."""
    found: dict[int, Scored | CoterieError] = {}
    lanes: list[tuple[int, Tally | ChoiceTally, BankLayers]] = []
    for i, (compute, request) in enumerate(asked):
        try:
            lanes.append((i, compute.tally(request), build_layers(compute.place.base.model, request.banks[0])))
        except CoterieError as fault:
            found[i] = fault
    place = asked[0][0].place
    size = _share(place, len(lanes))
    with attached_many(place.base.model, [f for *_, f in lanes]) as many, evaluating(place.base.model):
        for active, batch in _in_step([tally.batches(size) for _, tally, _ in lanes], place):
            for c, mine, of in zip(active, batch.logits(place, many, active), batch.parts, strict=True):
                lanes[c][1].add(of, mine)
        texts = _texts(place, many, [asked[i] for i, *_ in lanes])
    for (i, tally, _), made in zip(lanes, texts, strict=True):
        compute, request = asked[i]
        found[i] = tally.result(None if made is None else compute.compared(request.split, made))
    return [found[i] for i in range(len(asked))]


def _texts(place: Workplace, many: AttachedMany, asked: Sequence[tuple[LocalCompute, Score]]) -> list[list[str] | None]:
    """The completions that each client's own bank generates, where they are scored."""
    task = place.task
    if not isinstance(task, Generation) or not task.generates:
        return [None] * len(asked)
    texts: list[list[str] | None] = [[] if request.split == "test" else None for _, request in asked]
    prompts = [compute.prompts(r.split) if r.split == "test" else [] for compute, r in asked]
    size = _share(place, sum(map(bool, prompts)))
    for start in range(0, max(map(len, prompts), default=0), size):
        active = [c for c, rows in enumerate(prompts) if rows[start : start + size]]
        inputs = [prompts_of(place, task, prompts[c][start : start + size]) for c in active]
        batch = Merged.of([Batch(one, one["input_ids"], 0) for one in inputs], place, left=True)
        batch.choose(many, active)
        made = complete(place, task, batch.inputs)
        for at, (c, of) in enumerate(zip(active, batch.parts, strict=True)):
            texts[c] = [*(texts[c] or []), *made[at * batch.rows : at * batch.rows + len(of.labels)]]
    return texts


def observe_together(asked: Sequence[tuple[LocalCompute, Observe]]) -> list[Observed | CoterieError]:
    """What :meth:`LocalCompute.observe` returns or raises, for each."""
    found: dict[int, Observed | CoterieError] = {}
    lanes: list[tuple[int, Sight, BankLayers]] = []
    for i, (compute, request) in enumerate(asked):
        try:
            lanes.append((i, compute.sight(request), build_layers(compute.place.base.model, request.bank)))
        except CoterieError as fault:
            found[i] = fault
    place = asked[0][0].place
    # where padding counts, what is observed depends on how rows are put into batches
    share = _share(place, len(lanes))
    sizes = [place.eval_batch_size if sight.request.padding else share for _, sight, _ in lanes]
    with attached_many(place.base.model, [f for *_, f in lanes]) as many, evaluating(place.base.model):
        for _, sight, fitted in lanes:
            sight.start(fitted.now)
            many.now.row_mask.used = many.now.row_mask.used or fitted.now.rows.used
        streams = [sight.batches(size) for (_, sight, _), size in zip(lanes, sizes, strict=True)]
        for active, batch in _in_step(streams, place):
            for c, of, real, own in zip(active, batch.parts, batch.real, batch.own_tokens, strict=True):
                lanes[c][1].prepare(of, own if lanes[c][1].request.padding else real)
            batch.logits(place, many, active)
    return [found[i] if i in found else next(s for j, s, _ in lanes if j == i).result() for i in range(len(asked))]


def _share(place: Workplace, clients: int) -> int:
    """Each client's rows of a batch in evaluation."""
    return -(-place.eval_batch_size // max(1, clients))


def _in_step(streams: Sequence[Iterator[Batch]], place: Workplace) -> Iterator[tuple[list[int], Merged]]:
    """The first batches of all streams, then the second ones, and whose they are."""
    for parts in zip_longest(*streams):
        active = [c for c, part in enumerate(parts) if part is not None]
        yield active, Merged.of([part for part in parts if part is not None], place)


@dataclass(frozen=True)
class Merged:
    """Batches of several clients as one: [c*b, t], padded to the longest, with copies of rows where one has fewer.

    ``parts`` are the clients' own batches; ``real`` [c, b, t] marks their tokens, ``own_tokens`` their padding too.
    """

    inputs: dict[str, Tensor]
    parts: list[Batch]
    rows: int
    tokens: int
    real: Tensor
    own_tokens: Tensor

    @staticmethod
    def of(batches: Sequence[Batch], place: Workplace, left: bool = False) -> Merged:
        """``left``: with padding on the left, for generation."""
        sizes = [tuple(batch.mask.shape) for batch in batches]
        rows, tokens = (max(size[axis] for size in sizes) for axis in (0, 1))
        pads = {"input_ids": place.task.tokenizer.pad_token_id}

        def filled(values: Tensor, name: str) -> Tensor:
            b, t = values.shape
            space = (tokens - t, 0) if left else (0, tokens - t)
            wide = functional.pad(values, space, value=pads.get(name, 0))
            return wide if b == rows else torch.cat([wide, wide[-1:].expand(rows - b, -1)])

        inputs = {
            name: torch.cat([filled(batch.inputs[name], name) for batch in batches]).to(place.device, non_blocking=True)
            for name in batches[0].inputs
        }
        own = torch.zeros(len(batches), rows, tokens, dtype=torch.long)
        for at, (b, t) in enumerate(sizes):
            own[at, :b, :t] = 1
        own = own.to(place.device, non_blocking=True)
        real = inputs["attention_mask"].view_as(own) * own
        return Merged(inputs, [batch.to(place.device) for batch in batches], rows, tokens, real, own)

    @property
    def prompt(self) -> Tensor:
        """[c*b, t]: as :attr:`Batch.prompt`, and 0 for what fills up."""
        given = torch.zeros_like(self.own_tokens)
        for at, part in enumerate(self.parts):
            given[at, : part.mask.shape[0], : part.mask.shape[1]] = part.prompt
        return given.flatten(0, 1)

    def choose(self, many: AttachedMany, active: Sequence[int]) -> None:
        """The next pass is of these clients' rows."""
        own = [(part.mask.shape[0], part.mask.shape[1]) for part in self.parts]
        many.now.choose(active, self.rows, self.tokens, own, self.real.device)
        many.now.row_mask.prompt = None

    def logits(self, place: Workplace, many: AttachedMany, active: Sequence[int]) -> list[Tensor]:
        """Every active client's own logits for its own rows and tokens."""
        self.choose(many, active)
        if many.now.row_mask.used:
            many.now.row_mask.prompt = self.prompt
        return many.now.split(logits_of(place, self.inputs))
