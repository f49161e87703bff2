"""What is exported gives the logits of our own layer, through PEFT and through a bundle."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import tiny
from coterie.adapters.bundle import BUNDLE_FILE, Bundle, one_lora, read_bundle, write_bundle
from coterie.adapters.write import write_adapter
from coterie.codec import encode
from coterie.nn.attach import attached
from coterie.nn.spec import describe
from coterie.ops.streams import stream
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, CoterieError, GateSpec, Key, Part

torch.set_num_threads(1)
WIDTH, VOCABULARY, LABELS = 16, 40, 3
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 24, "max_position_embeddings": 32, "num_labels": LABELS, "pad_token_id": 0}  # fmt: skip
TOKENS = torch.tensor([[5, 9, 12, 7, 3, 22], [8, 30, 11, 2, 17, 6]])


def model_of(architecture: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    match architecture:
        case "bert":
            model: nn.Module = BertForSequenceClassification(BertConfig(**ENCODER))
        case "roberta":
            model = RobertaForSequenceClassification(RobertaConfig(**ENCODER))
        case "llama":
            config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
            model = LlamaForCausalLM(config)
        case _:
            sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **sizes))
    generator = stream(0, "model", architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype).eval().requires_grad_(False)


def expert_for(model: nn.Module, rank: int, number: int = 0, ranks: dict[str, int] | None = None) -> dict:
    generator, tensors = stream(1, "expert", number), {}
    for target in describe(model).targets:
        r = next((r for end, r in (ranks or {}).items() if target.name.endswith(end)), rank)
        tensors[Key(target.name, number, Part.A)] = torch.randn(r, target.d_in, generator=generator)
        tensors[Key(target.name, number, Part.B)] = torch.randn(target.d_out, r, generator=generator)
    return tensors


def head_for(model: nn.Module, labels: int) -> dict:
    generator = stream(2, "head")
    return {
        Key(p.name, NO_EXPERT, Part.HEAD): torch.randn(p.shape_for(labels), generator=generator).double()
        for p in describe(model).head
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def ours(model: nn.Module, bank: Bank) -> torch.Tensor:
    with attached(model, bank):
        return logits(model)


def through_peft(model: nn.Module, folder: Path) -> torch.Tensor:
    """The logits of PEFT's model, which must load without a complaint (a missing key is only a warning there)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "gpt2"])
def test_peft_gives_the_logits_of_our_layer(tmp_path, architecture, dtype, atol):
    model = model_of(architecture, dtype)
    kind = "generation" if architecture in ("llama", "gpt2") else "classification"
    expert = expert_for(model, rank=4)
    names = {key.module for key in expert}
    assert len(names) >= 2
    conv = any(target.transposed for target in describe(model).targets)
    assert conv == (architecture == "gpt2")
    write_adapter(tmp_path, expert, rank=4, alpha=6.0, about=tiny.about(task=kind), fan_in_fan_out=conv)
    expected = ours(model, Bank(expert, scaling=1.5))
    assert (expected - logits(model)).abs().max() > 0.02, "the expert must change something"
    torch.testing.assert_close(through_peft(model, tmp_path), expected, atol=atol, rtol=atol)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(names)
    assert config["base_model_name_or_path"] == "a/base"
    assert json.loads((tmp_path / "coterie.json").read_text())["round"] == 3


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_the_head_is_loaded_by_peft(tmp_path, architecture):
    model = model_of(architecture)
    expert, head = expert_for(model, rank=2), head_for(model, LABELS)
    assert len(head) == (2 if architecture == "bert" else 4)
    write_adapter(tmp_path, expert, rank=2, alpha=2.0, about=tiny.about(), head=head)
    expected = ours(model, Bank({**expert, **head}, scaling=1.0))
    without = ours(model, Bank(expert, scaling=1.0))
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(through_peft(model, tmp_path), expected, atol=1e-12, rtol=1e-12)


