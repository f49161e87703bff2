"""The requests of a client program and their answers: training, scores, observations.

A client program is a generator that yields requests and receives the answers. Nothing is computed here:
:mod:`coterie.compute` does that.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import Field

from coterie.types import NO_EXPERT, Bank, ClientId, ClientResult, Key, Number, Section, Tensors


class Optim(Section):
    """A client's local training in one round: the config section ``[train]``, and part of every request to train."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the optimiser; a new one in every round")
    learning_rate: float = Field(2e-3, gt=0, description="learning rate at the start of a round")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the learning rate falls to 0 within a round"
    )
    round_decay: float = Field(1.0, gt=0, le=1, description="the learning rate is multiplied by this every round")
    weight_decay: float = Field(0.05, ge=0, description="weight decay; decoupled for adamw")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    batch_size: int = Field(16, ge=1, description="examples per forward pass")
    packing: bool = Field(
        False,
        description="generation and multiple_choice: put the rows of a forward pass into as few rows as the longest "
        "allows, without padding between them; the same loss",
    )
    accumulate: int = Field(1, ge=1, description="forward passes per optimiser step")
    epochs: int = Field(2, ge=1, description="passes over the client's data in a round")
    steps: int = Field(0, ge=0, description="optimiser steps in a round instead of epochs; 0: epochs")

    def steps_on(self, rows: int) -> int:
        """The optimiser steps of a round on so many rows."""
        return self.steps or self.epochs * math.ceil(math.ceil(rows / self.batch_size) / self.accumulate)


@dataclass(frozen=True)
class HoldOut:
    """Rows of a split to set aside: ``fraction`` of them, at least one, at most ``most``.

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
class Proximal:
    """A pull towards the start of the round (FedProx, arXiv 1812.06127): ``weight``/2 * sum over ``keys`` ||w - w0||^2.

    w0 are the values in the request's bank. The gradient is ``weight`` * (w - w0) in every step.
    """

    weight: float
    keys: frozenset[Key]


@dataclass(frozen=True)
class LastRanks:
    """A term on the ranks from ``kept`` on (HetLoRA, arXiv 2401.06432): ``weight`` * sum ||B[:, kept:]|| ||A[kept:]||.

    The sum is over every module and expert whose A and B both train; Frobenius norms.
    """

    weight: float
    kept: int


@dataclass(frozen=True)
class Train:
    """Trains the tensors named ``trainable`` of ``bank`` on the client's training split. Answered by :class:`Trained`.

    ``purpose`` names the random stream (batch order, dropout) together with the seed, the round and the client. Rows
    of ``hold_out`` are not trained on. Keys of ``proximal`` must be trainable. ``rows_of``: train on the rows of these
    clients together, which only a simulation can do; each client's rows go through the bank's head of that number,
    ``Key(name, number, Part.HEAD)``. ``rates``: factors on the learning rate of single tensors; 1 for the others.
    """

    bank: Bank
    trainable: frozenset[Key]
    optim: Optim
    purpose: str = "train"
    balance: Balance | None = None
    hold_out: HoldOut | None = None
    proximal: Proximal | None = None
    last_ranks: LastRanks | None = None
    rows_of: Mapping[ClientId, int] = field(default_factory=dict)
    rates: Mapping[Key, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The trained tensors (those of ``trainable``, no others), the mean loss per label, and counts.

    A label is an example in classification, a pair of answers in DPO, and otherwise a token of the completion or of the
    right candidate. The loss
    is the task's alone; ``balance`` is the mean over the steps of the load-balance loss before its weight, 0 without
    such a loss. ``flops`` are the floating-point operations, counted from shapes and tokens
    (:mod:`coterie.compute.flops`); ``active_flops`` those that the experts in use need.
    """

    tensors: Tensors
    loss: float
    examples: int
    tokens: int
    steps: int
    balance: float = 0.0
    flops: int = 0
    active_flops: int = 0


@dataclass(frozen=True)
class Score:
    """Measures the mean loss and the metrics of each bank on ``split``. Answered by :class:`Scored`, one per bank.

    ``examples`` is the most examples to use, the same for all banks, drawn by the run's seed; 0: all. With ``usage``,
    the passes that score also collect how the tokens use the experts: in multiple choice, those of right candidates.
    ``samples`` is how many generated texts to return with the scores.
    """

    banks: Sequence[Bank]
    split: str = "train"
    examples: int = 0
    usage: bool = False
    samples: int = 0


@dataclass(frozen=True)
class Sample:
    """A generated text: the row's prompt, its completion in the data, and the model's."""

    prompt: str
    completion: str
    generated: str


@dataclass(frozen=True)
class Scored:
    """``loss`` is the mean per example (classification), per pair of answers, or per token of a completion or of a
    right candidate.

    ``observed`` holds the usage of the experts, and ``samples`` generated texts, where they were requested.
    """

    loss: float
    metrics: Mapping[str, float]
    examples: int
    observed: Observed | None = None
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Observe:
    """Collects statistics of the bank's forward pass on ``split`` in evaluation mode. Answered by :class:`Observed`.

    ``what`` names the statistics: ``"usage"``, ``"embeddings"``, ``"directions"``, and ``"first_order"`` and
    ``"gate_mass"`` of :mod:`coterie.compute.importance`. ``"signed_usage"`` is a usage whose weights are the mean
    weights, not their mean size. With ``hold_out`` only the rows that it sets aside are used,
    and of those at most ``examples``, drawn by the run's seed (0: all). Padding tokens count only with ``padding``, and
    never in the importance of a module or in directions. Without ``of_experts`` the only embeddings are the router's.
    """

    bank: Bank
    split: str = "train"
    what: tuple[str, ...] = ("usage",)
    hold_out: HoldOut | None = None
    padding: bool = False
    examples: int = 0
    of_experts: bool = True

    def wanted(self, embeddings: Tensors) -> Tensors:
        """Those of a bank's ``embeddings`` that are requested."""
        return {key: value for key, value in embeddings.items() if self.of_experts or key.expert == NO_EXPERT}


@dataclass(frozen=True)
class ExpertUse:
    """How tokens use the experts of one module, [e] each: mean size of weight, share of the tokens, expert numbers."""

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
R = TypeVar("R")
Program = Generator[Request, Any, R]  # yields requests, is sent the answers, and returns an R
ClientProgram = Program[ClientResult]
BankProgram = Program[Bank]
