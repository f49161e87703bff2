"""The runner with a made-up engine: what is checked, who is left out, when a run stops, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from coterie.cli.progress import Lines, Live, listener
from coterie.compute.workplace import Steps
from coterie.data.truncation import Truncation
from coterie.engines.base import Delivery, Evaluation
from coterie.methods.base import drive
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named
from coterie.methods.robust import RobustSettings, Weighed
from coterie.requests import Train, Trained
from coterie.runs.events import (
    ClientDone,
    ClientSteps,
    Evaluated,
    Note,
    RoundDone,
    RoundStart,
    Truncated,
    read_events,
)
from coterie.runs.health import loss_note
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import Traffic, Worst, best_round, read_summary, summarise
from coterie.types import BaseSpec, ClientInfo, CoterieError, Instruction, Key, Part, Reply, Target

Spoil = Callable[[str, int, Reply], Reply | str | None]
KEY = Key("q", 0, Part.A)


@dataclass
class FakeEngine:
    """Clients that add 1 to everything they train; ``spoil`` makes a reply bad, an error (str) or missing (None)."""

    spoil: Spoil = lambda client, rnd, reply: reply
    number: int = 4
    rounds: list[list[str]] = field(default_factory=list)
    told: list[tuple[str, int]] = field(default_factory=list)
    cut: Truncation = field(default_factory=Truncation)
    report: Callable[[Steps], None] = lambda steps: None

    spec = BaseSpec((Target("q", 3, 2),))

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(ClientInfo(f"c{i}", 10 * (i + 1)) for i in range(self.number))

    def train(
        self, method: Any, instructions: Mapping[str, Instruction], rnd: int, limits: Any = None
    ) -> Iterator[tuple[str, Delivery]]:
        self.rounds.append(list(instructions))
        for info in self.clients:
            if info.id in instructions:
                self.report(Steps((info.id,), 1, 2))
                program = method.client(instructions[info.id], info, method.begin(self.spec, info))
                reply = self.spoil(info.id, rnd, drive(program, self).reply)
                if isinstance(reply, Reply):
                    yield info.id, Delivery(reply, None, 7, 5, 0.5)
                else:
                    yield info.id, Delivery(None, reply, 7, 0, 0.5)

    def train_request(self, request: Train) -> Trained:
        return Trained({k: request.bank.tensors[k] + 1 for k in request.trainable}, 0.5, 10, 100, 2)

    def evaluate(self, method: Any, instructions: Any, rnd: int, splits: Any, usage: bool = False) -> Any:
        for client in instructions:
            yield client, Evaluation({s: {"accuracy": 0.1 * rnd, "loss": 1.0 / rnd} for s in splits})

    def banks(self, method: Any, instructions: Any, rnd: int) -> Any:
        return iter(())

    def watch(self, report: Callable[[Steps], None]) -> None:
        self.report = report

    def truncation(self) -> Truncation:
        return self.cut

    def restore(self, rnd: int) -> None:
        self.told.append(("restore", rnd))

    def state_rounds(self, rnd: int) -> dict[str, Any]:
        return {}

    def prune(self, rnd: int, kept_rounds: Any = ()) -> None:
        self.told.append(("prune", rnd))


class Compute(FakeEngine):
    def train(self, request: Any, *rest: Any) -> Any:  # type: ignore[override]
        return self.train_request(request) if isinstance(request, Train) else super().train(request, *rest)


def run(
    folder: Path,
    spoil: Spoil = lambda c, r, reply: reply,
    robust: Any = None,
    name: str = "fedit",
    **rounds: Any,
) -> tuple[Any, FakeEngine, list[Any]]:
    engine, heard = Compute(spoil), []
    method = method_named(name)(
        method_named(name).Settings(), Plan(rank=2, rounds=3, robust=robust or RobustSettings())
    )
    folder.mkdir(exist_ok=True)
    runner = Runner(method, engine, RoundSettings(**{"rounds": 3, "seed": 0, **rounds}), folder, heard.append)
    return runner.run(), engine, heard


def events(folder: Path, kind: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def with_tensor(reply: Reply, change: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    return replace(reply, tensors={**reply.tensors, KEY: change(reply.tensors[KEY])})


BAD = {
    "missing tensor": (lambda r: replace(r, tensors={k: v for k, v in r.tensors.items() if k != KEY}), "lacks q:0:A"),
    "surplus tensor": (
        lambda r: replace(r, tensors={**r.tensors, KEY._replace(expert=3): r.tensors[KEY]}),
        "has q:3:A, which was not requested",
    ),
    "shape": (lambda r: with_tensor(r, lambda t: t.T.contiguous()), r"q:0:A has the shape \[3, 2\], not \[2, 3\]"),
    "integers": (lambda r: with_tensor(r, lambda t: t.int()), "not torch.float32"),
    "nan": (lambda r: with_tensor(r, lambda t: t * math.nan), "not finite"),
    "infinite": (lambda r: with_tensor(r, lambda t: t / 0), "not finite"),
    "huge": (lambda r: with_tensor(r, lambda t: t * 1e9), "norm .* above the bound"),
    "no examples": (lambda r: replace(r, num_examples=0), "0 training examples"),
    "too many examples": (lambda r: replace(r, num_examples=41), "41 training examples; the client has 40"),
    "other floats": (lambda r: with_tensor(r, lambda t: t.double()), "dtype torch.float64, not torch.float32"),
    "a loss of text": (lambda r: replace(r, info={"loss": "x"}), "loss is 'x'"),
    "failed": (lambda r: "out of memory", "out of memory"),
    "silent": (lambda r: None, "no reply"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_left_out_with_the_reason_and_the_round_goes_on(name: str, tmp_path: Path) -> None:
    spoil, reason = BAD[name]
    state, _, heard = run(tmp_path, lambda c, rnd, reply: spoil(reply) if (c, rnd) == ("c3", 2) else reply)
    good, _, _ = run(tmp_path / "good", lambda c, rnd, reply: reply)
    failed = [event["failed"] for event in events(tmp_path, "round")]
    assert [list(f) for f in failed] == [[], ["c3"], []]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failed[1]["c3"])
    assert state.lora[KEY].equal(good.lora[KEY])  # everyone adds 1: leaving one out changes nothing
    assert [e for e in heard if isinstance(e, ClientDone) and e.failed]


def test_a_rule_decides_what_a_round_averages_and_says_who_points_away(tmp_path: Path) -> None:
    """Minus five times the update: too little for a bound on updates to see."""

    def turned(client: str, rnd: int, reply: Reply) -> Reply:
        return replace(reply, tensors={k: v - 6 for k, v in reply.tensors.items()}) if client == "c3" else reply

    honest, *_ = run(tmp_path / "honest")
    bent, _, _ = run(tmp_path / "bent", turned)
    state, _, _ = run(tmp_path / "robust", turned, RobustSettings(rule="median"))
    assert state.lora[KEY].equal(honest.lora[KEY])
    assert (bent.lora[KEY] < honest.lora[KEY]).all()
    assert [e.get("robust") for e in events(tmp_path / "bent", "round")] == [None] * 3
    for event in read_events(tmp_path / "robust" / "metrics.jsonl"):
        if isinstance(event, RoundDone):
            assert event.robust is not None
            assert event.robust["c3"] == Weighed(pytest.approx(5), 1.0, pytest.approx(-1), True)
            assert event.robust["c0"] == Weighed(1.0, 1.0, pytest.approx(1), False)
    assert [note["text"] for note in events(tmp_path / "robust", "note")] == [
        "c3's update points away from what its group agrees on: 5 times the median norm, cosine -1.00 with the result "
        "([robust] rule = 'median')"
    ]


def test_an_update_out_of_line_is_left_out_once_all_have_come(tmp_path: Path) -> None:
    """Minus 50 times the update that was trained: a norm that no bound on the reply alone would notice."""
    turned = partial(with_tensor, change=lambda t: t - 51)
    state, _, _ = run(tmp_path, lambda c, rnd, reply: turned(reply) if (c, rnd) == ("c3", 2) else reply)
    _, second, _ = events(tmp_path, "round")
    reason = (
        "the update of A is 50 times the round's median, more than 10 "
        "([run] update_bound; its steps allow 1.5 times that)"
    )
    assert second["failed"] == {"c3": reason}
    assert second["clients"]["c3"] == {"bytes_down": 7, "bytes_up": 5, "seconds": 0.5}  # nothing that it says
    assert state.lora[KEY].equal(run(tmp_path / "good")[0].lora[KEY])
    loose, _, _ = run(tmp_path / "loose", lambda c, rnd, reply: turned(reply), update_bound=1e9)
    assert not loose.lora[KEY].equal(state.lora[KEY])


def test_a_part_that_a_method_trains_faster_may_move_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_named("fedit"), "fastest", lambda self, rnd: {Part.A: 1e6} if rnd == 2 else {})
    run(tmp_path, lambda c, rnd, reply: with_tensor(reply, lambda t: t - 51) if c == "c3" else reply)
    assert [list(event["failed"]) for event in events(tmp_path, "round")] == [["c3"], [], ["c3"]]


def test_who_still_learns_is_not_out_of_line_where_the_others_have_stopped(tmp_path: Path) -> None:
    def moved(client: str, rnd: int, reply: Reply) -> Reply:
        return with_tensor(reply, lambda t: t - 1 + (1e-3 if client == "c3" else 1e-5))  # everyone had added 1

    run(tmp_path, moved)
    assert [event["failed"] for event in events(tmp_path, "round")] == [{}] * 3


def test_an_update_out_of_line_counts_against_the_quorum(tmp_path: Path) -> None:
    with pytest.raises(
        CoterieError,
        match=r"round 1: 3 of 4 clients sent a usable reply, .* is 4.*c3: the update of A is",
    ):
        run(tmp_path, lambda c, rnd, reply: with_tensor(reply, lambda t: t - 51) if c == "c3" else reply, quorum=1.0)


def test_a_client_with_most_of_the_examples_counts_for_its_share_and_it_is_noted_once(tmp_path: Path) -> None:
    """c3 has 40 of 100 examples, and adds 2 where the others add 1."""
    further = partial(with_tensor, change=lambda t: t + 1)
    for name, share, weight in (("all", 0.5, 0.4), ("capped", 0.35, 32 / 92)):
        spoil: Spoil = lambda c, rnd, reply: further(reply) if c == "c3" else reply  # noqa: E731
        state, _, _ = run(tmp_path / name, spoil, max_share=share)
        start, _, _ = run(tmp_path / f"{name} start", rounds=1)
        added = state.lora[KEY] - (start.lora[KEY] - 1)
        assert torch.allclose(added, torch.full_like(added, 3 * (1 + weight)), atol=1e-5)
    assert [e["text"] for e in events(tmp_path / "all", "note")] == []
    (note,) = events(tmp_path / "capped", "note")
    assert note["text"] == (
        "c3 has more than its share of the training examples: 40% of the round's; 32 of its 40 count, which "
        "makes it 35% ([run] max_share)"
    )


def test_a_method_that_weighs_all_clients_alike_has_no_shares_to_note(tmp_path: Path) -> None:
    run(tmp_path / "uniform", name="fdlora", max_share=0.35)
    assert events(tmp_path / "uniform", "note") == []


def test_a_resumed_run_notes_a_share_once(tmp_path: Path) -> None:
    run(tmp_path, rounds=1, max_share=0.35)
    run(tmp_path, rounds=3, max_share=0.35)
    assert len(events(tmp_path, "note")) == 1


def test_below_the_quorum_the_run_stops_and_the_checkpoint_stands(tmp_path: Path) -> None:
    def spoil(client: str, rnd: int, reply: Reply) -> Reply | None:
        return None if rnd == 3 and client != "c0" else reply

    with pytest.raises(CoterieError, match=r"round 3: 1 of 4 clients sent a usable reply, .* is 2.*c1: no reply"):
        run(tmp_path, spoil)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["000001.ckpt", "000002.ckpt"]
    state, engine, _ = run(tmp_path)
    assert len(engine.rounds) == 1
    assert state.lora[KEY].equal(run(tmp_path / "good")[0].lora[KEY])


def test_cohorts_are_seeded_samples_in_the_engines_order(tmp_path: Path) -> None:
    _, engine, _ = run(tmp_path, cohort=0.5, rounds=20)
    assert all(len(cohort) == 2 and cohort == sorted(cohort) for cohort in engine.rounds)
    assert len({tuple(cohort) for cohort in engine.rounds}) > 2
    assert run(tmp_path / "again", cohort=0.5, rounds=20)[1].rounds == engine.rounds
    assert run(tmp_path / "other", cohort=0.5, rounds=20, seed=1)[1].rounds != engine.rounds


def test_evaluates_every_few_rounds_and_always_the_last(tmp_path: Path) -> None:
    run(tmp_path, rounds=5, evaluate_every=2)
    assert [event["round"] for event in events(tmp_path, "evaluation")] == [2, 4, 5]


def test_the_best_round_is_chosen_on_validation_never_on_test() -> None:
    evaluations = [
        Evaluated(rnd, mean={"validation": {"accuracy": v, "loss": -v}, "test": {"accuracy": t}})
        for rnd, v, t in [(1, 0.5, 0.9), (2, 0.7, 0.1), (3, 0.7, 0.8), (4, 0.6, 1.0)]
    ]
    assert best_round(evaluations, "accuracy") == 2
    assert best_round(evaluations, "loss") == 2
    assert best_round([Evaluated(r, mean={"test": {"accuracy": 1 / r}}) for r in (1, 2)], "accuracy") == 2


def test_the_summary_adds_up(tmp_path: Path) -> None:
    _, engine, _ = run(tmp_path, lambda c, rnd, reply: "gone" if (c, rnd) == ("c1", 1) else reply)
    made = read_events(tmp_path / "metrics.jsonl")
    summary = summarise(made, engine.clients, method="fedit", title="FedIT", task="classification", seed=0)
    assert summary.bytes == Traffic(up=5 * 11, down=7 * 12)
    assert summary.clients["c1"].rounds_missed == 1
    assert summary.best_round == 3
    assert summary.mean["test"]["accuracy"] == pytest.approx(0.3)
    assert summary.worst == Worst("c0", "accuracy", pytest.approx(0.3))
    assert summary.seconds == pytest.approx(sum(getattr(event, "seconds", 0) for event in made))
    (tmp_path / "summary.json").write_text(json.dumps(summary.to_json(), allow_nan=False))
    assert read_summary(tmp_path / "summary.json") == summary


def test_the_cohort_does_not_depend_on_the_order_of_the_clients(tmp_path: Path) -> None:
    class Turned(Compute):
        @property
        def clients(self) -> tuple[ClientInfo, ...]:
            return tuple(reversed(super().clients))

    _, engine, _ = run(tmp_path, cohort=0.5, rounds=10)
    turned = Turned()
    method = method_named("fedit")(method_named("fedit").Settings(), Plan(rank=2, rounds=3))
    (tmp_path / "turned").mkdir()
    Runner(method, turned, RoundSettings(10, 0, cohort=0.5), tmp_path / "turned").run()
    assert [sorted(cohort) for cohort in turned.rounds] == [sorted(cohort) for cohort in engine.rounds]


def test_a_resumed_run_gives_up_what_its_last_commit_had_no_time_to(tmp_path: Path) -> None:
    run(tmp_path)
    _, engine, _ = run(tmp_path)  # killed after the last commit, before it pruned: nothing is left to do but that
    assert engine.told == [("restore", 3), ("prune", 2)]


def test_a_round_of_one_needs_one_reply(tmp_path: Path) -> None:
    method = method_named("fedit")(method_named("fedit").Settings(), Plan(rank=2, rounds=3))
    with pytest.raises(CoterieError, match="0 of 1 clients sent a usable reply, but the quorum is 1 "):
        Runner(method, Compute(lambda c, rnd, reply: None, number=1), RoundSettings(3, 0), tmp_path).run()


def test_half_of_five_is_three(tmp_path: Path) -> None:
    engine = Compute(lambda c, rnd, reply: reply if c in ("c0", "c1") else None, number=5)
    method = method_named("fedit")(method_named("fedit").Settings(), Plan(rank=2, rounds=3))
    with pytest.raises(CoterieError, match="2 of 5 clients sent a usable reply, but the quorum is 3"):
        Runner(method, engine, RoundSettings(3, 0), tmp_path).run()


def test_what_a_reply_says_stands_under_no_name_of_the_runners(tmp_path: Path) -> None:
    lie = {"event": "finished", "client": "c9", "failed": None, "round": 7, "bytes_up": 0, "seconds": -1, "said": 1}

    def spoil(client: str, rnd: int, reply: Reply) -> Reply:
        bad = {"num_examples": 0} if client == "c3" else {}
        return replace(reply, info={**lie, "loss": 0.5}, **bad)

    _, _, heard = run(tmp_path, spoil)
    done = [event for event in heard if isinstance(event, ClientDone)]
    assert [(e.round, e.client) for e in done] == [(rnd, f"c{i}") for rnd in (1, 2, 3) for i in range(4)]
    lines = [event.entry.to_json() for event in done]
    assert [
        (e.failed is None, of["bytes_up"], of["seconds"], of.get("said")) for e, of in zip(done, lines, strict=True)
    ] == [
        *[(True, 5, 0.5, 1)] * 3,
        (False, 5, 0.5, None),
    ] * 3
    assert events(tmp_path, "round")[0]["clients"]["c3"] == {"bytes_down": 7, "bytes_up": 5, "seconds": 0.5}


def test_a_loss_that_is_infinite_stops_no_line_of_the_progress(tmp_path: Path) -> None:
    _, _, heard = run(tmp_path, lambda c, rnd, reply: replace(reply, info={"loss": math.inf, "tokens": 1}))
    console = Console(file=StringIO(), width=120)
    with listener(console, 3) as plain, Progress(console=console) as progress:
        live = Live(Lines(console, 3), progress, progress.add_task("round", total=3, now="", left=""))
        for event in heard:
            plain(event)
            live(event)
    assert "round 3/3  loss inf" in console.file.getvalue()  # type: ignore[attr-defined]


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run(tmp_path, lambda c, rnd, reply: replace(reply, info={"loss": math.inf, "tokens": 1}))
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert events(tmp_path, "round")[0]["clients"]["c0"]["loss"] is None


def test_what_is_cut_off_the_rows_is_said_at_the_start_and_kept(tmp_path: Path) -> None:
    _, _, heard = run(tmp_path)
    assert not [event for event in heard if isinstance(event, Truncated | Note)]
    engine = Compute(lambda c, r, reply: reply, cut=Truncation(40, 3, 120))
    method = method_named("fedit")(method_named("fedit").Settings(), Plan(rank=2, rounds=3))
    (tmp_path / "cut").mkdir()
    heard.clear()
    Runner(method, engine, RoundSettings(rounds=3, seed=0), tmp_path / "cut", heard.append).run()
    said = [i for i, event in enumerate(heard) if isinstance(event, Note) and "3 of 40 rows" in event.text]
    first = next(i for i, event in enumerate(heard) if isinstance(event, RoundStart))
    assert len(said) == 1
    assert said[0] < first
    (line,) = events(tmp_path / "cut", "truncated")
    assert line == {"event": "truncated", "rows": 40, "cut": 3, "tokens": 120}
    read = read_events(tmp_path / "cut" / "metrics.jsonl")
    summary = summarise(read, engine.clients, method="fedit", title="", task="classification", seed=0)
    assert summary.truncated == Truncation(40, 3, 120)
    assert summary.to_json()["truncated"] == {"rows": 40, "cut": 3, "tokens": 120}


def test_what_the_user_should_know_of_the_rows_is_said_once_and_kept(tmp_path: Path) -> None:
    method = method_named("fedit")(method_named("fedit").Settings(), Plan(rank=2, rounds=3))
    engine = Compute(lambda c, r, reply: reply)
    for rounds in (2, 3):
        Runner(method, engine, RoundSettings(rounds, 0), tmp_path, notes=["3 test in train"]).run()
    assert [line["text"] for line in events(tmp_path, "note")] == ["3 test in train"]


def test_steps_are_heard_as_they_are_taken_and_kept_nowhere(tmp_path: Path) -> None:
    _, _, heard = run(tmp_path)
    assert [event for event in heard if isinstance(event, ClientSteps)] == [
        ClientSteps(rnd, [f"c{i}"], 1, 2) for rnd in (1, 2, 3) for i in range(4)
    ]
    kinds = [type(event) for event in heard]
    assert kinds[kinds.index(ClientSteps) + 1] is ClientDone
    assert events(tmp_path, "steps") == []


def test_a_run_that_diverges_is_not_blamed_on_the_replies(tmp_path: Path) -> None:
    def spoil(client: str, rnd: int, reply: Reply) -> Reply | str:
        return f"client {client}: the loss is not finite at step 3 of round {rnd}" if rnd == 2 else reply

    with pytest.raises(CoterieError, match=r"round 2: training diverged at 4 of 4 clients.*learning_rate.*step 3"):
        run(tmp_path, spoil)
    stopped = events(tmp_path, "round")[-1]
    assert (stopped["round"], len(stopped["failed"]), len(stopped["clients"])) == (2, 4, 4)
    assert "not finite" in stopped["failed"]["c0"]
    run(tmp_path)  # once the cause is gone
    assert [line["round"] for line in events(tmp_path, "round")] == [1, 2, 3]


def test_a_round_that_too_few_replies_stop_is_in_the_metrics(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"round 1: 0 of 4 clients sent a usable reply.*c0: no reply"):
        run(tmp_path, lambda client, rnd, reply: None)
    (line,) = events(tmp_path, "round")
    assert line["failed"] == dict.fromkeys(["c0", "c1", "c2", "c3"], "no reply")


@pytest.mark.parametrize("loss", [28_289.0, math.nan, math.inf])
def test_a_loss_that_no_guess_could_have_is_a_warning_once(loss: float) -> None:
    rounds = [
        Evaluated(rnd, {"a": {"test": {"loss": 0.7}}, "b": {"test": {"loss": value}, "validation": {"loss": 1.0}}})
        for rnd, value in enumerate([12.0, loss, loss], start=1)
    ]
    assert loss_note(rounds[:1]) is None
    text = loss_note(rounds[:2])
    assert text is not None
    assert "round 2 has losses that are worse than any guess (b test " in text
    assert loss_note(rounds) is None
