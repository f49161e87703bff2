"""Builds the layers of a bank for a model: checks that the bank fits, and lays its matrices out for the products."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.nn.bank import BankLayer, Pass
from coterie.nn.gates import gate_named, mixes, routes_by_expert
from coterie.nn.placement import device_of, hooks_of, without_hooks
from coterie.nn.products import Ranks, Span, padded
from coterie.nn.spec import linear_sizes
from coterie.ops.mixing import check_ranks
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, CoterieError, Key, Part, Tensors


@dataclass(frozen=True)
class BankLayers:
    """A bank's layers for a model, not on it yet: one layer per module, the heads, the trainable tensors."""

    layers: dict[str, BankLayer]
    heads: dict[str, nn.Module]
    parameters: dict[Key, nn.Parameter]
    now: Pass

    def tensors(self) -> dict[Key, Tensor]:
        """Copies of the trainable tensors as they are now, on the CPU."""
        return copies(self.parameters)


def build_layers(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> BankLayers:
    """The layers of ``bank`` for ``model``, which does not change; gradients reach the tensors in ``trainable``.

    Raises :class:`CoterieError` for a module that the model does not have, a shape that does not fit the module or the
    gate, an unknown gate or option, and a trainable key that the bank does not have.
    """
    wanted = frozenset(trainable)
    if unknown := wanted - bank.tensors.keys():
        raise CoterieError(f"cannot train {', '.join(sorted(map(str, unknown)))}: the bank has no such tensor")
    gate_named(bank.gate.name)  # raises for an unknown gate
    if not 0 <= bank.dropout < 1:
        raise CoterieError(f"dropout is {bank.dropout}; it must be at least 0 and less than 1")
    now = Pass()
    layers = {name: _layer(model, bank, name, wanted, now) for name in _modules(bank.tensors)}
    by_number = _heads(model, bank.tensors, wanted)
    heads = {name: _switch(modules, now) for name, modules in by_number.items()}
    parameters = {key: _parameter(by_number, key) for key in wanted if key.part is Part.HEAD}
    for name, layer in layers.items():
        parameters |= layer.parameters
        if layer.table is not None and layer.table.requires_grad:
            parameters[Key(name, NO_EXPERT, Part.ROUTER)] = layer.table
    return BankLayers(layers, heads, dict(sorted(parameters.items())), now)


def copies(parameters: Mapping[Key, nn.Parameter]) -> dict[Key, Tensor]:
    """The parameters' values as they are now, on the CPU."""
    return {key: p.detach().to("cpu", copy=True).contiguous() for key, p in parameters.items()}


def _modules(tensors: Tensors) -> list[str]:
    """The modules that the bank adapts. Raises :class:`CoterieError` for a B or a router without an A beside it."""
    adapted = {key.module for key in tensors if key.part is Part.A}
    lone = [key for key in tensors if key.part is Part.B and key._replace(part=Part.A) not in tensors]
    lone += [key for key in tensors if key.part is Part.ROUTER and key.module not in adapted]
    if lone:
        raise CoterieError(f"the bank has {', '.join(sorted(map(str, lone)))}, but no matching A")
    return sorted(adapted)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as fault:
        raise CoterieError(
            f"the bank adapts {name!r}, which the model does not have; was it made for this base?"
        ) from fault


def _layer(model: nn.Module, bank: Bank, name: str, trainable: frozenset[Key], now: Pass) -> BankLayer:
    module = _module(model, name)
    experts = sorted({key.expert for key in bank.tensors if key.module == name and key.part is Part.A})
    a_keys, b_keys = ([Key(name, e, part) for e in experts] for part in (Part.A, Part.B))
    router = Key(name, NO_EXPERT, Part.ROUTER)
    table = bank.tensors.get(router) if routes_by_expert(bank.gate.name) else None
    row_keys = [*a_keys, *([router] if router in bank.tensors and table is None else [])]
    _check_shapes(bank.tensors, a_keys, b_keys, row_keys, linear_sizes(module), name)
    device = device_of(module)
    layer = BankLayer(
        module=name,
        rows=_stack([bank.tensors[key].detach() for key in row_keys]).to(device),
        columns=torch.cat([bank.tensors[key].detach().T for key in b_keys]).to(device).contiguous(),
        experts=tuple(experts),
        ranks=Ranks.of(tuple(bank.tensors[key].shape[0] for key in a_keys), device),
        slots=bank.tensors[router].shape[0] if router in row_keys else 0,
        gate=bank.gate.name,
        options=bank.gate.options_for(name),
        scaling=bank.scaling,
        dropout=bank.dropout,
        own_masks=bank.own_masks,
        now=now,
        table=None if table is None else _table(table, router in trainable, device, len(experts) - (SHARED in experts)),
    )
    _check_gate(layer)
    layer.row_spans = _share(layer, row_keys, bank.tensors, trainable)
    layer.column_spans = _share(layer, b_keys, bank.tensors, trainable)
    return layer


def _table(router: Tensor, trains: bool, device: torch.device, experts: int) -> nn.Parameter:
    if router.ndim != 2 or len(router) != experts:
        raise CoterieError(f"a router of {list(router.shape)} does not have a row for each of {experts} experts")
    return nn.Parameter(router.detach().to(device, copy=True), requires_grad=trains)


def _stack(matrices: list[Tensor]) -> Tensor:
    """A copy of the matrices under each other, with rows of zeros up to a :func:`padded` number."""
    count = sum(len(matrix) for matrix in matrices)
    return torch.cat([*matrices, matrices[0].new_zeros(padded(count) - count, matrices[0].shape[1])])


def _share(layer: BankLayer, keys: list[Key], tensors: Tensors, trainable: frozenset[Key]) -> list[Span]:
    """Make Parameters of the trainable keys: views of the layer's storage, whose rows hold ``keys`` in order."""
    start, spans = 0, []
    for key in keys:
        of_b = key.part is Part.B
        stop = start + tensors[key].shape[1 if of_b else 0]
        if key in trainable:
            layer.parameters[key] = nn.Parameter(layer.columns[start:stop].T if of_b else layer.rows[start:stop])
            spans.append((start, stop))
        start = stop
    return spans


def _check_shapes(
    tensors: Tensors, a: list[Key], b: list[Key], rows: list[Key], sizes: tuple[int, int] | None, name: str
) -> None:
    if sizes is None:
        raise CoterieError(f"the bank adapts {name!r}, which is not a Linear")
    if missing := [str(key) for key in b if key not in tensors]:
        raise CoterieError(f"the bank has no {', '.join(missing)}")
    d_in, d_out = sizes
    wrong = [key for key in rows if tensors[key].ndim != 2 or tensors[key].shape[1] != d_in]
    wrong += [key for i, key in enumerate(b) if tensors[key].shape != (d_out, tensors[a[i]].shape[0])]
    if wrong:
        shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in wrong)
        raise CoterieError(f"{name} is a Linear of {d_in} to {d_out}; the bank has {shapes}")


