"""LoRAs as products B A by module, for methods that average products, not factors (:mod:`coterie.ops.lowrank`).

No product is multiplied out: each stays a pair of factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Tensor

from coterie.methods.plan import MethodSettings
from coterie.ops.lowrank import Product, compact, norm, stacked, truncated
from coterie.types import FOLDED, Key, Part, Tensors


class FoldingSettings(MethodSettings):
    """The settings of a method that folds products into the base."""

    folded_rank: int = Field(
        0, ge=0, description="largest rank of what was folded into the base, the rest cut off by SVD; 0: all of it"
    )


def products_of(lora: Tensors) -> dict[str, Product]:
    """B and A of every module of one expert, sorted by module."""
    keys = sorted(key for key in lora if key.part is Part.A)
    return {key.module: (lora[key._replace(part=Part.B)], lora[key]) for key in keys}


def as_lora(products: Mapping[str, Product], expert: int = 0) -> dict[Key, Tensor]:
    """The products as the tensors of an expert."""
    a = {Key(module, expert, Part.A): a for module, (_, a) in products.items()}
    return a | {Key(module, expert, Part.B): b for module, (b, _) in products.items()}


def summed(loras: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Product]:
    """sum_i w_i B_i A_i of every module, exactly: of rank sum_i r_i."""
    parts = [products_of(lora) for lora in loras]
    return {module: stacked([part[module] for part in parts], weights) for module in parts[0]}


def folded(before: Tensors, addition: Mapping[str, Product], most: int) -> dict[Key, Tensor]:
    """``before`` + ``addition`` as the folded expert: exact, or cut to a rank of ``most`` if that is not 0.

    Its rank is at most min(d_out, d_in). ``before`` may be empty, which is zero.
    """
    old = products_of(before)
    sums = {module: stacked([old[module], new], [1.0, 1.0]) if old else new for module, new in addition.items()}
    cut = {
        module: truncated(product, most) if 0 < most < product[1].shape[0] else compact(product)
        for module, product in sums.items()
    }
    return as_lora(cut, FOLDED)


def largest_rank(lora: Tensors) -> int:
    """The largest rank of a module; 0 where there is none."""
    return max((int(value.shape[0]) for key, value in lora.items() if key.part is Part.A), default=0)


def total_norm(products: Mapping[str, Product]) -> float:
    """The Frobenius norm of all modules' products as one vector."""
    return math.sqrt(sum(norm(product) ** 2 for product in products.values()))
