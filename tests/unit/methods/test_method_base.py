"""``drive``, which runs client programs, and the registry, which finds methods by looking into their package."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import coterie.methods
from coterie.methods.base import Method, MethodSettings, answer, drive, method_named, methods
from coterie.types import (
    Bank,
    ClientProgram,
    ClientResult,
    CoterieError,
    Observe,
    Observed,
    Optim,
    Personal,
    Reply,
    Request,
    Score,
    Scored,
    Train,
    Trained,
)

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

    with pytest.raises(TypeError, match="Train, Score or Observe, not for str"):
        drive(greedy(), FakeCompute())  # type: ignore[arg-type]


def method_files() -> list[str]:
    """The names of the files in the methods' package that ought to be methods."""
    folder = Path(coterie.methods.__file__).parent
    files = {path.stem for path in folder.iterdir() if not path.name.startswith("_")}
    return sorted(files - {"base", "findings", "parts"})


def test_the_registry_finds_every_file_of_the_package() -> None:
    files = method_files()
    assert {"fedit", "fedlease", "local"} <= set(files)
    found = {kind.__module__.rsplit(".", 1)[1] for kind in methods().values()}
    assert found == set(files)
    assert len(methods()) == len(files)
    assert list(methods()) == sorted(methods())


def _public(protocol: type[Any]) -> dict[str, Callable[..., Any]]:
    return {n: f for n, f in vars(protocol).items() if inspect.isfunction(f) and not n.startswith("_")}


@pytest.mark.parametrize("name", method_files())
def test_a_method_has_what_the_protocol_asks_for(name: str) -> None:
    (kind,) = [kind for kind in methods().values() if kind.__module__ == f"coterie.methods.{name}"]
    assert methods()[kind.name] is kind is method_named(kind.name)
    assert all(isinstance(getattr(kind, text), str) for text in ("name", "title", "paper", "summary"))
    assert issubclass(kind.Settings, MethodSettings)
    assert dataclasses.is_dataclass(kind.State)
    assert kind.State.__dataclass_params__.frozen
    assert len(_public(Method)) >= 9
    for function, of_protocol in _public(Method).items():
        own = inspect.signature(getattr(kind, function))
        assert list(own.parameters) == list(inspect.signature(of_protocol).parameters), f"{name}.{function}"
    assert kind.__doc__


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    methods.cache_clear()
    yield
    methods.cache_clear()


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Make the package of methods look into ``folder`` too, with a file for each source."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"coterie.methods.{name}", raising=False)
    monkeypatch.setattr(coterie.methods, "__path__", [*coterie.methods.__path__, str(folder)])


@pytest.mark.usefixtures("fresh_registry")
def test_a_new_file_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(methods())
    methods.cache_clear()
    plant(tmp_path, monkeypatch, planted="class METHOD:\n    name = 'planted'\n", _helper="raise AssertionError\n")
    assert set(methods()) - before == {"planted"}
    assert isinstance(sys.modules.pop("coterie.methods.planted"), ModuleType)


@pytest.mark.usefixtures("fresh_registry")
def test_two_methods_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, twin="class METHOD:\n    name = 'fedit'\n")
    with pytest.raises(TypeError, match="two methods are named 'fedit'"):
        methods()
    del sys.modules["coterie.methods.twin"]


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(CoterieError, match=r"unknown method 'fedlaese'; the methods are .*fedit, fedlease, .*local"):
        method_named("fedlaese")
