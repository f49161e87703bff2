"""``export``: a routed mixture as one static LoRA or merged weights, and its model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import bundles
import coterie
import finished_runs
import sites
import tiny
from coterie.adapters.bundle import read_bundle, write_bundle
from coterie.adapters.merge import write_merged
from coterie.artifacts.card import check_card
from coterie.artifacts.evaluate import open_client
from coterie.artifacts.export import _static, export
from coterie.artifacts.static import mean_weights, static_bank
from coterie.cli.main import app
from coterie.compute.client import LocalCompute
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.requests import ExpertUse, Observe
from coterie.types import SHARED, Bank, CoterieError, Key, Part

TEXTS = ["the printer smokes", "a very long day indeed", "x"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, bundles.LABELS, strict=True)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("classifier")
    sites.write_rows(made / "rows.jsonl", ROWS)
    return bundles.finished(made).parent


def product(bank: Bank, module: str) -> torch.Tensor:
    return bank.scaling * bank.tensors[Key(module, 0, Part.B)] @ bank.tensors[Key(module, 0, Part.A)]


def test_a_static_bank_weighs_every_expert_by_its_mean() -> None:
    made = tiny.model("bert")
    over = tiny.targets(made)
    bank = tiny.bank(over, 3, rank=(2, 1, 3), gate="softmax", shared=2)
    module = over[0].name
    usage = {target.name: ExpertUse([1.0, 0.5, 0.0, 0.25], [1.0] * 4, [SHARED, 0, 1, 2]) for target in over}
    static = static_bank(bank, usage)
    assert static.tensors[Key(module, 0, Part.A)].shape == (2 + 2 + 3, over[0].d_in)
    weights = {SHARED: 1.0, 0: 0.5, 2: 0.25}
    expected = sum(
        weight * bank.scaling * bank.tensors[Key(module, e, Part.B)] @ bank.tensors[Key(module, e, Part.A)]
        for e, weight in weights.items()
    )
    assert isinstance(expected, torch.Tensor)
    assert torch.allclose(product(static, module), expected, atol=1e-5)
    cut = static_bank(bank, usage, rank=2)
    assert cut.tensors[Key(module, 0, Part.A)].shape == (2, over[0].d_in)
    left = torch.linalg.svdvals(expected.double())[2:].square().sum().sqrt()
    assert float((product(cut, module).double() - expected).norm()) == pytest.approx(float(left), rel=1e-3)


def test_a_gate_of_one_loses_nothing() -> None:
    made = tiny.model("bert")
    bank = tiny.bank(tiny.targets(made), 2)
    logits = []
    for of in (bank, static_bank(bank, {})):
        with torch.no_grad(), attached(made, of):
            logits.append(made(**tiny.batch()).logits)
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 3])
def test_peft_loads_the_static_form_with_its_logits(rank: int | None, folder: Path, tmp_path: Path) -> None:
    made = export(folder / "run", "north", tmp_path / "out", form="static", rank=rank, data=folder / "rows.jsonl")
    assert made.rank == (rank or 12)
    client = open_client(folder / "run", "north")
    rows = client.rows_of(folder / "rows.jsonl")
    static = static_bank(client.bank, mean_weights(client, rows, "test"), rank)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    base = load_base(str(folder / "model"), "classification")
    with torch.no_grad(), attached(base.model, static):
        expected = base.model(**batch).logits
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, atol=1e-4)
    assert made.cost is not None
    right = expected.argmax(-1).tolist()
    assert made.cost.static["accuracy"] == sum(r == i for i, r in enumerate(right)) / 3
    routed = [a.columns()["prediction"] for a in coterie.load(folder / "run", "north").predict(ROWS)]
    assert made.cost.routed["accuracy"] == sum(r == row["label"] for r, row in zip(routed, ROWS, strict=True)) / 3


def test_merged_weights_are_a_model_of_their_own(folder: Path, tmp_path: Path) -> None:
    data = folder / "rows.jsonl"
    export(folder / "run", "north", tmp_path / "static", form="static", data=data)
    export(folder / "run", "north", tmp_path / "merged", form="merged", data=data)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "static").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, adapted(**batch).logits, atol=1e-4)
    assert merged.config.id2label == dict(enumerate(bundles.LABELS))
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize("gate", ["signed", "mixing"])
def test_weights_that_no_token_changes_are_exported_exactly_and_need_no_rows(gate: str, tmp_path: Path) -> None:
    north = bundles.finished(tmp_path, gate=gate) / "clients" / "north"
    for form in ("static", "merged"):
        export(north, None, tmp_path / form, form=form)  # type: ignore[arg-type]
    written, expected = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "static", north / "adapter"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    routed = coterie.load(north)
    batch = routed.tokenizer(TEXTS, return_tensors="pt", padding=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, routed.model(**batch).logits, atol=1e-4)


def test_a_client_without_a_router_needs_no_rows_even_where_its_run_is(tmp_path: Path) -> None:
    run = bundles.finished(tmp_path, gate="constant")
    north = open_client(run / "clients" / "north", None)
    (run / "config.json").write_text("{}")  # of a federation, whose rows are at its sites
    static, measured = _static(run, north, None, None)
    assert measured is None
    expected = static_bank(north.bank, {}, None).tensors
    assert static.tensors.keys() == expected.keys()
    assert all(torch.equal(static.tensors[key], value) for key, value in expected.items())


def test_a_bundle_does_not_answer_for_another_client(tmp_path: Path) -> None:
    north = bundles.finished(tmp_path) / "clients" / "north"
    assert coterie.load(north, "north").client == "north"
    with pytest.raises(CoterieError, match=r"is the bundle of north, not of south; give the run's folder"):
        coterie.load(north, "south")


def test_a_device_that_is_not_here_is_not_taken_for_a_missing_base(tmp_path: Path) -> None:
    north = bundles.finished(tmp_path) / "clients" / "north"
    with pytest.raises(CoterieError, match=r"^\[engine\] device = 'nonsense'"):
        coterie.load(north, device="nonsense")


def test_response_weights_keep_their_signs(tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path, gate="response") / "clients" / "north"
    bank, about = read_bundle(folder)
    for key, table in bank.tensors.items():
        if key.part is Part.ROUTER:
            table.zero_()[:, 0] = torch.tensor([-1.0, 0.5, -0.25])  # g = w, whatever the text
    write_bundle(folder, bank, about)
    sites.write_rows(tmp_path / "rows.jsonl", ROWS)
    client = open_client(folder, None)
    usage = mean_weights(client, client.rows_of(tmp_path / "rows.jsonl"), "test")
    assert len(usage) == 4
    assert all(use.weight == pytest.approx([-1.0, 0.5, -0.25]) for use in usage.values())
    reported = LocalCompute(client.workplace, client.rows_of(tmp_path / "rows.jsonl"), 0).observe(
        Observe(client.bank, "test")
    )
    assert all(use.weight == pytest.approx([1.0, 0.5, 0.25]) for use in reported.usage.values())
    made = export(folder, None, tmp_path / "out", form="static", data=tmp_path / "rows.jsonl")
    assert made.cost is not None
    assert made.cost.static == pytest.approx(made.cost.routed, abs=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_merged_decoder_writes_what_peft_writes(arch: str, tmp_path: Path) -> None:
    kind = "generation" if arch == "llama" else "multiple_choice"
    run = bundles.finished(tmp_path, kind)
    rows = [{"prompt": text, "completion": " b", "choices": [" a", " b"], "label": 1} for text in TEXTS]
    sites.write_rows(tmp_path / "rows.jsonl", rows)
    for form in ("static", "merged"):
        export(run, "north", tmp_path / form, form=form, data=tmp_path / "rows.jsonl")  # type: ignore[arg-type]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "static").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        found, expected = (model(**batch).logits for model in (merged, adapted))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_merged_decoder_has_the_files_names_and_shapes_of_its_base(arch: str, tmp_path: Path) -> None:
    """So what converts the base, to GGUF or another format, converts the merged model."""
    run = bundles.finished(tmp_path, "generation", gate="constant", arch=arch)
    base, merged = tmp_path / "model", tmp_path / "merged"
    (base / "tokenizer.model").write_bytes(b"a vocabulary of SentencePiece")
    export(run / "clients" / "north", None, merged, form="merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert (merged / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, merged)]
    for name in ("architectures", "model_type", "vocab_size", "tie_word_embeddings"):
        assert configs[0].get(name) == configs[1].get(name)
    vocabularies = [json.loads((folder / "tokenizer.json").read_text())["model"] for folder in (base, merged)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize(
    ("arch", "targets"),
    [("gpt2", ("attn.c_proj", "c_fc")), ("llama", ("q_proj", "lm_head")), ("gpt2", ("c_attn", "lm_head"))],
)
def test_merged_weights_of_any_targets_give_the_logits_of_the_bank(
    arch: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    run = bundles.finished(tmp_path, "generation", gate="constant", arch=arch, targets=targets)
    north = coterie.load(run, "north")
    export(run / "clients" / "north", None, tmp_path / "merged", form="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = tiny.batch()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, north.model(**batch).logits, atol=1e-4)


def test_weights_that_other_modules_share_are_not_merged(tmp_path: Path) -> None:
    run = bundles.finished(tmp_path, "generation", gate="constant", arch="gpt2", targets=("c_fc",))
    bank, about = read_bundle(run / "clients" / "north")
    base = load_base(str(tmp_path / "model"), "generation")
    first, second = (base.model.get_submodule(f"transformer.h.{i}.mlp.c_fc") for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(
        CoterieError, match=r"shares its weight with transformer\.h\.1\.mlp\.c_fc.*export with --static"
    ):
        write_merged(tmp_path / "out", base, static_bank(bank, {}), about)


def test_a_run_on_a_base_without_default_targets_can_be_used(tmp_path: Path) -> None:
    run = bundles.finished(tmp_path, gate="constant", arch="distilbert", targets=("q_lin", "v_lin"))
    north = coterie.load(run, "north")
    batch = north.tokenizer(TEXTS, return_tensors="pt", padding=True)
    for form in ("static", "merged"):
        export(run / "clients" / "north", None, tmp_path / form, form=form)  # type: ignore[arg-type]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "static").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = north.model(**batch).logits
        assert all(torch.allclose(model(**batch).logits, expected, atol=1e-4) for model in (adapted, merged))
    assert coterie.load(run, labels=["yes", "no"]).labels == ("yes", "no")


@pytest.mark.parametrize(("of_base", "ends"), [(7, [2, 7]), (None, [2])])
def test_merged_and_loaded_models_end_a_text_where_training_did(
    of_base: int | None, ends: list[int], tmp_path: Path
) -> None:
    run = bundles.finished(tmp_path, "generation", gate="constant")
    config = GenerationConfig.from_pretrained(tmp_path / "model")
    config.eos_token_id = of_base
    config.save_pretrained(tmp_path / "model")
    export(run / "clients" / "north", None, tmp_path / "merged", form="merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == ends
    loaded = coterie.load(run, "north")
    assert loaded.model.generation_config.eos_token_id == ends
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.model_max_length == loaded.tokenizer.model_max_length, "prompts are not cut like a run's rows"


# the model card -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished() -> Path:
    return finished_runs.fedlease()


def test_the_command_writes_a_card_that_the_hubs_library_reads(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "static"
    arguments = ["export", str(finished), "--client", "size-0", "--static", "--language", "en", "--out", str(out)]
    app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "routed and static on its own test rows: 6 rows" in shown
    assert "the static form costs" in shown
    card = ModelCard.load(out / "README.md")
    data = card.data
    assert (data.library_name, data.base_model, data.license, data.language) == ("peft", "model", "apache-2.0", ["en"])
    assert {"coterie", "lora", "fedlease"} <= set(data.tags)
    assert data.pipeline_tag == "text-classification"
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    assert set(metrics) == set(data.metrics) == {"accuracy", "f1", "matthews_correlation"}
    assert "| accuracy | " in card.text
    for text in ("| train | 12 |", "Labels, in the order of the logits: big, small, tiny.", "5 clients", "cluster"):
        assert text in card.text
    check_card(out)
    (out / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(CoterieError, match=r"the metadata of .*README\.md are not those of a model card"):
        check_card(out)
    with pytest.raises(CoterieError, match=r"is not empty; name another folder"):
        app(arguments, standalone_mode=False)


def test_a_bundle_is_exported_as_it_is(finished: Path, tmp_path: Path) -> None:
    made = export(finished, "mood-0", tmp_path / "out", command="coterie export")
    assert made.cost is None
    bank, about = read_bundle(tmp_path / "out")
    original, before = read_bundle(finished / "clients" / "mood-0")
    assert about == before
    assert all(torch.equal(bank.tensors[key], value) for key, value in original.tensors.items())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "coterie"
    accuracy = json.loads((finished / "summary.json").read_text())["clients"]["mood-0"]["test"]["accuracy"]
    assert [r.metric_value for r in card.data.eval_results if r.metric_type == "accuracy"] == [
        pytest.approx(accuracy, abs=1e-6)
    ]


def test_a_mixture_without_rows_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"its gate weighs experts by the text: give labelled rows with --data"):
        export(folder / "run" / "clients" / "north", None, tmp_path / "out", form="static")
    for arguments, text in (
        (["--static", "--merge"], "give one of the two"),
        (["--rank", "2"], "--rank cuts a static LoRA"),
    ):
        with pytest.raises(CoterieError, match=text):
            app(["export", str(folder), "--out", str(tmp_path / "x"), *arguments], standalone_mode=False)


def test_a_card_of_a_base_without_a_card_names_no_licence(folder: Path, tmp_path: Path) -> None:
    made = export(folder / "run", "north", tmp_path / "out", form="static", data=folder / "rows.jsonl")
    card = ModelCard.load(made.folder / "README.md")
    assert card.data.license is None
    assert "Its licence is not known here" in card.text
    assert made.cost is not None
    assert replace(made.cost, static={"accuracy": 0.5}, routed={"accuracy": 0.75}).points("accuracy") == -25
