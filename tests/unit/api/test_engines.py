"""The service's answers are those of ``coterie.load``, whatever else is in the batch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import coterie
import tiny
from api_runs import CLIENTS, make_run
from coterie.adapters.bundle import read_bundle, write_bundle
from coterie.api import decode
from coterie.api.decode import Decoding
from coterie.api.encode import Encoding
from coterie.api.experts import Gates, token_experts
from coterie.api.jobs import Encode, Encoded, Event, Generate, Job, Piece, RequestError, Written
from coterie.api.served import served
from coterie.api.worker import Engine
from coterie.data.rows import Turn
from coterie.ops.sampling import generator_of, next_token
from coterie.types import CoterieError, Part

torch.set_num_threads(1)
TEXTS = ["the printer smokes", "x", "a rather long day indeed, is it not?", "two words"]


def job(request: Encode | Generate, deadline: float = 1e12) -> tuple[Job, list[Event]]:
    events: list[Event] = []
    return Job(request, deadline, events.append), events


def run_all(engine: Engine, requests: list[Generate] | list[Encode], every: int = 0) -> list[list[Event]]:
    """Admit one request every ``every`` steps (0: all at once), and step to the end."""
    logs = []
    for request in requests:
        made, events = job(request)
        logs.append(events)
        engine.admit(made)
        for _ in range(every):
            engine.step()
    while engine.busy:
        engine.step()
    return logs


def alone(north: coterie.ClientModel, request: Generate) -> str:
    """What transformers' generate makes of the prompt with the client's own model."""
    if isinstance(request.prompt, str):
        ids = north.tokenizer(request.prompt)["input_ids"][:-1]
    else:
        (turn,) = request.prompt
        text = north.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.text}], add_generation_prompt=True, tokenize=False
        )
        ids = north.tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    out = north.model.generate(**inputs, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=2)
    return str(north.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("gate", "never"),
    [
        ("slot_top_k", ""),
        ("similarity", ""),
        ("similarity", "south"),
        ("scaled_dot_product", ""),
        ("scaled_dot_product", "east"),
        ("constant", ""),
    ],
)
def test_every_client_classifies_as_it_does_alone(gate: str, never: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, gate=gate, never=never)
    requests = [Encode(i % 3, ((text, None), ("pair", text))) for i, text in enumerate([*TEXTS, *TEXTS[:3]])]
    with served(run) as models:
        logs = run_all(Encoding(models, rows=5), requests)
        assert models.encoder
    own = [coterie.load(run, client) for client in CLIENTS]
    for request, (encoded,) in zip(requests, logs, strict=True):
        assert isinstance(encoded, tuple)
        mine = own[request.client]
        for (text, pair), answer in zip(request.texts, encoded, strict=True):
            with torch.no_grad():
                logits = mine.model(**mine.tokenizer(text, pair, return_tensors="pt")).logits
            assert answer.values == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)
            assert not answer.cut


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_base_in_half_precision_answers_nearly_alike(arch: str, tmp_path: Path) -> None:
    run, logs = make_run(tmp_path, arch), {}
    for dtype in (torch.float32, torch.bfloat16):
        with served(run, dtype=dtype) as models:
            assert {p.dtype for p in models.base.model.parameters() if p.is_floating_point()} == {dtype}
            if arch == "bert":
                requests = [Encode(i % 3, ((text, None),)) for i, text in enumerate(TEXTS)]
                logs[dtype] = [log[0][0].values for log in run_all(Encoding(models, rows=8), requests)]  # type: ignore[index, union-attr]
            else:  # the trial compares rows together with rows alone
                writes = [Generate(i % 3, text, 4) for i, text in enumerate(TEXTS)]
                assert all(isinstance(log[-1], Written) for log in run_all(Decoding(models, rows=8), writes))
    for exact, half in zip(*logs.values(), strict=True) if logs else ():
        assert half == pytest.approx(exact, abs=0.05)
        assert half != exact


def test_an_embedding_is_the_mean_over_the_texts_own_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with served(run) as models:
        logs = run_all(
            Encoding(models, rows=8), [Encode(i % 3, ((t, None),), "embedding") for i, t in enumerate(TEXTS)]
        )
    for i, ((encoded,), text) in enumerate(zip(logs, TEXTS, strict=True)):
        mine = coterie.load(run, CLIENTS[i % 3])
        with torch.no_grad():
            hidden = mine.model.base_model(**mine.tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert encoded[0].values == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)  # type: ignore[index, union-attr]


def test_a_long_text_is_cut_where_evaluation_cut_it(tmp_path: Path) -> None:
    with served(make_run(tmp_path, max_length=6)) as models:
        ((encoded,),) = run_all(Encoding(models, rows=8), [Encode(0, (("many words " * 9, None), ("x", None)))])
    assert isinstance(encoded, tuple)
    assert [(one.tokens, one.cut) for one in encoded] == [(6, True), (3, False)]


def test_a_prompt_is_read_whole_where_predict_keeps_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", max_length=8)
    north = coterie.load(run, "north")
    whole = Generate(1, "a rather long prompt of many words", max_tokens=6)
    with served(run) as models:
        ((end,),) = run_all(Decoding(models, rows=2), [whole])
    (predicted,) = replace(north, max_new_tokens=6).predict([{"prompt": whole.prompt, "completion": ""}])
    assert isinstance(end, Written)
    assert end.prompt_tokens == len(north.tokenizer(whole.prompt)["input_ids"]) - 1 > 8
    assert end.text == alone(north, whole) != predicted.columns()["prediction"]


@pytest.mark.parametrize("arch", tiny.DECODERS)
@pytest.mark.parametrize(("gate", "never"), [("slot_top_k", ""), ("similarity", ""), ("similarity", "south")])
def test_texts_of_many_clients_join_and_leave_and_are_those_of_each_alone(
    arch: str, gate: str, never: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, arch, gate, never=never)
    requests = [Generate(i % 3, text, max_tokens=4 + 5 * (i % 2)) for i, text in enumerate([*TEXTS, *TEXTS[::-1]])]
    own = [coterie.load(run, client) for client in CLIENTS]
    with served(run) as models:
        for every in (0, 2):
            logs = run_all(Decoding(models, rows=8), requests, every)
            written = [log[-1] for log in logs]
            for request, end in zip(requests, written, strict=True):
                assert isinstance(end, Written)
                assert end.text == alone(own[request.client], request)
        assert not models.encoder


def test_a_chat_has_the_tokens_of_training(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", chat=True)
    request = Generate(1, (Turn("user", "how are you"),), max_tokens=6)
    with served(run, ["south", "north"]) as models:
        assert models.names == ("south", "north")
        ((end,),) = run_all(Decoding(models, rows=2), [request])
    assert isinstance(end, Written)
    assert end.text == alone(coterie.load(run, "north"), request)


def test_what_is_sampled_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    sampled = [Generate(0, "a b", 8, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    with served(make_run(tmp_path, "llama")) as models:
        texts = [log[-1].text for log in run_all(Decoding(models, rows=8), sampled)]  # type: ignore[union-attr]
        ((one,),) = run_all(Decoding(models, rows=8), sampled[:1])
    assert texts[0] == texts[1] == one.text  # type: ignore[union-attr]
    assert texts[0] != texts[2]


def test_pieces_make_the_text_and_a_stop_string_ends_it(tmp_path: Path) -> None:
    with served(make_run(tmp_path, "llama")) as models:
        (log,) = run_all(Decoding(models, rows=8), [Generate(0, "a b", 12, stream=True)])
        *pieces, end = log
        assert isinstance(end, Written)
        assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == end.text
        assert len(pieces) > 1
        stop = end.text[3:5]
        (log,) = run_all(Decoding(models, rows=8), [Generate(0, "a b", 12, stream=True, stop=("@@", stop))])
    assert log[-1] == Written(end.text[: end.text.index(stop)], "stop", end.prompt_tokens, log[-1].tokens)  # type: ignore[union-attr]
    assert "".join(piece.text for piece in log[:-1] if isinstance(piece, Piece)) == log[-1].text  # type: ignore[union-attr]


def test_the_experts_of_every_token_are_those_that_its_gates_weighed(tmp_path: Path) -> None:
    with served(make_run(tmp_path)) as models:
        requests = [Encode(2, ((TEXTS[0], None),), experts=True), Encode(0, ((TEXTS[2], None),))]
        together, without = (log[0][0] for log in run_all(Encoding(models, rows=8), requests))  # type: ignore[index]
        ((single,),) = (log[0] for log in run_all(Encoding(models, rows=8), requests[:1]))
    assert isinstance(together, Encoded)
    assert isinstance(single, Encoded)
    assert without.experts is None  # type: ignore[union-attr]
    shown = together.experts
    assert shown is not None
    assert [layer.layer for layer in shown.layers] == ["0", "1"]
    assert len(shown.tokens) == together.tokens
    for layer in shown.layers:
        assert layer.experts == ("0", "1", "2", "3")
        assert len(layer.weights) == together.tokens
        assert all(sum(token) == pytest.approx(1, abs=1e-3) for token in layer.weights)
    assert single.experts is not None
    assert shown.layers[0].weights == single.experts.layers[0].weights


def test_a_text_that_is_written_shows_its_experts_too(tmp_path: Path) -> None:
    with served(make_run(tmp_path, "llama")) as models:
        logs = run_all(Decoding(models, rows=8), [Generate(0, "a", 5), Generate(1, "a b c", 5, experts=True)])
        plain, shown = (log[-1] for log in logs)
        spare = len(models.base.tokenizer)
        assert token_experts(models, 0, Gates(), [spare]).tokens == (f"<{spare}>",)  # of a padded vocabulary
    assert isinstance(plain, Written)
    assert plain.experts is None
    assert isinstance(shown, Written)
    assert shown.experts is not None
    assert len(shown.experts.tokens) == shown.prompt_tokens + shown.tokens - 1
    assert all(isinstance(token, str) for token in shown.experts.tokens)  # spare ids of the model have no name
    assert {len(layer.weights) for layer in shown.experts.layers} == {len(shown.experts.tokens)}


def test_a_job_that_is_dropped_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    with served(make_run(tmp_path, "llama")) as models:
        kept, other = Generate(0, "a b", 9), Generate(1, "a much longer prompt", 9)
        ((expected,),) = run_all(Decoding(models, rows=8), [kept])
        engine = Decoding(models, rows=8)
        (first, log), (second, lost) = job(kept), job(other)
        engine.admit(first)
        engine.admit(second)
        engine.step()
        engine.step()
        engine.drop({second})
        assert engine.busy == 1
        while engine.busy:
            engine.step()
    assert log == [expected]
    assert lost == []


def test_what_a_model_does_not_do_is_refused(tmp_path: Path) -> None:
    with served(make_run(tmp_path, "llama", "constant")) as models:
        engine = Decoding(models, rows=8, prompt_tokens=20)
        for request, code in (
            (Encode(0, (("a", None),)), "wrong_route"),
            (Generate(0, "word " * 30, 5), "prompt_too_long"),
            (Generate(0, "word", 5000), "context_length_exceeded"),
        ):
            with pytest.raises(RequestError) as caught:
                engine.admit(job(request)[0])
            assert caught.value.code == code
        assert engine.busy == 0


def test_a_job_that_is_too_late_gets_a_fault_once(tmp_path: Path) -> None:
    late, events = job(Generate(0, "a"), deadline=time.monotonic() - 1)
    assert late.over(time.monotonic())
    assert late.over(time.monotonic())
    (fault,) = events
    assert isinstance(fault, RequestError)
    assert fault.status == 504


def test_a_folder_without_bundles_or_with_other_clients_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CoterieError, match=r"no bundle of '\.\./north'; its clients are east, north, south"):
        served(run, ["../north"]).__enter__()
    with pytest.raises(CoterieError, match=r"no bundle\.safetensors in .*elsewhere"):
        served(tmp_path / "elsewhere").__enter__()
    with served(run / "clients" / "south") as models:
        assert models.names == ("south",)


def test_a_bank_that_makes_no_numbers_ends_its_own_requests_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama")
    bank, about = read_bundle(run / "clients" / "north")
    for key in (key for key in bank.tensors if key.part is Part.B):
        bank.tensors[key].fill_(float("nan"))
    write_bundle(run / "clients" / "north", bank, about)
    with served(run) as models:
        engine = Decoding(models, rows=8)
        kept, broken = run_all(engine, [Generate(0, "a b", 5), Generate(1, "a b", 5, temperature=1.0)])
        ((alone_,),) = run_all(engine, [Generate(0, "a b", 5)])
    assert kept == [alone_]
    (fault,) = broken
    assert isinstance(fault, RequestError)
    assert fault.code == "not_a_number"


def test_a_bank_that_classifies_into_no_numbers_ends_its_own_requests_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    bank, about = read_bundle(run / "clients" / "north")
    for key in (key for key in bank.tensors if key.part is Part.HEAD):
        bank.tensors[key].fill_(float("nan"))
    write_bundle(run / "clients" / "north", bank, about)
    with served(run) as models:
        kept, broken = run_all(Encoding(models, rows=8), [Encode(0, (("a", None),)), Encode(1, (("a", None),))])
    assert isinstance(kept[0], tuple)
    (fault,) = broken
    assert isinstance(fault, RequestError)
    assert fault.code == "not_a_number"


@pytest.mark.parametrize("part", ["next_token", "token_experts"])
def test_a_fault_of_one_row_ends_its_own_request_alone(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    real = getattr(decode, part)
    said: list[str] = []

    def fails(*args: Any) -> Any:
        if part == "next_token" and args[1] == 0:
            return real(*args)
        raise RuntimeError("SECRET")

    with served(make_run(tmp_path, "llama")) as models:
        kept, broken = Generate(0, "a b", 5), Generate(1, "b b", 5, temperature=1.0, experts=True)
        ((expected,),) = run_all(Decoding(models, rows=8), [kept])
        monkeypatch.setattr(decode, part, fails)
        logs = run_all(Decoding(models, rows=8, report=said.append), [kept, broken, kept])
    assert [logs[0], logs[2]] == [[expected]] * 2
    (fault,) = logs[1]
    assert isinstance(fault, RequestError)
    assert fault.code == "internal_error"
    (line,) = said
    assert line.startswith("a text could not be continued: RuntimeError at ")


@pytest.mark.parametrize("whole_pass", [True, False])
def test_a_text_that_cannot_be_encoded_ends_its_own_request_alone(
    whole_pass: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    said: list[str] = []
    bad = Encode(1, (("one", None), ("SECRET", None), ("three", None)))
    kept = [Encode(i % 3, ((text, None),)) for i, text in enumerate(TEXTS)]
    with served(make_run(tmp_path)) as models:
        engine = Encoding(models, rows=4, report=said.append)
        expected = run_all(engine, kept)
        ids = tuple(models.base.tokenizer("SECRET")["input_ids"])
        where = "_pass" if whole_pass else "_encoded"
        real = getattr(Encoding, where)

        def fails(self: Encoding, row: Any, *args: Any) -> Any:
            if ids in [tuple(one.example.ids) for one in (row if whole_pass else [row])]:
                raise IndexError("SECRET")
            return real(self, row, *args)

        monkeypatch.setattr(Encoding, where, fails)
        logs = run_all(engine, [*kept[:2], bad, *kept[2:]])
        assert (engine.busy, engine.fail(RequestError("none are left"))) == (0, [])
    ((fault,),) = logs[2:3]
    assert isinstance(fault, RequestError)
    assert fault.code == "internal_error"
    for (found,), (answer,) in zip([*logs[:2], *logs[3:]], expected, strict=True):
        assert found[0].values == pytest.approx(answer[0].values, abs=1e-5)  # type: ignore[index, union-attr]
    (line,) = said
    assert line.startswith("a text could not be encoded: IndexError at ")


def test_prompts_that_padding_would_make_too_long_wait_their_turn(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("coterie.api.decode._PREFILL", 40)
    requests = [Generate(0, "a b", 5), Generate(1, "a much longer prompt than the other", 5), Generate(2, "c", 5)]
    with served(make_run(tmp_path, "llama")) as models:
        engine = Decoding(models, rows=8)
        together = run_all(engine, requests)
        assert together == [log for request in requests for log in run_all(engine, [request])]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-10])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([1.0, 300.0, -7.0])
    assert next_token(logits, temperature, 1e-300, generator_of(1)) == 1
