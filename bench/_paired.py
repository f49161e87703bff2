"""Runs held against a control on the same seeds and clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coterie.ops.statistics import bootstrap_interval, holm, sign_flip_p

Scores = Mapping[tuple[str, int], Mapping[str, float]]  # of every client, by name and seed


def against(scores: Scores, control: str) -> list[dict[str, Any]]:
    """Every name less ``control`` on the same seeds, in points, and two tests that they are alike.

    ``p_seeds`` flips the signs of the seeds' differences, ``p_clients`` those of the clients' (means over the seeds);
    ``holm``: the latter adjusted for all names. Intervals are by bootstrap over clients.
    """
    tested: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for name, _ in scores if name != control):
        seeds = [seed for of, seed in scores if of == name and (control, seed) in scores]
        pairs = [(scores[name, seed], scores[control, seed]) for seed in seeds]
        if not pairs:
            continue
        table = 100 * np.array([[mine[c] - other[c] for c in sorted(other)] for mine, other in pairs])
        line = {"name": name, "seeds": seeds, "points": float(table.mean()), "by_seed": table.mean(1).tolist()}
        line |= {"ahead": int((table.mean(1) > 0).sum()), "interval": list(bootstrap_interval(table))}
        by_seeds = sign_flip_p(table.mean(1)[None]) if len(seeds) > 1 else 1.0  # one sign shows nothing
        tested.append(line | {"p_seeds": by_seeds, "p_clients": sign_flip_p(table)})
    adjusted = holm({line["name"]: line["p_clients"] for line in tested})
    return [line | {"holm": adjusted[line["name"]]} for line in tested]
