"""Secure sums over sites: real workers with keys, their messages, and a Grid in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import sites
from coterie import codec
from coterie.config.load import check_config, load_raw
from coterie.deploy.agreement import config_at, terms_of
from coterie.deploy.keys import init_keys
from coterie.deploy.secure_server import RemoteSums
from coterie.deploy.secure_site import note_opened, run_name
from coterie.deploy.serve import serve
from coterie.deploy.worker import Worker
from coterie.experiment import open_run, rounds_of
from coterie.flower.message import Message
from coterie.runs.events import Note, RoundDone
from coterie.runs.rounds import Runner
from coterie.secure.session import SecureSumError
from coterie.types import CoterieError, Instruction, Reply
from secure_sums import session

NAMES = ["mood-0", "mood-1", "place-0", "size-0"]
Change = Callable[[str, Message, Message], Message]
SPLITS = ("train", "validation", "test")
SECURE = {"enabled": True, "threshold": 0.6}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of four sites with keys; returns the config's path."""
    folder = tmp_path_factory.mktemp("made")
    path = sites.config(folder, method="fedit", run="evaluate_every = 3")
    init_keys(folder / "keys", NAMES, ["127.0.0.1"])
    return path


PRIVATE = {"unit": "client", "noise_at": "sum", "clip": 0.1, "noise_multiplier": 1.0, "colluding": 0.2}


def staff(folder: Path, state: Path) -> dict[str, Worker]:
    cache: dict[str, Any] = {}
    return {
        c: Worker(
            flower_sites.site_settings(
                folder, c, site={"key": f"keys/sites/{c}", "peers": "keys/sites", "state": str(state / c)}
            ),
            folder,
            cache,
        )
        for c in NAMES
    }


def run(
    made: Path,
    out: Path,
    there: dict[str, Worker],
    change: Change = lambda c, sent, made: made,
    privacy: dict[str, Any] | None = None,
    **agreed: Any,
) -> tuple[Any, list[Any], list[Any]]:
    """One round; returns the state, the runner's events and what every site answered."""
    config = flower_sites.server_config(
        made,
        secure_aggregation=SECURE,
        privacy=privacy or {},
        run={"rounds": 1, **({"export": "last"} if privacy else {})},
        federation={"sites": NAMES},
    )
    seen: list[Any] = []

    class Watching(Worker):
        def answer(self, message: Message) -> Message:
            answer = change(self.site.site.id, message, super().answer(message))
            seen.append((self.site.site.id, message.head["kind"], message.head.get("step"), answer))
            return answer

    watched = {}
    for c, worker in there.items():
        kind = type("Watched", (Watching, type(worker)), {})
        watched[c] = kind(worker.site, worker.root, worker.cache)
    engine = flower_sites.engine_over(config, watched, **agreed)
    engine.sites.gather(len(NAMES), 5)
    out.mkdir()
    heard: list[Any] = []
    method = flower_sites.method_of(config)
    runner = Runner(method, engine, rounds_of(config), out, heard.append, sums=RemoteSums(engine))
    return runner.run(), heard, seen


def done(heard: list[Any]) -> RoundDone:
    return next(event for event in heard if isinstance(event, RoundDone))


def test_sites_send_no_tensors_and_the_sum_is_that_of_a_simulation(made: Path, tmp_path: Path) -> None:
    state, heard, seen = run(made, tmp_path / "run", staff(made.parent, tmp_path))
    replies = [codec.decode(Reply, answer.body) for _, kind, _, answer in seen if kind == "train"]
    assert len(replies) == len(NAMES)
    assert all(not reply.tensors and not reply.info for reply in replies)
    ((_, of),) = (done(heard).sums or {}).items()
    assert (of.error, set(of.survivors)) == (None, set(NAMES))

    raw = load_raw(made)
    data = {"clients": [{"id": c, **{s: f"clients/{c}/{s}.jsonl" for s in SPLITS}} for c in NAMES]}
    plain = check_config({**raw, "data": data, "run": {**raw["run"], "rounds": 1}})  # type: ignore[dict-item]
    opened = open_run(plain, tmp_path / "plain", made.parent, {})
    (tmp_path / "plain").mkdir()
    whole = Runner(opened.method, opened.engine, rounds_of(plain), tmp_path / "plain").run()
    assert whole.lora
    assert all(torch.allclose(state.lora[key], value, atol=2e-6) for key, value in whole.lora.items())


