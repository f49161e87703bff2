"""Sums of low-rank products B A, cut to a rank, and their norms: from the factors, B A itself is not formed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor]  # B [d_out, r], A [r, d_in]


def stacked(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """``sum_i w_i B_i A_i`` exactly, as one product of rank ``sum_i r_i``: B = [w_1 B_1 ...], A = [A_1; ...]."""
    columns = torch.cat([w * b for w, (b, _) in zip(weights, products, strict=True)], dim=1)
    return columns, torch.cat([a for _, a in products], dim=0)


def decomposed(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U [d_out, k], S [k], V^T [k, d_in] of a product, k = min(d_out, d_in, r).

    QR of both factors, then the decomposition of an [r, r] matrix at most, in float64. Signs are fixed: the largest
    entry of each u is positive, whatever LAPACK returns.
    """
    b, a = map(_plain, product)
    left, of_left = torch.linalg.qr(b)
    right, of_right = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(of_left @ of_right.T, full_matrices=False)
    u, vt = left @ u, vt @ right.T
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return u * sign, s, vt * sign.unsqueeze(1)


def truncated(product: Product, rank: int) -> Product:
    """The nearest product of at most ``rank``: B = U S [d_out, rank], A = V^T [rank, d_in], padded with zeros.

    In the factors' own dtype. Raises :class:`ValueError` for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"a product cut to rank {rank}; a rank is at least 1")
    u, s, vt = decomposed(product)
    kept = min(rank, len(s))
    b = product[0].new_zeros(product[0].shape[0], rank)
    a = product[1].new_zeros(rank, product[1].shape[1])
    b[:, :kept] = (u[:, :kept] * s[:kept]).to(b.dtype)
    a[:kept] = vt[:kept].to(a.dtype)
    return b, a


def compact(product: Product) -> Product:
    """The same product with a rank of at most min(d_out, d_in): itself, where its rank is no larger."""
    most = min(product[0].shape[0], product[1].shape[1])
    return product if product[0].shape[1] <= most else truncated(product, most)


def norm(product: Product) -> float:
    """The Frobenius norm of B A, from Gram matrices [r, r]."""
    b, a = map(_plain, product)
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _plain(matrix: Tensor) -> Tensor:
    """A copy in float64 whose strides depend on its shape alone.

    A matrix of one column may have the strides of a row; its products then differ in the last bits.
    """
    return matrix.double().clone(memory_format=torch.contiguous_format)
