"""Every method on Flower's simulation runtime, against the local engine: the same run folders, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pools
import sites
from coterie.compute.loading import truncation_of
from coterie.config.load import load_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.engines import flower_sim, local
from coterie.engines.actor import answer
from coterie.flower.simulation import SimulatedTransport, simulation
from coterie.methods.registry import method_named, methods
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.types import CoterieError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CLIENTS = 3
TIMES = ("seconds", "energy", "joules", "joules_from", "peak_memory_bytes")


def test_flowers_simulation_runtime(tmp_path: Path) -> None:
    """One Ray for all that is looked at, in two actors, which outlive single runs: it takes its time to start."""
    torch.set_num_threads(1)
    with closed_ray() as transport:
        for name in sorted(methods()):
            every_file_is_the_local_engines(name, tmp_path / name, transport)
        faults_come_back(tmp_path / "faults", transport)
        an_actor_that_dies_is_told(tmp_path / "dies", transport)


@contextmanager
def closed_ray() -> Iterator[SimulatedTransport]:
    """A simulation with two actors that listens on this machine alone, and leaves no process behind."""
    before, own = set(psutil.pids()), {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    with simulation(answer, CLIENTS, {"num_cpus": 1.0, "num_gpus": 0.0}, own) as transport:
        yield transport
        started = psutil.Process().children(recursive=True)
        assert named("raylet", started)
        heard = {link.laddr.ip for p in [psutil.Process(), *started] for link in listening(p)}
        assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert [p for p in started if p.pid not in before and p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def named(what: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those whose command line holds ``what``; of a zombie there is none."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [process] if what in " ".join(process.cmdline()) else []
    return found


def listening(process: psutil.Process) -> list[Any]:
    try:
        return [link for link in process.net_connections("inet") if link.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def config_of(folder: Path, name: str, head: str = "personal") -> Config:
    folder.mkdir()
    path = sites.config(folder, method=name)
    for client in sorted((folder / "clients").iterdir())[CLIENTS:]:
        client.rename(folder / f"unused-{client.name}")
    more = [f'method.pool="{pools.for_tiny()}"'] if name == "smartfed" else []
    return load_config(path, [f"task.head={head}", *more])


def engines(config: Config, root: Path, ray: SimulatedTransport) -> dict[str, Any]:
    """The local engine in ``here``, the simulation's in ``there``."""
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    return {"here": local.make(config, federation, root / "here", root, {}), "there": there(config, root, ray)}


def there(config: Config, root: Path, ray: SimulatedTransport) -> flower_sim.FlowerSimEngine:
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    head = flower_sim.head_of(config, federation, root / "there", root)
    start = partial(nullcontext, ray)
    clients = tuple(c.info for c in federation.clients)
    return flower_sim.FlowerSimEngine(
        clients, head, root / "there", start, partial(truncation_of, config, federation, root)
    )


def left(folder: Path) -> dict[str, Any]:
    """What a run left: every file by its bytes, but of checkpoints the state and of events what is no time."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        found[str(path.relative_to(folder))] = data.split(b"\n", 3)[3] if path.suffix == ".ckpt" else data
    lines = found.pop("metrics.jsonl").decode().splitlines()
    return {**found, "events": [without_times(json.loads(line)) for line in lines]}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def every_file_is_the_local_engines(name: str, tmp_path: Path, ray: SimulatedTransport) -> None:
    """Resumed after a round, by an engine that has heard nothing of the first."""
    config = config_of(tmp_path, name, "shared" if name in ("fedit", "fedlease") else "personal")
    method = method_named(name)(config.method_settings(), config.plan())
    banks = {}
    for rounds in (1, 3):
        for place, engine in engines(config, tmp_path, ray).items():
            folder = tmp_path / place
            folder.mkdir(exist_ok=True)
            state = Runner(method, engine, RoundSettings(rounds, 0), folder).run()
            banks[place] = dict(engine.banks(method, method.configure(state, engine.clients, 4), 3))
    here, there = (left(tmp_path / place) for place in ("here", "there"))
    assert len(here) >= 3
    assert here == there
    assert list(banks["here"]) == list(banks["there"])
    for client, bank in banks["here"].items():
        assert bank.tensors.keys() == banks["there"][client].tensors.keys()
        assert all(torch.equal(bank.tensors[k], banks["there"][client].tensors[k]) for k in bank.tensors)


def faults_come_back(tmp_path: Path, ray: SimulatedTransport) -> None:
    config = config_of(tmp_path, "fedit")
    engine = there(config, tmp_path, ray)
    rows = next((tmp_path / "clients").rglob("train.jsonl"))
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(CoterieError, match="different rows than the run"):
        _ = engine.spec
    long = config.model_copy(update={"model": config.model.model_copy(update={"max_length": 4000})})
    with pytest.raises(CoterieError, match="the model has positions for 160 tokens"):
        _ = there(long, tmp_path, ray).spec


def an_actor_that_dies_is_told(tmp_path: Path, ray: SimulatedTransport) -> None:
    """Comes last: it leaves no actor."""
    config = config_of(tmp_path, "fedit")
    engine = there(config, tmp_path, ray)
    actors = named("ray::ClientAppActor", psutil.Process().children(recursive=True))
    assert len(actors) == 2
    for actor in actors:
        actor.kill()
    with pytest.raises(CoterieError, match=r"query\.hello of round 0.*--resume"):
        _ = engine.spec
