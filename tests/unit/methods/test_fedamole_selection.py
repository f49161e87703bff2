"""What FedAMoLE's experts choose by: the moment and the rows of embeddings, running means, inertia, known groups."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from coterie.methods.fedamole import FedAMoLE, FedAMoLESettings, FedAMoLEState
from coterie.methods.fedamole.selection import (
    affinity,
    at_random,
    by_group,
    knowingly,
    likeness,
    running_mean,
    with_inertia,
)
from coterie.methods.plan import Plan
from coterie.ops.assign import Limits, assign
from coterie.ops.streams import stream
from coterie.requests import HoldOut, Observe, Observed, Train, Trained
from coterie.types import NO_EXPERT, BaseSpec, ClientInfo, CoterieError, Part, Personal, Reply, Target

BASE = BaseSpec((Target("q", 6, 5), Target("v", 6, 5)))
CLIENTS = [ClientInfo(f"{g}{i}", 10, group=g) for g in "abc" for i in range(2)]
LIMITS = Limits(2, 1, 4)


def made(**settings: Any) -> tuple[FedAMoLE, FedAMoLEState]:
    plan = Plan(rank=4, alpha=4, dropout=0.0, rounds=6, head="personal")
    method = FedAMoLE(FedAMoLESettings(**{"experts": 6, "inertia": 0.0, "prototype": "experts", **settings}), plan)
    return method, method.init(BASE, CLIENTS)


def observe(request: Observe) -> Observed:
    """Embeddings that are a function of the bank that is observed."""
    kinds = (Part.A, Part.ROUTER)
    keys = [key for key in request.bank.tensors if key.part in kinds and key.expert != -2]
    found = {k._replace(part=Part.EMBEDDING): request.bank.tensors[k].mean(1) for k in keys}
    return Observed({}, 1, request.wanted(found))


def reply(method: FedAMoLE, state: FedAMoLEState, moved: float) -> tuple[Reply, list[Train | Observe]]:
    """A client's reply, whose training adds ``moved`` to all tensors, and its requests in their order."""
    me = CLIENTS[0]
    program = method.client(method.configure(state, CLIENTS, 1)[me.id], me, Personal())
    requests: list[Train | Observe] = []
    answer: Trained | Observed | None = None
    while True:
        try:
            request = program.send(answer)
        except StopIteration as stop:
            return stop.value.reply, requests
        assert isinstance(request, Train | Observe)
        requests.append(request)
        if isinstance(request, Observe):
            answer = observe(request)
        else:
            answer = Trained({key: v + moved for key, v in request.bank.tensors.items()}, 1.0, 10, 100, 5)


def embeddings(of: Reply) -> dict[str, list[float]]:
    return {str(key): value.tolist() for key, value in of.tensors.items() if key.part is Part.EMBEDDING}


def test_embeddings_before_training_do_not_depend_on_what_is_trained() -> None:
    method, state = made()
    (one, requests), (other, _) = (reply(method, state, moved) for moved in (1.0, -2.0))
    assert [type(request) for request in requests] == [Observe, Train]
    assert one.tensors.keys() == method.expects(state, CLIENTS[0], 1).keys()
    assert embeddings(one) == embeddings(other)
    assert not torch.equal(*(next(iter(r.tensors.values())) for r in (one, other)))
    method, state = made(embed="after")
    (one, requests), (other, _) = (reply(method, state, moved) for moved in (1.0, -2.0))
    assert [type(request) for request in requests] == [Train, Observe]
    assert embeddings(one).keys() == embeddings(other).keys()
    assert embeddings(one) != embeddings(other)


@pytest.mark.parametrize(("prototype", "sent"), [("holders", {-1}), ("experts", {-1, 0, 1, 2, 3, 4, 5})])
def test_embeddings_of_experts_are_sent_only_where_experts_choose_by_them(prototype: str, sent: set[int]) -> None:
    method, state = made(prototype=prototype, embed="before")
    one, _ = reply(method, state, 1.0)
    assert one.tensors.keys() == method.expects(state, CLIENTS[0], 1).keys()
    numbers = {key.expert for key in one.tensors if key.part is Part.EMBEDDING}
    assert NO_EXPERT in numbers <= sent
    assert (len(numbers) > 1) == (prototype == "experts")
    (embeddings,) = (release.what for release in method.releases() if release.measured)
    assert embeddings.endswith("by module") == (prototype == "holders")


