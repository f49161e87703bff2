"""The load on a service: requests that are timed, and the soak's mix of good and bad ones. Runs in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from typing import Any

import httpx

TEXTS = (
    "the printer on floor two smokes",
    "I would like to know when my order arrives, and whether I can still change the address",
    "x",
    "a transfer to the wrong account",
    "the street light in front of number twelve has been out for a week now",
    "two words",
)
TOKENS = (8, 16, 24, 32)


def bodies(route: str, clients: list[str], number: int) -> list[dict[str, Any]]:
    """Requests for the clients in turn, with texts and lengths of several sizes."""
    made: list[dict[str, Any]] = []
    for i in range(number):
        text = TEXTS[(i // len(clients) + i) % len(TEXTS)]
        if route == "classify":
            made.append({"model": clients[i % len(clients)], "input": text})
        else:
            made.append({"model": clients[i % len(clients)], "prompt": text, "max_tokens": TOKENS[i % len(TOKENS)]})
    return made


def load(address: str, route: str, requests: list[dict[str, Any]], in_flight: int) -> list[float]:
    """Seconds of each request, ``in_flight`` of them at a time."""
    return asyncio.run(_load(address, route, requests, in_flight))


async def _load(address: str, route: str, requests: list[dict[str, Any]], in_flight: int) -> list[float]:
    gate, seconds = asyncio.Semaphore(in_flight), []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=in_flight)) as client:

        async def one(body: dict[str, Any]) -> None:
            async with gate:
                began = time.perf_counter()
                (await client.post(f"{address}v1/{route}", json=body)).raise_for_status()
                seconds.append(time.perf_counter() - began)

        await asyncio.gather(*map(one, requests))
    return seconds


def soak(address: str, clients: list[str], seconds: float) -> dict[str, Any]:
    """What became of a mix of requests during that time, eight of them at a time."""
    return asyncio.run(_soak(address, clients, seconds))


async def _soak(address: str, clients: list[str], seconds: float) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    expected: dict[str, str] = {}
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        await asyncio.gather(
            *(_worker(client, address, clients, end, random.Random(i), counts, expected) for i in range(8))
        )
    return dict(sorted(counts.items()))


async def _worker(
    client: httpx.AsyncClient,
    address: str,
    clients: list[str],
    end: float,
    draw: random.Random,
    counts: Counter[str],
    expected: dict[str, str],
) -> None:
    while time.monotonic() < end:
        kind = draw.choices(["good", "bad", "gone", "slow"], [60, 25, 14, 1])[0]
        name, text = draw.choice(clients), draw.choice(TEXTS)
        if kind == "good":
            await _good(client, {"model": name, "prompt": text, "max_tokens": 12}, counts, expected)
        elif kind == "bad":
            await _bad(client, name, draw, counts)
        elif kind == "gone":
            await _hang_up(address, name, text, draw, counts)
        else:
            await _slow(address, counts)


async def _good(
    client: httpx.AsyncClient, body: dict[str, Any], counts: Counter[str], expected: dict[str, str]
) -> None:
    """An answer that is the same every time, whatever else is in the batch."""
    counts["good: sent"] += 1
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code in (429, 503):
        counts["good: refused for load"] += 1
        return
    if answer.status_code != 200:
        counts[f"good: status {answer.status_code}"] += 1
        return
    text = answer.json()["choices"][0]["text"]
    key = json.dumps(body)
    same = expected.setdefault(key, text) == text
    counts["good: answered" if same else "good: another answer than before"] += 1


async def _bad(client: httpx.AsyncClient, name: str, draw: random.Random, counts: Counter[str]) -> None:
    as_json = {"Content-Type": "application/json"}
    content, status = draw.choice(
        [
            (b"{", 400),
            (b"\xff" * 100, 400),
            (b"[" * 5000, 400),
            (json.dumps({"model": name, "prompt": "\ud800"}).encode(), 400),
            (json.dumps({"model": "nobody", "prompt": "a"}).encode(), 404),
            (json.dumps({"model": name, "prompt": "a", "max_tokens": 10**9}).encode(), 400),
            (json.dumps({"model": name, "prompt": "word " * 5000}).encode(), 400),
            (b" " * 300_000, 413),
        ]
    )
    counts["bad: sent"] += 1
    try:
        answer = await client.post("/v1/completions", content=content, headers=as_json)
        counts["bad: refused with a reason" if answer.status_code == status else f"bad: {answer.status_code}"] += 1
    except httpx.TransportError:
        counts["bad: connection closed"] += 1


async def _hang_up(address: str, name: str, text: str, draw: random.Random, counts: Counter[str]) -> None:
    """Send a request, read a little of its stream or nothing, and close the connection."""
    counts["hung up"] += 1
    url = httpx.URL(address)
    body = json.dumps({"model": name, "prompt": text, "max_tokens": 64, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: draw.choice([5, None])])
    with contextlib.suppress(OSError, TimeoutError):
        await writer.drain()
        await asyncio.wait_for(reader.read(200), draw.choice([0.001, 0.05, 0.5]))
    writer.transport.abort()


async def _slow(address: str, counts: Counter[str]) -> None:
    """A head that never ends: the service closes the connection."""
    counts["slow: sent"] += 1
    url = httpx.URL(address)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: lo")
    with contextlib.suppress(ConnectionError):
        if await asyncio.wait_for(reader.read(1), 40):
            counts["slow: answered"] += 1
            return
    counts["slow: closed"] += 1
    writer.close()
