"""The Method protocol, the registry that finds methods, and ``drive``, which runs a client program.

A method is a server half of pure functions over a serialisable state, and a client half written as a generator
that asks for compute (:class:`~coterie.types.Train`, :class:`~coterie.types.Score`,
:class:`~coterie.types.Observe`) and is handed the answer. The engines differ in how they answer, never in what
they are asked.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from coterie.methods.findings import Finding
from coterie.types import (
    Answer,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    ClientResult,
    CoterieError,
    Instruction,
    Key,
    Observe,
    Observed,
    Optim,
    Personal,
    Reply,
    Request,
    Score,
    Scored,
    Section,
    Tensors,
    Train,
    Trained,
)

S = TypeVar("S")
_SHARED = {"base", "findings", "parts"}  # modules of the package that are no methods


class MethodSettings(Section):
    """A method's own settings: the keys of ``[method]`` beside ``name``. Unknown keys are errors."""

    def located(self, root: Path) -> Self:
        """These settings with every relative path in them starting at ``root``, the config's folder."""
        return self


@dataclass(frozen=True)
class Plan:
    """What every method is given besides its own settings. ``scaling`` is alpha / rank."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    optim: Optim = field(default_factory=Optim)
    head: Literal["personal", "shared"] = "personal"
    rounds: int = 10
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class Method(Protocol[S]):
    """One federated method. ``S`` is its server state: a frozen dataclass that :mod:`coterie.codec` can encode.

    ``evaluates``: whether a client is meant to use what the server sends after averaging ("received"), or what it
    trained last itself ("trained"); ``[run] evaluate`` overrules it. ``newcomers``: why no client can come once the
    run has begun, "" where any can.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    evaluates: ClassVar[Literal["received", "trained"]]
    newcomers: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    State: ClassVar[type[Any]]

    def __init__(self, settings: Any, plan: Plan) -> None: ...

    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> S:
        """The state before the first round. Raises :class:`CoterieError` for settings that cannot work."""

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        """The client's personal state before its first round. Made on the client, from the plan's seed alone."""

    def configure(self, state: S, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        """What the server sends to each of ``clients`` for round ``rnd`` (the first is 1)."""

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        """The client's half of a round: yields requests, returns a :class:`ClientResult`."""

    def expects(self, state: S, me: ClientInfo, rnd: int) -> Mapping[Key, tuple[int, ...]]:
        """The shape of every tensor that a valid reply of ``me`` in round ``rnd`` holds: these keys and no others.

        All of them are float32 (:data:`coterie.engines.checks.DTYPE`).
        """

    def aggregate(self, state: S, replies: Mapping[ClientId, Reply], rnd: int) -> S:
        """The state after round ``rnd``, from the replies that came and passed the checks."""

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """What this client evaluates with, and exports, where it uses what it receives."""

    def experts(self, state: S) -> Mapping[str, Tensors]:
        """The server's experts by name, each with expert number 0, for export as PEFT adapters."""

    def describe(self, state: S) -> Sequence[Finding]:
        """What the method found, for the run's report: clusters, an assignment, notes (:mod:`.findings`)."""


class Compute(Protocol):
    """Answers a client's requests on that client's data."""

    def train(self, request: Train) -> Trained: ...

    def score(self, request: Score) -> list[Scored]: ...

    def observe(self, request: Observe) -> Observed: ...


def answer(request: Request, compute: Compute) -> Answer:
    """The answer of ``compute`` to one request. Raises :class:`TypeError` for anything else than a request."""
    match request:
        case Train():
            return compute.train(request)
        case Score():
            return compute.score(request)
        case Observe():
            return compute.observe(request)
        case _:
            raise TypeError(f"a client program asks for Train, Score or Observe, not for {type(request).__name__}")


def drive(program: ClientProgram, compute: Compute) -> ClientResult:
    """Run a client program to its end: send it the answer to each request, return what it returns.

    What the program or ``compute`` raises passes through, after the program's own ``finally`` blocks.
    """
    with closing(program):
        reply: Answer | None = None
        while True:
            try:
                request = program.send(reply)
            except StopIteration as stop:
                result: ClientResult = stop.value
                return result
            reply = answer(request, compute)


@cache
def methods() -> dict[str, type[Method[Any]]]:
    """Every method by name: every module of :mod:`coterie.methods` that is a method defines ``METHOD``."""
    package = importlib.import_module("coterie.methods")
    found: dict[str, type[Method[Any]]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _SHARED and not module.name.startswith("_"):
            method = importlib.import_module(f"{package.__name__}.{module.name}").METHOD
            if method.name in found:
                raise TypeError(f"two methods are named {method.name!r}: {method} and {found[method.name]}")
            found[method.name] = method
    return dict(sorted(found.items()))


def method_named(name: str) -> type[Method[Any]]:
    """The method class called ``name``. Raises :class:`CoterieError` that lists the known ones."""
    known = methods()
    if name not in known:
        raise CoterieError(f"unknown method {name!r}; the methods are {', '.join(known)}")
    return known[name]
