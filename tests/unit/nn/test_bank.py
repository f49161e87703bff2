"""The layer alone, on one Linear or Conv1D: against a loop over experts, its gradients, what it costs and keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import tiny
from coterie.nn.attach import Attached, attach
from coterie.nn.bank import BankLayer
from coterie.nn.gates import gates, routes_by_row
from coterie.nn.products import dropped
from coterie.ops.mixing import sizes_of
from coterie.ops.streams import stream
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, CoterieError, Key, Part, Target

torch.set_num_threads(1)

D_IN, D_OUT = 12, 10
TARGET = Target("0", D_IN, D_OUT)
GATES: dict[str, dict[str, Any]] = {
    "constant": {},
    "softmax": {},
    "top_k": {"k": 2},
    "slot_top_k": {"own": 1},
    "scaled_dot_product": {"k": 2},
    "signed": {},
    "response": {},
    "mixing": {},
}
BY_OUTPUT = ("scaled_dot_product", "response")
RANKS = {"alike": [3, 3, 3], "apart": [1, 4, 2], "one": [2, 2], "cut": [1, 1, 1]}
PAIRS = [
    (gate, ranks)
    for gate in GATES
    for ranks in RANKS
    if not (gate in BY_OUTPUT and ranks == "apart") and (gate != "mixing" or ranks == "cut")
]


def linear(dtype: torch.dtype = torch.float64, kind: type[nn.Module] = nn.Linear, seed: int = 0) -> nn.Sequential:
    module = nn.Linear(D_IN, D_OUT) if kind is nn.Linear else Conv1D(D_OUT, D_IN)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream(seed, name))
    return nn.Sequential(module).to(dtype).requires_grad_(False)


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (2, 5, D_IN), generator=stream(seed, "x"), dtype=torch.float64).to(dtype)


def make_bank(gate: str = "slot_top_k", ranks: list[int] | None = None, shared: int = 0, **more: Any) -> Bank:
    ranks = ranks or [1 if gate == "mixing" else 3] * 3
    more.setdefault("dtype", torch.float64)
    return tiny.bank([TARGET], len(ranks), ranks, gate=gate, options=GATES[gate], shared=shared, **more)


def by_loop(module: nn.Module, bank: Bank, values: dict[Key, Tensor], x: Tensor) -> Tensor:
    """y = W0 x + s sum_e g_e B_e A_e x, one expert at a time, with autograd's own operations alone."""
    rows = x.reshape(-1, x.shape[-1])
    experts = sorted(key.expert for key in values if key.part is Part.A)
    routed = [e for e in experts if e != SHARED]
    g = torch.ones(len(rows), len(routed), dtype=x.dtype)
    if bank.gate.name in ("signed", "response", "mixing"):
        table = values[Key("0", NO_EXPERT, Part.ROUTER)]
        g = table[:, 0].expand(len(rows), -1)
        if bank.gate.name == "response":
            size = torch.stack([(rows @ values[Key("0", e, Part.A)].T).norm(dim=1) for e in routed], 1)
            u = size / size.square().mean(1, keepdim=True).sqrt()
            g = g + table[:, 1] * u + u @ table[:, 3:] @ table[:, 2:3].T
    elif bank.gate.name != "constant":
        p = rows @ values[Key("0", NO_EXPERT, Part.ROUTER)].T
        if bank.gate.name == "scaled_dot_product":
            scores = [((rows @ values[Key("0", e, Part.A)].T) * p).sum(1) / p.shape[1] ** 0.5 for e in routed]
            p = torch.stack(scores, 1)
        serves = [*routed, *[bank.gate.options.get("own", 0)] * (p.shape[1] - len(routed))]
        count = len(routed) if bank.gate.name in ("softmax", "slot_top_k") else 2
        w, picks = p.topk(count, dim=1)
        w = w.softmax(1)
        g = torch.stack(
            [sum(w[:, j] * (torch.tensor(serves)[picks[:, j]] == e) for j in range(count)) for e in routed], 1
        )
    y = module(x).reshape(-1, D_OUT)
    for e in experts:
        weight = 1 if e == SHARED else g[:, routed.index(e), None]
        y = y + bank.scaling * weight * (rows @ values[Key("0", e, Part.A)].T @ values[Key("0", e, Part.B)].T)
        for f in routed if bank.gate.name == "mixing" and e != SHARED else []:
            found = rows @ values[Key("0", f, Part.A)].T * table[routed.index(e), 1 + routed.index(f)] / 10
            y = y + bank.scaling * (found @ values[Key("0", e, Part.B)].T)
    return y.reshape(*x.shape[:-1], D_OUT)