@pytest.mark.parametrize(
    ("rows", "trained_without", "observed_on"),
    [
        ("held_out", HoldOut(0.05, 200), HoldOut(0.05, 200)),
        ("training", None, HoldOut(0.05, 200)),
        ("all", None, None),
    ],
)
@pytest.mark.parametrize("moment", ["after", "before"])
def test_the_rows(rows: str, trained_without: HoldOut | None, observed_on: HoldOut | None, moment: str) -> None:
    _, requests = reply(*made(embed=moment, embed_rows=rows), moved=1.0)
    by_type = {type(request): request.hold_out for request in requests}
    assert by_type == {Train: trained_without, Observe: observed_on}


def test_clients_of_one_row_can_take_part_where_none_is_held_out() -> None:
    plan = Plan(rank=4, alpha=4, dropout=0.0, rounds=6, head="personal")
    method = FedAMoLE(FedAMoLESettings(experts=3), plan)
    method.init(BASE, [ClientInfo(c, 1) for c in "abc"])


def scores(seed: int, modules: int = 2, experts: int = 5, clients: int = 4) -> Any:
    return at_random((modules, experts, clients), seed, 0)


def best(of: Any, limits: Limits) -> float:
    """The largest sum of one module's scores [E, n] over all assignments within the limits."""
    sums = {(0,) * of.shape[1]: 0.0}
    for row in of:
        grown: dict[tuple[int, ...], float] = {}
        for held, value in sums.items():
            for chosen in combinations(range(of.shape[1]), limits.clients_per_expert):
                now = tuple(n + (c in chosen) for c, n in enumerate(held))
                grown[now] = max(grown.get(now, -np.inf), value + sum(row[c] for c in chosen))
        sums = grown
    return max(v for held, v in sums.items() if all(limits.min_experts <= n <= limits.max_experts for n in held))


