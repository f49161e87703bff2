"""Whole runs on tiny random models: what they leave behind is there, adds up, and gives the logits that it should."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import sites
import tiny
from coterie import __version__, codec, experiment
from coterie.adapters.bundle import read_bundle
from coterie.config.load import load_config
from coterie.data.clients import load_data
from coterie.data.rows import TextRow
from coterie.methods.registry import method_named
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.report.page import write_report
from coterie.runs.checkpoint import load_newest
from coterie.runs.events import Evaluated, Event, Note, read_events
from coterie.runs.summary import ALL_MODULES, Summary, read_summary
from coterie.types import Bank, Key, Part

RUNS: dict[str, dict[str, str]] = {  # what each run adds to the config of sites.config
    "bert-fedlease": {"method": "fedlease", "arch": "bert"},
    "bert-fedlease-shared": {"method": "fedlease", "arch": "bert", "task": 'head = "shared"'},
    "bert-fedit": {"method": "fedit", "arch": "bert"},
    "bert-fedit-shared": {"method": "fedit", "arch": "bert", "task": 'head = "shared"'},
    "bert-local": {"method": "local", "arch": "bert"},
    "bert-fedamole": {"method": "fedamole", "arch": "bert"},
    "llama-fedamole": {"method": "fedamole", "arch": "llama"},
    "llama-fedlease": {"method": "fedlease", "arch": "llama"},
    "llama-local": {"method": "local", "arch": "llama"},
    "gpt2-fedlease": {"method": "fedlease", "arch": "gpt2"},
    "gpt2-fedit": {"method": "fedit", "arch": "gpt2", "task": "generate = true\nmax_new_tokens = 4"},
}
CLIENTS = ["mood-0", "mood-1", "place-0", "size-0", "size-1"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Done:
    """A finished run: its config file, its folder, its summary and its events."""

    config: Path
    out: Path
    summary: Summary

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def state(self) -> Any:
        """The server's state after the last round."""
        config = load_config(self.config)
        found = load_newest(self.out / "checkpoints", method_named(config.method_name).State, print)
        assert found is not None
        return found.state


def configured(folder: Path, name: str) -> Path:
    ways = RUNS[name]
    path = sites.config(folder, ways["arch"], method=ways["method"], run='export = "last"')
    text = path.read_text().replace("[lora]", f"{ways.get('task', '')}\n[lora]")
    path.write_text(text)
    return path


