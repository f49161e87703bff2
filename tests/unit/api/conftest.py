"""Services that many tests share: a classifier and a generator, without keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api_runs import make_run
from api_server import running
from coterie.api.limits import Limits
from coterie.api.server import Ready, Service

LIMITS = Limits(body_bytes=20_000, max_tokens=40, texts=4, messages=4, read_seconds=0.5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    with running(Service(make_run(tmp_path_factory.mktemp("bert")), port=0, limits=LIMITS)) as service:
        yield service


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    run: Path = make_run(tmp_path_factory.mktemp("llama"), "llama", chat=True)
    with running(Service(run, port=0, limits=LIMITS)) as service:
        yield service
