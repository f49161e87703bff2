"""SmartFed's routers: where each kind starts, and the gate that it works through."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from coterie.methods.smartfed.settings import SmartFedSettings
from coterie.ops.streams import kaiming_uniform, stream
from coterie.types import NO_EXPERT, SHARED, GateSpec, Key, Part


def start_routers(settings: SmartFedSettings, seed: int, shapes: Mapping[str, tuple[int, int]]) -> dict[Key, Tensor]:
    """The router of each matrix, the same for all clients; ``shapes`` has its number of experts N and its d_in.

    ``paper``: W [N, d_in], as ``torch.nn.Linear``. ``signed``: w [N, 1] = K/N, so that N experts that weigh alike add
    up to the budget; with ``sparse`` 1, because only K of them are active, and at most a thousandth more, at random,
    or else the pool's first adapters would be. ``mixing``: [w, C] [N, 1 + N], w = K/N and C = 0. ``response``:
    [w, m, U, V] [N, 2 + 2q], w and m half of K/N each (of 1 with ``sparse``), U = 0: the first round prefers the
    experts whose A responds to the client's text.
    """
    return {
        Key(module, NO_EXPERT, Part.ROUTER): _start(settings, module, seed, *shape)
        for module, shape in sorted(shapes.items())
    }


def _start(settings: SmartFedSettings, module: str, seed: int, experts: int, width: int) -> Tensor:
    draw = stream(seed, "router", module)
    if settings.router == "paper":
        return kaiming_uniform((experts, width), draw)
    each = 1.0 if settings.sparse else min(settings.active, experts) / experts
    if settings.router == "signed":
        started = torch.full((experts, 1), each)
        return started + 1e-3 * torch.rand(experts, 1, generator=draw) if settings.sparse else started
    if settings.router == "mixing":
        return torch.cat([torch.full((experts, 1), each), torch.zeros(experts, experts)], dim=1)
    halves, q = torch.full((experts, 2), each / 2), settings.router_rank
    random = torch.randn(experts, q, generator=draw) * experts**-0.5
    return torch.cat([halves, torch.zeros(experts, q), random], dim=1)


def gate_of(settings: SmartFedSettings, quotas: Mapping[str, int]) -> GateSpec:
    """The gate, with each matrix's quota as the number of its active experts."""
    each = {module: {"k": k} for module, k in quotas.items()}
    if settings.router != "paper":
        return GateSpec(settings.router, {}, each if settings.sparse else {})
    scale = float(settings.active) if settings.gate_scale == "budget" else settings.gate_scale
    return GateSpec("top_k", {"k": settings.active, "scale": scale}, each)


def comparable(pool: Mapping[Key, Tensor], trained: Collection[Key]) -> dict[Key, Tensor]:
    """The pool's experts with A of length 1 and its length in B: then |A x| says how well x fits A, not how long A is.

    B A is the same. Experts in ``trained`` stay as they are, because A and B are averaged apart.
    """
    scaled = dict(pool)
    for key, a in pool.items():
        size = a.norm() if key.part is Part.A and key.expert != SHARED and key not in trained else None
        if size is not None and size > 0:
            b = key._replace(part=Part.B)
            scaled |= {key: a / size, b: pool[b] * size}
    return scaled