@pytest.mark.parametrize("kept_part", [1, 4, 10])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("gate", "ranks"), PAIRS)
def test_equals_a_loop_over_experts(
    gate: str, ranks: str, shared: int, kind: type[nn.Module], kept_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the backward pass keeps all of A x, three columns of it, or one."""
    monkeypatch.setattr("coterie.nn.bank.KEPT_PART", kept_part)
    bank = make_bank(gate, RANKS[ranks], shared)
    module = linear(kind=kind)
    values = {key: value.clone().requires_grad_() for key, value in bank.tensors.items()}
    x, probe = inputs().requires_grad_(), inputs(2, 5, D_OUT, seed=1)
    wanted = by_loop(module, bank, values, x)
    wanted_grads = torch.autograd.grad((wanted * probe).sum(), [x, *values.values()])

    attached = attach(module, bank, bank.tensors)
    x = x.detach().clone().requires_grad_()
    found = module(x)
    (found * probe).sum().backward()

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, wanted_grads[0], rtol=0, atol=1e-12)
    for key, grad in zip(values, wanted_grads[1:], strict=True):
        torch.testing.assert_close(attached.parameters[key].grad, grad, rtol=0, atol=1e-12)
    assert len(values) == 2 * (len(RANKS[ranks]) + bool(shared)) + (gate != "constant")


def test_every_gate_is_tried_here() -> None:
    assert set(GATES) == {name for name in gates() if not routes_by_row(name)}  # those: test_rows.py


@pytest.mark.parametrize("own_masks", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("gate", "ranks"), [pair for pair in PAIRS if pair[1] != "one"])
def test_gradcheck(gate: str, ranks: str, dropout: float, own_masks: bool) -> None:
    """The parameters share the layer's storage, so that gradcheck moves the layer by moving them."""
    made = make_bank(gate, RANKS[ranks], shared=2, dropout=dropout)
    module, bank = linear(), replace(made, own_masks=own_masks)
    attached = attach(module, bank, bank.tensors)
    attached.now.training = True
    x = inputs(4, D_IN).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *attached.parameters.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gate", GATES)
def test_a_frozen_tensor_changes_nothing_for_the_others(gate: str, dropout: float) -> None:
    bank = make_bank(gate, shared=2, dropout=dropout)
    everything, x_everything = gradients(bank, set(bank.tensors))
    assert everything.keys() == bank.tensors.keys()
    keys = sorted(bank.tensors)
    subsets = [{key} for key in keys] + [{k for k in keys if k.expert in (1, NO_EXPERT)}, set(keys[::2]), set()]
    for subset in subsets:
        found, x_grad = gradients(bank, subset)
        assert found.keys() == subset
        torch.testing.assert_close(x_grad, x_everything, rtol=1e-12, atol=1e-12)
        for key in subset:
            torch.testing.assert_close(found[key], everything[key], rtol=1e-12, atol=1e-12)


def gradients(bank: Bank, trainable: set[Key]) -> tuple[dict[Key, Tensor], Tensor]:
    module, x = linear(), inputs().requires_grad_()
    attached = attach(module, bank, trainable)
    attached.now.training = True
    module(x).square().sum().backward()
    assert attached.parameters.keys() == trainable
    assert x.grad is not None
    return {key: p.grad for key, p in attached.parameters.items() if p.grad is not None}, x.grad


def test_training_moves_the_layer_and_leaves_the_bank_alone() -> None:
    module, bank = linear(torch.float32), make_bank("slot_top_k", dtype=torch.float32)
    before = {key: value.clone() for key, value in bank.tensors.items()}
    own = {key for key in bank.tensors if key.expert in (1, NO_EXPERT)}
    attached, x = attach(module, bank, own), inputs(dtype=torch.float32)
    start = module(x).detach()
    optimiser = torch.optim.AdamW(attached.parameters.values(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in bank.tensors.items())
    trained = attached.tensors()
    assert trained.keys() == own
    assert all(not torch.equal(trained[key], before[key]) and trained[key].is_contiguous() for key in own)
    end = module(x).detach()
    assert not torch.equal(start, end)
    attached.detach()
    attach(module, Bank({**bank.tensors, **trained}, bank.gate, bank.scaling))
    torch.testing.assert_close(module(x), end, rtol=0, atol=0)


@pytest.mark.parametrize("trains_x", [True, False])
def test_a_model_may_write_over_the_output(trains_x: bool) -> None:
    """The layer itself writes over the base's output; what it returns must bear the same from its model."""
    found = []
    for write_over in (False, True):
        module, bank = linear(), make_bank()
        attached = attach(module, bank, bank.tensors)
        x = inputs().requires_grad_(trains_x)
        y = module(x)
        y = y.mul_(2).add_(x[..., :D_OUT]) if write_over else y * 2 + x[..., :D_OUT]
        y.square().sum().backward()
        found.append([p.grad for p in attached.parameters.values()] + [x.grad] * trains_x)
    assert len(found[0]) == len(bank.tensors) + trains_x
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class KeepsItsOutput(nn.Linear):
    """A base whose backward pass needs the output that the layer writes over."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


def test_a_base_that_needs_its_output_raises_and_goes_not_wrong() -> None:
    module = nn.Sequential(KeepsItsOutput(D_IN, D_OUT)).double().requires_grad_(False)
    attach(module, make_bank())
    y = module(inputs().requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# what a forward pass may do -------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts matrix products; refuses what would wait for a device: reading a number, looking for non-zeros, and
    copying a list of numbers to the device."""

    waits = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "lift_fresh",
        "unique",
        "bincount",
    )
    products = ("mm", "addmm", "addmm_", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        assert not any(name == wait or name.startswith(("nonzero", "_unique", "unique")) for wait in self.waits), name
        if name == "index":  # by a mask, it looks for non-zeros
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "index by a mask"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        self.found[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.found[name] for name in self.products)


def test_the_watch_sees_what_it_should() -> None:
    x = torch.randn(3, 3, generator=stream(0, "x"))
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.tensor([1, 2])):
        with pytest.raises(AssertionError), Watch():
            waits()
    with Watch() as watch:
        nn.functional.linear(x, x, x[0]) + x @ x
    assert watch.count == 2


@pytest.mark.parametrize(("gate", "ranks"), [pair for pair in PAIRS if pair[1] != "one"])
def test_two_products_and_no_wait_however_many_experts(gate: str, ranks: str) -> None:
    """Beside the base's one product. In training: the second product of A is for dropout, which the router sees not."""
    counts = set()
    for experts in (2, 4, 16):
        each = (RANKS[ranks] * experts)[:experts]
        module, bank = linear(), make_bank(gate, each, shared=3, dropout=0.1)
        attached = attach(module, bank)
        attached.now.usage, attached.now.mask = {}, torch.ones(2, 5)
        x = inputs()
        module(x)  # the gate makes its constants at the first pass
        with Watch() as watch:
            module(x)
        attached.now.training = True
        with Watch() as in_training:
            module(x)
        counts.add((watch.count - 1, in_training.count - 1, sum(watch.found.values()) - watch.found["clone"]))
    own = {"response": 2, "mixing": 1}.get(gate, 0)  # of U and V^T, or C, among the experts' weights
    assert {two for two, _, _ in counts} == {2 + own}
    assert {three for _, three, _ in counts} == {(2 if gate in ("constant", "signed", "mixing") else 3) + own}
    assert len(counts) == 1  # nor any other operation more (a copy where the rows are padded aside)


def test_only_experts_of_rank_1_are_mixed() -> None:
    with pytest.raises(CoterieError, match="0, gate 'mixing': it can only mix experts of rank 1"):
        attach(linear(), make_bank("mixing", [1, 2, 1]))


def test_a_module_without_experts_to_mix_has_its_shared_expert() -> None:
    module, bank = linear(), make_bank("mixing", shared=2)
    alone = {key: value for key, value in bank.tensors.items() if key.expert == SHARED}
    wanted = by_loop(module, Bank(alone), alone, inputs())
    attach(module, Bank(alone, bank.gate))
    torch.testing.assert_close(module(inputs()), wanted, rtol=0, atol=1e-12)


def test_the_use_of_a_mixed_expert_counts_what_it_gives_to_others() -> None:
    module, bank = linear(), make_bank("mixing", shared=2)
    table = bank.tensors[Key("0", NO_EXPERT, Part.ROUTER)]
    attached = attach(module, bank)
    attached.now.usage = {}
    module(inputs())
    (usage,) = attached.now.usage.values()
    torch.testing.assert_close(usage[0] / 10, torch.cat([torch.ones(1).double(), sizes_of(table)]))


def test_two_products_for_one_expert() -> None:
    module = linear()
    attach(module, make_bank("constant", [4]))
    with Watch() as watch:
        module(inputs())
    assert watch.count == 3


@pytest.mark.parametrize("trains", ["own and router", "everything"])
def test_backward_does_not_grow_with_the_experts_either(trains: str) -> None:
    counts = []
    for experts in (3, 16):
        module, bank = linear(), make_bank("slot_top_k", [4] * experts)
        attach(module, bank, {k for k in bank.tensors if trains == "everything" or k.expert in (1, NO_EXPERT)})
        x = inputs().requires_grad_()
        module(x).sum().backward()
        y = module(x).sum()
        with Watch() as watch:
            y.backward()
        counts.append(watch.count)
    assert counts[0] == counts[1] <= 7


@contextmanager
def kept(parameters: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("experts", "rank"), [(1, 4), (4, 8), (8, 8), (16, 4), (16, 8)])
def test_activations_kept_are_within_15_percent_of_one_plain_lora(
    experts: int, rank: int, dropout: float, strided: bool
) -> None:
    d, tokens = 768, 64
    x = torch.randn(*((d, tokens) if strided else (tokens, d)), generator=stream(0, "x")).requires_grad_()
    x = x.T if strided else x
    a, b, base = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False), nn.Linear(d, d).requires_grad_(False)
    with kept([a.weight, b.weight, base.weight, base.bias]) as plain:
        y_plain = base(x) + 2.0 * b(a(nn.functional.dropout(x, dropout)))
    module = nn.Sequential(base)
    bank = tiny.bank([Target("0", d, d)], experts, rank, gate="slot_top_k", options={"own": 0}, dropout=dropout)
    attached = attach(module, bank, {k for k in bank.tensors if k.expert in (0, NO_EXPERT)})
    attached.now.training = True
    y = module(x)  # the layer's constants exist from here on
    frozen = [layer_tensor for hook in module[0]._forward_hooks.values() for layer_tensor in (hook.rows, hook.columns)]
    with kept([base.weight, base.bias, *frozen]) as ours:
        y = module(x)
    assert y.requires_grad
    assert y_plain.requires_grad
    assert sum(ours.values()) <= 1.15 * sum(plain.values())


