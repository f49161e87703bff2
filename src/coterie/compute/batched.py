"""Runs the programs of many clients in step and answers their requests together, their rows in shared passes.

Each client gets what :class:`~coterie.compute.client.LocalCompute` would give it, within floating point. Requests that
cannot share a pass are answered one client at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, TypeVar

import torch

from coterie.compute.client import LocalCompute
from coterie.compute.observe import Observation, observe
from coterie.compute.preferences import scoring_of
from coterie.compute.score import Scoring, score
from coterie.compute.statistics import COLLECTED
from coterie.compute.train import train
from coterie.methods.base import answer
from coterie.nn.many import UnlikeError
from coterie.requests import Answer, ClientProgram, Observe, Observed, Request, Score, Scored, Train, Trained
from coterie.types import ClientResult, CoterieError

W = TypeVar("W")
R = TypeVar("R")
FAULTS = (CoterieError, torch.OutOfMemoryError)  # faults of a single client; anything else is a bug in Coterie
ClientRequest = tuple[LocalCompute, Request]
Note = Callable[[str], None]


def drive_together(
    programs: Sequence[ClientProgram], computes: Sequence[LocalCompute], note: Note
) -> list[ClientResult | Exception]:
    """Run the programs to their ends in step. Returns what each returns, or the fault that ended it.

    ``note`` is called with what the user should know. Any other fault is raised, after the programs'
    ``finally`` blocks.
    """
    results: dict[int, ClientResult | Exception] = {}
    answers: dict[int, Answer | None] = dict.fromkeys(range(len(programs)))
    with ExitStack() as stack:
        for program in programs:
            stack.enter_context(closing(program))
        while answers:
            requests: dict[int, Request] = {}
            for i, previous in answers.items():
                try:
                    requests[i] = programs[i].send(previous)
                except StopIteration as stop:
                    results[i] = stop.value
                except FAULTS as fault:
                    results[i] = fault.with_traceback(None)
            made = answer_all([(computes[i], request) for i, request in requests.items()], note)
            results |= {i: fault for i, fault in zip(requests, made, strict=True) if isinstance(fault, Exception)}
            answers = {i: of for i, of in zip(requests, made, strict=True) if not isinstance(of, Exception)}
    return [results[i] for i in range(len(programs))]


def answer_all(requests: Sequence[ClientRequest], note: Note) -> list[Answer | Exception]:
    """The answer to each client's request, or its fault; requests of one kind are answered together."""
    answers: dict[int, Answer | Exception] = {}
    for kind in dict.fromkeys(type(request) for _, request in requests):
        numbers = [i for i, (_, request) in enumerate(requests) if type(request) is kind]
        answers |= zip(numbers, _halving([requests[i] for i in numbers], note), strict=True)
    return [answers[i] for i in range(len(requests))]


