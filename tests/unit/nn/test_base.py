"""Loading the frozen base from tiny folders: what is found on it, and what is said of folders that hold none."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    PretrainedConfig,
)
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

import tiny
from coterie.machine import devices
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.nn.locate import files_of, resolve
from coterie.nn.pretrained import bare_linears
from coterie.nn.spec import describe, longest
from coterie.nn.targets import DEFAULT_TARGETS
from coterie.types import CoterieError

torch.set_num_threads(1)

DEFAULTS = {  # PEFT's, of layer 0
    "bert": ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.value"],
    "roberta": ["roberta.encoder.layer.0.attention.self.query", "roberta.encoder.layer.0.attention.self.value"],
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
    "qwen2": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn"],
}
HEADS = {
    "bert": {"classifier.weight": (-1, 32), "classifier.bias": (-1,)},
    "roberta": {
        "classifier.dense.weight": (32, 32),
        "classifier.dense.bias": (32,),
        "classifier.out_proj.weight": (-1, 32),
        "classifier.out_proj.bias": (-1,),
    },
    "llama": {"score.weight": (-1, 32)},
    "qwen2": {"score.weight": (-1, 32)},
    "gpt2": {"score.weight": (-1, 32)},
}


def folder(path: Path, arch: str, kind: str) -> str:
    """As users have them; for an encoder that generates, one that was trained to."""
    if kind == "generation" and arch in tiny.ENCODERS:
        return str(tiny.folder(path / "model", arch, "generation", is_decoder=True))
    return str(tiny.folder(path / "model", arch))


def other(kind: str, **more: Any) -> PretrainedConfig:
    """Of an architecture that has its own names for its sizes, and here plenty of noise."""
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 24}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    own: dict[str, dict[str, Any]] = {
        "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.4, "hidden_dropout_prob": 0.3},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "seq_classif_dropout": 0.4},
        "mpnet": {"pad_token_id": 1},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.3},
        "bloom": {},
        "deberta-v2": {"relative_attention": True, "position_biased_input": False},
    }
    return AutoConfig.for_model(kind, **{**sizes, **own[kind], **more})


@pytest.mark.parametrize("kind", ["classification", "generation"])
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_and_kind(arch: str, kind: Any, tmp_path: Path) -> None:
    path = folder(tmp_path, arch, kind)
    base = load_base(path, kind)
    assert (base.path, base.kind) == (path, kind)
    assert [t.name for t in base.spec.targets if ".0." in t.name] == DEFAULTS[arch]
    assert [t.name for t in base.spec.targets] == sorted(t.name for t in base.spec.targets)
    assert len(base.spec.targets) == 2 * len(DEFAULTS[arch])
    for target in base.spec.targets:
        assert target.d_in == 32
        assert target.d_out == {"c_attn": 96, "v_proj": 16}.get(target.name.rsplit(".", 1)[-1], 32)
    assert {p.name: p.shape for p in base.spec.head} == (HEADS[arch] if kind == "classification" else {})
    assert all(p.init == ("zeros" if p.name.endswith("bias") else "normal") for p in base.spec.head)
    assert base.spec.head_std == pytest.approx(0.3)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.pad_token_id == base.model.config.pad_token_id == 0
    assert all(p.dtype == torch.float32 for p in base.model.parameters())


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_the_weights_are_the_folders(arch: str, tmp_path: Path) -> None:
    kind: Any = "classification" if arch in tiny.ENCODERS else "generation"
    base = load_base(folder(tmp_path, arch, kind), kind)
    saved = tiny.model(arch, "bare" if arch in tiny.ENCODERS else "generation").state_dict()
    loaded = base.model.state_dict()
    prefix = f"{base.model.base_model_prefix}." if arch in tiny.ENCODERS else ""
    kept = [name for name in saved if not (arch == "roberta" and name.startswith("pooler"))]  # its head has its own
    compared = [name for name in kept if torch.equal(saved[name], loaded[prefix + name])]
    assert compared == kept
    assert len(compared) > 10


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 prefers another name for the same call
@pytest.mark.parametrize("kind", ["classification", "generation"])
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_no_dropout_is_left_in_training_mode(arch: str, kind: Any, tmp_path: Path) -> None:
    """Gradient checkpointing needs training mode; nothing else may come with it."""
    path = folder(tmp_path, arch, kind)
    base = load_base(path, kind, gradient_checkpointing=True)
    assert base.model.training
    assert base.model.is_gradient_checkpointing
    inputs = tiny.batch(padded=arch not in tiny.DECODERS)
    first, second = (base.model(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, load_base(path, kind).model(**inputs).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("arch", "name", "targets"),
    [
        ("distilbert", "seq_classif_dropout", ("q_lin", "v_lin")),
        ("albert", "classifier_dropout_prob", ("query", "value")),
        ("opt", "layerdrop", ("q_proj", "v_proj")),
    ],
)
def test_dropout_of_any_name_is_turned_off(arch: str, name: str, targets: Any, tmp_path: Path) -> None:
    config = other(arch)
    assert getattr(config, name) > 0.3
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    noisy = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    inputs = tiny.batch(padded=False)
    first = noisy(**inputs).logits
    assert not all(torch.equal(first, noisy(**inputs).logits) for _ in range(20))  # a layer is dropped by chance
    base = load_base(str(tmp_path), "classification", targets=targets)
    base.model.train()
    state = torch.random.get_rng_state()
    first, second = (base.model(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    if arch != "opt" or Version(transformers_version) >= Version("5.23"):  # 5.0 draws though nothing is to be dropped
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, base.model.eval()(**inputs).logits)


def test_a_model_without_gradient_checkpointing(tmp_path: Path) -> None:
    AutoModel.from_config(other("albert")).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CoterieError, match="AlbertForSequenceClassification does not support gradient_checkpointing"):
        load_base(str(tmp_path), "classification", targets=("query",), gradient_checkpointing=True)


def test_bfloat16(tmp_path: Path) -> None:
    base = load_base(folder(tmp_path, "llama", "generation"), "generation", dtype=torch.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_a_head_that_the_base_has_not_is_the_same_every_time(tmp_path: Path) -> None:
    """And torch's global stream stays where it was: it is drawn from a stream of its own."""
    path = folder(tmp_path, "roberta", "classification")
    state = torch.random.get_rng_state()
    one = load_base(path, "classification").model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    other = load_base(path, "classification").model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fine_tuned_head_of_another_size_is_no_hindrance(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", "bert", "classification", labels=5)
    assert load_base(str(tmp_path / "model"), "classification").spec.head[0].shape == (-1, 32)


def test_a_pooler_that_the_checkpoint_lacks_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    BertModel(tiny.config("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    one, other = (load_base(str(tmp_path), "classification").model.bert.pooler.dense.weight for _ in range(2))
    assert torch.equal(one, other)
    assert bool(one.any())


# lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "most"),
    [("bert", 24), ("gpt2", 24), ("roberta", 23), ("albert", 24), ("distilbert", 24), ("mpnet", 22), ("opt", 24)],
)
def test_the_longest_text_fits_and_one_more_token_does_not(arch: str, most: int) -> None:
    own = {"n_positions": 24} if arch == "gpt2" else {"max_position_embeddings": 24}
    config = tiny.config(arch, **own) if arch in tiny.ARCHITECTURES else other(arch)
    model = AutoModel.from_config(config).eval()
    assert longest(model) == most
    model(input_ids=torch.full((1, most), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 7))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rotary_positions_end_where_the_config_says(arch: str, tmp_path: Path) -> None:
    assert load_base(folder(tmp_path, arch, "generation"), "generation").longest == 160
    stretching = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert longest(tiny.model(arch, "generation", rope_parameters=stretching)) is None


@pytest.mark.parametrize("arch", ["bloom", "deberta-v2"])
def test_relative_positions_have_no_end(arch: str) -> None:
    model = AutoModel.from_config(other(arch)).eval()
    assert longest(model) is None
    assert model(input_ids=torch.full((1, 100), 7)).last_hidden_state.shape[1] == 100


# devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", "cuda 0"])
def test_a_device_that_is_not_here(device: str, tmp_path: Path) -> None:
    with pytest.raises(CoterieError) as caught:
        load_base(folder(tmp_path, "gpt2", "generation"), "generation", device=device)
    assert str(caught.value).startswith(f"[engine] device = {device!r} is not available")
    assert str(caught.value).endswith(f"; this machine has {', '.join(devices())}")
    assert len(str(caught.value).splitlines()) == 1


def test_cuda_on_a_torch_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("coterie.nn.base.devices", lambda: ("cpu",))
    path = folder(tmp_path, "gpt2", "generation")
    monkeypatch.setattr(torch.version, "cuda", None)
    built = r"\(this torch is built without CUDA\)"
    with pytest.raises(CoterieError, match=rf"'cuda' is not available {built}; this machine has cpu$"):
        load_base(path, "generation", device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(CoterieError, match=r"'cuda' is not available; this machine has cpu$"):
        load_base(path, "generation", device="cuda")


# targets --------------------------------------------------------------------------------------------------------------


def test_targets_by_last_name_and_by_whole_name(tmp_path: Path) -> None:
    path = folder(tmp_path, "bert", "classification")
    names = ("dense", "bert.encoder.layer.1.attention.self.key")
    found = [t.name for t in load_base(path, "classification", targets=names).spec.targets]
    assert "bert.encoder.layer.1.attention.self.key" in found
    assert "bert.encoder.layer.0.attention.self.key" not in found
    assert "bert.encoder.layer.0.output.dense" in found
    assert len(found) == 2 * 3 + 1  # per layer attention output, intermediate, output; one key; not the pooler


def test_targets_are_never_in_the_head(tmp_path: Path) -> None:
    made = tiny.model("roberta")
    assert not [t for t in describe(made, ("dense",)).targets if t.name.startswith("classifier")]
    with pytest.raises(CoterieError, match="out_proj"):
        describe(made, ("out_proj",))


@pytest.mark.parametrize(
    ("arch", "has"),
    [("bert", "dense, key, query, value"), ("llama", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")],
)
def test_a_target_that_matches_nothing_lists_what_the_model_has(arch: str, has: str, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=f"no Linear of the model matches the target 'proj'; it has {has}$"):
        load_base(folder(tmp_path, arch, "classification"), "classification", targets=("proj",))


def test_the_default_targets_are_those_of_peft() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

    named = {model: tuple(names) for model, names in PEFT_TARGETS.items() if not isinstance(names, str)}  # else a regex
    assert len(named) >= 30
    assert {model: DEFAULT_TARGETS.get(model) for model in named} == named


def test_an_architecture_without_defaults_lists_what_the_model_has() -> None:
    made = tiny.model("bert")
    made.config.model_type = "novel"
    with pytest.raises(CoterieError, match=r"'novel' models; set .* to some of dense, key, query, value"):
        describe(made)


# folders that hold no model -------------------------------------------------------------------------------------------


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "~/none/at/all"):
        with pytest.raises(CoterieError, match=r"no model folder at .*none"):
            load_base(name, "generation")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CoterieError, match="no model folder at"):
        load_base(str(tmp_path / "model.safetensors"), "generation")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CoterieError, match=r"is not a model folder: it has no config\.json"):
        load_base(str(tmp_path), "classification")


def damage_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def damage_type(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "none-such"}))


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def cut_weights(path: Path) -> None:
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def drop_tokenizer(path: Path) -> None:
    for file in path.glob("token*"):
        file.unlink()


