"""What FedLEASE's clients are clustered by, beside B: representations of their rows, and what is left of LoRAs when
centred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import halves
from coterie import codec
from coterie.engines.checks import fault_of
from coterie.methods.fedlease.allocation import Allocation, nearest
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.findings import Clusters, find
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings
from coterie.ops.streams import stream
from coterie.requests import Observe, Observed, Train, Trained
from coterie.types import NO_EXPERT, BaseSpec, ClientId, ClientInfo, CoterieError, Key, Part, Reply, Target
from halves import Play

CLIENTS = tuple(ClientInfo(f"{g}{i}", 10 + i, labels=("yes", "no"), group=g) for g in "abc" for i in range(3))
TRUTH = {frozenset(f"{g}{i}" for i in range(3)) for g in "abc"}


def directions(request: Observe, client: ClientInfo) -> Observed:
    """As if texts of a group were alike, and all texts shared a lot."""
    tensors = {}
    for key in sorted(k for k in request.bank.tensors if k.part is Part.A):
        width = request.bank.tensors[key].shape[1]
        vector = 8 * torch.ones(width) + torch.randn(width, generator=stream(1, str(client.group), key.module))
        vector += 0.1 * torch.randn(width, generator=stream(2, client.id, key.module))
        tensors[Key(key.module, NO_EXPERT, Part.EMBEDDING)] = vector / vector.norm()
    return Observed({}, 10, directions=tensors)


def trained(request: Train, client: ClientInfo) -> Trained:
    """As if all B moved in one direction, and by group a little."""
    moved = {}
    for key in sorted(request.trainable):
        shape = request.bank.tensors[key].shape
        common, group, own = (
            torch.randn(shape, generator=stream(seed, name, str(key)))
            for seed, name in ((1, "all"), (2, str(client.group)), (3, client.id))
        )
        moved[key] = request.bank.tensors[key] + (4 * common + group + 0.2 * own if key.part is Part.B else 0.01 * own)
    return Trained(moved, 1.0, client.num_train, 100, 5)


WIDE = BaseSpec((Target("q", 200, 300), Target("v", 250, 300)), halves.BASE.head)  # little happens by chance


def play(
    monkeypatch: pytest.MonkeyPatch, clients: Sequence[ClientInfo] = CLIENTS, head: Any = "personal", **settings: Any
) -> Play:
    monkeypatch.setattr(halves, "observed", directions)
    monkeypatch.setattr(halves, "BASE", WIDE)
    return Play(
        FedLEASE(FedLEASESettings(**settings), Plan(rank=2, alpha=4, dropout=0.0, rounds=9, head=head)), clients
    )


def clusters(game: Play) -> set[frozenset[ClientId]]:
    numbers = game.state.allocation.clusters
    return {frozenset(c for c in numbers if numbers[c] == e) for e in set(numbers.values())}


def test_representations_cluster_after_the_first_round_whatever_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance="representation", distance_rows=7)
    sent = game.round(trained)
    assert clusters(game) == TRUTH
    for client in CLIENTS:
        observe, train = game.asked[client.id]
        assert isinstance(observe, Observe)
        assert isinstance(train, Train)
        assert (observe.split, observe.examples) == ("train", 7)
        assert not any(value.any() for key, value in observe.bank.tensors.items() if key.part is Part.B)
    embeddings = {key: value.shape for key, value in sent["a0"].tensors.items() if key.part is Part.EMBEDDING}
    assert embeddings == {Key("q", NO_EXPERT, Part.EMBEDDING): (200,), Key("v", NO_EXPERT, Part.EMBEDDING): (250,)}
    later = game.round(trained)
    assert not any(key.part is Part.EMBEDDING for key in later["a0"].tensors)
    assert [type(request) for request in game.asked["a0"]] == [Train]


def test_a_late_client_joins_the_cluster_of_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance="representation")
    game.round(trained, only=[c.id for c in CLIENTS if c.id not in ("b2", "c0")])
    game.round(trained)
    assert clusters(game) == TRUTH
    assert [type(request) for request in game.asked["b2"]] == [Observe, Train]


@pytest.mark.parametrize("distance", ["B", "BA"])
def test_centred_loras_are_compared_by_what_they_do_not_share(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance=distance, centre=True, warmup_rounds=1)
    game.round(trained, only=[c.id for c in CLIENTS if c.id not in ("a1", "c2")])
    assert game.state.allocation.distances.max() > 1.2  # without centring all are within 0.2
    game.round(trained)
    assert clusters(game) == TRUTH


def turned(request: Train, client: ClientInfo) -> Trained:
    """As :func:`trained`, but the clients with odd numbers in group c move the other way, as if labels were swapped."""
    made = trained(request, client)
    if client.group != "c" or int(client.id[1]) % 2 == 0:
        return made
    start = request.bank.tensors
    return replace(made, tensors={key: start[key] - (value - start[key]) for key, value in made.tensors.items()})


LARGE = tuple(ClientInfo(f"{g}{i}", 10 + i, labels=("yes", "no"), group=g) for g in "abc" for i in range(6))
SWAPPED = {frozenset(f"{g}{i}" for i in range(6)) for g in "ab"}
SWAPPED |= {frozenset(f"c{i}" for i in range(6) if i % 2 == side) for side in (0, 1)}


def test_auto_parts_texts_by_representations_and_labels_by_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, LARGE, distance="auto", warmup_rounds=1, max_experts=6)
    late = {"a2", "c1", "c2"}
    game.round(turned, only=[c.id for c in LARGE if c.id not in late])
    assert game.state.allocation.num_experts == 4
    assert len(set(game.state.allocation.text_clusters)) == 3
    game.round(turned)
    assert clusters(game) == SWAPPED
    found = find(game.method.describe(game.state), Clusters)
    assert found is not None
    assert found.choice.startswith("4 clusters: 3 clusters by texts (the best silhouette is ")
    assert "LoRAs split cluster 2 of these into 2 (silhouette " in found.choice
    assert found.to_json()["grounds"] == found.choice


@pytest.mark.parametrize(("limits", "number"), [({"max_experts": 3}, 3), ({"experts": 4}, 4), ({"experts": 2}, 2)])
def test_auto_keeps_to_the_number_of_clusters(
    limits: dict[str, int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = play(monkeypatch, LARGE, distance="auto", warmup_rounds=1, **limits)
    game.round(turned)
    assert len(clusters(game)) == number
    assert (clusters(game) == SWAPPED) == (number == 4)


@pytest.mark.parametrize("distance", ["representation", "auto"])
@pytest.mark.parametrize("linkage", ["average", "complete", "single", "kmeans", "spectral"])
def test_every_linkage_finds_so_many_clusters(distance: str, linkage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance=distance, linkage=linkage, warmup_rounds=1, experts=3)
    game.round(trained)
    assert clusters(game) == TRUTH


def test_the_report_says_that_the_most_experts_stopped_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, LARGE, distance="auto", warmup_rounds=1, max_experts=3)
    game.round(turned)
    found = find(game.method.describe(game.state), Clusters)
    assert found is not None
    assert "LoRAs split no cluster (silhouette " in found.choice
    assert "but [method] max_experts = 3 leaves no room for so many)" in found.choice


def test_auto_finds_one_cluster_where_nothing_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = tuple(replace(c, group="a") for c in LARGE[:8])
    game = play(monkeypatch, alike, distance="auto", warmup_rounds=1)
    game.round(trained)
    assert len(clusters(game)) == 1
    found = find(game.method.describe(game.state), Clusters)
    assert found is not None
    assert found.choice.startswith("1 cluster: 1 cluster by texts (the best")
    game.round(trained)


@pytest.mark.parametrize("distance", ["auto", "B"])
def test_clusters_of_a_few_clients_say_so(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"distance": distance, "warmup_rounds": 1}
    game = play(monkeypatch, LARGE, **settings)
    game.round(trained, only=[c.id for c in LARGE if int(c.id[1]) < 2])
    some = "Only 6 of 18 clients had sent what clusters are made of; the others join the nearest. If that is too few, "
    for _ in range(2):
        found = find(game.method.describe(game.state), Clusters)
        assert found is not None
        assert found.choice.endswith(f". {some}raise [run] cohort")
        game.round(trained)  # the others join, which changes nothing in how the clusters were chosen
    whole = play(monkeypatch, LARGE, **settings)
    whole.round(trained)
    found = find(whole.method.describe(whole.state), Clusters)
    assert found is not None
    assert "Only" not in found.choice


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("distance", ["representation", "auto"])
def test_a_client_whose_texts_changed_moves_and_experts_stay(
    distance: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = play(monkeypatch, distance=distance, warmup_rounds=1, recluster_every=3, head=head)
    game.round(trained)
    changed = replace(CLIENTS[0], group="b")
    monkeypatch.setattr(halves, "observed", lambda r, c: directions(r, changed if c.id == "a0" else c))
    game.round(trained)
    assert clusters(game) == TRUTH
    assert [type(request) for request in game.asked["a0"]] == [Train]
    game.round(trained)
    assert [type(request) for request in game.asked["a0"]] == [Observe, Train]
    moved = {frozenset({"a1", "a2"}), frozenset({"a0", "b0", "b1", "b2"}), frozenset({"c0", "c1", "c2"})}
    assert clusters(game) == moved
    own = game.state.allocation.clusters
    assert own["a0"] == own["b0"]
    ins = game.method.configure(game.state, CLIENTS, 4)
    assert ins["a0"].info["own"] == own["b0"]
    assert {key.expert for key in ins["a0"].tensors if key.part is Part.A} == {0, 1, 2}
    for _ in range(3):
        game.round(trained)
    assert clusters(game) == moved


def test_reclustering_compares_with_what_the_clusters_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance="representation", recluster_every=2, experts=3)
    game.round(trained)
    monkeypatch.setattr(halves, "observed", lambda r, c: directions(r, replace(c, group="d") if c.group == "b" else c))
    sent = game.round(trained)
    assert clusters(game) == TRUTH
    for module in ("q", "v"):
        key = Key(module, NO_EXPERT, Part.EMBEDDING)
        now = torch.stack([sent[f"b{i}"].tensors[key] for i in range(3)]).mean(0)
        torch.testing.assert_close(game.state.starts[key._replace(expert=game.state.expert_of("b0"))], now)


def test_a_large_cluster_draws_the_mean_that_late_clients_are_centred_by() -> None:
    """Between the centres of two clusters, but further from the large one than the mean over all clients is."""
    numbers = {**{f"a{i}": 0 for i in range(9)}, "b0": 1}
    key, at = Key("q", 0, Part.EMBEDDING), Key("q", NO_EXPERT, Part.EMBEDDING)
    starts = {key: torch.tensor([1.0, 0.0]), key._replace(expert=1): torch.tensor([0.0, 1.0])}
    late = [{at: torch.tensor(point)} for point in ([0.7, 0.3], [0.95, 0.05])]
    made = Allocation(numbers, {}, tuple(numbers), torch.zeros(10, 10))
    assert nearest(FedLEASESettings(distance="representation"), starts, made, late) == [1, 0]
    even = replace(made, clusters={f"{g}{i}": e for e, g in enumerate("ab") for i in range(5)})
    assert nearest(FedLEASESettings(distance="representation"), starts, even, late) == [0, 0]


def test_the_last_client_of_a_cluster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (*CLIENTS[3:], CLIENTS[0])
    game = play(monkeypatch, few, distance="representation", recluster_every=2, experts=3)
    game.round(trained)
    before = clusters(game)
    monkeypatch.setattr(halves, "observed", lambda r, c: directions(r, replace(c, group="b")))
    game.round(trained)
    assert frozenset({"a0"}) in clusters(game)
    assert len(clusters(game)) == len(before) == 3


def test_reclustering_needs_representations(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CoterieError, match=r"recluster_every compares representations; set distance to"):
        play(monkeypatch, distance="B", recluster_every=2)


def test_no_rule_weighs_a_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a representation, which all have alike, an update that points the other way would hardly show."""
    game = play(monkeypatch, distance="representation")
    plan = replace(game.method.plan, robust=RobustSettings(rule="median"))
    game.method = replace(game.method, plan=plan)
    replies = {c.id: _reply(game, c) for c in CLIENTS}
    bad = {k: v if k.part is Part.EMBEDDING else -v for k, v in replies["a1"].tensors.items()}
    state = game.method.aggregate(game.state, {**replies, "a1": replace(replies["a1"], tensors=bad)}, 1)
    assert state.outlying == ("a1",)


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("distance", ["B", "representation", "auto"])
def test_a_client_joins_after_the_end_where_the_base_has_no_head(
    distance: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for generation and multiple choice, where ``head = "shared"`` says nothing."""
    game = play(monkeypatch, distance=distance, warmup_rounds=1, max_experts=3, head=head)
    headless = BaseSpec(WIDE.targets)
    monkeypatch.setattr(halves, "BASE", headless)
    game = Play(game.method, CLIENTS)
    for _ in range(2):
        game.round(trained)
    new = ClientInfo("new", 9, group="b")
    welcome = codec.decode(FedLEASEState, codec.encode(game.method.welcome(game.state, new)))
    joined, _ = halves.driven(game.method.onboard(welcome, headless, new), new, trained)
    assert joined.bank.gate.options["own"] == game.state.allocation.clusters["b0"]


def test_a_control_sends_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    game = play(monkeypatch, distance="representation", allocation="oracle", warmup_rounds=1)
    game.round(trained)
    assert clusters(game) == TRUTH
    assert [type(request) for request in game.asked["a0"]] == [Train]


def test_a_site_cannot_pull_the_mean_with_a_long_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a mean of unit vectors may be counts; more does not. NaN and other shapes never get that far."""
    game = play(monkeypatch, distance="representation")
    method, state = game.method, game.state
    expected = method.expects(state, CLIENTS[0], 1)
    honest = _reply(game, CLIENTS[0])
    key = Key("q", NO_EXPERT, Part.EMBEDDING)
    for value, fault in (
        (torch.full((200,), torch.nan), "not finite"),
        (torch.zeros(7), "shape"),
        (torch.full((200,), 1e5), "norm"),
    ):
        bad = replace(honest, tensors={**honest.tensors, key: value})
        assert fault in str(fault_of(bad, expected, 1e4, 10))
    replies = {c.id: _reply(game, c) for c in CLIENTS}
    honestly = game.method.aggregate(game.state, replies, 1).starts
    long = {k: v * 500 if k.part is Part.EMBEDDING else v for k, v in replies["a1"].tensors.items()}
    game.state = game.method.aggregate(game.state, {**replies, "a1": replace(replies["a1"], tensors=long)}, 1)
    assert clusters(game) == TRUTH
    means = {k: v for k, v in game.state.starts.items() if k.part is Part.EMBEDDING}
    assert len(means) == 6
    for key, mean in means.items():
        torch.testing.assert_close(mean, honestly[key])


def _reply(game: Play, client: ClientInfo) -> Reply:
    ins = game.method.configure(game.state, [client], 1)[client.id]
    result, _ = halves.driven(game.method.client(ins, client, game.own(client)), client, trained)
    return result.reply