@pytest.mark.parametrize("inertia", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_assignment_is_optimal_for_affinity_and_bonus(seed: int, inertia: float) -> None:
    prob, before = scores(seed), assign(scores(seed + 10), LIMITS)
    bonus = with_inertia(prob, list(torch.from_numpy(before)), inertia)
    z = assign(bonus, LIMITS)
    for module in range(len(prob)):
        wanted = best(prob[module] + inertia * prob[module].std() * before[module], LIMITS)
        assert (bonus * z)[module].sum() == pytest.approx(wanted, abs=1e-12)


def test_without_inertia_scores_are_the_same_bits_and_with_much_of_it_nobody_moves() -> None:
    prob, before = scores(3), assign(scores(4), LIMITS)
    held = list(torch.from_numpy(before))
    assert with_inertia(prob, held, 0.0) is prob
    moved = [int((assign(with_inertia(prob, held, i), LIMITS) & ~before).sum()) for i in (0.0, 0.5, 40.0)]
    assert moved[0] > moved[1] > moved[2] == 0


def test_the_server_adds_inertia_to_affinity() -> None:
    draw = stream(0, "embeddings")
    chosen = {}
    for inertia in (0.0, 100.0):
        method, state = made(inertia=inertia)
        state.expert_embeddings["q"].copy_(torch.randn(6, 4, generator=stream(1, "e")))
        state.token_embeddings["q"].copy_(torch.randn(6, 4, generator=stream(1, "t")))
        first = method.aggregate(state, {}, 1).holds
        chosen[inertia] = method.aggregate(state, {}, 2).holds
        assert torch.equal(first["q"], chosen[0.0]["q"])  # nobody chose who holds what in round 1
        if inertia:
            assert torch.equal(chosen[inertia]["q"], state.holds["q"])
    assert not torch.equal(chosen[0.0]["q"], chosen[100.0]["q"])
    e, t = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
    np.testing.assert_allclose(affinity([e], [t])[0].sum(axis=1), 1)


def test_experts_look_for_clients_like_their_holders_whatever_all_have_in_common() -> None:
    kinds = torch.eye(4)[[0, 0, 1, 1, 2, 2]]
    clients = [50 + kinds + 0.01 * torch.randn(6, 4, generator=stream(1, module)) for module in "qv"]
    clients[1] *= 1000  # a module's scale does not matter
    held = torch.eye(6, dtype=torch.bool)
    held[5] = False  # nobody holds it
    found = likeness([held, held.flip(1)], clients)
    assert found.shape == (2, 6, 6)
    assert (found[0, 5] == 0).all()
    for c in range(5):
        alike = found[0, c] > 0.9
        assert alike.nonzero()[0].tolist() == [c // 2 * 2, c // 2 * 2 + 1]
        np.testing.assert_allclose(found[0, c, alike], 1, atol=0.01)
        np.testing.assert_allclose(found[0, c, ~alike], -0.5, atol=0.05)  # three kinds, less their mean
    np.testing.assert_allclose(found[1, 4], found[0, 1], atol=1e-12)  # there, client 1 holds expert 4
    both = torch.zeros(1, 6, dtype=torch.bool)
    both[0, [0, 2]] = True
    np.testing.assert_allclose(likeness([both] * 2, clients)[0, 0], found[0, [0, 2]].mean(0), atol=1e-12)


def test_clients_that_have_not_replied_are_like_nobody_and_do_not_move_the_others_mean() -> None:
    clients = [30 + 100 * torch.rand(8, 4, generator=stream(4, module)) for module in "qv"]
    held = [torch.eye(8, dtype=torch.bool)] * 2
    came = [0, 2, 3, 6, 7]
    some = [t * torch.tensor([[c in came] for c in range(8)]) for t in clients]
    found = likeness(held, some)
    away = [c for c in range(8) if c not in came]
    assert (found[:, away] == 0).all()
    assert (found[:, :, away] == 0).all()
    alone = likeness([torch.eye(5, dtype=torch.bool)] * 2, [t[came] for t in clients])
    np.testing.assert_allclose(found[:, came][:, :, came], alone, atol=1e-12)
    assert (likeness(held, [torch.zeros_like(t) for t in clients]) == 0).all()


def test_an_expert_looks_for_clients_like_the_holders_that_it_knew() -> None:
    holds = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    known = torch.tensor([True, True, False, False])
    assert knowingly(holds, known).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(knowingly(holds, torch.ones(4, dtype=torch.bool)), holds)


def test_a_running_mean_starts_with_the_first_value() -> None:
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert running_mean(old, new, 0.0) is new
    assert running_mean(torch.zeros(2), new, 0.9) is new
    torch.testing.assert_close(running_mean(old, new, 0.75), torch.tensor([1.5, 1.5]))


def test_experts_embeddings_remember_earlier_rounds() -> None:
    kept = {}
    for memory in (0.0, 0.5):
        method, state = made(embed="after", prototype_memory=memory)
        for moved in (1.0, 2.0):
            sent, _ = reply(method, state, moved)
            state = method.aggregate(state, {CLIENTS[0].id: sent}, 6)  # the last round: nobody moves
            kept[memory, moved] = state.expert_embeddings["q"]
    assert torch.equal(kept[0.0, 1.0], kept[0.5, 1.0])
    torch.testing.assert_close(kept[0.5, 2.0], (kept[0.0, 1.0] + kept[0.0, 2.0]) / 2)
    assert not torch.equal(kept[0.0, 1.0], kept[0.0, 2.0])


def test_known_groups_are_a_control_that_needs_them() -> None:
    method, state = made(assignment="oracle")
    groups = np.array([INFO.group for INFO in sorted(CLIENTS, key=lambda c: c.id)])
    for z in state.holds.values():
        assert all(len({*groups[row.numpy()]}) == 1 for row in z)
        assert (z.sum(0) == 2).all()
    assert method.aggregate(state, {}, 1).holds is state.holds
    assert method.configure(state, CLIENTS, 1)["a0"].info == {"embed": False}
    with pytest.raises(CoterieError, match=r'assignment = "oracle" needs a group for every client; set one for x'):
        by_group(scores(0), [ClientInfo("x", 3)] * 4)