# dropout --------------------------------------------------------------------------------------------------------------


def in_training(seed: int, dropout: float = 0.5, gate: str = "slot_top_k", rows: int = 6, name: str = "0") -> Tensor:
    module, first = nn.ModuleDict({name: linear()[0]}), make_bank(gate)
    tensors = {key._replace(module=name): value for key, value in first.tensors.items()}
    bank = Bank(tensors, first.gate, first.scaling, dropout)
    attached = attach(module, bank)
    attached.now.training, attached.now.seed = True, seed
    return module[name](inputs(1, D_IN).expand(rows, D_IN))


def test_dropout_is_a_function_of_the_seed_and_the_module() -> None:
    assert torch.equal(in_training(3), in_training(3))
    assert not torch.equal(in_training(3), in_training(4))
    assert not torch.equal(in_training(3), in_training(3, name="other"))


def test_dropout_leaves_the_global_stream_alone() -> None:
    module = linear()
    attach(module, make_bank(dropout=0.5)).now.training = True
    state = torch.random.get_rng_state()
    module(inputs())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_only_in_training_and_only_if_asked() -> None:
    module = linear()
    attached = attach(module, make_bank(dropout=0.5))
    without = module(inputs())
    attached.now.training = True
    assert not torch.equal(module(inputs()), without)
    attached.detach()
    attach(module, make_bank(dropout=0.0)).now.training = True
    assert torch.equal(module(inputs()), without)