def run(path: Path, out: Path, *changes: str) -> Done:
    return Done(path, out, experiment.run(load_config(path, changes), out, root=path.parent))


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``done(name)``: the run of that name, made once."""

    @cache
    def make(name: str) -> Done:
        folder = tmp_path_factory.mktemp(name)
        torch.set_num_threads(1)
        return run(configured(folder, name), folder / "out")

    return make


def files_of(folder: Path, *names: str) -> dict[str, bytes]:
    found = [p for name in names for p in sorted((folder / name).rglob("*")) if p.is_file()]
    assert found
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


# the summary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_summary_is_what_the_events_add_up_to(name: str, done: Any) -> None:
    made = done(name)
    summary = json.loads((made.out / "summary.json").read_text())
    assert read_summary(made.out / "summary.json") == made.summary
    assert made.summary.to_json() == summary
    assert (summary["method"], summary["seed"], summary["rounds"]) == (RUNS[name]["method"], 0, 3)
    assert sorted(summary["clients"]) == CLIENTS
    rounds, evaluations = made.of("round"), {event["round"]: event for event in made.of("evaluation")}
    assert [event["round"] for event in rounds] == list(evaluations) == [1, 2, 3]

    primary = "accuracy" if name.startswith("bert") else "loss"
    sign = 1 if primary == "accuracy" else -1
    validation = {
        rnd: sum(c["validation"][primary] for c in event["clients"].values()) / 5 for rnd, event in evaluations.items()
    }
    best = max(validation, key=lambda rnd: (round(sign * validation[rnd], 12), -rnd))
    assert (summary["primary"], summary["best_round"]) == (primary, best)
    scores = {client: evaluations[best]["clients"][client]["test"] for client in CLIENTS}
    assert {client: row["test"] for client, row in summary["clients"].items()} == scores
    measured = {"accuracy", "macro_f1", "matthews", "loss"} if primary == "accuracy" else {"perplexity", "loss"}
    measured |= {"rouge_l", "exact_match"} if name == "gpt2-fedit" else set()
    for metric in measured:
        mean = sum(row[metric] for row in scores.values()) / 5
        assert summary["mean"]["test"][metric] == pytest.approx(mean, rel=1e-12)
    assert summary["mean"]["test"].keys() == measured
    worst = min(sorted(CLIENTS), key=lambda client: sign * scores[client][primary])
    assert summary["worst"] == {"client": worst, primary: scores[worst][primary]}
    assert summary["percentiles"]["p50"] == sorted(row[primary] for row in scores.values())[2]

    for way in ("up", "down"):
        each = {c: sum(event["clients"][c][f"bytes_{way}"] for event in rounds) for c in CLIENTS}
        assert {c: row[f"bytes_{way}"] for c, row in summary["clients"].items()} == each
        assert summary["bytes"][way] == sum(each.values()) > 0
    assert summary["seconds"] == pytest.approx(sum(e["seconds"] for e in [*rounds, *evaluations.values()]))
    assert summary["peak_memory_bytes"] > 10**8
    assert summary["versions"].keys() >= {"coterie", "python", "torch", "transformers", "peft"}
    assert (summary["coterie"], summary["versions"]["torch"]) == (__version__, torch.__version__)


def test_the_summary_is_of_the_round_that_validation_chose(tmp_path: Path) -> None:
    """Training makes the validation texts less likely: the best round is neither the last nor the best on test data."""
    path = configured(tmp_path, "llama-local")
    for client in CLIENTS:
        sites.write_rows(
            tmp_path / "clients" / client / "validation.jsonl", [{"prompt": "one", "completion": " 0987654321"}] * 6
        )
    made = run(path, tmp_path / "out", "train.learning_rate=0.1", "train.epochs=3")
    means = {
        split: [event["mean"][split]["loss"] for event in made.of("evaluation")] for split in ("validation", "test")
    }
    best = {split: 1 + values.index(min(values)) for split, values in means.items()}
    assert best["validation"] not in (best["test"], 3), means
    assert made.summary.best_round == best["validation"]
    assert made.summary.mean["test"]["loss"] == means["test"][best["validation"] - 1]
    assert made.summary.mean["validation"]["loss"] == min(means["validation"])


@pytest.mark.parametrize("name", [name for name in RUNS if "fedlease" in name])
def test_a_summary_of_fedlease_has_clusters_silhouettes_and_usage(name: str, done: Any) -> None:
    summary = done(name).summary
    clusters, silhouettes = summary.describe["clusters"], summary.describe["silhouettes"]
    assert sorted(clusters) == CLIENTS
    experts = max(clusters.values()) + 1
    assert set(clusters.values()) == set(range(experts))
    assert sorted(silhouettes) == ["2", "3", "4"]
    assert max(silhouettes, key=lambda k: (silhouettes[k], -int(k))) == str(experts)
    assert len(summary.describe["distances"]) == 5
    assert sorted(summary.usage) == CLIENTS
    for client, by_module in summary.usage.items():
        usage = by_module[ALL_MODULES]
        assert len(usage.weight) == len(usage.share) == experts
        assert sum(usage.weight) == pytest.approx(1)
        assert all(0 <= w <= s <= 1 for w, s in zip(usage.weight, usage.share, strict=True))
        assert usage.share[clusters[client]] == 1, "the own expert is always in"


@pytest.mark.pictures
@pytest.mark.parametrize("name", ["bert-fedlease", "llama-fedamole"])
def test_the_report_of_a_run_has_its_pictures(name: str, done: Any) -> None:
    page = write_report(done(name).out).read_text(encoding="utf-8")
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) > 4
    assert all("<path" in picture for picture in drawn)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_holds_what_it_should(name: str, done: Any) -> None:
    made = done(name)
    assert {p.name for p in made.out.iterdir()} >= {
        "config.json", "manifest.json", "metrics.jsonl", "checkpoints", "personal", "clients", "summary.json",
        "report.html",
    }  # fmt: skip
    assert [p.name for p in sorted((made.out / "checkpoints").iterdir())] == ["000002.ckpt", "000003.ckpt"]
    assert sorted(p.name for p in (made.out / "clients").iterdir()) == CLIENTS
    assert not list(made.out.rglob("*.tmp"))
    page = (made.out / "report.html").read_text(encoding="utf-8")
    for word in (*CLIENTS, made.summary.title, "</html>"):
        assert word in page
    config = json.loads((made.out / "config.json").read_text())
    assert config["root"] == str(made.config.parent)
    assert config["config"]["method"]["name"] == RUNS[name]["method"]
    assert config["config"]["run"]["cohort"] == 1.0, "defaults too"
    manifest = json.loads((made.out / "manifest.json").read_text())
    assert sorted(manifest["clients"]) == CLIENTS
    assert all(row["rows"] == {"train": 12, "validation": 6, "test": 6} for row in manifest["clients"].values())


# experts and bundles -------------------------------------------------------------------------------------------------


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    made = tiny.batch(3, 7, padded=model.config.model_type == "bert")
    return made | ({"token_type_ids": made["attention_mask"] * 0} if model.config.model_type == "bert" else {})


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def through_peft(base: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """PEFT's logits; a key that it misses is only a warning there, here it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval(), inputs)