def _halving(requests: list[ClientRequest], note: Note) -> list[Answer | Exception]:
    """The answers to requests of one kind; in halves where there is not enough memory for all at once."""
    if len(requests) == 1:
        return [_alone(requests[0], note)]
    try:
        return _together(requests, note)
    except UnlikeError:
        return [_alone(each, note) for each in requests]
    except torch.OutOfMemoryError:
        pass  # continue below, where the traceback no longer keeps the tensors
    requests = [_fewer_rows(each) for each in requests]  # else half as many clients would each get twice as many rows
    half = -(-len(requests) // 2)
    note(f"out of memory with {len(requests)} clients in a batch; continuing with {half}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [*_halving(requests[:half], note), *_halving(requests[half:], note)]


def _alone(client_request: ClientRequest, note: Note) -> Answer | Exception:
    """One client's answer or fault. A traceback keeps the tensors of the pass, so none is kept while others run."""
    compute, request = client_request
    try:
        return answer(request, compute)
    except FAULTS as raised:
        fault = raised.with_traceback(None)
    fewer = _fewer_rows(client_request)
    if not isinstance(fault, torch.OutOfMemoryError) or fewer is client_request:
        return fault
    rows = fewer[0].workplace.eval_batch_size
    note(f"out of memory evaluating client {compute.client.info.id}; continuing with {rows} rows at once")
    return _alone(fewer, note)


def _fewer_rows(client_request: ClientRequest) -> ClientRequest:
    """The same with half as many rows at once where possible: in evaluation, unless padding counts.

    A client whose rows are hidden measures one row at a time, and once: it stays as it is.
    """
    compute, request = client_request
    rows = compute.workplace.eval_batch_size
    counts_padding = isinstance(request, Observe) and request.padding
    if isinstance(request, Train) or counts_padding or compute.private is not None or rows == 1:
        return client_request
    return replace(compute, workplace=replace(compute.workplace, eval_batch_size=-(-rows // 2))), request


def _together(requests: list[ClientRequest], note: Note) -> list[Answer | Exception]:
    """The answers to requests of one kind, in shared passes."""
    private = {compute.private is not None for compute, _ in requests}
    if len(private) > 1 or (private == {True} and not isinstance(requests[0][1], Train)):
        return [_alone(each, note) for each in requests]
    match requests[0][1]:
        case Train():
            return [*train_together([(c, r) for c, r in requests if isinstance(r, Train)])]
        case Score():
            return [*score_together([(c, r) for c, r in requests if isinstance(r, Score)])]
        case Observe() if all(isinstance(r, Observe) and set(COLLECTED).issuperset(r.what) for _, r in requests):
            return [*observe_together([(c, r) for c, r in requests if isinstance(r, Observe)])]
        case _:
            return [_alone(each, note) for each in requests]


def train_together(requests: Sequence[tuple[LocalCompute, Train]]) -> list[Trained | CoterieError]:
    """What :meth:`LocalCompute.train` returns or raises, for each."""
    trainings, results = _made(lambda compute, request: compute.training(request), requests)
    for i, trained in zip(trainings, train([*trainings.values()]), strict=True):
        compute, request = requests[i]
        results[i] = trained if isinstance(trained, CoterieError) else compute.keep(request, trained)
    return [results[i] for i in range(len(requests))]


def score_together(requests: Sequence[tuple[LocalCompute, Score]]) -> list[list[Scored] | CoterieError]:
    """What :meth:`LocalCompute.score` returns or raises, for each: all first banks together, then all second ones."""
    scores: list[list[Scored]] = [[] for _ in requests]
    faults: dict[int, CoterieError] = {}
    for number in range(max(len(request.banks) for _, request in requests)):
        having = [i for i, (_, request) in enumerate(requests) if number < len(request.banks) and i not in faults]
        chosen = [(requests[i][0], replace(requests[i][1], banks=[requests[i][1].banks[number]])) for i in having]
        scorings, failed = _made(_scoring, chosen)
        faults |= {having[i]: fault for i, fault in failed.items()}
        for i, scored in zip(scorings, score([*scorings.values()]), strict=True):
            scores[having[i]].append(scored)
    return [faults.get(i) or each for i, each in enumerate(scores)]


def _scoring(compute: LocalCompute, request: Score) -> Scoring:
    (bank,) = request.banks
    return scoring_of(compute.workplace, compute.client, compute.rnd, request, bank)


def observe_together(requests: Sequence[tuple[LocalCompute, Observe]]) -> list[Observed | CoterieError]:
    """What :meth:`LocalCompute.observe` returns or raises, for each."""
    observations, results = _made(lambda c, r: Observation(c.workplace, c.client, c.rnd, r), requests)
    results |= zip(observations, observe([*observations.values()]), strict=True)
    return [results[i] for i in range(len(requests))]


def _made(
    make: Callable[[LocalCompute, R], W], requests: Sequence[tuple[LocalCompute, R]]
) -> tuple[dict[int, W], dict[int, Any]]:
    """The result of ``make`` for each client's request, by its number; and the faults of those where it fails."""
    made: dict[int, W] = {}
    faults: dict[int, CoterieError] = {}
    for i, (compute, request) in enumerate(requests):
        try:
            made[i] = make(compute, request)
        except CoterieError as fault:
            faults[i] = fault.with_traceback(None)
    return made, faults
