"""A federation over Flower in one process: real workers, the real ClientApp and messages, a Grid of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config, load_raw
from coterie.config.sections import Config
from coterie.data.settings import DataSettings
from coterie.deploy.agreement import Agreement, federation_config, terms_of
from coterie.deploy.head import digest_of
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.sites import Sites
from coterie.deploy.worker import Worker
from coterie.flower.app import GridTransport
from coterie.methods.base import Method
from coterie.methods.registry import method_named
from coterie.runs.events import Listener
from grid import InProcessGrid


def site_settings(folder: Path, client: str, **sections: Any) -> SiteSettings:
    """SITE.toml of a client of ``sites.federation``, as checked."""
    rows = folder / "clients" / client
    raw: dict[str, Any] = {
        "site": {"id": client, "server": "127.0.0.1:1", "state": f"states/{client}"},
        "model": {"path": "model"},
        "data": {s: str(rows / f"{s}.jsonl") for s in ("train", "validation", "test")},
        "engine": {"device": "cpu", "threads": 1},
    }
    whole = {k: {**raw.get(k, {}), **sections.get(k, {})} for k in {*raw, *sections}}
    return SiteSettings.model_validate_json(json.dumps(whole))


def workers(folder: Path, clients: list[str], **sections: Any) -> dict[str, Worker]:
    """A worker per client; they share the base that the first one loads."""
    cache: dict[str, Any] = {}
    return {c: Worker(site_settings(folder, c, **sections), folder, cache) for c in clients}


def server_config(path: Path, **changes: dict[str, Any]) -> Config:
    raw = load_raw(path)
    return federation_config({**raw, **{k: {**raw.get(k, {}), **v} for k, v in changes.items()}})


def method_of(config: Config) -> Method:
    return method_named(config.method_name)(config.method_settings(), config.plan())


class Clock:
    """Time passes by sleeping alone, and sleeping takes no time."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine_over(
    config: Config,
    staff: dict[str, Worker],
    *,
    attempt: int = 1,
    spoil: Callable[..., Any] | None = None,
    note: Listener = lambda event: None,
    **agreed: Any,
) -> RemoteEngine:
    """The server's engine over ``staff``; nodes are numbered from 11 in the order of the clients."""
    grid = InProcessGrid({11 + i: staff[c].answer for i, c in enumerate(sorted(staff))})
    if spoil is not None:
        grid.spoil = spoil
    terms = terms_of(config)
    agreed = {"deadline": 30.0, "greeting": 0.2, **agreed}
    agreement = Agreement("run", terms, digest_of(terms), attempt, **agreed)
    clock = Clock()
    return RemoteEngine(Sites(GridTransport(grid), agreement, note, clock=lambda: clock.now, sleep=clock.sleep))


def local_config(path: Path, clients: list[str], folder: Path, **changes: dict[str, Any]) -> Config:
    """The same federation for ``coterie run``."""
    raw = load_raw(path)
    data: dict[str, Any] = {
        "clients": [
            {"id": c, **{s: str(folder / "clients" / c / f"{s}.jsonl") for s in ("train", "validation", "test")}}
            for c in clients
        ]
    }
    DataSettings.model_validate_json(json.dumps(data))
    raw["data"] = data
    return check_config({**raw, **{k: {**raw.get(k, {}), **v} for k, v in changes.items()}})
