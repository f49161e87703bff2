"""Documents with the right structure and odd values in it are refused, or read and then of use."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.config.check import checked
from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.methods.registry import methods
from coterie.runs.events import RUN, from_json
from coterie.runs.folder import plain
from coterie.runs.ledger import ledger_from
from coterie.types import CoterieError, Section

few = settings(
    deadline=None, max_examples=60, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

numbers = st.sampled_from([0, 1, 2, 3, -1, 10**9, 2**63, 10**400, 0.5, 1.5, -0.0, 1e-320, 1e308, math.nan, math.inf])
texts = st.sampled_from(
    ["", " ", "a", "auto", "none", "..", "/", "a/../../b", "\x00", "é\u202e", "x" * 5000, "1", "0.5"]
)
scalars = st.none() | st.booleans() | numbers | texts | st.text(max_size=5)
odd = st.recursive(scalars, lambda of: st.lists(of, max_size=3) | st.dictionaries(texts, of, max_size=2), max_leaves=5)


def keys_of(kind: type[Section], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a section, and of the sections in it."""
    found = []
    for name, field in kind.model_fields.items():
        found.append((*path, name))
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += keys_of(inner, (*path, name))
    return found


def with_values(base: Mapping[str, Any], values: Mapping[tuple[str, ...], object]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(base))
    for path, value in sorted(values.items(), key=lambda item: len(item[0])):
        inner: Any = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[path[-1]] = value
    return result


CONFIG_KEYS = keys_of(Config)
SITE_KEYS = keys_of(SiteSettings)
SITE = {"site": {"id": "north", "server": "127.0.0.1:9092"}, "data": {"train": "train.jsonl"}, "policy": {}}


@few
@given(st.data())
@pytest.mark.parametrize("method", sorted(methods()))
def test_a_config_with_odd_values(method: str, data: st.DataObject) -> None:
    own = [("method", name) for name in methods()[method].Settings.model_fields if name != "name"]
    keys = st.sampled_from(CONFIG_KEYS) | (st.sampled_from(own) if own else st.nothing())
    values = data.draw(st.dictionaries(keys, odd, min_size=1, max_size=3))
    with suppress(CoterieError):
        config = check_config(with_values({"data": {"folder": "clients"}, "method": {"name": method}}, values))
        again = json.loads(json.dumps(plain(config)))
        read = ""  # as a run that is resumed reads it
        with suppress(CoterieError):
            read = plain(check_config(again))
        assert read == again


@few
@given(st.dictionaries(st.sampled_from(SITE_KEYS), odd, min_size=1, max_size=3))
def test_a_site_file_with_odd_values(values: dict[tuple[str, ...], object]) -> None:
    with suppress(CoterieError):
        site = checked(SiteSettings, with_values(SITE, values), "")
        assert site == checked(SiteSettings, json.loads(site.model_dump_json()), "")


SAID = ["loss", "tokens", "gflop", "gflop_active", "energy", "bytes_up", "seconds"]
releases = st.fixed_dictionaries(
    {"round": numbers, "kind": texts, "name": texts},
    optional={"rows": numbers, "times": st.integers(-1, 40) | numbers},
)
noises = st.fixed_dictionaries(
    {"multiplier": st.sampled_from([0, 1e-9, 0.01, 0.7, 2, 1e8]) | numbers},
    optional={
        "sampled": st.sampled_from(["all", "fixed", "poisson", "some"]),
        "members": st.integers(0, 99) | numbers,
        "drawn": st.floats(0, 99) | numbers,
    },
)
entries = st.tuples(releases, noises).map(lambda of: {**of[0], "noised": of[1]})


@settings(few, max_examples=40)
@given(st.lists(entries | odd, max_size=3))
def test_a_ledger_with_odd_values(lines: list[Any]) -> None:
    with suppress(CoterieError):
        ledger = ledger_from(lines, "the ledger")
        assert ledger.spent(1e-5).epsilon >= 0
        assert ledger_from(ledger.to_json(), "the ledger") == ledger


GOOD = {
    "clients": ["north"],
    "rounds": 3,
    "round": 1,
    "text": "a",
    "taken": 1,
    "of": 2,
    "client": "north",
    "failed": None,
}


def lines_of(event: str) -> st.SearchStrategy[dict[str, Any]]:
    """Lines of JSON with what the event needs, and odd values instead of some of it and beside it."""
    good, names = dict(GOOD), [field.name for field in dataclasses.fields(RUN[event].type)]
    values = st.dictionaries(st.sampled_from(names), odd, max_size=2)
    entries = st.dictionaries(st.sampled_from(SAID), odd, max_size=3)
    match event:
        case "ready":
            good["clients"] = 2
        case "round":
            good.update(clients={}, failed={})
            values |= st.fixed_dictionaries({"clients": st.dictionaries(texts, entries, max_size=2)})
        case "evaluation":
            good["clients"] = {}
        case "client":
            values |= entries
    needed = {"event": event, **{name: good[name] for name in names if name in good}}
    return values.map(lambda line: {**needed, **line})


@pytest.mark.parametrize("event", sorted(RUN))
def test_an_event_with_odd_values(event: str) -> None:
    accepted = 0

    @few
    @given(lines_of(event))
    def tried(line: dict[str, Any]) -> None:
        nonlocal accepted
        try:
            made = from_json(line)
        except ValueError:
            return
        accepted += 1
        assert made is not None
        written = json.loads(json.dumps(made.to_json(), allow_nan=False))
        entries = getattr(made, "clients", {}).values() if event == "round" else [getattr(made, "entry", None)]
        assert all(entry.gflop_active < math.inf and entry.tokens < 10**400 for entry in entries if entry)
        assert all(entry.loss is None or isinstance(entry.loss, float) for entry in entries if entry)
        assert from_json(written) is not None

    tried()
    assert accepted > 0