@pytest.mark.parametrize("step", ["keys", "values", "reveal"])
def test_a_site_whose_worker_forgets_is_left_out(step: str, made: Path, tmp_path: Path) -> None:
    def forgets(client: str, sent: Message, answer: Message) -> Message:
        lost = client == "mood-0" and sent.head.get("step") == step
        return (
            Message({"error": "this site holds no update for a secure sum; it may have been restarted"})
            if lost
            else answer
        )

    _, heard, _ = run(made, tmp_path / "run", staff(made.parent, tmp_path), forgets)
    ((_, of),) = (done(heard).sums or {}).items()
    assert of.error is None
    assert set(of.survivors) == set(NAMES) - ({"mood-0"} if step != "reveal" else set())
    assert set(done(heard).failed) == set(NAMES) - set(of.survivors)


def test_with_too_few_sites_nothing_is_opened_and_the_run_says_so(made: Path, tmp_path: Path) -> None:
    def forget(client: str, sent: Message, answer: Message) -> Message:
        lost = client.startswith("mood") and sent.head.get("step") == "shares"
        return Message({"error": "gone"}) if lost else answer

    _, heard, seen = run(made, tmp_path / "run", staff(made.parent, tmp_path), forget)
    texts = [event.text for event in heard if isinstance(event, Note)]
    assert any(
        "was not opened: 2 of its 4 sites were left after the step 'shares', and 3 are needed" in t for t in texts
    )
    assert not [step for _, _, step, _ in seen if step in ("values", "survivors", "reveal")]


def test_a_restarted_worker_and_another_round_get_no_answer(made: Path, tmp_path: Path) -> None:
    there = staff(made.parent, tmp_path)
    sent: list[Message] = []

    def remember(client: str, message: Message, answer: Message) -> Message:
        sent.extend([message] if (client, message.head.get("step")) == ("mood-0", "keys") else [])
        return answer

    run(made, tmp_path / "run", there, remember)
    fresh = staff(made.parent, tmp_path)["mood-0"]
    assert "holds no update for a secure sum" in fresh.answer(sent[0]).head["error"]
    assert "not one of keys, shares" in fresh.answer(Message({**sent[0].head, "step": "open"})).head["error"]


def test_a_round_that_is_done_again_has_the_same_noise_and_the_same_sum(made: Path, tmp_path: Path) -> None:
    """A server that starts again learns nothing new; sites whose processes were started anew too."""
    state, heard, seen = run(made, tmp_path / "run", staff(made.parent, tmp_path), privacy=PRIVATE)
    ((_, of),) = (done(heard).sums or {}).items()
    assert (of.error, set(of.survivors)) == (None, set(NAMES))
    replies = [codec.decode(Reply, answer.body) for _, kind, _, answer in seen if kind == "train"]
    assert all((reply.tensors, reply.info, reply.num_examples) == ({}, {}, 1) for reply in replies)
    again, heard, _ = run(made, tmp_path / "again", staff(made.parent, tmp_path), privacy=PRIVATE, attempt=2)
    assert [of.error for of in (done(heard).sums or {}).values()] == [None]
    assert all(torch.equal(state.lora[key], again.lora[key]) for key in state.lora)
    other, _, _ = run(made, tmp_path / "other", staff(made.parent, tmp_path / "others"), privacy=PRIVATE)
    assert not torch.equal(state.lora[min(state.lora)], other.lora[min(state.lora)])


@pytest.mark.parametrize("step", ["values", "reveal"])
def test_sums_with_noise_do_without_a_site(step: str, made: Path, tmp_path: Path) -> None:
    def forgets(client: str, sent: Message, answer: Message) -> Message:
        lost = client == "mood-0" and sent.head.get("step") == step
        return Message({"error": "gone"}) if lost else answer

    _, heard, _ = run(made, tmp_path / "run", staff(made.parent, tmp_path), forgets, PRIVATE)
    ((_, of),) = (done(heard).sums or {}).items()
    assert of.error is None
    assert set(of.survivors) == set(NAMES) - ({"mood-0"} if step == "values" else set())


