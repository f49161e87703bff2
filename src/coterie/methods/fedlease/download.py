"""Which experts a FedLEASE client is sent: all of them, or its own and those that its tokens use.

With ``download = "used"`` a client measures, after training, how much of the gates' weight each expert gets: the mean
over the tokens of its rows, then over modules. It reports these M numbers, which add up to 1. From then on it is sent
its own expert and every other with at least ``download_threshold``. All are sent again ``download_every`` rounds after
it last received all, and whenever it has no report: before its first, after it has moved to another cluster, and where
a site keeps the numbers to itself. So a site that reports nothing is sent all, as with ``download = "all"``.

In place of an expert that was not sent the client uses the copy that it last received. An expert below the threshold
still has some of the weight, and much of it for a few tokens. Its copy is an older version of what would have been
sent, and the closer to it the more the experts have settled. With B = 0 in its place, that weight would add nothing:
the output would jump with every refresh, and the router would learn to avoid the expert, so that it would never be used
again. The copies cost a client the disk space of M - 1 experts, and no memory beyond what all experts take anyway. A
client that has lost them uses B = 0 and reports nothing, so that it is sent all in its next round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.parts import head_of, lora_of, part_of, start_lora
from coterie.methods.plan import Plan
from coterie.requests import Observe, Observed, Program
from coterie.types import Bank, BaseSpec, Instruction, Part, Personal, Range, Reply, Target, Tensors

USE = "expert_use"  # in a reply's info
ROWS = 100  # of a client, at most, over which its use is measured
_COPIES = "copies"  # in a client's personal info: the experts that its tensors are copies of
_OWN = "own_lora"  # there too: the number of the LoRA that is the client's own; before it has a cluster, 0
_ROUNDING = 1e-3


# server ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """A client's report: the weight of each expert, and the last round in which the client was sent all of them."""

    weight: Mapping[int, float]
    all_sent: int


def wanted(settings: FedLEASESettings, use: Use | None, own: int, rnd: int, experts: int) -> list[int]:
    """The numbers of the experts that a client of expert ``own`` is sent in round ``rnd``, of ``experts`` in all."""
    if settings.download == "all" or use is None or rnd - use.all_sent >= settings.download_every:
        return list(range(experts))
    return [e for e in range(experts) if e == own or use.weight.get(e, 0.0) >= settings.download_threshold]


def reported(before: Use | None, reply: Reply, rnd: int, all_sent: bool) -> Use | None:
    """What the server keeps of a reply of round ``rnd``; None if the client reported nothing."""
    if USE not in reply.info or not (all_sent or before):
        return None
    weight = {int(e): float(value) for e, value in reply.info[USE].items()}
    return Use(weight, rnd if all_sent or before is None else before.all_sent)


def use_range(experts: int) -> dict[str, Range]:
    """What a report must be: a number for each expert. It is optional, because a site may keep it to itself."""
    return {USE: Range(0.0, 1.0 + _ROUNDING, names=frozenset(map(str, range(experts))), optional=True)}


# client ---------------------------------------------------------------------------------------------------------------


def stand_ins(ins: Instruction, personal: Personal, plan: Plan) -> Tensors:
    """A and B in place of the experts that ``ins`` lacks: the client's copies, else their start, where B = 0."""
    lacking = _lacking(ins)
    copies = {e: lora_of(personal.tensors, e) for e in lacking if e in personal.info.get(_COPIES, ())}
    starts = {e: start_lora(_spec(ins), plan, e) for e in lacking if e not in copies}
    return {key: value for each in (copies, starts) for tensors in each.values() for key, value in tensors.items()}


def own_lora(personal: Personal, new: int) -> Tensors:
    """The LoRA of the client's own in its personal state, as expert ``new``; empty where A and B are all copies."""
    number = personal.info.get(_OWN, None if _COPIES in personal.info else 0)
    return {} if number is None else lora_of(personal.tensors, int(number), new=new)


def with_own_lora(personal: Personal, lora: Tensors, number: int) -> Personal:
    """``personal`` with the client's head, this LoRA of its own as expert ``number``, and no other A and B."""
    info = {name: value for name, value in personal.info.items() if name != _OWN}
    info |= {_OWN: number} if lora else {}
    return replace(personal, tensors={**head_of(personal.tensors), **lora}, info=info)


def kept_copies(ins: Instruction, personal: Personal, bank: Bank) -> Personal:
    """``personal`` with every expert of ``bank`` that the client may not be sent next time."""
    copies = {key: value for key, value in lora_of(bank.tensors).items() if key.expert != ins.info["own"]}
    numbers = sorted({key.expert for key in copies})
    return Personal({**personal.tensors, **copies}, {**personal.info, _COPIES: numbers}, personal.kept)


def measured(ins: Instruction, personal: Personal, trained: Bank) -> Program[dict[str, dict[str, float]]]:
    """The client's report on ``trained``, its bank after training; empty if it had lost a copy."""
    if not set(_lacking(ins)) <= {*personal.info.get(_COPIES, ())}:
        return {}
    observed = yield Observe(trained, "train", ("usage",), examples=ROWS)
    return {USE: _mean_weights(observed)}


def num_experts(ins: Instruction) -> int:
    """The number of experts of the client's bank, sent or not."""
    return int(ins.info.get("experts", len(_sent(ins))))


def _mean_weights(observed: Observed) -> dict[str, float]:
    """The weight of each expert by its number, as the mean over modules; what rounding leaves above 1 is 1."""
    sums: dict[str, float] = {}
    for use in observed.usage.values():
        for expert, weight in zip(use.expert, use.weight, strict=True):
            sums[str(expert)] = sums.get(str(expert), 0.0) + weight
    return {expert: min(total / len(observed.usage), 1.0) for expert, total in sorted(sums.items())}


def _lacking(ins: Instruction) -> list[int]:
    return [e for e in range(num_experts(ins)) if e not in _sent(ins)] if "experts" in ins.info else []


def _sent(ins: Instruction) -> set[int]:
    return {key.expert for key in part_of(ins.tensors, Part.A)}


def _spec(ins: Instruction) -> BaseSpec:
    """The targets of the experts that were sent."""
    a: Mapping[str, Tensor] = {key.module: value for key, value in part_of(ins.tensors, Part.A).items()}
    b = {key.module: value for key, value in part_of(ins.tensors, Part.B).items()}
    return BaseSpec(tuple(Target(module, a[module].shape[1], b[module].shape[0]) for module in sorted(a)))
