"""Every method over Flower's messages, in process, against the local engine: the same tensors bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flower_sites
import pools
import sites
from coterie import codec
from coterie.data.clients import load_data
from coterie.deploy.events import Joined
from coterie.deploy.keys import init_keys
from coterie.deploy.secure_server import RemoteSums
from coterie.deploy.worker import Worker
from coterie.engines import local
from coterie.methods.registry import methods
from coterie.runs.events import Event
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from thinned import PUBLISHED, thinned

CLIENTS = ["mood-0", "mood-1", "place-0", "size-0"]
TIMES = ("seconds", "energy", "joules", "joules_from", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def events(folder: Path) -> list[Any]:
    """Without what is cut off the rows, which a server does not know."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] != "truncated" and "max_length" not in line.get("text", "")]
    for line in lines:
        if "clients" in line:
            line["clients"] = dict(sorted(line["clients"].items()))
    return [without_times(line) for line in lines]


NAMES = [name for name, kind in methods().items() if not kind.needs_all_rows]
USED = {"download": "used", "download_threshold": 0.4, "experts_per_cluster": 2}
EVERY = [(name, head, {}, "classification") for name in NAMES for head in ("personal", "shared")]
EVERY += [("fedlease", "shared", {"distance": "representation", **USED}, "classification")]
EVERY += [(name, "personal", {}, kind) for name in NAMES for kind in ("generation", "multiple_choice")]
EVERY += [
    ("fedlease", "personal", {}, "dpo"),
    ("smartfed", "shared", {"router": "paper", "budgets": {"mood-1": 1}}, "classification"),
]


