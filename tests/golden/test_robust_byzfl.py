"""The robust rules against ByzFL 0.0.11: ``robust.json``, made by ``make_robust.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.ops.robust import (
    centered_clipping,
    clipping,
    combine,
    geometric_median,
    gram,
    neighbour_mixing,
    norms,
)

GOLDEN = json.loads(Path(__file__).with_name("robust.json").read_text())
CASES = GOLDEN["cases"]
RULES = ("mean", "median", "trimmed_mean", "krum", "multi_krum")

assert GOLDEN["byzfl"] == "0.0.11"
assert len(CASES) == 5


def vectors(case: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Every vector as two tensors, because an update is several."""
    return [{"a": row[:2].reshape(2, 1), "b": row[2:]} for row in torch.tensor(case["vectors"], dtype=torch.float64)]


def whole(value: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value["a"].flatten(), value["b"]])


def expect(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_that_of_byzfl(rule: Any) -> None:
    for case in CASES:
        x, f = vectors(case), case["attackers"]
        expect(whole(combine(rule, x, torch.eye(len(x)).double(), gram(x), f)), case[rule])


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum"])
def test_a_rule_after_mixing_is_that_of_byzfl(rule: Any) -> None:
    for case in CASES:
        x, f = vectors(case), case["attackers"]
        mixing = neighbour_mixing(gram(x), f)
        expect(torch.stack([whole(v) for v in mixed(x, mixing)]), case["nnm"])
        expect(whole(combine(rule, x, mixing, gram(x), f)), case[f"nnm + {rule}"])


def test_the_iterations_are_those_of_byzfl() -> None:
    for case in CASES:
        x = torch.tensor(case["vectors"], dtype=torch.float64)
        products = gram(vectors(case))
        expect(geometric_median(products, 0.1, 3) @ x, case["geometric_median"])
        expect(centered_clipping(products, 2.5, 4) @ x, case["centered_clipping"])


def test_the_clip_is_that_of_byzfl() -> None:
    for case in CASES:
        x, f = torch.tensor(case["vectors"], dtype=torch.float64), case["attackers"]
        products, n = gram(vectors(case)), len(x)
        expect(x * (3.0 / norms(products)).clamp_max(1.0)[:, None], case["clip"])
        cut = n - int((2 * f / n) * (n - f))  # ARC's: its threshold is the cut-th smallest norm
        expect(x * clipping(products, (cut - 1) / (n - 1))[:, None], case["arc"])


def mixed(x: list[dict[str, Tensor]], mixing: Tensor) -> list[dict[str, Tensor]]:
    return [{key: torch.tensordot(row, torch.stack([v[key] for v in x]), 1) for key in x[0]} for row in mixing]
