"""Floating-point operations of training, counted from shapes and tokens.

A matrix of n numbers costs 2 n operations for a token in the forward pass, and 2 n for the gradient of its input. One
that trains costs 2 n more for its own gradient. The base's Linear layers do not train. All experts of a bank count,
whatever the gate picks: the layer multiplies with all of them. Left out are attention's products of tokens, norms,
embeddings, padding, what gradient checkpointing computes again, and the base's own experts where it is a mixture of
experts that keeps them in one tensor; the operations for layers below the lowest target, whose gradients nobody needs,
are in.
"""

from __future__ import annotations

from torch import nn

from coterie.requests import Train
from coterie.types import Part

_FORWARD, _INPUT, _OWN = 2, 2, 2


def training_flops(model: nn.Module, request: Train) -> int:
    """The operations for one token of training ``request`` on the base ``model``."""
    parts = (Part.A, Part.B, Part.ROUTER)
    bank = {key: value.numel() for key, value in request.bank.tensors.items() if key.part in parts}
    own = sum(size for key, size in bank.items() if key in request.trainable)
    return (_FORWARD + _INPUT) * (_base_size(model) + sum(bank.values())) + _OWN * own


def _base_size(model: nn.Module) -> int:
    """The numbers in the base's matrices that a token is multiplied with; those of a quantised layer as unpacked."""
    return sum(_matrix_size(module) for module in model.modules())


def _matrix_size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):  # a quantised one too, whose weight is packed
        return module.in_features * module.out_features
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
    return weight.numel() if is_matrix and weight is not None else 0
