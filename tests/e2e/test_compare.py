"""Whole comparisons of tiny runs: what is reused, resumed, skipped and reported, in one process and in several."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import sites
from coterie import experiment
from coterie.cli.progress import listener
from coterie.comparison import Comparison, compare, jobs, page, processes, study
from coterie.comparison.cross import read_cross
from coterie.config.load import load_config
from coterie.methods.fedit import FedIT
from coterie.methods.registry import methods
from coterie.runs.folder import lock_folder
from coterie.types import CoterieError

FEW = ["run.rounds=1"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bundles(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "clients").rglob("*") if p.is_file()}
    assert found
    return found


def times(folder: Path) -> dict[Path, int]:
    """When the files of the runs below ``folder`` were written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.parent != folder}


def reasons(comparison: Comparison) -> dict[tuple[str, int], tuple[str, str]]:
    return {(entry.variant, entry.seed): (entry.why, entry.reason) for entry in comparison.missing}


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def test_a_comparison_is_a_run_per_method_and_seed_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    call = partial(compare, path, out, overrides=FEW, watch=partial(listener, Console(quiet=True)))
    made = call(methods=["fedit", "local"], seeds=[0, 5])
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["fedit-0", "fedit-5", "local-0", "local-5"]
    for method, seed in (("fedit", 0), ("fedit", 5), ("local", 0), ("local", 5)):
        summary = json.loads((out / f"{method}-{seed}" / "summary.json").read_text())
        assert summary == made.results[method][seed].to_json()
        assert (summary["method"], summary["seed"]) == (method, seed)
    table = record(out)["variants"]["fedit"]
    assert [run["mean"] for run in table["runs"]] == [made.results["fedit"][s].mean["test"]["accuracy"] for s in (0, 5)]
    alone = tmp_path / "alone"
    experiment.run(load_config(path, [*FEW, "method.name=local", "run.seed=5"]), alone, root=tmp_path)
    assert bundles(alone) == bundles(out / "local-5")

    before = times(out)
    said: list[str] = []
    again = call(methods=["fedit", "local"], seeds=[0, 5], say=said.append)
    assert again == made
    assert times(out) == before
    assert said == ["4 of 4 runs have finished already and are reused"]

    fewer = call(methods=["local"], seeds=[5])
    assert list(fewer.results) == ["local", "fedit"]
    assert {v: row["seeds"] for v, row in record(out)["variants"].items()} == {"local": [0, 5], "fedit": [0, 5]}


def test_a_run_with_another_config_is_not_reused(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    compare(path, out, methods=["fedit", "local"], overrides=FEW)
    changed = compare(path, out, methods=["local"], overrides=[*FEW, "lora.rank=3"])
    assert changed.done == {}
    found = reasons(changed)
    assert set(found) == {("local", 0), ("fedit", 0)}
    for why, reason in found.values():
        assert why == "other config"
        assert "it differs in lora.rank" in reason
    assert set(record(out)["variants"]) == {"fedit", "local"}
    back = compare(path, out, methods=["local"], overrides=FEW)
    assert (set(back.results), back.missing) == ({"fedit", "local"}, [])


def test_what_fails_is_reported_and_does_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, state: Any, replies: Any, rnd: int) -> Any:
        raise ZeroDivisionError("nothing to divide")

    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(FedIT, "aggregate", broken)
        said: list[str] = []
        made = compare(path, out, methods=["fedit", "smartfed", "local"], overrides=FEW, say=said.append)
    assert list(made.results) == ["local"]
    found = reasons(made)
    assert found["fedit", 0] == ("failed", f"ZeroDivisionError: nothing to divide (see {out / 'fedit-0.log'})")
    assert "in aggregate" in (out / "fedit-0.log").read_text() or "broken" in (out / "fedit-0.log").read_text()
    assert found["smartfed", 0][0] == "failed"
    assert "SmartFed needs a pool" in found["smartfed", 0][1]
    assert [text.split(":")[0] for text in said] == [
        "fedit seed 0 failed", "smartfed seed 0 failed", "local seed 0 has finished (3 of 3 runs)",
    ]  # fmt: skip
    assert {entry["variant"]: entry["why"] for entry in record(out)["missing"]} == {
        "fedit": "failed",
        "smartfed": "failed",
    }
    fixed = compare(path, out, methods=["fedit"], overrides=FEW)
    assert set(fixed.results) == {"fedit", "local"}
    assert [entry.variant for entry in fixed.missing] == ["smartfed"]


