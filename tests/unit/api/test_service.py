"""What faces the network: limits, hosts, slow clients, clients that hang up, and what the log does not hold."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from api_runs import make_run
from api_server import running
from coterie.api.keys import read_keys
from coterie.api.limits import Limits
from coterie.api.server import Ready, Service, ready
from coterie.types import CoterieError

torch.set_num_threads(1)
JSON = {"Content-Type": "application/json"}


def connect(service: Ready) -> socket.socket:
    url = urlsplit(service.address)
    made = socket.create_connection((url.hostname, url.port))
    made.settimeout(20)
    return made


def exchange(service: Ready, sent: bytes) -> bytes:
    """All that comes back until the service closes the connection."""
    with connect(service) as made:
        made.sendall(sent)
        parts = []
        while part := made.recv(65536):
            parts.append(part)
    return b"".join(parts)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def metric(service: Ready, line: str) -> str:
    text = httpx.get(f"{service.address}metrics").text
    return next(row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(f"{line} "))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON: Expecting property name"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"model": "north", "input": "\xed\xa0\x80"}', "the body is not JSON: 'utf-8' codec can't decode byte 0xed"),
        ('{"model": "north", "input": "a"}'.encode("utf-16"), "the body is not JSON"),
        (b"[" * 9000, "nested too deep"),
        (b'{"model": "north", "input": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "north", "input": 3}', "input"),
        (b'{"model": "north", "input": "a", "secret \\u001b[31m": 1}', r"this service does not know it"),
        (b"[]", "Input should be"),
        (b"", "the body is not JSON"),
    ],
)
def test_a_body_that_is_wrong_gets_a_reason(body: bytes, said: str, classifier: Ready) -> None:
    answer = httpx.post(f"{classifier.address}v1/classify", content=body, headers=JSON)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["message"].isprintable()


def test_only_json_of_the_same_origin_is_taken(classifier: Ready) -> None:
    url = f"{classifier.address}v1/classify"
    assert httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.get(classifier.address, headers={"Host": "evil.example"}).status_code == 421
    assert httpx.get(classifier.address, headers={"Host": "localhost:1"}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(classifier.address, headers={"Origin": "http://a.b"}).headers


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/docs", "GET", 404), ("/v1/classify", "GET", 405), ("/v1/../x", "GET", 404)]
)
def test_other_routes_are_errors_in_the_same_shape(path: str, method: str, status: int, classifier: Ready) -> None:
    answer = httpx.request(method, f"{classifier.address.rstrip('/')}{path}")
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_cut_off(classifier: Ready) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    said = exchange(classifier, head + b"Content-Length: 999999999999999\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413")
    chunk = b"4e20\r\n" + b" " * 20000 + b"\r\n"
    said = exchange(classifier, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + chunk)
    assert said.startswith(b"HTTP/1.1 413")
    assert exchange(classifier, head + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 4")


def test_a_head_that_is_too_large_or_never_ends_is_cut_off(classifier: Ready) -> None:
    assert b"400" in exchange(classifier, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000)[:20]
    with connect(classifier) as silent, connect(classifier) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: lo")
        for waiting in (silent, slow):
            with contextlib.suppress(ConnectionResetError):
                assert waiting.recv(100) == b""
    assert httpx.get(f"{classifier.address}health").status_code == 200


def test_a_body_that_comes_too_slowly_is_refused(classifier: Ready) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert exchange(classifier, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")


def test_a_client_that_hangs_up_costs_no_more_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "llama")
    body = json.dumps({"model": "north", "prompt": "a", "max_tokens": 150, "stop": "@@@@", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(Service(run, port=0, limits=Limits(rows=2))) as service:
        for sent in (*[len(body)] * 5, 9):
            with connect(service) as made:
                made.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
        until(lambda: metric(service, "coterie_api_running") == metric(service, "coterie_api_waiting") == "0")
        answer = httpx.post(f"{service.address}v1/completions", json={"model": "north", "prompt": "a", "max_tokens": 3})
        assert answer.status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_what_is_too_much_or_takes_too_long_is_refused_with_when_to_come_back(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama")
    limits = Limits(rows=1, waiting=1, per_key=3, seconds=30)
    body = {"model": "north", "prompt": "a", "max_tokens": 60}
    with running(Service(run, port=0, limits=limits)) as service:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{service.address}v1/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    by_status = {answer.status_code: answer for answer in answers}
    assert 200 in by_status
    assert set(by_status) <= {200, 429, 503}
    assert len(by_status) > 1
    for status in {429, 503} & set(by_status):
        assert int(by_status[status].headers["retry-after"]) >= 1
    with running(Service(run, port=0, limits=Limits(seconds=0.001))) as service:
        late = httpx.post(f"{service.address}v1/completions", json=body, timeout=60)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"


def test_nothing_of_a_text_is_in_any_log(classifier: Ready, generator: Ready, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for service, route, text in (
        (classifier, "classify", {"input": "SECRET"}),
        (classifier, "classify", {"input": 3, "SECRET": "SECRET"}),
        (generator, "completions", {"prompt": "SECRET", "max_tokens": 3}),
        (generator, "completions", {"prompt": "SECRET " * 100}),
    ):
        httpx.post(f"{service.address}v1/{route}?q=SECRET", json={"model": "north", **text})
        httpx.post(f"{service.address}v1/{route}", json={"model": "SECRET", **text})
    httpx.get(f"{classifier.address}v1/models/SECRET")
    httpx.get(f"{classifier.address}SECRET")
    until(lambda: sum(record.name == "coterie.api" for record in caplog.records) == 10)  # a line follows its answer
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    lines = [record.getMessage() for record in ours if record.name == "coterie.api"]
    assert any(line.startswith("POST /v1/classify 200 ") for line in lines)
    assert any(line.startswith("GET /v1/models/... 404 ") for line in lines)
    for record in ours:
        assert "SECRET" not in record.getMessage()
        assert "SECRET" not in str(record.exc_info)
    assert "SECRET" not in httpx.get(f"{classifier.address}metrics").text


def test_an_exceptions_text_does_not_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from coterie.api.server import _WithoutText

    try:
        raise ValueError("SECRET")
    except ValueError as fault:
        record = logging.LogRecord(
            "uvicorn.error", logging.ERROR, "", 1, "Exception %s", ("x",), (ValueError, fault, None)
        )
    assert _WithoutText().filter(record)
    assert record.getMessage().startswith("a request failed: ValueError at ")
    assert record.exc_info is None


def test_the_counts_are_prometheus(classifier: Ready) -> None:
    httpx.post(f"{classifier.address}v1/classify", json={"model": "north", "input": "a"})
    text = httpx.get(f"{classifier.address}metrics").text
    assert 'coterie_api_requests_total{route="/v1/classify",status="200"}' in text
    assert 'coterie_api_request_seconds_bucket{route="/v1/classify",le="+Inf"}' in text
    assert metric(classifier, "coterie_api_up") == "1"
    for name in ("north", "east"):
        assert name not in text


@pytest.mark.parametrize("path", ["health/", "v1/models/", "v1/classify/"])
def test_a_slash_at_the_end_is_another_route_and_no_redirect(path: str, classifier: Ready) -> None:
    answer = httpx.get(f"{classifier.address}{path}", headers={"Host": "localhost"})
    assert answer.status_code == 404
    assert "location" not in answer.headers


def test_every_answer_has_the_headers_of_a_careful_service(classifier: Ready) -> None:
    page = httpx.get(classifier.address)
    assert "'sha256-" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    other = httpx.get(f"{classifier.address}health")
    assert other.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    for answer in (page, other):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_without_keys_only_this_machine_is_served(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CoterieError, match=r"without keys the models are for this machine only, and 0\.0\.0\.0 is not"):
        ready(Service(run, host="0.0.0.0", port=0)).__enter__()
    with pytest.raises(CoterieError, match="no such host"):
        ready(Service(run, host="nowhere.invalid", port=0)).__enter__()
    with pytest.raises(CoterieError, match="both --certificate and --private-key"):
        ready(Service(run, certificate=tmp_path / "a", port=0)).__enter__()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CoterieError, match=rf"--port {port}: .*; choose another"):
            ready(Service(run, port=port)).__enter__()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[keys]", "is not TOML"),
        ("keys = []", "keys: List should have at least 1 item"),
        (
            '[[keys]]\nname = "a"\nsha256 = "x"\nclients = "*"',
            r"keys\.0\.sha256: .*`coterie api-key NAME` writes an entry",
        ),
        ("{entry}\n{entry}", "two keys with the name 'a'"),
        ('[[keys]]\nname = "a"\nsha256 = "{zeros}"\nclients = ["west"]', "is for 'west', which is not served"),
        ('[[keys]]\nname = "a\\u001b"\nsha256 = "{zeros}"\nclients = "*"', r"character U\+001B"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    zeros = "0" * 64
    entry = f'[[keys]]\nname = "a"\nsha256 = "{zeros}"\nclients = "*"'
    (tmp_path / "keys.toml").write_text(text.replace("{zeros}", zeros).replace("{entry}", entry), encoding="utf-8")
    with pytest.raises(CoterieError, match=said):
        read_keys(tmp_path / "keys.toml", ["east"])


def test_keys_are_read_before_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.toml").write_text(
        f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\nclients = ["north"]', encoding="utf-8"
    )
    monkeypatch.delattr("coterie.api.server.served")
    service = Service(make_run(tmp_path), clients=("east", "south"), port=0, keys=tmp_path / "keys.toml")
    with pytest.raises(CoterieError, match="is for 'north', which is not served; served are east, south"):
        ready(service).__enter__()
