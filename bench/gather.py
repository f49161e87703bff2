"""SmartFed's layer over a large pool: all rank-1 experts of a matrix, or the active ones alone, forward and backward.

One adapted Linear (d to d) with N frozen experts of rank 1, a router [N, d] that trains, the top K per token.
``bank`` is Coterie's layer: A of all experts, weights of which N - K are 0, B of all. ``bag`` takes A of all and sums
the K active rows of B (``embedding_bag``). ``gather`` takes the K active rows of A and of B alone. All three need the
router's N scores, as many multiplications as A x. ``plain`` is one LoRA of rank N without a router, all of it training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _harness import arguments, interleaved, table, write
from torch import Tensor, nn
from torch.nn import functional

from coterie.nn import bank as bank_layer
from coterie.nn.attach import attach
from coterie.ops.streams import stream
from coterie.types import NO_EXPERT, Bank, GateSpec, Key, Part

ROUTER = Key("0", NO_EXPERT, Part.ROUTER)


class Sparse(nn.Module):
    """y = W0 x + K sum over the top K of g_i B_i (A_i x), touching the active experts of B, or of A and B, alone."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, router: Tensor, k: int, both: bool) -> None:
        super().__init__()
        self.base, self.a, self.b, self.k, self.both = base, a, b.contiguous(), k, both
        self.router = nn.Parameter(router.clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, picks = (rows @ self.router.T).topk(self.k, dim=-1, sorted=False)
        if self.both:
            h = torch.einsum("ni,nki->nk", rows, functional.embedding(picks, self.a))
        else:
            h = (rows @ self.a.T).gather(1, picks)
        weights = values.softmax(-1) * self.k * h
        out = functional.embedding_bag(picks, self.b, per_sample_weights=weights, mode="sum")
        return self.base(x) + out.reshape(*x.shape[:-1], -1)


def bank(base: nn.Linear, a: Tensor, b: Tensor, router: Tensor, k: int) -> nn.Module:
    twin = nn.Linear(base.in_features, base.out_features)
    twin.load_state_dict(base.state_dict())
    module = nn.Sequential(twin).requires_grad_(False)
    tensors = {ROUTER: router}
    for i in range(len(a)):
        tensors |= {Key("0", i, Part.A): a[i : i + 1], Key("0", i, Part.B): b[i : i + 1].T}
    attach(module, Bank(tensors, GateSpec("top_k", {"k": k, "scale": "active"})), [ROUTER])
    return module


class Plain(nn.Module):
    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.a.T @ self.b
        return out


def step(module: nn.Module, x: Tensor, probe: Tensor) -> Callable[[], Callable[[], Any]]:
    def prepare() -> Callable[[], Any]:
        module.zero_grad(set_to_none=True)
        mine = x.detach().requires_grad_()

        def run() -> None:
            module(mine).backward(probe)

        return run

    return prepare


def measure(d: int, experts: int, active: tuple[int, ...], tokens: int, repeats: int) -> list[dict[str, Any]]:
    draw = stream(0, "bench", d, experts)
    x, probe = (torch.randn(tokens, d, generator=draw) for _ in range(2))
    a, b, router = (torch.randn(experts, d, generator=draw) * d**-0.5 for _ in range(3))
    base = nn.Linear(d, d).requires_grad_(False)
    forms: dict[str, nn.Module] = {"plain": Plain(base, a, b)}
    for k in active:
        forms[f"bank {k}"] = bank(base, a, b, router, k)
        forms[f"bag {k}"] = Sparse(base, a, b, router, k, both=False)
        forms[f"gather {k}"] = Sparse(base, a, b, router, k, both=True)
        expected = forms[f"bank {k}"](x)
        for form in ("bag", "gather"):
            torch.testing.assert_close(forms[f"{form} {k}"](x), expected, rtol=1e-3, atol=1e-3)
    times = interleaved({name: step(module, x, probe) for name, module in forms.items()}, repeats)
    return [
        {
            "d": d,
            "experts": experts,
            "active": k,
            "bank_ms": 1e3 * times.median(f"bank {k}"),
            "bag_over_bank": times.cpu_ratio(f"bag {k}", f"bank {k}"),
            "gather_over_bank": times.cpu_ratio(f"gather {k}", f"bank {k}"),
            "bank_over_plain": times.cpu_ratio(f"bank {k}", "plain"),
        }
        for k in active
    ]


def main() -> None:
    options = arguments(__doc__ or "")
    quick = options.quick
    bank_layer.SPARSE_FROM = sys.maxsize  # the layer itself would choose
    rows = []
    for d in (64,) if quick else (768, 4096):
        for experts in (16,) if quick else (16, 64, 256, 1024):
            tokens = 32 if quick else 512 if d > 1000 else 1024
            rows += measure(d, experts, (4,) if quick else (4, 16), tokens, 1 if quick else 7)
    table("forward and backward over all rank-1 experts, or the active ones alone", rows)
    write("gather", options, {"rows": rows})


if __name__ == "__main__":
    main()
