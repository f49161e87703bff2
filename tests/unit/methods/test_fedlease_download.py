"""FedLEASE's ``download = "used"``: which experts a client is sent, and what it uses in place of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import halves
from coterie import codec
from coterie.engines.checks import fault_of
from coterie.methods.fedlease.download import USE
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings
from coterie.requests import ExpertUse, Observe, Observed, Train
from coterie.types import ClientInfo, CoterieError, Instruction, Key, Part, Personal, Reply

CLIENTS = [ClientInfo(f"{g}{i}", 10 + i, labels=("yes", "no"), group=g) for g in "abc" for i in range(3)]
INFO = {c.id: c for c in CLIENTS}


def answer(request: Any, client: ClientInfo) -> Any:
    """As if trained; and as if every gate gave its own expert .7, the next .25, the third .05 of the weight."""
    if isinstance(request, Observe):
        assert request.what == ("usage",)
        own = request.bank.gate.options["own"]
        weights = {own: 0.7, (own + 1) % 3: 0.25, (own + 2) % 3: 0.05}
        use = ExpertUse([weights[e] for e in range(3)], [1.0] * 3, range(3))
        return Observed({"q": use, "v": use}, 10)
    assert isinstance(request, Train)
    return halves.moved(request, client)


class Run:
    """Rounds of nine clients in three known clusters; ``silent`` clients send no use, as some sites do."""

    def __init__(self, silent: str = "", robust: Any = None, **settings: Any) -> None:
        plan = Plan(rank=2, alpha=4, dropout=0.0, rounds=20, robust=robust or RobustSettings())
        settings = {"distance": "B", "allocation": "oracle", "warmup_rounds": 1, "download": "used", **settings}
        self.method, self.silent, self.rnd = FedLEASE(FedLEASESettings(**settings), plan), silent, 0
        self.state: FedLEASEState = self.method.init(halves.BASE, CLIENTS)
        self.personal = {c.id: self.method.begin(halves.BASE, c) for c in CLIENTS}
        self.sent: dict[str, Instruction] = {}

    def round(self, only: Any = None, lost: Any = ()) -> Run:
        """A round of all clients, or of ``only`` these; the replies of those in ``lost`` do not reach the server."""
        self.rnd += 1
        self.sent = dict(self.method.configure(self.state, [c for c in CLIENTS if not only or c.id in only], self.rnd))
        replies = {}
        for client, ins in self.sent.items():
            reply, self.personal[client] = self.client(client, ins)
            replies[client] = replace(reply, info={}) if client == self.silent else reply
            shapes, info = (
                of(self.state, INFO[client], self.rnd) for of in (self.method.expects, self.method.expects_info)
            )
            assert fault_of(replies[client], shapes, 1e9, 99, info) is None
        after = self.method.aggregate(self.state, {c: r for c, r in replies.items() if c not in lost}, self.rnd)
        self.state = codec.decode(FedLEASEState, codec.encode(after))
        return self

    def client(self, name: str, ins: Instruction) -> tuple[Reply, Personal]:
        program = self.method.client(ins, INFO[name], self.personal[name])
        request = next(program)
        while True:
            try:
                request = program.send(answer(request, INFO[name]))
            except StopIteration as stop:
                return stop.value.reply, stop.value.personal

    def experts_sent(self) -> dict[str, list[int]]:
        return {c: sorted({k.expert for k in ins.tensors if k.part is Part.A}) for c, ins in self.sent.items()}


ALL = {c: [0, 1, 2] for c in INFO}
OWN_AND_NEXT = {c: sorted([g, (g + 1) % 3]) for g, group in enumerate("abc") for c in INFO if c[0] == group}


def test_all_experts_come_first_then_the_used_ones_and_after_some_rounds_all_again() -> None:
    run, sent = Run(download_every=3), []
    for _ in range(8):
        run.round()
        sent.append(run.experts_sent())
    assert sent[0] == {c: [] for c in INFO}
    assert sent[1:] == [ALL, OWN_AND_NEXT, OWN_AND_NEXT, ALL, OWN_AND_NEXT, OWN_AND_NEXT, ALL]


@pytest.mark.parametrize(("threshold", "experts"), [(0.05, [0, 1, 2]), (0.06, [0, 1]), (0.25, [0, 1]), (0.26, [0])])
def test_the_threshold_chooses_the_experts(threshold: float, experts: list[int]) -> None:
    run = Run(download_threshold=threshold).round().round().round()
    assert run.experts_sent()["a0"] == experts


def test_in_place_of_an_expert_that_is_not_sent_stands_the_one_last_received() -> None:
    run = Run().round().round()
    received = run.sent["a1"].tensors
    now = run.round().sent["a1"]
    bank = run.method.bank(now, INFO["a1"], run.personal["a1"])
    assert set(bank.tensors) == set(received) | {k for k in bank.tensors if k.part is Part.HEAD}
    for key in (key for key in bank.tensors if key.expert >= 0):
        assert torch.equal(bank.tensors[key], received[key] if key.expert == 2 else now.tensors[key])
        assert (key.expert == 2) == (key not in now.tensors)


def test_a_client_that_lost_its_copies_uses_b_0_and_is_sent_all_next_time() -> None:
    run = Run().round().round()
    run.personal["a1"] = run.method.begin(halves.BASE, INFO["a1"])
    run.round()
    bank = run.method.bank(run.sent["a1"], INFO["a1"], run.method.begin(halves.BASE, INFO["a1"]))
    assert run.experts_sent()["a1"] == [0, 1]
    assert bank.tensors[Key("q", 2, Part.A)].any()
    assert not bank.tensors[Key("q", 2, Part.B)].any()
    run.round()
    assert run.experts_sent() == {**OWN_AND_NEXT, "a1": [0, 1, 2]}


def test_a_client_that_reports_nothing_is_sent_all() -> None:
    run = Run(silent="b0").round().round().round()
    assert run.experts_sent() == {**OWN_AND_NEXT, "b0": [0, 1, 2]}
    assert USE in run.method.usage


def test_a_client_that_was_away_is_counted_from_the_round_in_which_it_received_all() -> None:
    run = Run(download_every=3).round().round()
    for _ in range(3):
        run.round({"a0", "b0"})
    run.round()
    assert run.experts_sent() == {**ALL, **{c: OWN_AND_NEXT[c] for c in ("a0", "b0")}}


def test_a_late_client_and_one_that_moves_are_sent_all() -> None:
    """With this threshold a client's use of its old expert does not ask for all three."""
    run = Run(allocation="learned", experts=3, download_threshold=0.3).round(set(INFO) - {"c2"}).round().round()
    assert run.experts_sent()["c2"] == [0, 1, 2]
    own = run.state.expert_of("a0")
    moved = run.method._server._move(run.state, {"a0": (own + 1) % 3}, {"a0": Reply()})  # type: ignore[operator]
    ins = run.method.configure(moved, CLIENTS, 4)
    assert len({k.expert for k in ins["a0"].tensors if k.part is Part.A}) == 3
    assert len({k.expert for k in ins["a1"].tensors if k.part is Part.A}) == 1


