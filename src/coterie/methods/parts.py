"""Functions that methods share: seeded starts, heads, the parts of a set of tensors, and what travels after training.

They are public, for methods in this package and outside it. A client's round is mostly: make a bank, request training
of some of its tensors, and :func:`settle` what travels and what stays. A server's is mostly: take the same part of
every reply, and average it with :func:`weights_of` the replies (:func:`coterie.ops.mean.mean`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from coterie.methods.plan import Plan
from coterie.ops.mean import aggregation_error, mean
from coterie.ops.streams import kaiming_uniform, stream
from coterie.requests import Trained
from coterie.types import (
    NO_EXPERT,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
    Tensors,
)

Shapes = dict[Key, tuple[int, ...]]

# starts ---------------------------------------------------------------------------------------------------------------


def start_lora(base: BaseSpec, plan: Plan, expert: int = 0, *purpose: str | int) -> dict[Key, Tensor]:
    """One expert on every target: A [r, d_in] Kaiming uniform by the seed and the module's name, B [d_out, r] zero.

    Every client that shares the seed starts from the same A, which a comparison of clients' B needs. ``purpose`` gives
    experts different starts.
    """
    if not base.targets:
        raise CoterieError("the base has no targets to adapt; set [lora] targets")
    return {
        key: kaiming_uniform(shape, stream(plan.seed, "A", key.module, *purpose))
        if key.part is Part.A
        else torch.zeros(shape)
        for key, shape in lora_shapes(base, plan, expert).items()
    }


def lora_shapes(base: BaseSpec, plan: Plan, expert: int = 0) -> Shapes:
    """The shapes of :func:`start_lora`."""
    of_a: Shapes = {Key(t.name, expert, Part.A): (plan.rank, t.d_in) for t in base.targets}
    return of_a | {Key(t.name, expert, Part.B): (t.d_out, plan.rank) for t in base.targets}


def start_router(base: BaseSpec, plan: Plan, slots: int) -> dict[Key, Tensor]:
    """A router [slots, d_in] on every target, initialised like ``torch.nn.Linear``."""
    shapes = {Key(t.name, NO_EXPERT, Part.ROUTER): (slots, t.d_in) for t in base.targets}
    return {key: kaiming_uniform(shape, stream(plan.seed, "router", key.module)) for key, shape in shapes.items()}


def start_head(base: BaseSpec, plan: Plan, me: ClientInfo) -> dict[Key, Tensor]:
    """The head for the client's labels, the same for all clients with as many labels. Empty for generation."""
    init = {p.name: p.init for p in base.head}
    return {
        key: _start(shape, init[key.module], base, plan, f"{key.module}/{len(me.labels or ())}")
        for key, shape in head_shapes(base, me).items()
    }


def head_shapes(base: BaseSpec, me: ClientInfo) -> Shapes:
    """The shapes of :func:`start_head`."""
    return {Key(p.name, NO_EXPERT, Part.HEAD): p.shape_for(len(me.labels or ())) for p in base.head}


def _start(shape: tuple[int, ...], init: str, base: BaseSpec, plan: Plan, purpose: str) -> Tensor:
    if init == "normal":
        return torch.randn(shape, generator=stream(plan.seed, "head", purpose)) * base.head_std
    return torch.ones(shape) if init == "ones" else torch.zeros(shape)


# shared heads ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The server's shared heads: one per group of clients with the same label space. Empty if heads are personal."""

    values: Mapping[str, Tensors] = field(default_factory=dict)
    group: Mapping[ClientId, str] = field(default_factory=dict)

    def of(self, client: ClientId) -> Tensors:
        """The head that the server sends to ``client``; empty if heads are personal."""
        return self.values[self.group[client]] if client in self.group else {}

    def for_newcomer(self, me: ClientInfo) -> Tensors:
        """The head of the clients with the labels of ``me``, which was not there; empty where there are none."""
        return self.values.get(label_space(me), {})

    def with_late(self, clients: Sequence[ClientInfo]) -> Heads:
        """With those of ``clients`` that were not there and have the labels of a group, which they join."""
        spaces = {c.id: label_space(c) for c in clients if c.id not in self.group}
        known = {*self.group.values()}
        new = {c: space for c, space in spaces.items() if space in known}
        return replace(self, group={**self.group, **new}) if new else self


def label_space(me: ClientInfo) -> str:
    """A name for the client's label space: clients with the same labels in the same order share it."""
    return json.dumps(me.labels)


def start_heads(base: BaseSpec, plan: Plan, clients: Sequence[ClientInfo]) -> Heads:
    """Shared heads by label space; none if the plan keeps heads personal."""
    if plan.head == "personal" or not base.head:
        return Heads()
    return Heads({label_space(c): start_head(base, plan, c) for c in clients}, {c.id: label_space(c) for c in clients})


def mean_heads(heads: Heads, replies: Mapping[ClientId, Reply], weight: Mapping[ClientId, float]) -> Heads:
    """Every shared head as the mean of its group's replies. Where no client of the group replied, it is unchanged."""
    values = dict(heads.values)
    for name in values:
        members = [c for c in sorted(replies) if heads.group.get(c) == name]
        if members:
            values[name] = mean([head_of(replies[c].tensors) for c in members], [weight[c] for c in members])
    return replace(heads, values=values)