def auto(name: str) -> Any:
    return AutoModelForSequenceClassification if name.startswith("bert") else AutoModelForCausalLM


@pytest.mark.parametrize("name", [name for name in RUNS if "local" not in name])
def test_each_expert_is_a_peft_adapter_with_the_logits_of_our_layer(name: str, done: Any) -> None:
    made = done(name)
    state = made.state
    experts = method_named(RUNS[name]["method"])(None, None).experts(state)
    folders = sorted((made.out / "experts").iterdir())
    assert [folder.name for folder in folders] == sorted(experts)
    number = max(state.allocation.clusters.values()) + 1 if "fedlease" in name else 9 if "fedamole" in name else 1
    assert len(folders) == number
    base = auto(name).from_pretrained(made.config.parent / "model").eval()
    base_logits = logits(base, inputs_for(base))
    for folder in folders:
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "model"
        expert = {key._replace(expert=0): value for key, value in experts[folder.name].items()}
        with attached(base, Bank(expert, scaling=16 / 2)):
            ours = logits(base, inputs_for(base))
        assert (ours - base_logits).abs().max() > 1e-3, "the expert changes something"
        torch.testing.assert_close(through_peft(base, folder, inputs_for(base)), ours, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["bert-fedlease", "bert-fedlease-shared", "bert-fedamole", "bert-fedit", "bert-local"])
def test_a_bundle_gives_the_accuracy_of_the_last_round(name: str, done: Any) -> None:
    made = done(name)
    last = made.of("evaluation")[-1]["clients"]
    config = load_config(made.config)
    federation = load_data(config.data, "classification", config.run.seed, made.config.parent)
    seen = set()
    for client in federation.clients:
        bank, info = read_bundle(made.out / "clients" / client.info.id)
        assert (info.client, info.method, info.round) == (client.info.id, RUNS[name]["method"], 3)
        assert tuple(info.labels) == client.info.labels
        base = load_base(info.base_path, info.task)
        rows = [row for row in client.splits["test"] if isinstance(row, TextRow)]
        with attached(base.model, bank):
            right = []
            for row in rows:
                tokens = base.tokenizer(row.text, truncation=True, max_length=32, return_tensors="pt")
                found = logits(base.model, dict(tokens))
                assert found.shape == (1, len(info.labels))
                right.append(int(found.argmax()) == row.label)
        assert sum(right) / len(rows) == last[client.info.id]["test"]["accuracy"]
        seen.add(sum(right))
    assert len(seen) > 1, "clients differ, so that a mix-up of them shows"


@pytest.mark.parametrize("name", ["bert-local", "bert-fedit-shared", "llama-local"])
def test_a_plain_lora_has_a_peft_adapter_beside_its_bundle(name: str, done: Any) -> None:
    made = done(name)
    for client in CLIENTS:
        bank, info = read_bundle(made.out / "clients" / client)
        labels = {"num_labels": len(info.labels)} if info.labels else {}
        base = auto(name).from_pretrained(info.base_path, **labels).eval()
        with attached(base, bank):
            ours = logits(base, inputs_for(base))
        adapter = made.out / "clients" / client / "adapter"
        torch.testing.assert_close(through_peft(base, adapter, inputs_for(base)), ours, atol=2e-5, rtol=2e-5)
        assert any(key.part is Part.HEAD for key in bank.tensors) == name.startswith("bert")
    if "local" in name:
        weights = [(made.out / "clients" / c / "adapter" / "adapter_model.safetensors").read_bytes() for c in CLIENTS]
        assert len(set(weights)) == 5