@pytest.mark.parametrize(
    ("name", "head", "settings", "kind"),
    thinned(
        EVERY,
        lambda name, head, settings, kind: (
            kind in ("classification", "dpo") and (head == "personal" or bool(settings) or name in PUBLISHED)
        ),
    ),
)
def test_every_method_ends_with_the_bits_of_the_local_engine(
    name: str, head: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    arch = "bert" if kind == "classification" else "llama"
    path = sites.config(tmp_path, arch, method=name, kind=kind)
    pool = {"pool": pools.for_tiny(arch, poisoned=bool(settings))} if name == "smartfed" else {}
    ranks = {"ranks": list(sites.ranks_of(name))}  # of local, too
    changes: dict[str, Any] = {"task": {"head": head}, "lora": ranks, "method": {**pool, **settings}}
    config = flower_sites.local_config(path, CLIENTS, tmp_path, **changes)
    federation = load_data(config.data, config.task.kind, config.run.seed, tmp_path)
    reference = local.make(config, federation, tmp_path / "here", tmp_path, {})
    staff = flower_sites.workers(tmp_path, CLIENTS, policy={"upload_bank": True})
    server = flower_sites.server_config(path, **changes)
    remote = flower_sites.engine_over(server, staff, sites=tuple(CLIENTS))
    remote.sites.gather(0, 10)
    assert remote.spec == reference.spec
    assert remote.clients == reference.clients

    method, states = flower_sites.method_of(config), {}
    for place, engine in (("here", reference), ("there", remote)):
        (tmp_path / place).mkdir(exist_ok=True)
        runner = Runner(method, engine, RoundSettings(3, 0), tmp_path / place)
        states[place] = runner.run()
    assert codec.encode(states["here"]) == codec.encode(states["there"])
    assert events(tmp_path / "here") == events(tmp_path / "there")
    if name == "smartfed":
        assert states["there"].dropped == (("bad",) if settings else ())
    instructions = method.configure(states["here"], reference.clients, 4)
    banks = {
        place: dict(engine.banks(method, instructions, 3)) for place, engine in (("here", reference), ("there", remote))
    }
    assert sorted(banks["here"]) == CLIENTS
    for client in CLIENTS:
        assert codec.encode(banks["here"][client]) == codec.encode(banks["there"][client])
        kept = staff[client].state / "run" / "personal"
        assert [p.name for p in sorted((kept / client).iterdir())] == [
            p.name for p in sorted((tmp_path / "here" / "personal" / client).iterdir())
        ][-len(list((kept / client).iterdir())) :]
        assert (kept / client / "000003.safetensors").read_bytes() == (
            tmp_path / "here" / "personal" / client / "000003.safetensors"
        ).read_bytes()
        assert list((staff[client].state / "run" / "export").iterdir())


def test_a_site_with_few_active_experts_trains_as_a_client_with_a_budget(tmp_path: Path) -> None:
    method = {"pool": pools.for_tiny(), "router": "paper", "active": 3}
    path, changes = sites.config(tmp_path, method="smartfed"), {"method": method}
    states, joined = {}, {}
    for place, budgets, active in (("site", {}, 1), ("server", {"mood-1": 1}, None)):
        config = flower_sites.server_config(path, **{**changes, "method": {**changes["method"], "budgets": budgets}})
        limited = {"mood-1": {"active": active}} if active else {}
        staff = {
            c: flower_sites.workers(tmp_path, [c], site={**limited.get(c, {}), "state": f"{place}/{c}"})[c]
            for c in CLIENTS
        }
        heard: list[Event] = []
        engine = flower_sites.engine_over(config, staff, sites=tuple(CLIENTS), note=heard.append)
        engine.sites.gather(0, 10)
        (tmp_path / place).mkdir(exist_ok=True)
        states[place] = Runner(flower_sites.method_of(config), engine, RoundSettings(3, 0), tmp_path / place).run()
        joined[place] = {e.client: e.active for e in heard if isinstance(e, Joined)}
    assert states["site"].budgets == {"mood-1": 1}
    assert codec.encode(states["site"]) == codec.encode(states["server"])
    assert joined["site"] == {**dict.fromkeys(CLIENTS), "mood-1": 1}


NOISE: dict[str, dict[str, Any]] = {
    "server": {"noise_at": "server"},
    "client": {"noise_at": "client"},
    "sum": {"noise_at": "sum"},
    "rows in sums": {"unit": "example"},
    "rows and embeddings": {"unit": "example"},
}
CHOOSES = {"balance": 0, "embed_rows": "all", "experts": 4, "clients_per_expert": 2, "max_experts": 4}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_the_same_over_flower(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise of tests: the same experts, the same ledger, and nothing that sites keep to themselves."""
    monkeypatch.setattr("coterie.deploy.agreement.check_privacy_of_sites", lambda settings: None)  # refuses it
    embeds = kind == "rows and embeddings"
    path = sites.config(tmp_path, "bert", method="fedamole" if embeds else "fedit", kind="classification")
    privacy = {"unit": "client", "clip": 0.1, "noise_multiplier": 1.0, "noise_source": "seeded", **NOISE[kind]}
    changes: dict[str, Any] = {"privacy": privacy, "lora": {"dropout": 0.0}, "method": CHOOSES if embeds else {}}
    changes["train"] = {"batch_size": 64} if embeds else {}  # steps of all rows are accounted for at once
    site: dict[str, Any] = {}
    if hidden := kind in ("sum", "rows in sums"):
        init_keys(tmp_path / "keys", CLIENTS, ["127.0.0.1"])
        changes["secure_aggregation"], site = {"enabled": True}, {"peers": str(tmp_path / "keys" / "sites")}
    config = flower_sites.local_config(path, CLIENTS, tmp_path, **changes)
    federation = load_data(config.data, config.task.kind, config.run.seed, tmp_path)
    reference = local.make(config, federation, tmp_path / "here", tmp_path, {})
    cache: dict[str, Any] = {}
    staff = {
        c: Worker(
            flower_sites.site_settings(tmp_path, c, site=site and {**site, "key": f"keys/sites/{c}"}), tmp_path, cache
        )
        for c in CLIENTS
    }
    remote = flower_sites.engine_over(flower_sites.server_config(path, **changes), staff, sites=tuple(CLIENTS))
    remote.sites.gather(0, 10)
    method, states, spent = flower_sites.method_of(config), {}, {}
    for place, engine in (("here", reference), ("there", remote)):
        (tmp_path / place).mkdir(exist_ok=True)
        sums = RemoteSums(remote) if hidden and place == "there" else None
        runner = Runner(method, engine, RoundSettings(2, 0), tmp_path / place, sums=sums)
        states[place] = runner.run()
        assert runner.private is not None
        spent[place] = runner.private.guarantee()
    assert codec.encode(states["here"]) == codec.encode(states["there"])
    assert spent["here"] == spent["there"]
    steps = {"steps of a client"} | ({"embeddings"} if embeds else set())
    assert spent["here"].releases.keys() == (steps if kind.startswith("rows") else {"updates"})
    assert '"loss"' not in (tmp_path / "there" / "metrics.jsonl").read_text(encoding="utf-8")
