"""FedLEASE's server against the published code's: what every client is sent after a round, with and without router."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.parts import start_router
from coterie.methods.plan import Plan
from coterie.types import NO_EXPERT, BaseSpec, ClientInfo, Key, Part, Reply, Target

FILE = np.load(Path(__file__).parent / "fedlease_server_aggregation.npz", allow_pickle=False)
NAME = re.compile(r"(?P<way>in|out_route[01]):base_model\.model\.(?P<module>.*)\.lora_(?P<part>A|B|route)(?P<e>\d*)")


def values(way: str, client: int) -> dict[Key, torch.Tensor]:
    found = {}
    for name in FILE.files:
        match = NAME.match(name)
        if match and match["way"] == way:
            part = Part.ROUTER if match["part"] == "route" else Part(match["part"])
            found[Key(match["module"], int(match["e"] or NO_EXPERT), part)] = torch.from_numpy(FILE[name][client])
    return found


@pytest.mark.parametrize("way", ["out_route1", "out_route0"])
def test_what_each_client_is_sent_equals_the_published_servers(way: str) -> None:
    groups = {int(g): members for g, members in json.loads(str(FILE["groups"])).items()}
    clusters = {f"c{member}": g for g, members in groups.items() for member in members}
    modules = sorted({key.module for key in values("in", 0)})
    assert len(clusters) == 6
    assert len(modules) == 4
    base = BaseSpec(tuple(Target(m, 8, 8) for m in modules))
    router = "cluster" if way == "out_route1" else "personal"
    plan = Plan(rank=3, alpha=3, rounds=10)
    method = FedLEASE(FedLEASESettings(distance="B", warmup_rounds=1, router=router), plan)
    routers = {g: start_router(base, plan, 2 * len(groups) - 1) for g in groups}
    allocation = Allocation(clusters, {}, tuple(sorted(clusters)), torch.zeros(6, 6, dtype=torch.float64))
    state = FedLEASEState(base, {}, dict.fromkeys(clusters, ()), allocation=allocation, routers=routers)
    replies = {}
    for client, own in clusters.items():
        mine = values("in", int(client[1:]))
        sent = {k: v for k, v in mine.items() if k.expert == own or (k.part is Part.ROUTER and router == "cluster")}
        replies[client] = Reply(sent, 10)
    state = method.aggregate(state, replies, rnd=2)
    infos = [ClientInfo(client, 10) for client in clusters]
    compared = 0
    for client, ins in method.configure(state, infos, rnd=3).items():
        expected = values(way, int(client[1:]))
        for key, value in ins.tensors.items():
            if key.part is not Part.ROUTER or router == "cluster":
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
                compared += 1
    assert compared == 6 * 4 * (6 + (router == "cluster"))