def _check_gate(layer: BankLayer) -> None:
    """Try the gate on one row of zeros, to find unknown options and routers of the wrong size before any pass."""
    p = torch.zeros(1, layer.slots) if layer.slots else None
    routed = torch.zeros(1, layer.columns.shape[0] - layer.shared_rank)
    where = f"{layer.module}, gate {layer.gate!r}"
    if FOLDED in layer.experts and layer.gate != "constant":
        raise CoterieError(f"{where}: a bank with a folded expert has the gate 'constant'")
    try:
        if mixes(layer.gate):
            check_ranks(layer.ranks.each[int(layer.has_shared) :])
        inspect.signature(gate_named(layer.gate)).bind(p, None, **layer.options)
        g = layer.weights(p, routed)
    except (TypeError, ValueError) as fault:
        raise CoterieError(f"{where}: {fault}") from fault
    if g is not None and g.shape[1] != len(layer.ranks.each):
        number = len(layer.ranks.each) - layer.has_shared
        raise CoterieError(f"{where}: a router of {layer.slots} outputs does not fit {number} experts")


def _split(key: Key) -> tuple[str, str]:
    """The head's module and the parameter's name in it: ``("classifier", "dense.weight")``."""
    name, _, leaf = key.module.partition(".")
    return name, leaf