@pytest.mark.parametrize("own_masks", [False, True])
def test_a_folded_expert_is_as_if_it_were_added_to_the_base(own_masks: bool) -> None:
    """It sees no dropout: outputs and gradients are those of a base with other weights, in training too."""
    lora = replace(make_bank("constant", [3], dropout=0.4), own_masks=own_masks)
    extra = {key._replace(expert=FOLDED): value for key, value in make_bank("constant", [4], seed=1).tensors.items()}
    a, b = (extra[Key("0", FOLDED, part)] for part in (Part.A, Part.B))
    other, module, made = linear(), linear(), []
    other[0].weight.data += lora.scaling * b @ a
    for base, bank in ((module, replace(lora, tensors={**lora.tensors, **extra})), (other, lora)):
        attached = attach(base, bank, lora.tensors)
        attached.now.training, attached.now.seed = True, 7
        x = inputs().requires_grad_()
        (base(x) ** 2).sum().backward()
        made.append([base(x).detach(), x.grad, *(p.grad for p in attached.parameters.values())])
    assert len(made[0]) == len(made[1]) == 4
    torch.testing.assert_close(made[0], made[1])


def test_a_folded_expert_goes_with_the_gate_constant_alone() -> None:
    bank = make_bank("softmax")
    extra = {key._replace(expert=FOLDED): value for key, value in make_bank("constant", [4]).tensors.items()}
    with pytest.raises(CoterieError, match="a bank with a folded expert has the gate 'constant'"):
        attach(linear(), replace(bank, tensors={**bank.tensors, **extra}))


