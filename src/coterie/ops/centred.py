"""Distances between clients after what all of them share is taken off: one cosine of all modules together.

What clients have in common (the start of training, the language of their texts) can be large beside what parts them.
With v_i the vector of client i over all modules, and u_i = v_i / |v_i|,

    d(i, j) = 1 - cos(u_i - m, u_j - m),    m = sum_i w_i u_i

No vector as long as v is ever made: everything follows from the Gram matrix of the v_i, which is a sum over modules.
N is the number of clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coterie.ops.cluster import Array, Feature, product_gram

_ROUNDING = 1e-9  # beside 1, the largest squared length before the mean is taken off


def gram(features: Sequence[Sequence[Tensor]]) -> Array:
    """The inner products [N, N] of the clients' ``features[i][module]``, over all modules together, in float64.

    Raises :class:`ValueError` where clients differ in modules or sizes.
    """
    _check_modules(features)
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for tensors in zip(*features, strict=True):
        if len({tensor.numel() for tensor in tensors}) != 1:
            raise ValueError(f"a Gram matrix of tensors of shapes {sorted({tuple(t.shape) for t in tensors})}")
        rows = torch.stack([tensor.detach().reshape(-1).double() for tensor in tensors])
        total += rows @ rows.T
    return np.asarray(total.numpy())


def lora_gram(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]], feature: Feature = "B") -> Array:
    """The inner products [N, N] of LoRAs by their B, their A or their product, all [client][module].

    Shapes: ``a[i][l]`` [r, d_in], ``b[i][l]`` [d_out, r]. No product is formed. Raises as :func:`gram`.
    """
    if feature != "BA":
        return gram(b if feature == "B" else a)
    _check_modules(a)
    total = torch.zeros(len(a), len(a), dtype=torch.float64)
    for of_a, of_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        total += product_gram(list(zip(of_a, of_b, strict=True)))
    return np.asarray(total.numpy())


def centred_distances(inner: Array, weights: Sequence[float] | None = None) -> Array:
    """The distances [N, N] of the module's docstring from inner products [N, N] of the v_i; zero diagonal.

    ``weights`` are the w_i, which add up to 1; all equal by default. Every client counts with length 1, so none can
    move the mean further than another. A client that is the mean is at distance 1 from every other.
    """
    lengths = np.sqrt(np.diag(inner).clip(min=0))
    lengths[lengths == 0] = 1
    units = inner / lengths / lengths[:, None]
    w = np.full(len(inner), 1 / len(inner)) if weights is None else np.asarray(weights, dtype=np.float64)
    of_mean = units @ w
    centred = units - of_mean - of_mean[:, None] + w @ of_mean
    squares = np.diag(centred).copy()
    squares[squares <= _ROUNDING] = np.inf
    lengths = np.sqrt(squares)
    cosines = centred / lengths / lengths[:, None]
    d: Array = (1 - (cosines + cosines.T) / 2).clip(0, 2)
    np.fill_diagonal(d, 0)
    return d


def _check_modules(features: Sequence[Sequence[Tensor]]) -> None:
    counts = {len(client) for client in features}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"a Gram matrix of clients with {sorted(counts)} modules")