def test_ranks_may_differ_between_modules(tmp_path):
    model = model_of("bert")
    expert = expert_for(model, rank=4, ranks={"layer.1.attention.self.query": 2})
    write_adapter(tmp_path, expert, rank=4, alpha=8.0, about=tiny.about())
    expected = ours(model, Bank(expert, scaling=2.0))
    torch.testing.assert_close(through_peft(model, tmp_path), expected, atol=1e-12, rtol=1e-12)


def test_an_adapter_is_the_same_bytes_each_time_and_float32(tmp_path):
    expert = {key: value.bfloat16() for key, value in expert_for(model_of("bert"), rank=2).items()}
    for folder in ("one", "two"):
        write_adapter(tmp_path / folder, expert, rank=2, alpha=2.0, about=tiny.about())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    model = model_of("bert")
    expected = ours(model, Bank({key: value.float() for key, value in expert.items()}))
    torch.testing.assert_close(through_peft(model, tmp_path / "one"), expected, atol=1e-12, rtol=1e-12)


def test_what_is_no_expert_is_refused(tmp_path):
    expert = expert_for(model_of("bert"), rank=2)
    two = {**expert, **expert_for(model_of("bert"), rank=2, number=1)}
    name = next(iter(expert)).module
    half = {key: value for key, value in expert.items() if key != Key(name, 0, Part.B)}
    crossed = {**expert, Key(name, 0, Part.A): torch.zeros(3, WIDTH)}
    for tensors, reason in ((two, "one A and one B"), (half, "one A and one B"), (crossed, "no product"), ({}, "no")):
        with pytest.raises(ValueError, match=reason):
            write_adapter(tmp_path / "x", tensors, rank=2, alpha=2.0, about=tiny.about())
    head = head_for(model_of("bert"), LABELS)
    for kind in ("generation", "multiple_choice"):
        with pytest.raises(ValueError, match="no classification head"):
            write_adapter(tmp_path / "x", expert, rank=2, alpha=2.0, about=tiny.about(task=kind), head=head)
    assert not (tmp_path / "x").exists()