def test_dropout_is_unbiased() -> None:
    """The mean over 40,000 rows of the same input, each with its own mask, is the row without dropout."""
    wanted = in_training(0, dropout=0.0, rows=1)[0]
    rows = in_training(0, dropout=0.25, rows=40_000)
    error = rows.std(0) / 40_000**0.5
    assert bool((error > 0).all())
    assert float(((rows.mean(0) - wanted) / error).abs().max()) < 4.5
    assert len(rows.unique(dim=0)) > 1_000


@pytest.mark.parametrize(("dropout", "share"), [(0.05, 0.05), (0.9, 0.9), (1e-7, 0.0), (1 - 1e-7, 1 - 2**-16)])
def test_dropout_drops_the_share_that_was_asked_for(dropout: float, share: float) -> None:
    """In every place of the draws that four numbers share, to the 1/65536 that a draw can tell apart."""
    module = linear()
    attach(module, make_bank(dropout=dropout))
    (layer,) = module[0]._forward_hooks.values()
    dropped = ~layer._keep(torch.empty(10_001, 37))
    assert dropped.shape == (10_001, 37)
    places = dropped.flatten()[: 92_500 * 4].view(-1, 4).double()
    assert places.mean(0) == pytest.approx([share] * 4, abs=5 * (share * (1 - share) / 92_500) ** 0.5 + 1e-5)
    both = (places[:, :1] * places[:, 1:]).mean(0)
    assert both == pytest.approx([share**2] * 3, abs=5 * share / 92_500**0.5 + 1e-4)


def test_the_router_does_not_see_dropout() -> None:
    usage = []
    for training in (False, True):
        module = linear()
        attached = attach(module, make_bank(dropout=0.5))
        attached.now.training, attached.now.usage = training, {}
        module(inputs())
        usage.append(attached.now.usage["0"])
    torch.testing.assert_close(*usage)


# statistics -----------------------------------------------------------------------------------------------------------


def test_usage_leaves_padding_out_and_adds_up_over_passes() -> None:
    module = linear()
    attached = attach(module, make_bank())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    x, seen = inputs(), []
    for fill in (0.0, 100.0):
        attached.now.usage, attached.now.mask = {}, mask
        module(x.masked_fill(mask.unsqueeze(-1) == 0, fill))
        seen.append(attached.now.usage["0"])
    assert torch.equal(*seen)
    weight, tokens = seen[0]
    torch.testing.assert_close(weight.sum(), torch.tensor(7.0, dtype=torch.float64))
    assert tokens[1] == 7  # the client's own expert serves every token
    assert bool((tokens <= 7).all())
    module(x)
    assert torch.allclose(attached.now.usage["0"].sum(1)[0], torch.tensor(14.0, dtype=torch.float64))


def test_usage_counts_the_shared_expert_as_always_on() -> None:
    module = linear()
    attached = attach(module, make_bank("top_k", shared=2))
    attached.now.usage = {}
    module(inputs())
    assert attached.now.usage["0"][:, 0].tolist() == [10, 10]
    assert attached.now.usage["0"].shape == (2, 4)
    assert float(attached.now.usage["0"][1, 1:].sum()) == 20  # two picks a token


