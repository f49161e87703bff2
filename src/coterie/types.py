"""The words that every part of Coterie shares: keys, banks, what travels, what a client may ask for.

Nothing here computes. Tensors are named by a structured :class:`Key`, never by string surgery; what crosses a
process or a network boundary is one of :class:`Instruction`, :class:`Reply` and :class:`Personal`, each of them
tensors plus JSON (see :mod:`coterie.codec`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

ClientId = str
TaskKind = Literal["classification", "generation", "multiple_choice"]
Json = Any  # what json.dumps takes: dict, list, str, int, float, bool, None
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has no NaN

NO_EXPERT = -1  # the tensor belongs to the module as a whole (a router, a head)
SHARED = -2  # the shared expert, whose gate is always 1
FOLDED = -3  # what a method has added to the base, as an expert: its gate is always 1, and it sees no dropout
_EXPERT_NAMES = {NO_EXPERT: "-", SHARED: "shared", FOLDED: "folded"}
_EXPERT_IDS = {name: number for number, name in _EXPERT_NAMES.items()}


class CoterieError(Exception):
    """A fault that the user can mend. Its text says what is wrong, where, and the fix; the command exits with 2."""


class PrivateError(CoterieError):
    """Its text names what is this machine's alone, such as paths. ``public`` is what other machines may see of it."""

    public: ClassVar[str] = "this site cannot use a file of its own; site.log there says where it failed"


class DataError(PrivateError):
    """A fault of the rows; its text may quote them."""

    public: ClassVar[str] = "this site cannot read its rows; `coterie site check` there says why"


class Part(StrEnum):
    """What a tensor is within its module."""

    A = "A"  # [r, d_in]
    B = "B"  # [d_out, r]
    ROUTER = "router"  # [slots, d_in]
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
            raise ValueError(f"{text!r} is no tensor key; expected 'module:expert:part'") from fault
        if str(key) != text:  # int() also reads "-1", "01" and " 1": one tensor would have several names
            raise ValueError(f"{text!r} is no tensor key; {str(key)!r} is")
        return key


Tensors = Mapping[Key, Tensor]


@dataclass(frozen=True)
class Target:
    """An adapted Linear: its qualified name, its sizes, and whether it keeps its weight transposed (``Conv1D``).

    ``weights`` tells its weights from others': a digest of them as they lie in the base's files, "" where unknown.
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
    """What a method knows of the base: the targets, the head's parameters (only for classification), its init."""

    targets: tuple[Target, ...]
    head: tuple[HeadParameter, ...] = ()
    head_std: float = 0.02


@dataclass(frozen=True)
class ClientInfo:
    """What the server may know of a client: counts of rows, its label space, never a row.

    ``group`` is the domain that a simulation knows (the dataset a client was cut from): used by ``oracle`` controls
    and to colour pictures, never by a method's own decisions.
    """

    id: ClientId
    num_train: int
    num_validation: int = 0
    num_test: int = 0
    labels: tuple[str, ...] | None = None
    group: str | None = None


@dataclass(frozen=True)
class GateSpec:
    """Which gate a bank uses: the name of a function of :mod:`coterie.nn.gates` and its options.

    ``per_module`` overrides options for single modules (a quota per matrix, say).
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
class Kept:
    """Tensors that came once and never change, named by their SHA-256: whoever stores them writes them once."""

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


class Optim(Section):
    """A client's local training in one round: the config section ``[train]``, and part of every request to train."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="started anew in every round")
    learning_rate: float = Field(2e-3, gt=0, description="at the start of a round")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="within a round, down to 0")
    round_decay: float = Field(1.0, gt=0, le=1, description="the learning rate is multiplied by this every round")
    weight_decay: float = Field(0.05, ge=0, description="decoupled for adamw")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    batch_size: int = Field(16, ge=1, description="examples per forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimiser step")
    epochs: int = Field(2, ge=1, description="passes over the client's data in a round")
    steps: int = Field(0, ge=0, description="optimiser steps in a round instead of epochs; 0: epochs")