def drop_padding(path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            kept = json.loads((path / name).read_text())
            kept = {k: v for k, v in kept.items() if k not in ("pad_token", "eos_token", "unk_token")}
            (path / name).write_text(json.dumps(kept))


def widen(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    wider = {"intermediate_size": 64, "n_inner": 64}
    (path / "config.json").write_text(json.dumps({**config, **wider}))


def deepen(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config = {**config, "num_hidden_layers": 3, "n_layer": 3}
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_config, "cannot load the model"),
        (damage_type, "cannot load the model"),
        (drop_weights, "cannot load the model"),
        (cut_weights, "cannot load the model"),
        (drop_tokenizer, "cannot load the model|has no tokenizer"),
        (drop_padding, "no padding token"),
        (widen, "no matching weights for"),
        (deepen, "no matching weights for"),
    ],
)
@pytest.mark.parametrize(
    ("arch", "kind"), [("bert", "classification"), ("llama", "generation"), ("gpt2", "generation")]
)
def test_a_damaged_folder(damage: Any, says: str, arch: str, kind: Any, tmp_path: Path) -> None:
    path = folder(tmp_path, arch, kind)
    load_base(path, kind)
    damage(Path(path))
    with pytest.raises(CoterieError, match=says) as caught:
        load_base(path, kind)
    assert len(str(caught.value).splitlines()) == 1
    assert path in str(caught.value)


