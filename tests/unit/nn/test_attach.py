"""A bank on whole models: it changes what it should, nothing else, and leaves without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import tiny
from coterie.nn.attach import Attached, attach, attached, attached_layers
from coterie.nn.attach_many import attached_many
from coterie.nn.build import build_layers
from coterie.nn.spec import describe, linear_sizes
from coterie.types import NO_EXPERT, SHARED, Bank, CoterieError, GateSpec, Key, Part

torch.set_num_threads(1)

MODELS = [(arch, "classification") for arch in tiny.ARCHITECTURES] + [(arch, "generation") for arch in tiny.DECODERS]
each_model = pytest.mark.parametrize(("arch", "kind"), MODELS)


def fedlease(made: nn.Module, **more: Any) -> Bank:
    return tiny.bank(tiny.targets(made), 3, gate="slot_top_k", options={"own": 1}, **more)


def own(bank: Bank) -> set[Key]:
    return {key for key in bank.tensors if key.expert in (1, NO_EXPERT)}


def logits(made: Any, **inputs: Any) -> Tensor:
    return made(**(inputs or tiny.batch())).logits.detach().clone()


def frozen(made: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def hooks(made: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in made.modules())


def test_the_five_architectures_are_covered() -> None:
    assert {arch for arch, _ in MODELS} == {"bert", "roberta", "llama", "qwen2", "gpt2"}
    assert len(MODELS) == 8


@each_model
def test_zero_b_changes_no_bit_and_nonzero_b_does_and_detach_restores(arch: str, kind: str) -> None:
    made = tiny.model(arch, kind)
    before, start, hooked = logits(made), frozen(made), hooks(made)
    with attached(made, fedlease(made, zero_b=True, shared=2)):
        assert hooks(made) == hooked + len(tiny.targets(made))
        assert torch.equal(logits(made), before)
    with attached(made, fedlease(made, shared=2)):
        assert not torch.allclose(logits(made), before, atol=1e-3)
    assert torch.equal(logits(made), before)
    assert hooks(made) == hooked
    assert same(frozen(made), start)


@each_model
def test_training_leaves_every_base_parameter_bit_identical(arch: str, kind: str) -> None:
    made = tiny.model(arch, kind)
    before, start = logits(made), frozen(made)
    bank = fedlease(made, dropout=0.1)
    bank = Bank({**bank.tensors, **tiny.head(made, 5)}, bank.gate, bank.scaling, bank.dropout)
    handle = attach(made, bank, own(bank))
    assert handle.parameters.keys() == own(bank)
    assert list(handle.parameters) == sorted(handle.parameters)
    losses = [train_step(made, handle, seed) for seed in range(6)]
    assert losses[-1] < losses[0]
    trained = handle.tensors()
    assert all(not torch.equal(trained[key], bank.tensors[key]) for key in own(bank))
    after = logits(made)
    assert after.shape[-1] == (5 if kind == "classification" else tiny.VOCABULARY)
    handle.detach()
    assert same(frozen(made), start)
    assert torch.equal(logits(made), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in made.parameters())
    with attached(made, Bank({**bank.tensors, **trained}, bank.gate, bank.scaling)):
        torch.testing.assert_close(logits(made), after, rtol=0, atol=0)


def train_step(made: Any, handle: Attached, seed: int) -> float:
    """One AdamW step towards the label 1 (or the next token), and the loss before it."""
    handle.now.training, handle.now.seed = True, seed
    optimiser = torch.optim.AdamW(handle.parameters.values(), lr=0.02)
    loss = loss_of(made)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    handle.now.training = False
    return float(loss.detach())


def loss_of(made: Any) -> Tensor:
    inputs = tiny.batch()
    found = made(**inputs).logits.float()
    if found.ndim == 2:
        return nn.functional.cross_entropy(found, torch.ones(len(found), dtype=torch.long))
    wanted = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), wanted.flatten())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 prefers another name for the same call
@each_model
def test_gradient_checkpointing_gives_the_same_gradients(arch: str, kind: str) -> None:
    """With dropout, whose mask a recomputed block must draw again."""
    found = []
    for checkpointing in (False, True):
        made = tiny.model(arch, kind)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        made.config.attention_probs_dropout_prob = made.config.attention_dropout = 0.0
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
            made.train()
        bank = fedlease(made, dropout=0.3)
        with attached(made, bank, own(bank)) as handle:
            handle.now.training, handle.now.seed = True, 11
            passes = count_passes(made)
            loss_of(made).backward()
            found.append({key: p.grad for key, p in handle.parameters.items()})
            assert passes[0] == (2 if checkpointing else 1)
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-5, atol=1e-7)
        assert bool(grad.any()), key


def count_passes(made: nn.Module) -> list[int]:
    """How often the first target ran: twice where its block was computed again."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    made.get_submodule(tiny.targets(made)[0].name).register_forward_hook(count)
    return passes


