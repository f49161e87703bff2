"""Make ``robust.json``: what ByzFL 0.0.11 answers on small random vectors (byzfl is in no extra: see decision 0036).

ByzFL imports torchvision, which the rules do not use and which need not be installed: it is replaced with a mock. In an
environment of its own:

    pip install --no-deps byzfl==0.0.11
    pip install numpy torch scipy matplotlib seaborn
    python tests/golden/make_robust.py
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
    sys.modules[name] = MagicMock()

byzfl = importlib.import_module("byzfl")

CASES = ((8, 2, 11), (7, 2, 5), (5, 1, 9), (4, 1, 6), (3, 0, 4))  # vectors, attackers, dimension


def case(n: int, f: int, d: int) -> dict[str, object]:
    rng = np.random.default_rng(100 * n + d)
    x = rng.normal(size=(n, d)) + 1.0
    x[:f] *= -20.0  # the attackers
    answers = {
        "mean": byzfl.Average()(x),
        "median": byzfl.Median()(x),
        "trimmed_mean": byzfl.TrMean(f)(x),
        "geometric_median": byzfl.GeometricMedian(nu=0.1, T=3)(x),
        "krum": byzfl.Krum(f)(x),
        "multi_krum": byzfl.MultiKrum(f)(x),
        "centered_clipping": byzfl.CenteredClipping(L=4, tau=2.5)(x),
        "nnm": byzfl.NNM(f)(x),
        "clip": byzfl.Clipping(3.0)(x.copy()),
        "arc": byzfl.ARC(f)(x.copy()),
        "nnm + median": byzfl.Median()(byzfl.NNM(f)(x)),
        "nnm + multi_krum": byzfl.MultiKrum(f)(byzfl.NNM(f)(x)),
        "nnm + trimmed_mean": byzfl.TrMean(f)(byzfl.NNM(f)(x)),
    }
    return {"attackers": f, "vectors": x.tolist(), **{name: np.asarray(v).tolist() for name, v in answers.items()}}


if __name__ == "__main__":
    content = {"byzfl": version("byzfl"), "cases": [case(*sizes) for sizes in CASES]}
    Path(__file__).with_name("robust.json").write_text(json.dumps(content) + "\n")