def test_a_constant_gate_has_no_usage() -> None:
    module = linear()
    attached = attach(module, make_bank("constant"))
    attached.now.usage = {}
    module(inputs())
    assert attached.now.usage == {}


# inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D_IN,), (3, D_IN), (2, 3, 4, D_IN), (0, D_IN), (2, 0, D_IN)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    module, bank = linear(), make_bank()
    x = inputs(*shape)
    wanted = by_loop(module, bank, dict(bank.tensors), x)
    attach(module, bank)
    torch.testing.assert_close(module(x), wanted)


def test_input_given_by_name_and_a_strided_input() -> None:
    module, bank = linear(), make_bank()
    x = inputs(5, 2, D_IN).transpose(0, 1)
    wanted = by_loop(module, bank, dict(bank.tensors), x)
    attach(module, bank)
    torch.testing.assert_close(module[0](input=x), wanted)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_base_and_float32_bank(gate: str) -> None:
    bank = make_bank(gate, shared=2, dtype=torch.float32)
    low, high = linear(torch.bfloat16), linear(torch.float32)
    attached, exact = (attach(module, bank, bank.tensors) for module in (low, high))
    x = inputs(64, D_IN, dtype=torch.bfloat16)
    y, wanted = low(x), high(x.float())
    assert y.dtype == torch.bfloat16
    assert float(((y.float() - wanted).norm() / wanted.norm()).detach()) < 0.03
    y.float().square().mean().backward()
    wanted.square().mean().backward()
    for key, parameter in attached.parameters.items():
        grad, true = parameter.grad, exact.parameters[key].grad
        assert parameter.dtype == grad.dtype == torch.float32
        assert float((grad - true).norm() / true.norm()) < 0.1


def test_autocast() -> None:
    bank = make_bank(dtype=torch.float32)
    module = linear(torch.float32)
    wanted = module(inputs(dtype=torch.float32))
    attached = attach(module, bank, bank.tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(inputs(dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attached.parameters.values())
    attached.detach()
    assert torch.equal(module(inputs(dtype=torch.float32)), wanted)


def test_inference_mode_then_training() -> None:
    module, bank = linear(), make_bank("slot_top_k", [2] * 5)
    attached: Attached = attach(module, bank, bank.tensors)
    with torch.inference_mode():
        module(inputs())
    module(inputs()).sum().backward()
    assert all(p.grad is not None for p in attached.parameters.values())


# few of many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["one", "active"])
def test_a_sum_over_the_active_experts_alone_is_the_sum_over_all(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.model("bert")
    over = tiny.targets(made)
    bank = tiny.bank(over, experts=40, rank=1, gate="top_k", options={"k": 2, "scale": scale})
    routers = [key for key in bank.tensors if key.part is Part.ROUTER]

    def run() -> tuple[Tensor, dict[Key, Tensor]]:
        attached = attach(made, bank, routers)
        out = made(**tiny.batch()).logits
        out.square().sum().backward()
        attached.detach()
        return out.detach(), {key: p.grad for key, p in attached.parameters.items() if p.grad is not None}

    calls: list[int] = []
    original = BankLayer._add_active
    monkeypatch.setattr(BankLayer, "_add_active", lambda *args: calls.append(1) or original(*args))
    out, grads = run()
    assert calls == []
    monkeypatch.setattr("coterie.nn.bank.SPARSE_FROM", 40)
    few, few_grads = run()
    assert len(calls) == len(over)
    assert grads.keys() == few_grads.keys() == set(routers)
    torch.testing.assert_close(few, out)
    for key in routers:
        torch.testing.assert_close(few_grads[key], grads[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_dropout_takes_is_zero_whatever_it_was(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.5, -2.0, float("inf"), float("nan")], [-0.0, 3.0, -float("inf"), 4.0]], dtype=dtype)
    keep = torch.tensor([[True, False, False, False], [False, True, False, True]])
    expected = torch.tensor([[1.5, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 4.0]], dtype=dtype)
    assert torch.equal(dropped(x, keep), expected)
    assert torch.equal(dropped(x.T, keep.T), expected.T)  # a view with other strides