def test_an_encoder_that_cannot_generate(tmp_path: Path) -> None:
    path = str(tiny.folder(tmp_path / "model", "bert"))
    with pytest.raises(CoterieError, match="a whole model, and one for generation"):
        load_base(path, "generation")
    with pytest.raises(CoterieError, match="a whole model, and one for multiple choice"):
        load_base(path, "multiple_choice")


# names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generation", "multiple_choice"])
def test_an_encoder_with_an_output_layer_is_no_decoder(kind: Any, tmp_path: Path) -> None:
    """transformers loads it as a causal model, with a warning at most: each token would see the answer."""
    BertForMaskedLM(tiny.config("bert")).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CoterieError, match=r"not a decoder.*causal language model"):
        load_base(str(tmp_path), kind)


def test_a_hub_name_stays_as_it_is() -> None:
    assert resolve("organisation/model") == "organisation/model"


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts at the root that is given, and nowhere else; at the working folder where none is."""
    made = tiny.folder(tmp_path / "config" / "mine", "gpt2")
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for root in (tmp_path / "config", Path("../config"), tmp_path / "here" / "sub" / ".." / ".." / "config"):
        assert resolve("mine", root) == resolve("./mine", root) == str(made)
    assert resolve(str(made), tmp_path / "here") == str(made)
    assert resolve("mine") == "mine"
    monkeypatch.chdir(tmp_path / "config")
    assert resolve("mine") == str(made)
    assert load_base(resolve("mine"), "generation").spec.targets
    assert resolve("mine", tmp_path / "here") == "mine"
    with pytest.raises(CoterieError, match=f"no model folder at {tmp_path / 'here' / 'mine'}"):
        resolve("./mine", tmp_path / "here")


def test_a_hub_name_is_not_taken_for_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read the folder."""
    made = tiny.folder(tmp_path / "organisation" / "model", "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CoterieError, match=f"a folder here; give the whole path of the folder, {made}$"):
        load_base("organisation/model", "generation")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that cannot be reached: where the snapshot of organisation/model would be."""

    def ask(*args: Any, **options: Any) -> None:
        assert options["timeout"] <= 10
        raise HfHubHTTPError.__bases__[0]("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("coterie.nn.locate.get_hf_file_metadata", ask)
    place = tmp_path / "hub" / "models--organisation--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    return place / "snapshots" / "abc"


def test_a_name_that_is_no_model_says_what_was_tried(hub: Path, tmp_path: Path) -> None:
    tried = f"no model 'models/mine': there is no folder {tmp_path}/models/mine, no model 'models/mine' in the hub's "
    tried += "cache, and the hub answered: Name or service not known; for a folder give its path (./models/mine), "
    for call in (
        lambda: load_base("models/mine", "generation", root=tmp_path),
        lambda: files_of("models/mine", tmp_path, weights=False),
    ):
        with pytest.raises(CoterieError, match=f"^{re.escape(tried)}"):
            call()
    for name in ("a/b/c", "two words"):
        with pytest.raises(CoterieError, match=r"no folder .*, and it is not a valid hub name; for a folder"):
            load_base(name, "generation")
    with pytest.raises(CoterieError, match=f"no folder {Path.cwd()}/nobody/none, "):
        bare_linears("nobody/none")


def test_a_model_that_the_hub_does_not_have(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {RepositoryNotFoundError: "and none on the hub that you have access to", GatedRepoError: "hf auth login"}
    for kind, says in answers.items():
        fault = kind.__new__(kind)  # they are made of a response
        monkeypatch.setattr("coterie.nn.locate.get_hf_file_metadata", lambda *a, f=fault, **o: (_ for _ in ()).throw(f))
        with pytest.raises(CoterieError, match=says):
            files_of("organisation/other")
    monkeypatch.setattr("coterie.nn.locate.get_hf_file_metadata", lambda *a, **o: None)
    assert files_of("organisation/other") == "organisation/other"


def test_a_model_in_the_cache_is_read_without_the_hub(hub: Path) -> None:
    tiny.folder(hub, "bert")
    assert load_base("organisation/model", "classification").path == str(hub)
    weights = hub / "model.safetensors"
    weights.rename(hub / "model-1.safetensors")  # a download that was cut off
    assert files_of("organisation/model", weights=False) == str(hub)
    with pytest.raises(CoterieError, match="the hub answered"):
        files_of("organisation/model")
    index = hub / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(CoterieError, match="the hub answered"):
        files_of("organisation/model")
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}')
    assert files_of("organisation/model") == str(hub)
    for file in hub.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CoterieError, match="the hub answered"):
        files_of("organisation/model")


def test_the_packaged_encoder() -> None:
    base = load_base("minilm", "classification")
    assert Path(base.path).is_dir()
    assert len(base.spec.targets) == 12
    assert {(t.d_in, t.d_out) for t in base.spec.targets} == {(384, 384)}
    text = base.tokenizer("a sentence", return_tensors="pt")
    assert base.model(**text).logits.shape[0] == 1


def test_the_hub_when_the_packaged_encoder_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.nn.locate._packaged_minilm", lambda: None)
    assert resolve("minilm") == resolve("minilm", Path("/none")) == "sentence-transformers/all-MiniLM-L6-v2"


# what is said while loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "kind"), [("bert", "classification"), ("llama", "classification"), ("gpt2", "generation")]
)
def test_loading_says_nothing(arch: str, kind: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bar, and no report on the head that no base has. Outside of it, transformers speaks as before."""
    path = folder(tmp_path, arch, kind)
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    capfd.readouterr()
    load_base(path, kind)
    said = capfd.readouterr()
    assert (said.out + said.err, records) == ("", [])
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    AutoModelForSequenceClassification.from_pretrained(path)
    logging.getLogger("transformers").removeHandler(handler)
    assert "Loading weights" in capfd.readouterr().err
    assert "LOAD REPORT" in records[0]


def test_it_speaks_again_after_a_fault(tmp_path: Path) -> None:
    path = folder(tmp_path, "bert", "classification")
    drop_weights(Path(path))
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(CoterieError):
        load_base(path, "classification")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_a_model_without_a_head() -> None:
    assert describe(tiny.model("bert", "bare")).head == ()


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_linears_held_in_the_dtype_of_autocast_give_the_same_bits(arch: str, tmp_path: Path) -> None:
    kind = "classification" if arch == "bert" else "generation"
    base = load_base(str(tiny.folder(tmp_path, arch)), kind)  # type: ignore[arg-type]
    bank = tiny.bank(base.spec.targets, 2, gate="softmax")

    def found() -> list[torch.Tensor]:
        with attached(base.model, bank, bank.tensors) as handle:
            with torch.autocast("cpu", torch.bfloat16):
                logits = base.model(**tiny.batch()).logits
            logits.float().square().sum().backward()
            return [logits.detach(), *(p.grad for p in handle.parameters.values() if p.grad is not None)]

    before = found()
    base.hold_linears(torch.bfloat16)
    held = [m.weight.dtype for m in base.model.modules() if type(m) is torch.nn.Linear]
    assert held.count(torch.bfloat16) == {"bert": 13, "llama": 14, "gpt2": 0}[arch], "all but the head, or the tied one"
    assert {m.weight.dtype for m in base.model.modules() if isinstance(m, torch.nn.Embedding)} == {torch.float32}
    after = found()
    assert len(before) == len(after) > 10
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
