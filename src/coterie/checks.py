"""What a reply must be before it counts: the keys, shapes and dtypes asked for, finite values, a bounded norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from coterie.types import Key, Reply


def fault_of(reply: Reply, expected: Mapping[Key, tuple[int, ...]], norm_bound: float, num_train: int) -> str | None:
    """Why ``reply`` must be left out, or None if it is good."""
    if missing := sorted(expected.keys() - reply.tensors.keys()):
        return f"the reply has no {_some(missing)}"
    if surplus := sorted(reply.tensors.keys() - expected.keys()):
        return f"the reply has {_some(surplus)}, which nobody asked for"
    for key, value in reply.tensors.items():
        if tuple(value.shape) != expected[key]:
            return f"{key} has the shape {list(value.shape)}, not {list(expected[key])}"
        if not value.is_floating_point():
            return f"{key} has the dtype {value.dtype}, not a floating one"
        if not bool(torch.isfinite(value).all()):
            return f"{key} has values that are not finite"
    norm = float(sum(value.double().square().sum() for value in reply.tensors.values())) ** 0.5
    if norm > norm_bound:
        return f"the reply's norm {norm:.3g} is above the bound {norm_bound:g} ([run] norm_bound)"
    if not 1 <= reply.num_examples <= num_train:
        return f"the reply says that it stands on {reply.num_examples} examples, the client has {num_train}"
    return None


def _some(keys: list[Key]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(str, keys[:3])) + more
