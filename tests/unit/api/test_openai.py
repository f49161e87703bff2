"""The official client of OpenAI's against the real service on loopback."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import httpx
import openai
import pytest
import torch

from api_runs import CLIENTS, LABELS, make_run
from api_server import running
from coterie.api.keys import new_key
from coterie.api.server import Ready, Service
from doc_blocks import blocks

torch.set_num_threads(1)


def client_of(service: Ready, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.address}v1", api_key=key, max_retries=0, timeout=30)


def test_there_is_a_model_for_every_client(generator: Ready) -> None:
    client = client_of(generator)
    models = client.models.list().data
    assert [model.id for model in models] == list(CLIENTS)
    assert {model.owned_by for model in models} == {"coterie"}
    assert client.models.retrieve("north").id == "north"


def test_a_chat_in_one_piece_and_as_a_stream_are_the_same(generator: Ready) -> None:
    client = client_of(generator)
    whole = client.chat.completions.create(
        model="north", messages=[{"role": "user", "content": "how are you"}], max_tokens=12
    )
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")
    stream = client.chat.completions.create(
        model="north",
        messages=[{"role": "user", "content": [{"type": "text", "text": "how are you"}]}],
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_example_of_the_page_runs(generator: Ready, classifier: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python", "serve")
    address = "http://127.0.0.1:8000/"
    assert f'"{address}v1"' in example.text
    said = [{"role": "user", "content": "the printer on floor two smokes"}]
    limited = example.text.replace("stream=True", "stream=True, max_tokens=12")
    exec(limited.replace(address, generator.address), {})
    whole = client_of(generator).chat.completions.create(model="north", messages=said, max_tokens=12)  # type: ignore[call-overload]
    assert capsys.readouterr().out == whole.choices[0].message.content
    (curl,) = [block.text for block in blocks("text") if block.page == example.page and "curl" in block.text]
    address_of, body = re.search(r"curl (\S+) .*-d '(.*)'", curl, re.DOTALL).groups()  # type: ignore[union-attr]
    answer = httpx.post(address_of.replace(address, classifier.address), json=json.loads(body))
    assert [item["label"] in LABELS["north"] for item in answer.json()["data"]] == [True, True]


def test_clients_differ_and_so_do_seeds(generator: Ready) -> None:
    client = client_of(generator)

    def text(model: str, **settings: float) -> str:
        made = client.completions.create(model=model, prompt="one two", max_tokens=10, **settings)  # type: ignore[call-overload]
        return str(made.choices[0].text)

    assert text("north") == text("north") != text("south")
    one, again, other = (text("north", temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_completion_streams_and_stops(generator: Ready) -> None:
    client = client_of(generator)
    whole = client.completions.create(model="east", prompt="one", max_tokens=20).choices[0].text
    pieces = client.completions.create(model="east", prompt="one", max_tokens=20, stream=True, stop=[whole[4:6]])
    cut = "".join(piece.choices[0].text for piece in pieces)
    assert cut == whole[: whole.index(whole[4:6])]


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"model": "nobody"}, 404, "no model 'nobody'; /v1/models lists yours"),
        ({"model": "../north"}, 404, "no model '../north'"),
        ({"model": "\x1b[31m" + "n" * 200}, 404, r"no model ' \[31mnnn"),
        ({"max_tokens": 41}, 400, "this service writes at most 40 tokens"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"n": 2}, 400, "n: Value error, this service writes one text per request"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty: .* has no such penalty"),
        ({"logprobs": True}, 400, "logprobs: .* does not offer it"),
        ({"tools": []}, 400, "tools: this service does not know it; leave it out"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"messages": []}, 400, "messages: .*at least 1 item"),
        ({"messages": [{"role": "user", "content": "a"}] * 5}, 400, "at most 4 messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, 400, "the model takes 160"),
        ({"messages": [{"role": "user", "content": "w" * 30_000}]}, 413, "the body may have 20,000 bytes"),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(
    settings: dict[str, object], status: int, said: str, generator: Ready
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=said) as caught:
            client_of(generator).chat.completions.create(  # type: ignore[call-overload]
                **{"model": "north", "messages": [{"role": "user", "content": "a"}], "stream": stream, **settings}
            )
        assert caught.value.status_code == status
        assert caught.value.type in ("invalid_request_error", "server_error")
        assert "\x1b" not in caught.value.message


def test_a_generator_neither_classifies_nor_embeds(generator: Ready) -> None:
    client = client_of(generator)
    with pytest.raises(openai.BadRequestError, match="this model writes text"):
        client.embeddings.create(model="north", input="a")
    with pytest.raises(openai.BadRequestError, match="this model writes text"):
        client.post("/classify", body={"model": "north", "input": "a"}, cast_to=object)


def test_texts_are_classified_with_probabilities_and_experts(classifier: Ready) -> None:
    answer = httpx.post(
        f"{classifier.address}v1/classify",
        json={"model": "north", "input": ["the printer smokes", {"text": "a", "text_pair": "b"}], "experts": True},
    ).json()
    assert answer["model"] == "north"
    assert [item["index"] for item in answer["data"]] == [0, 1]
    for item in answer["data"]:
        assert tuple(item["probabilities"]) == LABELS["north"]
        assert sum(item["probabilities"].values()) == pytest.approx(1)
        assert item["label"] == max(item["probabilities"], key=item["probabilities"].get)
        assert [layer["layer"] for layer in item["experts"]["layers"]] == ["0", "1"]
        assert len(item["experts"]["tokens"]) == len(item["experts"]["layers"][0]["weights"])
    with pytest.raises(openai.BadRequestError, match="this model classifies texts and does not write any"):
        client_of(classifier).completions.create(model="north", prompt="a")


def test_embeddings_are_the_same_as_numbers_and_as_bytes(classifier: Ready) -> None:
    client = client_of(classifier)
    numbers = client.embeddings.create(model="south", input=["a b", "c"], encoding_format="float").data
    by_default = client.embeddings.create(model="south", input=["a b", "c"]).data  # the client wants bytes, and unpacks
    assert [one.embedding for one in by_default] == [pytest.approx(one.embedding) for one in numbers]
    raw = httpx.post(
        f"{classifier.address}v1/embeddings", json={"model": "south", "input": "c", "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    packed = base64.b64decode(raw)
    assert list(struct.unpack(f"<{len(packed) // 4}f", packed)) == pytest.approx(numbers[1].embedding, abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="at most 4 texts"):
        client.embeddings.create(model="south", input=["a"] * 5)


def test_a_key_opens_the_models_that_it_names_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (one, entry), (every, whole) = new_key("one", ["north"]), new_key("every", [])
    (tmp_path / "keys.toml").write_text(f"{entry}\n{whole}\n", encoding="utf-8")
    with running(Service(run, port=0, keys=tmp_path / "keys.toml")) as service:
        assert [model.id for model in client_of(service, one).models.list()] == ["north"]
        assert [model.id for model in client_of(service, every).models.list()] == list(CLIENTS)
        assert client_of(service, one).embeddings.create(model="north", input="a").data
        for model in ("south", "nobody"):
            with pytest.raises(openai.NotFoundError, match=f"no model '{model}'"):
                client_of(service, one).embeddings.create(model=model, input="a")
        for wrong in ("wrong", one[:-1], one + "a", "é"):
            answer = httpx.get(f"{service.address}v1/models", headers={b"Authorization": b"Bearer " + wrong.encode()})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{service.address}metrics").status_code == 401
        assert httpx.get(f"{service.address}health").json() == {"status": "ok"}
        assert httpx.get(f"{service.address}", headers={"Host": "models.example.org"}).status_code == 200