def test_with_own_starts_a_copy_is_not_taken_for_the_clients_lora() -> None:
    """The expert of b is untrained until a reply of its clients counts. They have copies, of expert 0 among others."""
    of_b = {"b0", "b1", "b2"}
    run = Run(expert_start="own", download_threshold=0.3).round().round(lost=of_b)
    for _ in range(2):
        run.round(lost=of_b)
        for client in of_b:
            ins = run.method.configure(run.state, CLIENTS, run.rnd + 1)[client]
            bank, personal = run.method.bank(ins, INFO[client], run.personal[client]), run.personal[client]
            for part in (Part.A, Part.B):
                assert torch.equal(bank.tensors[Key("q", 1, part)], personal.tensors[Key("q", 1, part)])
            assert bank.tensors[Key("q", 1, Part.B)].any()
            assert personal.tensors[Key("q", 0, Part.B)].any()  # the copy
            assert not torch.equal(bank.tensors[Key("q", 1, Part.A)], personal.tensors[Key("q", 0, Part.A)])
    run.personal["b0"] = Personal(
        {key: v for key, v in run.personal["b0"].tensors.items() if key.expert != 1}, {"copies": [0, 2]}
    )
    ins = run.method.configure(run.state, CLIENTS, run.rnd + 1)["b0"]
    bank = run.method.bank(ins, INFO["b0"], run.personal["b0"])
    assert not bank.tensors[Key("q", 1, Part.B)].any()  # with copies alone, it starts from what it was sent
    run.round().round()
    for client, ins in run.sent.items():
        bank, own = run.method.bank(ins, INFO[client], run.personal[client]), ins.info["own"]
        assert torch.equal(bank.tensors[Key("q", own, Part.B)], ins.tensors[Key("q", own, Part.B)])
        assert Key("q", own, Part.B) not in run.personal[client].tensors


def test_withheld_experts_stay_withheld() -> None:
    run = Run(robust=RobustSettings(rule="median", min_group=4), download_threshold=0.2).round()
    for _ in range(2):
        run.round()
        for client, ins in run.sent.items():
            bank = run.method.bank(ins, INFO[client], run.personal[client])
            others = [e for e in range(3) if e != ins.info["own"]]
            assert not any(bank.tensors[Key(m, e, Part.B)].any() for m in "qv" for e in others)


def test_personal_routers_go_with_it_and_without_a_router_it_is_refused() -> None:
    run = Run(router="personal").round().round().round()
    assert {k.part for ins in run.sent.values() for k in ins.tensors} == {Part.A, Part.B}
    assert run.experts_sent() == OWN_AND_NEXT
    with pytest.raises(CoterieError, match=r'download = "used" chooses .*routing = "own" does not send; remove one'):
        Run(routing="own")


def test_one_cluster_has_nothing_to_report() -> None:
    run = Run(allocation="learned", experts=1).round().round()
    assert all(USE not in run.client(c, ins)[0].info for c, ins in run.sent.items())