class Switch(nn.Module):
    """Several heads in place of one; ``now`` says which one a pass goes through."""

    def __init__(self, heads: Mapping[int, nn.Module], now: Pass) -> None:
        super().__init__()
        self.heads, self.now = dict(heads), now  # a plain dict: the copies are no part of the model

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The output of the head that the pass goes through."""
        result: Tensor = self.heads[self.now.head](*args, **kwargs)
        return result


def _switch(heads: Mapping[int, nn.Module], now: Pass) -> nn.Module:
    return next(iter(heads.values())) if len(heads) == 1 else Switch(heads, now)


def _parameter(heads: Mapping[str, Mapping[int, nn.Module]], key: Key) -> nn.Parameter:
    name, leaf = _split(key)
    return heads[name][key.expert].get_parameter(leaf)


def _heads(model: nn.Module, tensors: Tensors, trainable: frozenset[Key]) -> dict[str, dict[int, nn.Module]]:
    """Copies of the head's modules, by name and the head's number, that hold the bank's heads; mostly there is one."""
    heads: dict[str, dict[int, nn.Module]] = {}
    for number in sorted({key.expert for key in tensors if key.part is Part.HEAD}):
        of_one = {key: value for key, value in tensors.items() if key.part is Part.HEAD and key.expert == number}
        for name, module in _head(model, of_one, trainable).items():
            heads.setdefault(name, {})[number] = module
    return heads


def _head(model: nn.Module, tensors: Tensors, trainable: frozenset[Key]) -> dict[str, nn.Module]:
    """Copies of the head's modules, by name, that hold one head."""
    keys = sorted(tensors)
    wanted = {_split(key)[0] for key in keys}
    for name in sorted(wanted):
        _module(model, name)
    children = {name: child for name, child in model.named_children() if name in wanted}
    kept: dict[int, object] = {id(p): p for child in children.values() for p in child.parameters()}
    kept |= {id(hook): hook for child in children.values() for hook in hooks_of(child)}
    heads = {name: copy.deepcopy(child, dict(kept)) for name, child in children.items()}
    devices = {name: device_of(child) for name, child in children.items()}
    last = [m for head in heads.values() for m in head.modules() if isinstance(m, nn.Linear)][-1:]
    labels = [id(parameter) for linear in last for parameter in linear.parameters()]
    for key in keys:
        name, leaf = _split(key)
        like = dict(heads[name].named_parameters()).get(leaf)
        if like is None:
            raise CoterieError(f"the bank has a head parameter {key.module!r}, which the model does not have")
        fixed = 1 if id(like) in labels else 0  # the number of labels is the client's own
        if tensors[key].ndim != like.ndim or tensors[key].shape[fixed:] != like.shape[fixed:]:
            raise CoterieError(f"{key.module} is {list(like.shape)}; the bank has {list(tensors[key].shape)}")
        value = tensors[key].detach().to(device=devices[name], copy=True)
        owner, _, own_name = leaf.rpartition(".")
        setattr(heads[name].get_submodule(owner), own_name, nn.Parameter(value, requires_grad=key in trainable))
    for linear in last:
        linear.out_features = linear.weight.shape[0]
        if linear.bias is not None and len(linear.bias) != linear.out_features:
            raise CoterieError(
                f"the bank's head has {linear.out_features} labels by weight, {len(linear.bias)} by bias"
            )
    for head in heads.values():
        without_hooks(head)
        head.register_forward_pre_hook(_as_own)
    return heads


def _as_own(head: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """Inputs on the head's device and in its dtype: it trains in float32 on a base in bfloat16."""
    own = next(head.parameters())
    return tuple(arg.to(own) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