# parts of tensors -----------------------------------------------------------------------------------------------------


def part_of(tensors: Tensors, *parts: Part) -> dict[Key, Tensor]:
    """Those of ``tensors`` that are one of ``parts``: ``part_of(tensors, Part.A)``."""
    return {key: value for key, value in tensors.items() if key.part in parts}


def head_of(tensors: Tensors) -> dict[Key, Tensor]:
    """The head's tensors among ``tensors``."""
    return part_of(tensors, Part.HEAD)


def router_of(tensors: Tensors) -> dict[Key, Tensor]:
    """The routers among ``tensors``."""
    return part_of(tensors, Part.ROUTER)


def lora_of(tensors: Tensors, expert: int | None = None, new: int | None = None) -> dict[Key, Tensor]:
    """A and B among ``tensors``: of one ``expert`` if given, renumbered to ``new`` if given."""
    return {
        key if new is None else key._replace(expert=new): value
        for key, value in part_of(tensors, Part.A, Part.B).items()
        if expert is None or key.expert == expert
    }


def numbered_head(tensors: Tensors, number: int) -> dict[Key, Tensor]:
    """The head among ``tensors`` under a number, to go with other heads: ``Key(name, number, Part.HEAD)``."""
    return {key._replace(expert=number): value for key, value in head_of(tensors).items()}


def one_head(tensors: Tensors, number: int) -> dict[Key, Tensor]:
    """``tensors`` with only the head of that number, as the head."""
    head = {key._replace(expert=NO_EXPERT): v for key, v in head_of(tensors).items() if key.expert == number}
    return {**{key: value for key, value in tensors.items() if key.part is not Part.HEAD}, **head}


def shapes_of(*tensors: Tensors) -> Shapes:
    """The shape of every tensor, by key."""
    return {key: tuple(value.shape) for group in tensors for key, value in group.items()}


# a round --------------------------------------------------------------------------------------------------------------


def with_head(tensors: Tensors, ins: Instruction, personal: Personal) -> dict[Key, Tensor]:
    """``tensors`` and the client's head: the one that the server sent, else the personal one."""
    return {**tensors, **(head_of(ins.tensors) or head_of(personal.tensors))}


def settle(
    plan: Plan, trained: Trained, me: ClientInfo, personal: Personal, travels: Iterable[Key], stays: Iterable[Key] = ()
) -> ClientResult:
    """The reply with the trained tensors in ``travels``, and the personal state with those in ``stays``.

    Of both only the keys count, in their order. The head need not be named: it travels if heads are shared, and stays
    if they are personal.
    """
    head = head_of(trained.tensors)
    shared = plan.head == "shared"
    upload = {key: trained.tensors[key] for key in travels} | (head if shared else {})
    home = {key: trained.tensors[key] for key in stays} | ({} if shared else head)
    reply = Reply(upload, me.num_train, statistics(trained))
    return ClientResult(reply, replace(personal, tensors={**personal.tensors, **home}))


def of_both(first: Trained, last: Trained) -> Trained:
    """``last`` with the counts of two trainings in one round; the loss is that of ``last``."""
    return replace(
        last,
        examples=first.examples + last.examples,
        tokens=first.tokens + last.tokens,
        steps=first.steps + last.steps,
        flops=first.flops + last.flops,
        active_flops=first.active_flops + last.active_flops,
    )


def own_copy(ins: Instruction, trained: Bank) -> Instruction:
    """``ins`` with the tensors of ``trained`` that it has too: what it would say had nobody else trained."""
    return replace(ins, tensors={key: trained.tensors.get(key, value) for key, value in ins.tensors.items()})


def statistics(trained: Trained) -> dict[str, float]:
    """What a reply reports of its training; ``gflop`` in billions of operations.

    ``gflop_active`` is only there where it is less than ``gflop``: where tokens do not use all experts.
    """
    said = {"loss": trained.loss, "tokens": trained.tokens, "steps": trained.steps}
    said |= {"gflop": trained.flops / 1e9} if trained.flops else {}
    return said | ({"gflop_active": trained.active_flops / 1e9} if 0 < trained.active_flops < trained.flops else {})


def weights_of(
    replies: Mapping[ClientId, Reply], by: Literal["examples", "uniform"] = "examples"
) -> dict[ClientId, float]:
    """The weight of each reply in a mean, sorted by client: its number of training examples, or 1 for all."""
    return {c: float(replies[c].num_examples) if by == "examples" else 1.0 for c in sorted(replies)}


def mean_error(replies: Sequence[Tensors], weights: Sequence[float]) -> list[tuple[float, float]]:
    """What averaging A and B separately loses, of each expert (:func:`~coterie.ops.mean.aggregation_error`).

    All of ``replies`` hold the same experts.
    """
    a_keys = sorted(part_of(replies[0], Part.A))
    return [
        aggregation_error([r[key] for r in replies], [r[key._replace(part=Part.B)] for r in replies], weights)
        for key in a_keys
    ]
