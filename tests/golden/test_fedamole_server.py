"""FedAMoLE's server against the published code's: experts over their holders, embeddings, and the next assignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coterie.methods.fedamole import FedAMoLE, FedAMoLESettings, FedAMoLEState
from coterie.methods.plan import Plan
from coterie.types import NO_EXPERT, SHARED, BaseSpec, ClientInfo, Key, Part, Reply, Target, Tensors

FILE = np.load(Path(__file__).parent / "fedamole_aggregate.npz", allow_pickle=False)
EXPERTS, CLIENTS = FILE["dispatch"].shape
RANK = int(FILE["r"])
PROJECTION = Key("q", NO_EXPERT, Part.ROUTER)


def upload(client: int) -> dict[Key, torch.Tensor]:
    """What the client sends: the file numbers the shared expert last."""
    found = {
        PROJECTION: FILE[f"c{client}_token_proj"],
        PROJECTION._replace(part=Part.EMBEDDING): FILE[f"c{client}_token_emb"][0],
    }
    for row, number in enumerate(FILE[f"c{client}_ids"]):
        expert = SHARED if number == EXPERTS else int(number)
        found |= {
            Key("q", expert, Part.A): FILE[f"c{client}_A"][row],
            Key("q", expert, Part.B): FILE[f"c{client}_B"][row],
        }
        if expert != SHARED:
            found[Key("q", expert, Part.EMBEDDING)] = FILE[f"c{client}_expert_embs"][row]
    return {key: torch.from_numpy(value) for key, value in found.items()}


def test_averages_and_the_next_assignment_equal_the_published_servers() -> None:
    paper: dict[str, Any] = {"embed": "after", "embed_rows": "held_out", "inertia": 0.0, "prototype": "experts"}
    settings = FedAMoLESettings(experts=EXPERTS, clients_per_expert=2, min_experts=2, max_experts=8, top_k=2, **paper)
    method = FedAMoLE(settings, Plan(rank=RANK, alpha=RANK, rounds=10))
    clients = [ClientInfo(f"c{i}", 10) for i in range(CLIENTS)]
    before = method.init(BaseSpec((Target("q", 8, 7),)), clients)
    before = FedAMoLEState(
        **{**vars(before), "holds": {"q": torch.from_numpy(FILE["dispatch"]).bool()}, "pool": doubled(before.pool)}
    )
    sent = {f"c{i}": Reply(upload(i), 10) for i in range(CLIENTS)}
    for i, client in enumerate(clients):
        assert upload(i).keys() == method.expects(before, client, 1).keys()
    after = method.aggregate(before, sent, 1)

    for e in range(EXPERTS + 1):
        number = SHARED if e == EXPERTS else e
        for part in (Part.A, Part.B):
            assert_equal(after.pool[Key("q", number, part)], FILE[f"out_{part.value}"][e])
    assert_equal(after.pool[PROJECTION], FILE["out_token_proj"])
    assert_equal(after.expert_embeddings["q"], FILE["out_expert_embs"], 1e-6)  # the server keeps them in float32
    assert_equal(after.token_embeddings["q"], FILE["out_token_embs"], 1e-6)
    assert_equal(torch.from_numpy(method._scores(after)[0]), FILE["out_next_probs"], 1e-6)
    probability, chosen = FILE["out_next_probs"], after.holds["q"].numpy()
    assert abs((probability * chosen).sum() - (probability * FILE["out_next_dispatch"]).sum()) < 1e-6
    assert (chosen.sum(1) == 2).all()
    assert 2 <= chosen.sum(0).min() <= chosen.sum(0).max() <= 8


def doubled(tensors: Tensors) -> dict[Key, torch.Tensor]:
    return {key: value.double() for key, value in tensors.items()}


def assert_equal(found: torch.Tensor, wanted: np.ndarray, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=0, atol=atol)
