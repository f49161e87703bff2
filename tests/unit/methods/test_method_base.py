"""``drive``, which runs client programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from coterie.methods.base import answer, drive
from coterie.requests import ClientProgram, Observe, Observed, Optim, Request, Score, Scored, Train, Trained
from coterie.types import Bank, ClientResult, CoterieError, Personal, Reply

BANK = Bank({})
TRAIN, SCORE, OBSERVE = Train(BANK, frozenset(), Optim()), Score([BANK, BANK], "validation"), Observe(BANK)
TRAINED = Trained({}, loss=0.5, examples=10, tokens=90, steps=3)
SCORED = [Scored(2.0, {}, 4), Scored(1.0, {}, 4)]
OBSERVED = Observed({}, tokens=7)


class FakeCompute:
    """Answers with constants and keeps the requests; raises ``fault`` at a request of its kind."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.asked: list[Request] = []
        self.fault = fault

    def train(self, request: Train) -> Trained:
        self.asked.append(request)
        if self.fault is not None:
            raise self.fault
        return TRAINED

    def score(self, request: Score) -> list[Scored]:
        self.asked.append(request)
        return SCORED

    def observe(self, request: Observe) -> Observed:
        self.asked.append(request)
        return OBSERVED


def every_kind() -> ClientProgram:
    scored = yield SCORE
    best = min(range(len(scored)), key=lambda i: scored[i].loss)
    trained = yield TRAIN
    observed = yield OBSERVE
    info = {"best": best, "loss": trained.loss, "tokens": observed.tokens}
    return ClientResult(Reply({}, trained.examples, info), Personal({}, {"seen": True}))


def test_drive_answers_each_kind_of_request_in_turn() -> None:
    compute = FakeCompute()
    result = drive(every_kind(), compute)
    assert result.reply == Reply({}, 10, {"best": 1, "loss": 0.5, "tokens": 7})
    assert result.personal.info == {"seen": True}
    assert compute.asked == [SCORE, TRAIN, OBSERVE]
    assert all(one is other for one, other in zip(compute.asked, [SCORE, TRAIN, OBSERVE], strict=True))


@pytest.mark.parametrize(("request_", "expected"), [(TRAIN, TRAINED), (SCORE, SCORED), (OBSERVE, OBSERVED)], ids=type)
def test_answer_takes_the_function_of_the_request(request_: Request, expected: object) -> None:
    assert answer(request_, FakeCompute()) is expected


def test_a_program_may_ask_for_nothing() -> None:
    def silent() -> ClientProgram:
        return ClientResult(Reply(), Personal())
        yield  # makes it a generator

    compute = FakeCompute()
    assert drive(silent(), compute) == ClientResult(Reply(), Personal())
    assert compute.asked == []


def test_a_fault_of_the_compute_passes_through_after_the_programs_own_cleaning_up() -> None:
    cleaned = []

    def tidy() -> ClientProgram:
        try:
            yield TRAIN
        finally:
            cleaned.append(True)
        raise AssertionError("not reached")

    program = tidy()
    with pytest.raises(CoterieError, match="non-finite loss at step 3"):
        drive(program, FakeCompute(CoterieError("client a: non-finite loss at step 3")))
    assert cleaned == [True]
    assert inspect.getgeneratorstate(program) == inspect.GEN_CLOSED


def test_a_fault_of_the_program_passes_through() -> None:
    def faulty() -> ClientProgram:
        trained = yield TRAIN
        raise KeyError(trained.steps)

    with pytest.raises(KeyError, match="3"):
        drive(faulty(), FakeCompute())


def test_a_stop_iteration_in_the_compute_is_no_end_of_the_program() -> None:
    with pytest.raises(StopIteration):
        drive(every_kind(), FakeCompute(StopIteration("the data ran out")))


def test_an_interrupt_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        drive(every_kind(), FakeCompute(KeyboardInterrupt()))


def test_what_is_no_request_is_refused() -> None:
    def greedy() -> Iterator[str]:
        yield "the rows"

    with pytest.raises(TypeError, match="Train, Score or Observe, not str"):
        drive(greedy(), FakeCompute())  # type: ignore[arg-type]