def test_all_stands_for_every_method_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmartFed needs a pool, FedAMoLE more experts than one client holds, and ranks by client suit few methods."""
    carried: list[str] = []
    real = jobs.run

    def spied(config: Any, *args: Any, **options: Any) -> Any:
        carried.append(config.method_name)
        if config.method_name in ("local", "smartfed", "hetlora"):
            return real(config, *args, **options)
        raise AssertionError("not in this test")

    monkeypatch.setattr(jobs, "run", spied)
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    made = compare(path, out, methods=["all"], overrides=[*FEW, "lora.ranks=[1, 2]"])
    mixed = sorted(name for name, kind in methods().items() if kind.mixed_ranks)
    assert carried == mixed
    assert {"local", "hetlora"} < set(mixed)
    assert set(made.results) == {"local", "hetlora"}
    found = reasons(made)
    assert {v for (v, _), (why, _) in found.items() if why == "does not fit"} == set(methods()) - set(mixed)
    assert "all clients of fedlease have the same rank" in found["fedlease", 0][1]
    plain = compare(path, tmp_path / "plain", methods=["all"], overrides=FEW)
    assert reasons(plain)["smartfed", 0][0] == "does not fit"
    assert "SmartFed needs a pool" in reasons(plain)["smartfed", 0][1]


def test_a_run_that_another_process_works_on_is_skipped(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    with lock_folder(out / "fedit-0"):
        made = compare(path, out, methods=["fedit", "local"], overrides=FEW)
    assert list(made.results) == ["local"]
    assert reasons(made)["fedit", 0] == (
        "in use",
        f"another process is using {out / 'fedit-0'}; wait for it or stop it",
    )
    assert not (out / "fedit-0" / "config.json").exists()


@pytest.mark.slow
def test_processes_give_the_same_bits_and_report_what_fails(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    names = ["fedit", "smartfed", "local"]
    here = compare(path, tmp_path / "here", methods=names, overrides=FEW)
    events: dict[str, list[str]] = {}

    def watch(rounds: int, label: str) -> Any:
        return listener_to(events.setdefault(label, []))

    made = compare(path, out, methods=names, overrides=FEW, jobs=2, watch=watch)
    assert list(made.results) == ["fedit", "local"]
    for method in ("fedit", "local"):
        assert bundles(out / f"{method}-0") == bundles(tmp_path / "here" / f"{method}-0")
        assert made.results[method][0].mean == here.results[method][0].mean
        assert events[f"{method} seed 0"][0] == "ready"
        assert {"round", "evaluation", "checkpoint"} <= set(events[f"{method} seed 0"])
    assert reasons(made) == reasons(here)
    assert not list(out.glob("*.log"))


def test_tuning_chooses_on_validation_with_another_seed_and_goes_on(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    rates = ["1e-9", "0.02"]
    call = partial(compare, path, out, methods=["fedit", "local"], overrides=["run.rounds=2"], tune_with=7)
    said: list[str] = []
    made = call(tune=[f"train.learning_rate={','.join(rates)}"], say=said.append)
    for method in ("fedit", "local"):
        tried = [
            json.loads((out / f"{method}-train.learning_rate-{rate}-7" / "summary.json").read_text()) for rate in rates
        ]
        values = [summary["mean"]["validation"]["accuracy"] for summary in tried]
        assert values[1] > values[0]  # 1e-9 learns nothing
        chosen = made.choices[method]
        assert (chosen.settings, chosen.seed) == (("train.learning_rate=0.02",), 7)
        assert [*chosen.tried.values()] == values
        assert f"{method}: tuning chose train.learning_rate=0.02 (train.learning_rate at the edge of the grid)" in said
        assert list(made.done[method]) == [0]
        assert made.done[method][0].folder == out / f"{method}-train.learning_rate-0.02-0"
        assert record(out)["variants"][method]["tuned"]["settings"] == ["train.learning_rate=0.02"]
    assert len([p for p in out.iterdir() if p.is_dir()]) == 6

    before = times(out)
    assert call(tune=[f"train.learning_rate={','.join(rates)}"]) == made
    assert times(out) == before

    fewer = compare(path, out, methods=["local"], overrides=["run.rounds=2"], seeds=[0])
    assert fewer.done["local"][0].folder == out / "local-0"
    assert (set(fewer.choices), set(fewer.done)) == ({"fedit"}, {"fedit", "local"})
    assert fewer.choices["fedit"] == made.choices["fedit"]


def test_tuning_may_have_fewer_rounds_than_what_is_reported(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    tune = ["train.learning_rate=1e-9,0.02"]
    made = compare(path, out, methods=["local"], overrides=["run.rounds=2"], tune=tune, tune_rounds=1)
    rounds = {p.name: json.loads((p / "summary.json").read_text())["rounds"] for p in out.iterdir() if p.is_dir()}
    chosen = "local-train.learning_rate-0.02"
    tuned = [f"local-train.learning_rate-{rate}-run.rounds-1-1000" for rate in ("1e-9", "0.02")]
    assert rounds == {**dict.fromkeys(tuned, 1), f"{chosen}-0": 2}
    assert made.choices["local"].rounds == record(out)["variants"]["local"]["tuned"]["rounds"] == 1
    assert "Rounds of the runs that chose settings: 1." in (out / "compare.md").read_text()
    compare(path, out, methods=["local"], overrides=["run.rounds=2"], tune=tune)
    assert json.loads((out / f"{chosen}-1000" / "summary.json").read_text())["rounds"] == 2, "another run"
    shorter = compare(path, out, methods=["local"], overrides=["run.rounds=2"], tune=[f"{tune[0]},1e-8"], tune_rounds=1)
    assert shorter.choices["local"].tried.items() > made.choices["local"].tried.items()
    alone = compare(path, out, methods=["local"], overrides=["run.rounds=2"], tune=["train.learning_rate=0.02"])
    assert alone.choices["local"].rounds is None


def test_a_run_of_tuning_never_becomes_a_result(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    tune = ["train.learning_rate=1e-9,0.02"]
    call = partial(compare, path, out, methods=["local"], tune=tune)
    call(overrides=FEW)
    other = call(overrides=[*FEW, "train.batch_size=3"])
    assert not other.done
    assert {(entry.seed, entry.why) for entry in other.missing} == {(1000, "tuning"), (0, "other config")}
    again = compare(path, out, methods=["fedit"], overrides=FEW)
    assert 1000 not in again.done.get("local", {})


def test_a_tuned_run_stays_in_the_tables_after_another_config(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    compare(path, out, methods=["local"], overrides=FEW, tune=["train.learning_rate=1e-9,0.02"])
    compare(path, out, methods=["fedit"], overrides=[*FEW, "train.batch_size=3"])
    assert "local" not in record(out)["variants"]
    for method in ("ffa_lora", "fedit"):
        compare(path, out, methods=[method], overrides=FEW)
        assert record(out)["variants"]["local"]["tuned"]["settings"] == ["train.learning_rate=0.02"]


def test_rounds_of_tuning_without_tuning_are_refused(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    with pytest.raises(CoterieError, match="--tune-rounds 7 without --tune"):
        compare(path, out, methods=["fedit"], overrides=FEW, tune_rounds=7)


def test_a_value_that_fails_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs.run

    def spied(config: Any, *args: Any, **options: Any) -> Any:
        if config.train.learning_rate == 0.5 or config.method_name == "local":
            raise CoterieError("it diverged")
        return real(config, *args, **options)

    monkeypatch.setattr(jobs, "run", spied)
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    tune = ["train.learning_rate=0.5,0.01", "methods.fedlease.warmup_rounds=1"]
    made = compare(path, out, methods=["fedit", "local"], overrides=FEW, tune=tune)
    assert made.choices["fedit"].settings == ("train.learning_rate=0.01",)
    assert made.choices["fedit"].tried["train.learning_rate=0.5"] is None
    assert list(made.done) == ["fedit"]
    assert reasons(made) == {("local", 1000): ("failed", "it diverged")}


def test_tuning_needs_validation_rows(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="local")
    for file in (tmp_path / "clients").glob("*/validation.jsonl"):
        file.unlink()
    few = [*FEW, "data.validation_fraction=0"]
    with pytest.raises(CoterieError, match="--tune chooses on validation data, and there are none"):
        compare(path, tmp_path / "out", methods=["local"], overrides=few, tune=["train.epochs=1,2"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["local-train.epochs-1-1000"]


def test_every_model_on_the_rows_of_clients_with_the_same_labels(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    call = partial(compare, path, out, overrides=FEW)
    before = call(methods=["fedit", "local"])
    said: list[str] = []
    call(methods=["fedit", "local"], cross=True, say=said.append)
    assert [text for text in said if text.startswith("fedit-0: every client's model")]
    summary = before.results["local"][0]
    table = json.loads((out / "local-0" / "cross.json").read_text())
    alike = {"mood-0": ["mood-0", "mood-1"], "size-0": ["size-0", "size-1"], "place-0": ["place-0"]}
    assert {of: sorted(on) for of, on in table["metrics"].items()} == {
        client: alike[f"{client[:-1]}0"] for client in summary.clients
    }
    for client, row in summary.clients.items():  # one round: the best is the last
        for name, value in row.test.items():
            assert table["metrics"][client][client][name] == pytest.approx(value, abs=1e-6)
    figures = record(out)["variants"]["local"]
    pairs = [("mood-0", "mood-1"), ("mood-1", "mood-0"), ("size-0", "size-1"), ("size-1", "size-0")]
    values = [table["metrics"][of][on]["accuracy"] for of, on in pairs]
    assert figures["beyond"] == figures["runs"][0]["beyond"] == pytest.approx(sum(values) / 4)
    assert "on others' rows" in (out / "compare.md").read_text()
    at = (out / "local-0" / "cross.json").stat().st_mtime_ns
    call(methods=["local"], cross=True)
    assert (out / "local-0" / "cross.json").stat().st_mtime_ns == at


def test_what_cannot_be_scored_on_others_rows_is_said_and_the_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    call = partial(compare, path, out, overrides=FEW)
    call(methods=["local"])
    (out / "local-0" / "clients" / "mood-0" / "bundle.safetensors").unlink()
    said: list[str] = []
    call(methods=["local"], cross=True, say=said.append)
    assert [text for text in said if "not evaluated on other clients' rows: no bundle.safetensors" in text]
    assert record(out)["variants"]["local"]["beyond"] is None

    def breaks(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(study, "_CROSS", replace(study._CROSS, measure=breaks))
    (out / "compare.md").unlink()
    call(methods=["local"], cross=True, say=said.append)
    assert "local-0: not evaluated on other clients' rows: RuntimeError: out of memory" in said
    assert (out / "compare.md").exists()


def test_newcomers_take_no_part_and_join_every_run_afterwards(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    late = [*FEW, 'data.newcomers=["mood-1"]']
    said: list[str] = []
    made = compare(path, out, methods=["local", "fedit", "centralised"], overrides=late, say=said.append)
    run = made.results["fedit"][0]
    assert "mood-1" not in run.clients
    assert "mood-0" in run.clients
    assert not (out / "fedit-0" / "clients" / "mood-1").exists()
    manifest = json.loads((out / "fedit-0" / "manifest.json").read_text())
    assert list(manifest["newcomers"]) == ["mood-1"]
    assert "mood-1" not in manifest["clients"]
    kept = json.loads((out / "fedit-0" / "newcomers.json").read_text())
    assert kept["after"].keys() == {"mood-1"}
    assert kept["after"] != kept["before"]
    figures = record(out)["variants"]
    assert figures["fedit"]["newcomers"] == kept["after"]["mood-1"]["accuracy"]
    assert figures["centralised"]["newcomers"] is None
    assert [
        text for text in said if text.startswith("centralised-0: newcomers cannot join: centralised takes no client")
    ]
    assert "newcomers" in (out / "compare.md").read_text()

    at = (out / "fedit-0" / "newcomers.json").stat().st_mtime_ns
    compare(path, out, methods=["fedit"], overrides=late)
    assert (out / "fedit-0" / "newcomers.json").stat().st_mtime_ns == at


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["nobody"], "data.newcomers names nobody, but no client is called so; the clients are"),
        (["mood-0", "mood-1", "place-0", "size-0", "size-1"], "data.newcomers names every client"),
    ],
)
def test_newcomers_are_clients_and_not_all_of_them(tmp_path: Path, names: list[str], fault: str) -> None:
    path = sites.config(tmp_path, method="local")
    made = compare(path, tmp_path / "out", methods=["local"], overrides=[*FEW, f"data.newcomers={json.dumps(names)}"])
    ((_, reason),) = reasons(made).values()
    assert fault in reason


@pytest.mark.slow
def test_the_controls_of_fedlease_run_side_by_side(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="fedlease"), tmp_path / "out"
    settings = ("allocation=random", "distance=A", "distance=BA", "start=own", "routing=dense", "routing=own",
                "routing=top_k:top_k=1", "routing=top_k:top_k=2")  # fmt: skip
    variants = ["fedlease:experts=2", *(f"fedlease:experts=2:{setting}" for setting in settings)]
    made = compare(path, out, methods=variants, overrides=["run.rounds=2"])
    assert made.missing == []
    assert list(made.done) == variants
    sent = {v: runs[0].summary.bytes for v, runs in made.done.items()}
    assert sent["fedlease:experts=2:routing=own"].down < 0.6 * sent["fedlease:experts=2"].down  # one expert of two
    kept = out / "fedlease-experts-2-routing-own-0" / "clients" / "mood-0" / "adapter" / "adapter_config.json"
    assert kept.exists()  # a plain LoRA
    several = ["run.rounds=2", "engine.clients_per_batch=5"]
    together = compare(path, tmp_path / "together", methods=[variants[6]], overrides=several)
    for client, row in made.results[variants[6]][0].clients.items():
        found = together.results[variants[6]][0].clients[client]
        assert found.test["loss"] == pytest.approx(row.test["loss"], rel=1e-3)


def test_more_rounds_continue_the_runs_that_are_named(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    compare(path, out, methods=["fedit", "local"], overrides=FEW, cross=True)
    before = read_cross(out / "local-0")
    more = ["run.rounds=2"]
    made = compare(path, out, methods=["local"], overrides=more)
    assert list(made.done) == ["local"]
    assert made.results["local"][0].rounds == 2
    why, reason = reasons(made)["fedit", 0]
    assert why == "other config"
    assert "fewer rounds" in reason
    assert (before is None, read_cross(out / "local-0")) == (False, None)  # that of the shorter run
    both = compare(path, out, methods=["fedit"], overrides=more, jobs=1)
    assert (set(both.done), both.missing) == ({"fedit", "local"}, [])


def test_a_page_that_fails_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(record: Any) -> Any:
        raise ValueError("no ink")

    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(page, "overview", broken)
        made = compare(path, out, methods=["local"], overrides=FEW, say=said.append)
    assert list(made.results) == ["local"]
    assert said[-1].startswith("the page could not be written (ValueError: no ink)")
    assert not (out / "compare.html").exists()
    compare(path, out, methods=["local"], overrides=FEW)
    assert (out / "compare.html").exists()


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_that_is_killed_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    for text, how in (
        ("cat > /dev/null; echo gone >&2; kill -9 $$", "killed by SIGKILL, perhaps for lack of memory"),
        ("exit 7", "the process ended with exit code 7"),
        ("echo '{\"eve'; exit 1", "the process ended with exit code 1"),
    ):
        monkeypatch.setattr(sys, "executable", program(tmp_path / "python", text))
        made = compare(path, out, methods=["local"], overrides=FEW, jobs=2)
        assert reasons(made) == {("local", 0): ("failed", f"{how} (see {out / 'local-0.log'})")}
    assert made.done == {}


@pytest.fixture
def heeded() -> Iterator[None]:
    """Processes started here heed SIGINT, also where a shell in the background has made this one ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_interrupts_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    event = '{"event": "ready", "clients": 1, "rounds": 1}'
    text = f"trap 'touch {tmp_path}/interrupted; exit 130' INT; echo '{event}'; cat > /dev/null"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", f"{text}; sleep 60 > /dev/null & wait"))
    ready = threading.Event()
    monkeypatch.setattr(processes, "as_completed", lambda waiting: interrupted(ready))
    with pytest.raises(KeyboardInterrupt):
        compare(path, out, methods=["local"], overrides=FEW, jobs=2, watch=lambda rounds, label: setting(ready))
    assert (tmp_path / "interrupted").exists()


@pytest.mark.usefixtures("heeded")
def test_what_stops_the_comparison_stops_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run fails while another is at work, and to say so is interrupted."""
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    at_work = f"trap 'touch {tmp_path}/interrupted; exit 130' INT; touch {tmp_path}/ready; sleep 60 > /dev/null & wait"
    failing = f"until [ -e {tmp_path}/ready ]; do sleep 0.05; done; exit 7"
    text = f"if grep -q fedit; then {failing}; fi; {at_work}"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", text))

    def stop(said: str) -> None:
        raise KeyboardInterrupt(said)

    with pytest.raises(KeyboardInterrupt, match="fedit seed 0 failed"):
        compare(path, out, methods=["fedit", "local"], overrides=FEW, jobs=2, say=stop)
    assert (tmp_path / "interrupted").exists()


def interrupted(ready: threading.Event) -> Iterator[Any]:
    """Ctrl-C, once a process is at work."""
    assert ready.wait(60)
    raise KeyboardInterrupt
    yield


@contextmanager
def setting(ready: threading.Event) -> Iterator[Any]:
    yield lambda event: ready.set()


@contextmanager
def listener_to(names: list[str]) -> Iterator[Any]:
    """Notes the names of events."""
    yield lambda event: names.append(event.event)