def test_a_mixture_has_a_bundle_and_no_adapter(done: Any) -> None:
    made = done("bert-fedlease")
    bank, _ = read_bundle(made.out / "clients" / "mood-0")
    assert bank.gate.name == "slot_top_k"
    assert {key.part for key in bank.tensors} == set(Part) - {Part.EMBEDDING}
    assert not (made.out / "clients" / "mood-0" / "adapter").exists()


def test_heads_are_personal_or_shared_by_label_space_and_cluster(done: Any) -> None:
    def heads(name: str) -> dict[str, dict[Key, torch.Tensor]]:
        banks = {c: read_bundle(done(name).out / "clients" / c)[0] for c in CLIENTS}
        return {c: {k: v for k, v in bank.tensors.items() if k.part is Part.HEAD} for c, bank in banks.items()}

    def same(one: Any, other: Any) -> bool:
        return codec.encode(one) == codec.encode(other)

    alike = [("mood-0", "mood-1"), ("size-0", "size-1")]
    for name in ("bert-fedlease", "bert-fedit"):
        assert [same(heads(name)[a], heads(name)[b]) for a, b in alike] == [False, False]
    shared = heads("bert-fedit-shared")
    assert [same(shared[a], shared[b]) for a, b in alike] == [True, True]
    assert not same(shared["mood-0"], shared["place-0"]), "as many labels, but other ones"
    clusters = done("bert-fedlease-shared").summary.describe["clusters"]
    shared = heads("bert-fedlease-shared")
    assert [same(shared[a], shared[b]) for a, b in alike] == [clusters[a] == clusters[b] for a, b in alike]


# the same bits -------------------------------------------------------------------------------------------------------


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in ("seconds", "energy", "joules", "joules_from", "peak_memory_bytes")
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["bert-fedlease", "llama-fedamole", "gpt2-fedit"])
def test_the_same_config_gives_the_same_bits_and_another_seed_others(name: str, done: Any, tmp_path: Path) -> None:
    first = done(name)
    again, other = (run(first.config, tmp_path / str(seed), f"run.seed={seed}") for seed in (0, 1))
    bits = files_of(first.out, "experts", "clients", "personal")
    assert files_of(again.out, "experts", "clients", "personal") == bits
    assert without_times(again.events) == without_times(first.events)
    changed = files_of(other.out, "experts")
    weights = [path for path in bits if path in changed and path.endswith(".safetensors")]
    assert weights
    assert all(changed[path] != bits[path] for path in weights)


@pytest.mark.parametrize("name", ["bert-fedlease-shared", "bert-fedamole", "bert-fedit", "bert-local"])
def test_results_do_not_depend_on_the_order_of_the_clients(name: str, done: Any, tmp_path: Path) -> None:
    """The order of the config; clusters are numbered by sorted client ids, so their numbers stay the same too."""
    first = done(name)
    made = []
    for order in (CLIENTS, ["size-1", "mood-1", "place-0", "mood-0", "size-0"]):
        text = first.config.read_text().replace('folder = "clients"\n', "")
        assert "folder" not in text
        for client in order:
            files = "".join(f'{s} = "clients/{client}/{s}.jsonl"\n' for s in ("train", "validation", "test"))
            text += f'[[data.clients]]\nid = "{client}"\n{files}'
        path = first.config.parent / f"{order[0]}.toml"
        path.write_text(text)
        made.append(run(path, tmp_path / order[0]))
    given, turned = made
    assert list(turned.summary.clients) != list(given.summary.clients)
    for folder in ("experts", "clients", "personal"):
        if folder != "experts" or "local" not in name:
            assert files_of(turned.out, folder) == files_of(given.out, folder) == files_of(first.out, folder)
    for event, other in zip(given.events, turned.events, strict=True):
        assert without_times(other.get("clients")) == without_times(event.get("clients"))
        assert other.get("describe") == event.get("describe")
        assert other.get("usage") == event.get("usage")
    for key in ("best_round", "worst", "percentiles", "bytes", "describe"):
        assert getattr(turned.summary, key) == getattr(given.summary, key)


