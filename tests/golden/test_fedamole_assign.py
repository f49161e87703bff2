"""The reverse selection against the published FedAMoLE code, which solves it as an integer program with SCIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coterie.ops.assign import Limits, assign, check
from coterie.types import CoterieError

FILES = {path.stem.removeprefix("fedamole_rsea_"): path for path in Path(__file__).parent.glob("fedamole_rsea_*.npz")}
INFEASIBLE = {
    "infeasible_capacity_30x10_m5": (
        "max_experts = 5 .*: raise max_experts to at least 6, or lower the experts to at most 25"
    ),
    "infeasible_min_4x10": (
        "min_experts = 2 .*: raise the experts to at least 10, or raise clients_per_expert to at least 5"
    ),
    "homo_indivisible_10x3": (
        "10 experts with clients_per_expert = 2 make 20 picks .* 3 clients .* lower the experts to 9, or"
    ),
}


def limits_of(golden) -> Limits:
    return Limits(
        *(int(golden[name]) for name in ("expert_choices", "min_experts", "max_experts")), bool(golden["homo"])
    )


def test_every_golden_case_is_covered() -> None:
    assert len(FILES) == 8
    assert INFEASIBLE.keys() == {name for name, path in FILES.items() if str(np.load(path)["status"]) != "optimal"}


@pytest.mark.parametrize("name", sorted(FILES.keys() - INFEASIBLE))
def test_the_same_objective(name: str) -> None:
    golden = np.load(FILES[name], allow_pickle=False)
    limits = limits_of(golden)
    check(*golden["prob"].shape, limits)
    (z,) = assign(golden["prob"][None], limits)
    assert z.sum(axis=1).tolist() == [limits.clients_per_expert] * len(z)
    held = z.sum(axis=0)
    assert limits.min_experts <= held.min() <= held.max() <= limits.max_experts
    assert not limits.homogeneous or np.ptp(held) == 0
    objective = float(golden["prob"].astype(np.float64)[z].sum())
    assert objective == pytest.approx(float(golden["objective"]), rel=0, abs=1e-7)
    assert np.array_equal(z, golden["dispatch"] == 1)  # the scores are random: the optimum is the only one


def test_all_modules_in_one_call() -> None:
    names = ["30x10_c2_m8", "30x10_c2_m8_peaked"]
    golden = [np.load(FILES[name], allow_pickle=False) for name in names]
    assert limits_of(golden[0]) == limits_of(golden[1])
    found = assign(np.stack([case["prob"] for case in golden]), limits_of(golden[0]))
    assert np.array_equal(found, np.stack([case["dispatch"] for case in golden]) == 1)


@pytest.mark.parametrize("name", sorted(INFEASIBLE))
def test_what_the_reference_cannot_solve_is_refused(name: str) -> None:
    golden = np.load(FILES[name], allow_pickle=False)
    for refuse in (
        lambda: check(*golden["prob"].shape, limits_of(golden)),
        lambda: assign(golden["prob"][None], limits_of(golden)),
    ):
        with pytest.raises(CoterieError, match=INFEASIBLE[name]):
            refuse()