@dataclass(frozen=True)
class HoldOut:
    """Rows of a split that are set aside: ``fraction`` of them, at least one, at most ``most``.

    The same rows in every round: a function of the run's seed, the client and the split.
    """

    fraction: float
    most: int

    def count(self, rows: int) -> int:
        return max(1, min(self.most, round(self.fraction * rows)))


@dataclass(frozen=True)
class Balance:
    """A load-balance loss beside the task's: ``weight`` * sum over modules of n * sum_e mean_t(p_te) f_e.

    p is the softmax of the gate's scores over the n routed experts of a module, f_e the share of the top-k picks that
    go to expert e (no gradient). Padding tokens count only with ``padding``.
    """

    weight: float
    padding: bool = False


@dataclass(frozen=True)
class Train:
    """Ask: train the tensors named ``trainable`` of ``bank`` on the client's training split. Answer: :class:`Trained`.

    ``purpose`` names the random stream (batch order, dropout) next to the seed, the round and the client. Rows of
    ``hold_out`` are not trained on.
    """

    bank: Bank
    trainable: frozenset[Key]
    optim: Optim
    purpose: str = "train"
    balance: Balance | None = None
    hold_out: HoldOut | None = None


@dataclass(frozen=True)
class Trained:
    """The trained tensors (those asked for, and no others), the mean loss per label seen, and counts.

    A label is an example in classification, a token of a completion in generation, and of the right candidate in
    multiple choice. The loss is the task's alone; ``balance`` the mean of the load-balance loss, before its weight.
    """

    tensors: Tensors
    loss: float
    examples: int
    tokens: int
    steps: int
    balance: float = 0.0


@dataclass(frozen=True)
class Score:
    """Ask: mean loss and metrics of each bank on ``split``. Answer: a list of :class:`Scored`, in the banks' order.

    ``examples``: on at most so many examples, the same for all banks, drawn by the run's seed; 0: on all.
    """

    banks: Sequence[Bank]
    split: str = "train"
    examples: int = 0


@dataclass(frozen=True)
class Scored:
    """``loss`` is the mean per example (classification), or per token of a completion or of a right candidate."""

    loss: float
    metrics: Mapping[str, float]
    examples: int


@dataclass(frozen=True)
class Observe:
    """Ask: statistics of the bank's forward pass on ``split``, in evaluation mode. Answer: :class:`Observed`.

    ``what`` holds names of statistics: ``"usage"``, ``"embeddings"``, ``"directions"``, and of
    :mod:`coterie.compute.importance` ``"first_order"`` and ``"gate_mass"``. With ``hold_out`` only the rows that it
    sets aside are looked at, and of those at most ``examples``, drawn by the run's seed (0: all). Padding tokens count
    only with ``padding``, and never in a module's importance or in directions.
    """

    bank: Bank
    split: str = "train"
    what: tuple[str, ...] = ("usage",)
    hold_out: HoldOut | None = None
    padding: bool = False
    examples: int = 0


@dataclass(frozen=True)
class ExpertUse:
    """How tokens use the experts of one module, [e] each: mean gate weight, share of the tokens, expert numbers."""

    weight: Sequence[Number]
    share: Sequence[Number]
    expert: Sequence[int] = ()


Usage = Mapping[str, ExpertUse]  # by module


@dataclass(frozen=True)
class Observed:
    """What was observed, over ``tokens`` tokens.

    ``usage`` has the experts in the bank's order. ``embeddings`` holds mean_t A_e x [r] for every expert but the
    shared one, and mean_t R x [s] of the router. ``directions`` has, as ``Key(module, NO_EXPERT, Part.EMBEDDING)``,
    the mean over rows of m / |m| [i], m the mean over a row's tokens of a module's input x (of a row to complete, over
    its prompt). ``importance[statistic][module]`` is one number per module with a gate.
    """

    usage: Usage
    tokens: int
    embeddings: Tensors = field(default_factory=dict)
    directions: Tensors = field(default_factory=dict)
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


Request = Train | Score | Observe
Answer = Trained | list[Scored] | Observed
ClientProgram = Generator[Request, Any, ClientResult]
