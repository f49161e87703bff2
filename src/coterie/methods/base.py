"""``Method``, what every method is, and ``drive``, which runs a client program.

A method has a server half of pure functions over a serialisable state, and a client half written as a generator that
requests compute (``Train``, ``Score`` and ``Observe`` of :mod:`coterie.requests`) and receives the answers. Engines
differ in how they answer, never in what a method may request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Protocol

from typing_extensions import TypeVar

from coterie.methods.findings import Finding
from coterie.methods.parts import Heads, lora_of, start_head, with_head
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.releases import Release, head_release
from coterie.methods.robust import Group, grouped
from coterie.requests import (
    Answer,
    BankProgram,
    ClientProgram,
    Observe,
    Observed,
    Program,
    Request,
    Score,
    Scored,
    Train,
    Trained,
)
from coterie.types import (
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    CoterieError,
    Instruction,
    Key,
    Part,
    Personal,
    Range,
    Reply,
    Tensors,
)

R = TypeVar("R")
S = TypeVar("S", default=Any)  # a Method of any state, where none is named


@dataclass(frozen=True)
class Method(ABC, Generic[S]):
    """One federated method. ``S`` is its server state: a frozen dataclass that :mod:`coterie.codec` can encode.

    A method is a frozen dataclass that subclasses this one for its defaults, and for nothing else: what methods share
    are functions (:mod:`coterie.methods.parts`). ``Settings`` are the keys of ``[method]``, ``State`` is ``S``,
    ``Welcome`` the type of what a newcomer is given.

    ``evaluates``: what a client is meant to use, the bank that the server sends after averaging ("received") or the one
    that it trained last itself ("trained"); ``[run] evaluate`` overrides it. ``newcomers``: why no client can join
    after the start, "" if any can. ``mixed_ranks``: whether clients may have different ranks (``[lora] ranks``).
    ``needs_all_rows``: whether it trains on several clients' rows together, which only a simulation can do. ``usage``:
    the names, in a reply's ``info``, of numbers that say how the client's rows use the experts. A site may keep these
    to itself, so the server has to work without them. ``no_rules``: why the rules of ``[robust]`` do not apply, "" if
    they do. ``beyond_training``: what its clients do with their rows beside one training in a round, "" if nothing:
    ``[privacy] unit = "example"`` puts noise in that training alone. ``instructs_alike``: whether all clients of a
    round are sent the same beside heads; with secure sums each client checks it.
    """

    settings: Any
    plan: Plan

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    State: ClassVar[type[Any]]
    Welcome: ClassVar[type[Any]] = Instruction
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    evaluates: ClassVar[Literal["received", "trained"]] = "received"
    newcomers: ClassVar[str] = ""
    mixed_ranks: ClassVar[bool] = False
    needs_all_rows: ClassVar[bool] = False
    usage: ClassVar[Sequence[str]] = ()
    no_rules: ClassVar[str] = ""
    beyond_training: ClassVar[str] = ""
    instructs_alike: ClassVar[bool] = True

    @property
    def max_rank(self) -> int:
        """The largest rank of an expert that clients train: a site may refuse it. By default the plan's."""
        return self.plan.max_rank

    @property
    def weighting(self) -> Literal["examples", "uniform"]:
        """How its means weigh clients: by ``[method] weighting`` where it has that setting, else by their examples."""
        return "uniform" if getattr(self.settings, "weighting", "examples") == "uniform" else "examples"

    def active_fault(self) -> str:
        """Why no client can activate fewer experts than the run (``[site] active``); "" if one can."""
        return f"{self.name} activates the same experts at every client; leave it out"

    def fastest(self, rnd: int) -> Mapping[Part, float]:
        """The largest factors on ``[train] learning_rate`` in round ``rnd``, by part; 1 for those that are not here."""
        return {}

    # server ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def init(self, base: BaseSpec, clients: Sequence[ClientInfo]) -> S:
        """The state before the first round. Raises :class:`CoterieError` for settings that cannot work."""

    def admit(self, state: S, clients: Sequence[ClientInfo]) -> S:
        """The state that knows those of ``clients`` too that were not there before; they are in :meth:`configure` next.

        By default a client receives the shared head of its labels from now on, and counts in its mean. Where there is
        nothing to add, it is ``state`` itself.
        """
        heads = getattr(state, "heads", None)
        if not isinstance(heads, Heads) or (joined := heads.with_late(clients)) is heads:
            return state
        return replace(state, heads=joined)  # type: ignore[type-var]

    @abstractmethod
    def configure(self, state: S, clients: Sequence[ClientInfo], rnd: int) -> Mapping[ClientId, Instruction]:
        """What the server sends to each of ``clients`` for round ``rnd`` (the first is 1)."""

    @abstractmethod
    def expects(self, state: S, me: ClientInfo, rnd: int) -> Mapping[Key, tuple[int, ...]]:
        """The shape of every tensor in a valid reply of ``me`` in round ``rnd``: these keys and no others.

        All of them are float32 (:data:`coterie.engines.checks.DTYPE`).
        """

    def expects_info(self, state: S, me: ClientInfo, rnd: int) -> Mapping[str, Range]:
        """The numbers in a valid reply's ``info``, beside the loss, tokens, steps and operations of its training.

        :meth:`aggregate` may rely on what is declared here. Other keys are allowed. Nothing by default.
        """
        return {}

    def started_from(self, base: BaseSpec, state: S, me: ClientInfo, ins: Instruction, reply: Reply) -> Tensors:
        """What the tensors of ``reply`` were before the client trained them: the server measures the update from these.

        By default those that it received, and for others those that :meth:`begin` gives it. A client whose update is
        hidden measures it so too, without a ``state``.
        """
        own = {} if reply.tensors.keys() <= ins.tensors.keys() else self.begin(base, me).tensors
        return {**own, **ins.tensors}

    def groups(self, state: S, replies: Mapping[ClientId, Reply], spaces: Mapping[ClientId, str]) -> Sequence[Group]:
        """Which replies :meth:`aggregate` averages together, for the rules of ``[robust]``.

        ``spaces`` names every client's label space. By default all replies, shared heads by label space.
        """
        return grouped(replies, dict.fromkeys(replies, ""), spaces)

    def releases(self) -> Sequence[Release]:
        """What leaves a client beside :data:`coterie.methods.releases.COMMON`, and what the server needs of it.

        By default A and B, averaged over all clients, and shared heads; by client if the rules of ``[robust]`` do not
        apply, for the same reason.
        """
        lora = Release("A and B", reads="each" if self.no_rules else "sum", why=self.no_rules)
        return (lora, *head_release(self.plan.head == "shared"))

    @abstractmethod
    def aggregate(self, state: S, replies: Mapping[ClientId, Reply], rnd: int) -> S:
        """The state after round ``rnd``, from the replies that came and passed the checks."""

    def experts(self, state: S) -> Mapping[str, Tensors]:
        """The server's experts by name, each with expert number 0, for export as PEFT adapters. None by default."""
        return {}

    def describe(self, state: S) -> Sequence[Finding]:
        """What the method found, for the run's report (:mod:`coterie.methods.findings`). Nothing by default."""
        return ()

    # client ----------------------------------------------------------------------------------------------------------

    def begin(self, base: BaseSpec, me: ClientInfo) -> Personal:
        """The client's personal state before its first round, made on the client from the plan's seed alone.

        By default the head, where heads are personal.
        """
        return Personal(start_head(base, self.plan, me) if self.plan.head == "personal" else {})

    @abstractmethod
    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        """The client's half of a round: yields requests, returns a :class:`ClientResult`."""

    def bank(self, ins: Instruction, me: ClientInfo, personal: Personal) -> Bank:
        """The client's bank, from what it received and what it kept.

        By default the A and B that it received beside those that it kept, with its head, and no router.
        """
        tensors = with_head({**lora_of(personal.tensors), **lora_of(ins.tensors)}, ins, personal)
        return Bank(tensors, scaling=self.plan.scaling, dropout=self.plan.dropout)

    def welcome(self, state: S, me: ClientInfo) -> Any:
        """What ``me``, a client that was not there, needs of the ``state`` after the last round: a ``Welcome``.

        By default an instruction, as the server sends one to a client that joins, with the shared head of its labels if
        there is one. It names no other client. Raises :class:`CoterieError` where no client can join.
        """
        if self.newcomers:
            raise CoterieError(f"{self.name} takes no client after the start: {self.newcomers}")
        return self.configure(self.admit(state, [me]), [me], self.plan.rounds + 1)[me.id]

    def onboard(self, welcome: Any, base: BaseSpec, me: ClientInfo) -> Program[Onboarded]:
        """A program that finds the bank of ``me``, a client that was not there, from what :meth:`welcome` gave.

        It may request compute on the client's rows. By default the client keeps what the method keeps on a client, and
        chooses as a client does. What came from the server is frozen; the router, the head and what stays on the client
        train afterwards.
        """
        own = self.begin(base, me)
        personal = replace(own, tensors={**start_head(base, self.plan, me), **own.tensors})
        bank = yield from self.choose(welcome, me, personal)
        mine = (personal.tensors.keys() - welcome.tensors.keys()) & bank.tensors.keys()
        return Onboarded(bank, newcomers_own(bank) | mine)

    def choose(self, ins: Instruction, me: ClientInfo, personal: Personal) -> BankProgram:
        """A program that returns the bank to evaluate with and to export, if that is not the one trained last.

        By default, it returns :meth:`bank` without any request. A method whose clients choose among banks yields a
        :class:`Score` first.
        """
        return returning(self.bank(ins, me, personal))

    def after_training(self, ins: Instruction, me: ClientInfo, personal: Personal, trained: Bank) -> BankProgram:
        """As :meth:`choose`, with ``[run] evaluate = "trained"``: before the client gets the others' training.

        By default, it returns ``trained``, the bank that the client trained last. A method of which that is only a part
        puts it together with the rest. ``ins`` is the instruction for the next round.
        """
        return returning(trained)


