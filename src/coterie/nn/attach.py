"""Puts a bank on a model and takes it off again. The base's own parameters are never touched."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coterie.nn.bank import BankLayer, Pass
from coterie.nn.gates import gates
from coterie.nn.products import Ranks, Span, padded
from coterie.nn.spec import linear_sizes
from coterie.types import NO_EXPERT, Bank, CoterieError, Key, Part, Tensors


@dataclass
class Attached:
    """A bank on a model. ``parameters`` holds the trainable tensors by key; ``now`` steers the forward passes.

    ``heads`` are the modules of the model's own head that copies stand in for until :meth:`detach`.
    """

    model: nn.Module
    parameters: dict[Key, nn.Parameter]
    now: Pass
    handles: list[RemovableHandle]
    heads: dict[str, nn.Module]

    def tensors(self) -> dict[Key, Tensor]:
        """Copies of the trainable tensors as they are now, on the CPU."""
        return _copies(self.parameters)

    def detach(self) -> None:
        """Leave the model as it was before."""
        for handle in self.handles:
            handle.remove()
        for name, head in self.heads.items():
            self.model.set_submodule(name, head)
        self.handles, self.heads = [], {}


@contextmanager
def attached(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> Iterator[Attached]:
    """``attach`` for the length of a ``with`` block."""
    handle = attach(model, bank, trainable)
    try:
        yield handle
    finally:
        handle.detach()


def attach(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> Attached:
    """Put ``bank`` on ``model``; gradients reach the tensors named in ``trainable`` and no others.

    Raises :class:`CoterieError` as :func:`fit` does, before anything changes.
    """
    fitted = fit(model, bank, trainable)
    before = {name: model.get_submodule(name) for name in fitted.heads}
    handles = [
        model.get_submodule(name).register_forward_hook(layer, with_kwargs=True)
        for name, layer in fitted.layers.items()
    ]
    for name, head in fitted.heads.items():
        model.set_submodule(name, head)
    return Attached(model, fitted.parameters, fitted.now, handles, before)


@dataclass(frozen=True)
class Fitted:
    """A bank that fits a model and is not on it yet: the layer of every module, the heads, the trainable tensors."""

    layers: dict[str, BankLayer]
    heads: dict[str, nn.Module]
    parameters: dict[Key, nn.Parameter]
    now: Pass

    def tensors(self) -> dict[Key, Tensor]:
        """Copies of the trainable tensors as they are now, on the CPU."""
        return _copies(self.parameters)


def fit(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> Fitted:
    """What :func:`attach` puts on ``model``, which stays as it is.

    Raises :class:`CoterieError` for a module that the model has not, a shape that does not fit it or the gate, an
    unknown gate or option, and a trainable key that the bank has not.
    """
    wanted = frozenset(trainable)
    if unknown := wanted - bank.tensors.keys():
        raise CoterieError(f"cannot train {', '.join(sorted(map(str, unknown)))}: the bank has no such tensor")
    if bank.gate.name not in gates():
        raise CoterieError(f"unknown gate {bank.gate.name!r}; the gates are {', '.join(gates())}")
    if not 0 <= bank.dropout < 1:
        raise CoterieError(f"dropout is {bank.dropout}; it is at least 0 and less than 1")
    now = Pass()
    layers = {name: _layer(model, bank, name, wanted, now) for name in _modules(bank.tensors)}
    heads = _heads(model, bank.tensors, wanted)
    parameters = {key: heads[_split(key)[0]].get_parameter(_split(key)[1]) for key in wanted if key.part is Part.HEAD}
    for layer in layers.values():
        parameters |= layer.parameters
    return Fitted(layers, heads, dict(sorted(parameters.items())), now)


def _copies(parameters: Mapping[Key, nn.Parameter]) -> dict[Key, Tensor]:
    return {key: p.detach().to("cpu", copy=True).contiguous() for key, p in parameters.items()}


def _modules(tensors: Tensors) -> list[str]:
    """The modules that the bank adapts. Raises :class:`CoterieError` for a B or a router without an A beside it."""
    adapted = {key.module for key in tensors if key.part is Part.A}
    lone = [key for key in tensors if key.part is Part.B and key._replace(part=Part.A) not in tensors]
    lone += [key for key in tensors if key.part is Part.ROUTER and key.module not in adapted]
    if lone:
        raise CoterieError(f"the bank has {', '.join(sorted(map(str, lone)))}, and no A that goes with it")
    return sorted(adapted)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as fault:
        raise CoterieError(f"the bank adapts {name!r}, which the model has not; was it made for this base?") from fault


def _layer(model: nn.Module, bank: Bank, name: str, trainable: frozenset[Key], now: Pass) -> BankLayer:
    module = _module(model, name)
    experts = sorted({key.expert for key in bank.tensors if key.module == name and key.part is Part.A})
    a_keys, b_keys = ([Key(name, e, part) for e in experts] for part in (Part.A, Part.B))
    router = Key(name, NO_EXPERT, Part.ROUTER)
    row_keys = [*a_keys, *([router] if router in bank.tensors else [])]
    _check_shapes(bank.tensors, a_keys, b_keys, row_keys, linear_sizes(module), name)
    device = next(module.parameters()).device
    layer = BankLayer(
        module=name,
        rows=_stack([bank.tensors[key].detach() for key in row_keys]).to(device),
        columns=torch.cat([bank.tensors[key].detach().T for key in b_keys]).to(device).contiguous(),
        experts=tuple(experts),
        ranks=Ranks.of(tuple(bank.tensors[key].shape[0] for key in a_keys), device),
        slots=bank.tensors[router].shape[0] if router in bank.tensors else 0,
        gate=bank.gate.name,
        options=bank.gate.options_for(name),
        scaling=bank.scaling,
        dropout=bank.dropout,
        own_masks=bank.own_masks,
        now=now,
    )
    _check_gate(layer)
    layer.row_spans = _share(layer, row_keys, bank.tensors, trainable)
    layer.column_spans = _share(layer, b_keys, bank.tensors, trainable)
    return layer


def _stack(matrices: list[Tensor]) -> Tensor:
    """A copy of the matrices under each other, and rows of zeros up to a good number of them."""
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
        raise CoterieError(f"the bank adapts {name!r}, which is no Linear")
    if missing := [str(key) for key in b if key not in tensors]:
        raise CoterieError(f"the bank has no {', '.join(missing)}")
    d_in, d_out = sizes
    wrong = [key for key in rows if tensors[key].ndim != 2 or tensors[key].shape[1] != d_in]
    wrong += [key for i, key in enumerate(b) if tensors[key].shape != (d_out, tensors[a[i]].shape[0])]
    if wrong:
        found = ", ".join(f"{key} {list(tensors[key].shape)}" for key in wrong)
        raise CoterieError(f"{name} is a Linear of {d_in} to {d_out}; the bank has {found}")


def _check_gate(layer: BankLayer) -> None:
    """Try the gate on one row of zeros: an option that it does not know, or a router that does not fit, shows here."""
    p = torch.zeros(1, layer.slots) if layer.slots else None
    routed = torch.zeros(1, layer.columns.shape[0] - layer.shared_rank)
    where = f"{layer.module}, gate {layer.gate!r}"
    try:
        inspect.signature(gates()[layer.gate]).bind(p, None, **layer.options)
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


def _heads(model: nn.Module, tensors: Tensors, trainable: frozenset[Key]) -> dict[str, nn.Module]:
    """Copies of the head's modules, by name, that hold the bank's head. Empty if the bank has none."""
    keys = sorted(key for key in tensors if key.part is Part.HEAD)
    wanted = {_split(key)[0] for key in keys}
    for name in sorted(wanted):
        _module(model, name)
    heads = {name: copy.deepcopy(child) for name, child in model.named_children() if name in wanted}
    last = [m for head in heads.values() for m in head.modules() if isinstance(m, nn.Linear)][-1:]
    labels = [id(parameter) for linear in last for parameter in linear.parameters()]
    for key in keys:
        name, leaf = _split(key)
        like = dict(heads[name].named_parameters()).get(leaf)
        if like is None:
            raise CoterieError(f"the bank has a head parameter {key.module!r}, which the model has not")
        fixed = 1 if id(like) in labels else 0  # the number of labels is the client's own
        if tensors[key].ndim != like.ndim or tensors[key].shape[fixed:] != like.shape[fixed:]:
            raise CoterieError(f"{key.module} is {list(like.shape)}; the bank has {list(tensors[key].shape)}")
        value = tensors[key].detach().to(device=like.device, copy=True)
        owner, _, own_name = leaf.rpartition(".")
        setattr(heads[name].get_submodule(owner), own_name, nn.Parameter(value, requires_grad=key in trainable))
    for linear in last:
        linear.out_features = linear.weight.shape[0]
        if linear.bias is not None and len(linear.bias) != linear.out_features:
            raise CoterieError(
                f"the bank's head has {linear.out_features} labels by weight, {len(linear.bias)} by bias"
            )
    for head in heads.values():
        head.register_forward_pre_hook(_in_own_dtype)
    return heads


def _in_own_dtype(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs in the head's dtype: it trains in float32 on a base in bfloat16."""
    dtype = next(head.parameters()).dtype
    return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