@pytest.mark.parametrize("arch", tiny.DECODERS)
def test_generation_with_a_cache_equals_generation_without(arch: str) -> None:
    made = tiny.model(arch, "generation")
    inputs = tiny.batch(left=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    base = made.generate(**inputs, **options)
    with attached(made, fedlease(made)):
        cached, plain = (made.generate(**inputs, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert not torch.equal(cached.sequences, base.sequences)


@each_model
def test_bfloat16_base(arch: str, kind: str) -> None:
    """The bank and the head stay in float32, train there, and come back in it."""
    made, exact = tiny.model(arch, kind).to(torch.bfloat16), tiny.model(arch, kind)
    zero = fedlease(made, zero_b=True)
    before = logits(made)
    with attached(made, zero):
        assert torch.equal(logits(made), before)
    bank = fedlease(made)
    bank = Bank({**bank.tensors, **tiny.head(made, 3)}, bank.gate, bank.scaling)
    with attached(made, bank, own(bank)) as handle, attached(exact, bank, own(bank)) as true:
        for one in (made, exact):
            loss_of(one).backward()
        for parameter in handle.parameters.values():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        ours, theirs = (
            torch.cat([p.grad.flatten() for k, p in h.parameters.items() if k.part is not Part.HEAD])
            for h in (handle, true)
        )
        assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.95
    assert all(p.dtype == torch.bfloat16 for p in made.parameters())


@each_model
def test_autocast_bfloat16(arch: str, kind: str) -> None:
    made = tiny.model(arch, kind)
    bank = fedlease(made, dropout=0.1)
    bank = Bank({**bank.tensors, **tiny.head(made, 3)}, bank.gate, bank.scaling, bank.dropout)
    exact = {}
    for low in (False, True):
        with attached(made, bank, own(bank)) as handle:
            handle.now.training = True
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = loss_of(made)
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in handle.parameters.values()])
            assert all(p.grad.dtype == torch.float32 for p in handle.parameters.values())
            exact[low] = grads
    assert float(torch.cosine_similarity(exact[False], exact[True], dim=0)) > 0.9


def test_modules_without_an_expert_stay_as_they_are() -> None:
    made = tiny.model("bert")
    target = tiny.targets(made)[-1]
    with attached(made, tiny.bank([target])) as handle:
        assert len(handle.handles) == 1


# the head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("labels", [2, 3, 9])
def test_a_head_of_the_clients_own_number_of_labels(arch: str, labels: int) -> None:
    made = tiny.model(arch, labels=3)
    (name,) = {parameter.name.split(".")[0] for parameter in describe(made).head}
    before, module = logits(made), made.get_submodule(name)
    head = tiny.head(made, labels)
    with attached(made, Bank(head), head) as handle:
        assert logits(made).shape == (3, labels)
        assert handle.parameters.keys() == head.keys()
        assert all(torch.equal(value, head[key]) for key, value in handle.tensors().items())
    assert made.get_submodule(name) is module
    assert torch.equal(logits(made), before)


def test_a_frozen_head_gets_no_gradient() -> None:
    made = tiny.model("roberta")
    bank = Bank({**fedlease(made).tensors, **tiny.head(made, 4)}, GateSpec("slot_top_k", {"own": 0}))
    lora = {key for key in bank.tensors if key.part is not Part.HEAD}
    with attached(made, bank, lora) as handle:
        loss_of(made).backward()
        assert handle.parameters.keys() == lora
        assert all(p.grad is None for p in made.classifier.parameters())


def test_a_head_of_two_modules() -> None:
    """DistilBERT has a layer before its classifier that base checkpoints have not: it belongs to the head."""
    config = DistilBertConfig(vocab_size=300, dim=32, n_layers=1, n_heads=4, hidden_dim=32, num_labels=3)
    made = DistilBertForSequenceClassification(config).eval().requires_grad_(False)
    before = logits(made)
    spec = describe(made, ("q_lin", "v_lin"))
    assert [(p.name, p.shape) for p in spec.head] == [
        ("pre_classifier.weight", (32, 32)),
        ("pre_classifier.bias", (32,)),
        ("classifier.weight", (-1, 32)),
        ("classifier.bias", (-1,)),
    ]
    head = tiny.head(made, 5, over=("q_lin",))
    with attached(made, Bank(head), head) as handle:
        assert logits(made).shape == (3, 5)
        loss_of(made).backward()
        assert all(p.grad is not None for p in handle.parameters.values())
    assert torch.equal(logits(made), before)


# bad input ------------------------------------------------------------------------------------------------------------


def faults() -> dict[str, tuple[Any, str]]:
    """By name: a function from a good bank and its model to (bad bank, trainable keys), and what the error says."""
    query, weight = "bert.encoder.layer.0.attention.self.query", "classifier.weight:-:head"

    def lora(module: str) -> dict[str, Tensor]:
        return {f"{module}:0:A": torch.ones(4, 32), f"{module}:0:B": torch.ones(32, 4)}

    def change(**tensors: Tensor | None):
        def make(bank: Bank) -> tuple[Bank, set[Key]]:
            values = dict(bank.tensors)
            for text, value in tensors.items():
                key = Key.parse(f"{query}:{text[1:]}".replace("_", ":")) if text.startswith("q") else Key.parse(text)
                if value is None:
                    del values[key]
                else:
                    values[key] = value
            return Bank(values, bank.gate, bank.scaling), set()

        return make

    def gate(name: str, **options: Any):
        return lambda bank: (Bank(bank.tensors, GateSpec(name, options), bank.scaling), set())

    return {
        "unknown module": (change(**lora("bert.nothing")), "'bert.nothing', which the model does not have"),
        "no Linear": (change(**lora("bert.embeddings")), "'bert.embeddings', which is not a Linear"),
        "A of another width": (change(q0_A=torch.ones(4, 31)), r"Linear of 32 to 32; the bank has .*:0:A \[4, 31\]"),
        "A of one axis": (change(q0_A=torch.ones(32)), r"the bank has"),
        "B of another width": (change(q0_B=torch.ones(33, 4)), r":0:B \[33, 4\]"),
        "B of another rank": (change(q2_B=torch.ones(32, 5)), r":2:B \[32, 5\]"),
        "router of another width": (change(**{"q-_router": torch.ones(5, 8)}), r"router \[5, 8\]"),
        "router for other experts": (change(**{"q-_router": torch.ones(3, 32)}), "3 outputs does not fit 3 experts"),
        "router of even size": (change(**{"q-_router": torch.ones(6, 32)}), "6 slots"),
        "no router": (change(**{"q-_router": None}), "needs a router"),
        "A without B": (change(q1_B=None), r"no .*query:1:B"),
        "B without A": (change(q1_A=None), r"query:1:B, but no matching A"),
        "router alone": (change(**{"bert.x:-:router": torch.ones(5, 32)}), r"bert.x:-:router, but no matching A"),
        "unknown gate": (gate("slot_topk"), "unknown gate 'slot_topk'; the gates are constant, mixing, response"),
        "unknown option": (gate("slot_top_k", own=1, k=2), "query.*'k'"),
        "missing option": (gate("slot_top_k"), "'own'"),
        "own expert that is none": (gate("slot_top_k", own=3), "own = 3"),
        "softmax over slots": (gate("softmax"), "5 outputs does not fit 3 experts"),
        "dropout of 1": (lambda bank: (Bank(bank.tensors, bank.gate, dropout=1.0), set()), "dropout is 1.0"),
        "unknown trainable key": (lambda bank: (bank, {Key("bert.x", 0, Part.A)}), "cannot train bert.x:0:A"),
        "trainable expert that is none": (lambda bank: (bank, {Key(query, 7, Part.A)}), "query:7:A"),
        "trainable shared expert that is none": (lambda bank: (bank, {Key(query, SHARED, Part.B)}), "query:shared:B"),
        "unknown head": (change(**{"score.weight:-:head": torch.ones(2, 32)}), "'score'"),
        "unknown head parameter": (change(**{"classifier.scale:-:head": torch.ones(2)}), "classifier.scale"),
        "head of another width": (change(**{weight: torch.ones(2, 31)}), r"\[3, 32\]; the bank has \[2, 31\]"),
        "head with one size forgotten": (change(**{weight: torch.ones(2, 32)}), "2 labels by weight, 3 by bias"),
    }  # fmt: skip


@pytest.mark.parametrize("fault", faults())
def test_bad_input_is_refused_and_leaves_the_model_untouched(fault: str) -> None:
    made = tiny.model("bert")
    start, before, hooked = frozen(made), logits(made), hooks(made)
    modules = dict(made.named_modules())
    make, says = faults()[fault]
    bank, trainable = make(fedlease(made))
    with pytest.raises(CoterieError, match=says) as caught:
        attach(made, bank, trainable)
    assert len(str(caught.value).splitlines()) == 1
    assert hooks(made) == hooked
    assert dict(made.named_modules()) == modules
    assert same(frozen(made), start)
    assert torch.equal(logits(made), before)


def test_a_head_whose_inner_layer_is_resized_is_refused() -> None:
    made = tiny.model("roberta")
    head = {**tiny.head(made, 4), Key("classifier.dense.weight", NO_EXPERT, Part.HEAD): torch.ones(16, 32)}
    with pytest.raises(CoterieError, match=r"classifier\.dense\.weight"):
        attach(made, Bank(head))


def test_an_exception_inside_a_with_block_detaches() -> None:
    made = tiny.model("gpt2")
    before = logits(made)
    with pytest.raises(RuntimeError, match="stop"), attached(made, fedlease(made)):
        raise RuntimeError("stop")
    assert torch.equal(logits(made), before)


def test_linear_sizes() -> None:
    made = tiny.model("gpt2")
    assert linear_sizes(made.get_submodule("transformer.h.0.attn.c_attn")) == (32, 96)
    assert linear_sizes(nn.Linear(3, 4)) == (3, 4)
    assert linear_sizes(nn.LayerNorm(3)) is None
    assert linear_sizes(nn.Embedding(3, 4)) is None


# a second bank -------------------------------------------------------------------------------------------------------


def test_a_second_bank_on_one_model_is_refused_and_the_first_one_stays() -> None:
    made = tiny.model("bert")
    first, second = fedlease(made), fedlease(made)
    before = logits(made)
    handle = attach(made, first)
    expected = logits(made)
    with pytest.raises(CoterieError, match="carries a bank already"):
        attach(made, second)
    with pytest.raises(CoterieError, match="carries a bank already"), attached(made, second):
        pass
    with (
        pytest.raises(CoterieError, match="carries a bank already"),
        attached_many(made, [build_layers(made, second), build_layers(made, second)]),
    ):
        pass
    assert torch.equal(logits(made), expected)
    handle.detach()
    handle.detach()  # again changes nothing
    assert torch.equal(logits(made), before)
    with attached(made, second):
        handle.detach()  # nor does it take off another's bank
        with pytest.raises(CoterieError, match="carries a bank already"):
            attach(made, first)
    assert torch.equal(logits(made), before)


def test_a_bank_that_does_not_fit_leaves_the_model_free() -> None:
    made = tiny.model("bert")
    with pytest.raises(CoterieError):
        attach(made, Bank({Key("nowhere", 0, Part.A): torch.zeros(1, 4), Key("nowhere", 0, Part.B): torch.zeros(4, 1)}))
    attach(made, Bank({})).detach()
    with attached(made, fedlease(made)) as handle:
        assert handle.on
    assert not handle.on


@pytest.mark.parametrize("many", [False, True])
def test_a_failure_half_way_leaves_the_model_as_it_was(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.model("bert")
    before, hooked = logits(made), hooks(made)
    head = {Key("classifier.weight", NO_EXPERT, Part.HEAD): torch.zeros(2, 32)}
    head |= {Key("classifier.bias", NO_EXPERT, Part.HEAD): torch.zeros(2)}
    banks = [build_layers(made, Bank({**fedlease(made).tensors, **head}, gate=fedlease(made).gate)) for _ in range(2)]

    def fail(name: str, module: nn.Module) -> None:
        raise AttributeError(name)

    with monkeypatch.context() as patched:
        patched.setattr(made, "set_submodule", fail)
        with (
            pytest.raises(AttributeError, match="classifier"),
            attached_many(made, banks) if many else attached_layers(made, banks[0]),
        ):
            pass
    assert hooks(made) == hooked
    assert torch.equal(logits(made), before)
    with attached_many(made, banks) if many else attached_layers(made, banks[0]):
        assert hooks(made) > hooked