def test_a_round_is_opened_over_one_set_of_sites_alone(tmp_path: Path) -> None:
    of, path, three = session(4), tmp_path / "opened.json", ("s0", "s1", "s2")
    again = replace(of, run="run 1 again")
    note_opened(path, of, three, "sent")
    note_opened(path, again, ("s2", "s1", "s0"), "sent")
    note_opened(path, replace(of, rnd=2), of.members, "sent")
    note_opened(path, replace(of, layout=("other numbers",)), of.members, "sent")
    with pytest.raises(SecureSumError, match="round 1 was opened over s0, s1, s2 before; over s0, s1, s2, s3 too"):
        note_opened(path, again, of.members, "sent")
    with pytest.raises(SecureSumError, match="after another instruction"):
        note_opened(path, again, three, "sent otherwise")


@pytest.mark.parametrize(
    "changes",
    [
        {"most_examples": 39},
        {"total": 5.0},
        {"members": ("s0", "s1", "s2")},
        {"layout": ("more numbers", "five numbers")},
        {"start": ("another",)},
    ],
)
def test_a_round_is_opened_once_for_each_tensor_whatever_the_session_says(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    of = session(4)
    note_opened(tmp_path / "opened.json", of, ("s0", "s1", "s2"), "sent")
    with pytest.raises(SecureSumError, match="with other members, weights or tensors"):
        note_opened(tmp_path / "opened.json", replace(of, **changes), ("s0", "s1", "s2"), "sent")


def test_sites_that_were_sent_other_experts_open_no_sum(made: Path, tmp_path: Path) -> None:
    there = staff(made.parent, tmp_path)

    class Lied(Worker):
        def answer(self, message: Message) -> Message:
            if message.head["kind"] == "train" and self.site.site.id != "size-0":
                ins = codec.decode(Instruction, message.body)
                zeros = {key: torch.zeros_like(value) for key, value in ins.tensors.items()}
                message = Message(message.head, codec.encode(replace(ins, tensors=zeros)))
            return super().answer(message)

    lied = {c: Lied(w.site, w.root, w.cache) for c, w in there.items()}
    _, heard, seen = run(made, tmp_path / "run", lied)
    ((_, of),) = (done(heard).sums or {}).items()
    assert "1 of its 4 sites were left after the step 'keys'" in str(of.error)
    assert not [step for _, _, step, _ in seen if step in ("shares", "values", "survivors", "reveal")]


def test_sites_with_other_terms_open_no_sum() -> None:
    assert run_name("run", 1, "one") != run_name("run", 1, "other")


def test_what_a_site_needs_and_what_it_refuses(made: Path, tmp_path: Path) -> None:
    folder = made.parent
    hidden = flower_sites.server_config(made, secure_aggregation=SECURE, federation={"sites": NAMES})
    plain = flower_sites.server_config(made, federation={"sites": NAMES})

    def greeted(config: Any, **site: Any) -> str:
        worker = Worker(flower_sites.site_settings(folder, "mood-0", site={**site, "state": str(tmp_path)}), folder)
        engine = flower_sites.engine_over(config, {"mood-0": worker})
        answer = worker.answer(engine.sites.agreement.message("query.hello"))
        return str(answer.head.get("error", ""))

    assert "signs with [site] key" in greeted(hidden)
    assert greeted(hidden, key="keys/sites/mood-0", peers="keys/sites") == ""
    assert "this site hides its updates ([site] peers), and the run does not" in greeted(
        plain, key="keys/sites/mood-0", peers="keys/sites"
    )
    with pytest.raises(CoterieError, match="needs the sites' keys, which --insecure leaves out"):
        serve(hidden, tmp_path / "run", root=folder, insecure=True)


def test_no_config_and_no_server_gets_sums_of_two_sites(made: Path, tmp_path: Path) -> None:
    """Of two, each can compute the other's update from the sum."""
    two = r"\[secure_aggregation\] min_group: Input should be greater than or equal to 3"
    with pytest.raises(CoterieError, match=two):
        flower_sites.server_config(made, secure_aggregation={**SECURE, "min_group": 2})
    terms = terms_of(flower_sites.server_config(made, secure_aggregation=SECURE))
    terms["secure_aggregation"]["min_group"] = 2  # a server that does not check
    with pytest.raises(CoterieError, match=two):
        config_at(flower_sites.site_settings(tmp_path, NAMES[0]), terms)
