"""Floating-point operations of training, counted from shapes and tokens.

A matrix of n numbers costs 2 n operations for a token in the forward pass, and 2 n for the gradient of its input. One
that trains costs 2 n more for its own gradient. The base's Linear layers do not train. All experts of a bank count,
whatever the gate picks: the layer multiplies with all of them (but for B where a few of 256 or more are active, see
:class:`~coterie.nn.bank.BankLayer`). :func:`active_flops` counts only what active experts need. Of a base that is a
mixture of experts, a token is multiplied with the experts that it is routed to. Left out are attention's products of
tokens, norms, embeddings, padding, and what gradient checkpointing computes again; the operations for layers below
the lowest target, whose gradients nobody needs, are in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

from torch import nn

from coterie.requests import Train
from coterie.types import FOLDED, SHARED, Bank, Key, Part

_FORWARD, _INPUT, _OWN = 2, 2, 2
_PARTS = (Part.A, Part.B, Part.ROUTER)
# What of an expert that a gate does not pick is not needed. signed, mixing and response have gradients for all experts.
_SPARED = {"top_k": (Part.A, Part.B), "scaled_dot_product": (Part.B,)}
_TOP_K = ("top_k", "num_experts_per_tok")  # what routers, their blocks and configs call it


def training_flops(model: nn.Module, request: Train) -> int:
    """The operations for one token of training ``request`` on the base ``model``."""
    bank = {key: value.numel() for key, value in request.bank.tensors.items() if key.part in _PARTS}
    return (_FORWARD + _INPUT) * _base_size(model) + sum(_operations(bank, request).values())


def active_flops(model: nn.Module, request: Train) -> int:
    """As :func:`training_flops`, if experts that a token does not use were left out.

    Where the gate picks k of N experts, each counts for k / N of the tokens; routers count for all.
    """
    bank, gate = request.bank, request.bank.gate
    sizes = {key: value.numel() for key, value in bank.tensors.items() if key.part in _PARTS}
    spared, routed = _SPARED.get(gate.name, ()), _routed(bank)
    total = (_FORWARD + _INPUT) * _base_size(model)
    for key, cost in _operations(sizes, request).items():
        experts = routed.get(key.module, 0)
        if key.part in spared and key.expert not in (SHARED, FOLDED):
            cost = cost * min(gate.options_for(key.module)["k"], experts) // experts
        total += cost
    return total


def _operations(sizes: dict[Key, int], request: Train) -> dict[Key, int]:
    """The operations for each of a bank's tensors and one token."""
    each = {key: _FORWARD + _INPUT + _OWN * (key in request.trainable) for key in sizes}
    return {key: cost * sizes[key] for key, cost in each.items()}


def _routed(bank: Bank) -> dict[str, int]:
    """How many experts the gate weighs, by module."""
    count: dict[str, int] = {}
    for key in bank.tensors:
        if key.part is Part.A and key.expert not in (SHARED, FOLDED):
            count[key.module] = count.get(key.module, 0) + 1
    return count


def _base_size(model: nn.Module) -> int:
    """The numbers in the base's matrices that a token is multiplied with; those of a quantised layer as unpacked."""
    return sum(_matrix_size(module) for module in model.modules()) + sum(_expert_sizes(model))


def _matrix_size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):  # a quantised one too, whose weight is packed
        return module.in_features * module.out_features
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
    return weight.numel() if is_matrix and weight is not None else 0


def _expert_sizes(model: nn.Module) -> Iterator[int]:
    """The numbers of each tensor that holds all matrices [experts, ., .] of a mixture, that a token is multiplied with.

    A module whose forward gets nothing but the tokens multiplies each with all experts, as Llama 4's does.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        experts = getattr(module, "num_experts", None)
        stacked = [p.numel() for p in module._parameters.values() if p is not None and p.ndim == 3]
        if not stacked or not isinstance(experts, int) or experts < 1:
            continue
        picked = experts
        if len(inspect.signature(module.forward).parameters) > 1:
            block = modules[name.rpartition(".")[0]]
            picked = _picked([module, block, *block.children(), getattr(model, "config", None)]) or experts
        yield from (size * min(picked, experts) // experts for size in stacked)


def _picked(places: Iterable[object]) -> int | None:
    """How many experts a token is routed to, from the first of ``places`` that says it."""
    for place in places:
        for name in _TOP_K:
            number = getattr(place, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return number
    return None
