"""The types that every part of Coterie shares: errors, keys, banks, clients, and what travels.

Nothing here computes. Tensors are named by a structured :class:`Key`. What crosses a process or a network boundary is
an :class:`Instruction`, a :class:`Reply` or a :class:`Personal`, each of them tensors plus JSON (:mod:`coterie.codec`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor

ClientId = str
TaskKind = Literal["classification", "generation", "multiple_choice"]
ExportedAs = Literal["best", "last"]  # which round an export is of: the one that validation chose, or the last
Json = Any  # what json.dumps takes: dict, list, str, int, float, bool, None
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has no NaN

NO_EXPERT = -1  # the tensor belongs to the module as a whole (a router, a head)
SHARED = -2  # the shared expert, whose gate is always 1
FOLDED = -3  # what a method has added to the base, as an expert: its gate is always 1, and it sees no dropout
_EXPERT_NAMES = {NO_EXPERT: "-", SHARED: "shared", FOLDED: "folded"}
_EXPERT_IDS = {name: number for number, name in _EXPERT_NAMES.items()}


class CoterieError(Exception):
    """An error that the user can fix. Its text says what is wrong, where, and the fix; the command exits with 2."""


class PrivateError(CoterieError):
    """An error whose text is for this machine only, such as paths. Other machines see ``public`` instead."""

    public: ClassVar[str] = "this site cannot use one of its files; its site.log says which"


class DataError(PrivateError):
    """An error in the rows; its text may quote them."""

    public: ClassVar[str] = "this site cannot read its rows; run `coterie site check` there to see why"


class Part(StrEnum):
    """What a tensor is within its module."""

    A = "A"  # [r, d_in]
    B = "B"  # [d_out, r]
    ROUTER = "router"  # [slots, d_in], or [experts, c] for a gate by expert
    EMBEDDING = "embedding"  # [r], a mean over tokens that a client reports; in no bank
    HEAD = "head"  # a parameter of the classification head, any shape


class Key(NamedTuple):
    """The name of one tensor: ``Key("encoder.layer.0.attention.self.query", 2, Part.A)``.

    ``module`` is the qualified name of the target Linear (for a head: of the head's parameter), ``expert`` the
    number of the expert, :data:`SHARED`, :data:`FOLDED` or :data:`NO_EXPERT`. ``str(key)`` and :meth:`parse` are
    inverse.
    """

    module: str
    expert: int
    part: Part

    def __str__(self) -> str:
        return f"{self.module}:{_EXPERT_NAMES.get(self.expert, self.expert)}:{self.part.value}"

    @staticmethod
    def parse(text: str) -> Key:
        """The key that ``str`` made ``text`` from. Raises :class:`ValueError` for anything else."""
        try:
            module, expert, part = text.rsplit(":", 2)
            key = Key(module, _EXPERT_IDS[expert] if expert in _EXPERT_IDS else int(expert), Part(part))
        except ValueError as fault:
            raise ValueError(f"{text!r} is not a tensor key; expected 'module:expert:part'") from fault
        if str(key) != text:  # int() also reads "-1", "01" and " 1": one tensor would have several names
            raise ValueError(f"{text!r} is not a tensor key; {str(key)!r} is")
        return key


Tensors = Mapping[Key, Tensor]


@dataclass(frozen=True)
class Target:
    """An adapted Linear: its qualified name, its sizes, and whether it stores its weight transposed (``Conv1D``).

    ``weights`` is a digest of its weights in the base's files, "" if unknown.
    """

    name: str
    d_in: int
    d_out: int
    transposed: bool = False
    weights: str = ""


@dataclass(frozen=True)
class HeadParameter:
    """One parameter of the classification head. ``-1`` in ``shape`` stands for the client's number of labels."""

    name: str
    shape: tuple[int, ...]
    init: str  # "normal", "zeros" or "ones"

    def shape_for(self, num_labels: int) -> tuple[int, ...]:
        return tuple(num_labels if size == -1 else size for size in self.shape)


@dataclass(frozen=True)
class BaseSpec:
    """What a method knows about the base: the targets, the head's parameters (only for classification), its init."""

    targets: tuple[Target, ...]
    head: tuple[HeadParameter, ...] = ()
    head_std: float = 0.02


@dataclass(frozen=True)
class ClientInfo:
    """What the server may know about a client: counts of rows, its label space, never a row.

    ``group`` is the client's domain, which a simulation knows (the dataset that its rows come from). ``oracle``
    controls and pictures use it, never a method's own decisions. ``active``: the most experts per matrix, on average,
    that the client wants to activate; None: as many as the run does.
    """

    id: ClientId
    num_train: int
    num_validation: int = 0
    num_test: int = 0
    labels: tuple[str, ...] | None = None
    group: str | None = None
    active: int | None = None


@dataclass(frozen=True)
class GateSpec:
    """Which gate a bank uses: the name of a function of :mod:`coterie.nn.gates` and its options.

    ``per_module`` overrides options for single modules (for example, a quota per matrix).
    """

    name: str = "constant"
    options: Mapping[str, Json] = field(default_factory=dict)
    per_module: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)

    def options_for(self, module: str) -> dict[str, Json]:
        return {**self.options, **self.per_module.get(module, {})}


@dataclass(frozen=True)
class Bank:
    """A client's experts on every target, its routers and its head, and how the gate weighs them.

    ``y = W0 x + s B_cat (gate(x) * (A_cat x~))`` with ``s`` = :attr:`scaling`. Experts of a module are ordered by
    their number. Modules without an expert in ``tensors`` stay as the base has them. All experts share one dropout
    mask, or with ``own_masks`` each draws its own.
    """

    tensors: Tensors
    gate: GateSpec = GateSpec()
    scaling: float = 1.0
    dropout: float = 0.0
    own_masks: bool = False


@dataclass(frozen=True)
class Instruction:
    """Server to client, for one round."""

    tensors: Tensors = field(default_factory=dict)
    info: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """Client to server: tensors, the number of training examples behind them, and statistics as JSON."""

    tensors: Tensors = field(default_factory=dict)
    num_examples: int = 0
    info: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """A number in a reply's ``info``, from ``low`` to ``high``; ``whole``: an integer.

    With ``names`` it is a mapping from exactly these names to such numbers. ``optional``: it may be missing.
    """

    low: float = 0.0
    high: float = 1e15
    whole: bool = False
    names: frozenset[str] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Kept:
    """Tensors that are received once and never change, named by their SHA-256: they are stored once."""

    name: str
    tensors: Tensors


@dataclass(frozen=True)
class Personal:
    """What stays on the client from round to round. It never travels. ``kept`` does not change (SmartFed's pool)."""

    tensors: Tensors = field(default_factory=dict)
    info: Mapping[str, Json] = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True)
class ClientResult:
    """What a client program returns: the reply that travels and the personal state that stays."""

    reply: Reply
    personal: Personal


class Section(BaseModel):
    """Settings: a section of a config. Unknown keys are errors; so are "4" or true for a number, infinity and nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
