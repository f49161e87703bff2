"""Every gate against a loop that follows its definition, its gradient, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coterie.nn.gates import gates, mixing, response, signed, slot_top_k, softmax, top_k
from coterie.ops.streams import stream

torch.set_num_threads(1)


def logits(rows: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, slots, generator=stream(seed, "logits"), dtype=torch.float64).mul(3).to(dtype)


def by_loop(p: Tensor, k: int, serves: list[int], experts: int) -> Tensor:
    """Softmax over the k largest outputs of each row, added up by the expert that a slot serves."""
    rows = []
    for row in p:
        picks = sorted(range(len(row)), key=lambda j: -float(row[j].detach()))[:k]
        weights = torch.softmax(torch.stack([row[j] for j in picks]), 0)
        rows.append(
            torch.stack(
                [
                    sum((w for w, j in zip(weights, picks, strict=True) if serves[j] == e), 0 * row[0])
                    for e in range(experts)
                ]
            )
        )
    return torch.stack(rows)


CASES: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax-4": (4, lambda p: softmax(p, None), lambda p: by_loop(p, 4, [0, 1, 2, 3], 4)),
    "softmax-1": (1, lambda p: softmax(p, None), lambda p: by_loop(p, 1, [0], 1)),
    "top_k-1": (5, lambda p: top_k(p, None, k=1), lambda p: by_loop(p, 1, list(range(5)), 5)),
    "top_k-2": (5, lambda p: top_k(p, None, k=2), lambda p: by_loop(p, 2, list(range(5)), 5)),
    "top_k-9": (5, lambda p: top_k(p, None, k=9), lambda p: by_loop(p, 5, list(range(5)), 5)),
    "slot_top_k-1": (1, lambda p: slot_top_k(p, None, own=0), lambda p: by_loop(p, 1, [0], 1)),
    "slot_top_k-2": (3, lambda p: slot_top_k(p, None, own=0), lambda p: by_loop(p, 2, [0, 1, 0], 2)),
    "slot_top_k-4": (7, lambda p: slot_top_k(p, None, own=2), lambda p: by_loop(p, 4, [0, 1, 2, 3, 2, 2, 2], 4)),
    "slot_top_k-200": (
        399,
        lambda p: slot_top_k(p, None, own=7),
        lambda p: by_loop(p, 200, [*range(200), *[7] * 199], 200),
    ),
}


def test_the_gates_are_found_by_looking() -> None:
    assert {"constant", "softmax", "top_k", "slot_top_k"} <= set(gates())
    assert not any(name.startswith("_") or name == "gates" for name in gates())
    assert {case.split("-")[0] for case in CASES} | {"constant"} <= set(gates())


def test_constant_is_one_for_every_expert() -> None:
    assert gates()["constant"](None, None) is None


@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case: str) -> None:
    slots, gate, wanted = CASES[case]
    p = logits(2 if slots > 99 else 40, slots)
    torch.testing.assert_close(gate(p), wanted(p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradient(case: str) -> None:
    slots, gate, wanted = CASES[case]
    p = logits(2 if slots > 99 else 12, slots)
    if slots < 99:
        assert torch.autograd.gradcheck(gate, p.clone().requires_grad_())
    probe = torch.randn(gate(p).shape, generator=stream(0, "probe"), dtype=p.dtype)
    ours, theirs = (
        torch.autograd.grad((function(q) * probe).sum(), q)[0]
        for function in (gate, wanted)
        for q in [p.clone().requires_grad_()]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("experts", [1, 2, 3, 6])
def test_own_expert_is_always_in(experts: int) -> None:
    """M - 1 slots are not the client's own, and M are picked; between 1 and M experts are in use."""
    for own in range(experts):
        g = slot_top_k(logits(500, 2 * experts - 1, seed=own), None, own=own)
        used = (g > 0).sum(1)
        assert bool((g[:, own] > 0).all())
        assert int(used.min()) >= 1
        assert int(used.max()) <= experts
        if 1 < experts < 4:
            assert set(used.tolist()) == set(range(1, experts + 1))
        torch.testing.assert_close(g.sum(1), torch.ones(500, dtype=g.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_takes_its_softmax_in_float32(dtype: torch.dtype) -> None:
    p = logits(50, 7, dtype=dtype)
    found = slot_top_k(p, None, own=1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, slot_top_k(p.float(), None, own=1).to(dtype), rtol=0, atol=0)


def test_a_first_use_in_inference_mode_does_not_spoil_training() -> None:
    """The gate keeps a constant from one call to the next; autograd refuses one that was made in inference mode."""
    with torch.inference_mode():
        slot_top_k(logits(2, 21), None, own=9)
    p = logits(2, 21).requires_grad_()
    slot_top_k(p, None, own=9).sum().backward()
    assert p.grad is not None


@pytest.mark.parametrize("own", [-1, 3, 17])
def test_an_own_expert_that_is_none_is_refused(own: int) -> None:
    with pytest.raises(ValueError, match=f"own = {own}"):
        slot_top_k(logits(2, 5), None, own=own)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="4 slots"):
        slot_top_k(logits(2, 4), None, own=0)
    with pytest.raises(ValueError, match="k is 0"):
        top_k(logits(2, 4), None, k=0)
    for gate, options in ((softmax, {}), (top_k, {"k": 2}), (slot_top_k, {"own": 0})):
        with pytest.raises(ValueError, match="router"):
            gate(None, None, **options)


def test_signed_is_a_weight_for_each_expert_whatever_the_token() -> None:
    w = logits(5, 1)
    assert torch.equal(signed(w, None), w.T)
    picks = w[:, 0].abs().argsort(descending=True)[:2]
    kept = torch.zeros(5, dtype=w.dtype).index_copy(0, picks, w[picks, 0])
    assert torch.equal(signed(w, None, k=2), kept.unsqueeze(0))
    assert torch.equal(signed(w, None, k=9), w.T)
    wanted = torch.randn(1, 5, generator=stream(0, "probe"), dtype=w.dtype)
    grads = [
        torch.autograd.grad((signed(v, None, k=k) * wanted).sum(), v)[0]
        for k in (0, 2)
        for v in [w.clone().requires_grad_()]
    ]
    assert torch.equal(grads[0], wanted.T)
    assert torch.equal(grads[1], wanted.T)  # inactive experts can come back


def test_response_prefers_the_experts_whose_a_responds() -> None:
    z = torch.tensor([[[3.0], [-4.0], [0.0]], [[0.3], [-0.4], [0.0]], [[0.0], [0.0], [0.0]]], dtype=torch.float64)
    p = torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)
    g = response(p, z)
    assert g[0].tolist() == pytest.approx([3 / (25 / 3) ** 0.5, 4 / (25 / 3) ** 0.5, 0])
    torch.testing.assert_close(g[1], g[0])  # the size of x does not matter
    assert g[2].tolist() == [0, 0, 0]
    assert response(p, z, k=1).ne(0).sum(1).tolist() == [1, 1, 0]
    low = torch.cat([p, torch.ones(3, 2, dtype=p.dtype)], dim=1)
    torch.testing.assert_close(response(low, z), g + g.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("gate", "columns", "options", "message"),
    [
        (signed, 2, {}, "it must have 1"),
        (response, 1, {}, "it must have 2, or an even number more"),
        (response, 3, {}, "it must have 2, or an even number more"),
        (signed, 1, {"k": -1}, "k is -1"),
        (mixing, 3, {}, "a router of 3 numbers for each of 3 experts; it must have 4"),
    ],
)
def test_tables_of_other_sizes_are_refused(gate: Callable, columns: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(logits(3, columns), logits(4, 3).unsqueeze(-1), **options)