@dataclass(frozen=True)
class Onboarded:
    """The bank of a client that was not there, and what of it trains on the client's rows.

    ``rates``: factors on the learning rate of single tensors; 1 for the others.
    """

    bank: Bank
    trainable: frozenset[Key]
    rates: Mapping[Key, float] = field(default_factory=dict)


def newcomers_own(bank: Bank) -> frozenset[Key]:
    """The router and the head of ``bank``."""
    return frozenset(key for key in bank.tensors if key.part in (Part.ROUTER, Part.HEAD))


class Compute(Protocol):
    """Answers a client's requests on that client's data."""

    def train(self, request: Train) -> Trained: ...

    def score(self, request: Score) -> list[Scored]: ...

    def observe(self, request: Observe) -> Observed: ...


def answer(request: Request, compute: Compute) -> Answer:
    """The answer of ``compute`` to one request. Raises :class:`TypeError` for anything but a request."""
    match request:
        case Train():
            return compute.train(request)
        case Score():
            return compute.score(request)
        case Observe():
            return compute.observe(request)
        case _:
            raise TypeError(f"a client program yields Train, Score or Observe, not {type(request).__name__}")


def returning(value: R) -> Program[R]:
    """A program that returns ``value`` and yields no request."""
    yield from ()
    return value


def drive(program: Program[R], compute: Compute) -> R:
    """Run a program to its end: send it the answer to each request, return what it returns.

    An exception of the program or of ``compute`` passes through, after the program's own ``finally`` blocks.
    """
    with closing(program):
        reply: Answer | None = None
        while True:
            try:
                request = program.send(reply)
            except StopIteration as stop:
                result: R = stop.value
                return result
            reply = answer(request, compute)