def test_a_report_that_fails_costs_the_run_nothing_but_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise UnicodeEncodeError("utf-8", "big\ud800", 3, 4, "surrogates not allowed")

    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    heard: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setattr("coterie.report.page.write_report", fail)
        summary = experiment.run(load_config(path), out, root=tmp_path, listen=heard.append)
    assert read_summary(out / "summary.json") == summary
    (note,) = [event.text for event in heard if isinstance(event, Note) and "report" in event.text]
    assert re.match(r"the report could not be written \(UnicodeEncodeError: .*coterie report ", note)
    assert not (out / "report.html").exists()
    assert experiment.run(load_config(path), out, root=tmp_path, resume=True) == summary
    assert (out / "report.html").exists(), "a finished run without a report is given one"


def test_a_generation_run_shows_samples_of_its_texts(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method="fedit")
    few = ["task.generate=true", "task.max_new_tokens=4", "run.rounds=2", "run.evaluate_every=1"]
    summary = experiment.run(load_config(path, few), tmp_path / "out", root=tmp_path)
    first, last = [e for e in read_events(tmp_path / "out" / "metrics.jsonl") if isinstance(e, Evaluated)]
    assert not first.samples
    assert set(last.samples) == set(summary.clients)
    assert {len(samples) for samples in last.samples.values()} == {3}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(escape(sample.prompt) in page for samples in last.samples.values() for sample in samples)


# what is evaluated ---------------------------------------------------------------------------------------------------


def test_received_and_trained_banks_are_evaluated_and_exported_as_asked(done: Any, tmp_path: Path) -> None:
    """FedIT's received bank is the same for all but the head; its trained one is each client's own."""
    received = done("bert-fedit")
    trained = run(received.config, tmp_path / "trained", "run.evaluate=trained")
    assert (received.summary.evaluated, trained.summary.evaluated) == ("received", "trained")
    assert not (received.out / "trained").exists()
    assert files_of(received.out, "experts", "personal") == files_of(trained.out, "experts", "personal")
    key = next(key for key in received.state.lora if key.part is Part.B)
    for made, different in ((received, 1), (trained, 5)):
        banks = [read_bundle(made.out / "clients" / c)[0] for c in CLIENTS]
        assert len({codec.encode(Bank({key: bank.tensors[key]})) for bank in banks}) == different
    kept = sorted(p.stem for p in (trained.out / "trained" / "mood-0").iterdir())
    assert kept == ["000002", "000003"]
    assert done("bert-fedamole").summary.evaluated == "trained"
    asked = run(done("bert-fedamole").config, tmp_path / "asked", "run.evaluate=received")
    assert asked.summary.evaluated == "received"
    assert asked.summary.mean["test"]["loss"] != done("bert-fedamole").summary.mean["test"]["loss"]


def test_a_client_that_trains_twice_is_evaluated_with_both_of_its_loras(done: Any, tmp_path: Path) -> None:
    made = run(done("bert-fedit").config, tmp_path / "out", "method.name=feddpa", "run.evaluate=trained")
    for client in CLIENTS:
        bank = read_bundle(made.out / "clients" / client)[0]
        assert bank.gate.name == "similarity"
        assert {key.expert for key in bank.tensors if key.part is Part.B} == {0, 1}


def test_a_client_that_never_trained_is_evaluated_with_what_it_receives(done: Any, tmp_path: Path) -> None:
    made = run(done("bert-fedit").config, tmp_path / "out", "run.evaluate=trained", "run.cohort=0.4", "run.rounds=1")
    took_part = set(made.of("round")[0]["clients"])
    assert len(took_part) == 2
    assert {p.name for p in (made.out / "trained").iterdir()} == took_part
    assert sorted(made.of("evaluation")[0]["clients"]) == CLIENTS
    key = next(key for key in made.state.lora if key.part is Part.B)
    for client in CLIENTS:
        bank, _ = read_bundle(made.out / "clients" / client)
        assert torch.equal(bank.tensors[key], made.state.lora[key]) == (client not in took_part)


def test_fedamole_on_multiple_choice(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method="fedamole", kind="multiple_choice")
    summary = experiment.run(load_config(path), tmp_path / "out", root=tmp_path)
    assert (summary.task, summary.primary) == ("multiple_choice", "accuracy")
    assert set(summary.describe["assignment"]) == {t.name for t in tiny.targets(tiny.model("llama", "generation"))}