def mixture(model: nn.Module, dtype: torch.dtype) -> Bank:
    tensors = {**expert_for(model, 2, number=0), **expert_for(model, 2, number=1), **head_for(model, 5)}
    generator = stream(3, "router")
    for target in describe(model).targets:
        tensors[Key(target.name, NO_EXPERT, Part.ROUTER)] = torch.randn(3, target.d_in, generator=generator)
    gate = GateSpec("slot_top_k", {"own": 1}, {describe(model).targets[0].name: {"own": 0}})
    return Bank({key: value.to(dtype) for key, value in tensors.items()}, gate, scaling=0.75, dropout=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_comes_back_bit_for_bit_and_attaches(tmp_path, dtype):
    model = model_of("bert")
    bank = mixture(model, dtype)
    info = tiny.about(labels=("a", "b", "c", "d", "e"), client="north", method="fedlease", round=7, export="best")
    write_bundle(tmp_path / "north", bank, info)
    again, found = read_bundle(tmp_path / "north")
    assert found == info
    assert (again.gate, again.scaling, again.dropout) == (bank.gate, bank.scaling, bank.dropout)
    assert again.tensors.keys() == bank.tensors.keys()
    assert all(again.tensors[key].dtype == dtype for key in bank.tensors)
    assert all(torch.equal(again.tensors[key], value) for key, value in bank.tensors.items())
    double = Bank({key: value.double() for key, value in again.tensors.items()}, again.gate, again.scaling)
    same = Bank({key: value.double() for key, value in bank.tensors.items()}, bank.gate, bank.scaling)
    assert ours(model, double).shape == (len(TOKENS), 5)
    assert torch.equal(ours(model, double), ours(model, same))
    assert not (tmp_path / "north" / "adapter").exists(), "a mixture is no PEFT adapter"
    assert [path.name for path in (tmp_path / "north").iterdir()] == [BUNDLE_FILE]


@pytest.mark.parametrize("number", [0, 3, SHARED])
def test_a_bundle_of_a_plain_lora_has_an_adapter_beside_it(tmp_path, number):
    model = model_of("bert")
    bank = Bank({**expert_for(model, 4, number), **head_for(model, LABELS)}, scaling=0.3)
    write_bundle(tmp_path, bank, tiny.about())
    expected = ours(model, read_bundle(tmp_path)[0])
    torch.testing.assert_close(through_peft(model, tmp_path / "adapter"), expected, atol=1e-12, rtol=1e-12)


def test_a_bundle_of_a_sum_of_loras_has_one_adapter_for_all(tmp_path):
    """Experts whose gates are 1, of different ranks; not every module has all of them."""
    model = model_of("bert")
    parts = {**expert_for(model, 4, FOLDED), **expert_for(model, 2, 0, {"query": 3}), **expert_for(model, 1, 1)}
    first = min(key.module for key in parts)
    tensors = {key: value for key, value in parts.items() if (key.module, key.expert) != (first, FOLDED)}
    bank = Bank({**tensors, **head_for(model, LABELS)}, scaling=0.3)
    write_bundle(tmp_path, bank, tiny.about())
    expected = ours(model, read_bundle(tmp_path)[0])
    torch.testing.assert_close(through_peft(model, tmp_path / "adapter"), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["generation", "multiple_choice"])
def test_the_bundle_of_a_causal_model_has_a_causal_adapter(tmp_path, kind):
    model = model_of("gpt2")
    bank = Bank(expert_for(model, 2), scaling=2.0)
    write_bundle(tmp_path, bank, tiny.about(task=kind), fan_in_fan_out=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    torch.testing.assert_close(through_peft(model, tmp_path / "adapter"), ours(model, bank), atol=1e-12, rtol=1e-12)


def test_a_folder_without_a_good_bundle_is_an_error_that_says_where(tmp_path):
    with pytest.raises(CoterieError, match=r"no bundle.safetensors in .*missing"):
        read_bundle(tmp_path / "missing")
    bank = Bank(expert_for(model_of("bert"), 2))
    write_bundle(tmp_path, bank, tiny.about())
    path = tmp_path / BUNDLE_FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not safetensors at all", encode(bank)):
        path.write_bytes(damaged)
        with pytest.raises(CoterieError, match="damaged or was not written by Coterie"):
            read_bundle(tmp_path)
    path.write_bytes(encode(Bundle(bank, tiny.about(), format=99)))
    with pytest.raises(CoterieError, match="has format 99"):
        read_bundle(tmp_path)


def test_a_router_that_does_not_fit_the_experts_to_mix_is_an_error():
    experts = {key: v for e in range(2) for key, v in expert_for(model_of("bert"), 1, e).items()}
    for rows in (1, 3):
        table = {
            Key(module, NO_EXPERT, Part.ROUTER): torch.ones(rows, 1 + rows) for module in {k.module for k in experts}
        }
        with pytest.raises(CoterieError, match=f"gate 'mixing': a router of {rows} rows for 2 experts"):
            one_lora(Bank({**experts, **table}, GateSpec("mixing")))


@pytest.mark.parametrize(("gate", "k"), [("signed", 0), ("signed", 2), ("mixing", 0)])
def test_weights_that_no_token_changes_are_one_lora(tmp_path, gate, k):
    """The gates signed and mixing: their weights are in the adapter's B, and what weighs 0 is left out."""
    model = model_of("bert")
    experts = {key: v for e in range(4) for key, v in expert_for(model, 1, e).items()} | expert_for(model, 3, SHARED)
    modules = sorted({key.module for key in experts})
    size = (4, 5 if gate == "mixing" else 1)
    tables = {Key(m, NO_EXPERT, Part.ROUTER): torch.randn(size, generator=stream(2, m)).double() for m in modules}
    spec = GateSpec(gate, {"k": k} if k else {})
    bank = Bank({**experts, **tables, **head_for(model, LABELS)}, spec, scaling=0.3)
    write_bundle(tmp_path, bank, tiny.about())
    expected = ours(model, read_bundle(tmp_path)[0])
    torch.testing.assert_close(through_peft(model, tmp_path / "adapter"), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3 + (k or 4)
