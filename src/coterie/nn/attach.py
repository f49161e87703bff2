"""Puts a bank on a model and takes it off again. The base's own parameters are never touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coterie.nn.bank import BankLayer, Pass
from coterie.nn.gates import gates
from coterie.types import NO_EXPERT, SHARED, Bank, CoterieError, Key, Part, Tensors


@dataclass
class Attached:
    """A bank on a model. ``parameters`` holds the trainable tensors by key; ``now`` steers the forward passes."""

    model: nn.Module
    parameters: dict[Key, nn.Parameter]
    now: Pass
    handles: list[RemovableHandle]
    head: tuple[str, nn.Module] | None = None

    def tensors(self) -> dict[Key, Tensor]:
        """Copies of the trainable tensors as they are now, on the CPU."""
        return {key: p.detach().to("cpu", copy=True).contiguous() for key, p in self.parameters.items()}

    def detach(self) -> None:
        """Leave the model as it was before."""
        for handle in self.handles:
            handle.remove()
        if self.head is not None:
            self.model.set_submodule(*self.head)
        self.handles, self.head = [], None


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

    Raises :class:`CoterieError` for a module that the model has not, a shape that does not fit it, an unknown gate,
    and a trainable key that the bank has not. Everything is checked before anything changes.
    """
    wanted = frozenset(trainable)
    if unknown := wanted - bank.tensors.keys():
        raise CoterieError(f"cannot train {', '.join(sorted(map(str, unknown)))}: the bank has no such tensor")
    now = Pass()
    layers = [(_module(model, name), _layer(model, bank, name, wanted, now)) for name in _modules(bank)]
    head = _head(model, bank, wanted)
    handles = [module.register_forward_hook(layer, with_kwargs=True) for module, layer in layers]
    parameters = {key: p for _, layer in layers for key, p in layer.parameters.items()}
    if head is None:
        return Attached(model, parameters, now, handles)
    name, new = head
    old = model.get_submodule(name)
    model.set_submodule(name, new)
    parameters |= {
        key: new.get_parameter(key.module.removeprefix(f"{name}.")) for key in wanted if key.part is Part.HEAD
    }
    return Attached(model, dict(sorted(parameters.items())), now, handles, (name, old))


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a Linear, a quantised Linear or GPT-2's ``Conv1D``; None for any other module."""
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):
        sizes = getattr(module, d_in, None), getattr(module, d_out, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None


def _modules(bank: Bank) -> list[str]:
    return sorted({key.module for key in bank.tensors if key.part is Part.A})


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as fault:
        raise CoterieError(f"the bank adapts {name!r}, which the model has not; was it made for this base?") from fault


def _layer(model: nn.Module, bank: Bank, name: str, trainable: frozenset[Key], now: Pass) -> BankLayer:
    if bank.gate.name not in gates():
        raise CoterieError(f"unknown gate {bank.gate.name!r}; the gates are {', '.join(gates())}")
    module = _module(model, name)
    experts = sorted({key.expert for key in bank.tensors if key.module == name and key.part is Part.A})
    a_keys, b_keys = ([Key(name, e, part) for e in experts] for part in (Part.A, Part.B))
    router = Key(name, NO_EXPERT, Part.ROUTER)
    row_keys = [*a_keys, *([router] if router in bank.tensors else [])]
    _check_shapes(bank.tensors, a_keys, b_keys, row_keys, linear_sizes(module), name)
    device = next(module.parameters()).device
    rows = torch.cat([bank.tensors[key] for key in row_keys]).to(device)
    columns = torch.cat([bank.tensors[key].T for key in b_keys]).to(device).contiguous()
    layer = BankLayer(
        module=name,
        rows=rows,
        columns=columns,
        ranks=tuple(bank.tensors[key].shape[0] for key in a_keys),
        gate=bank.gate.name,
        options=bank.gate.options_for(name),
        has_shared=SHARED in experts,
        scaling=bank.scaling,
        dropout=bank.dropout,
        now=now,
    )
    _share(layer, row_keys, rows, bank.tensors, trainable, transpose=False)
    _share(layer, b_keys, columns, bank.tensors, trainable, transpose=True)
    return layer


def _share(
    layer: BankLayer, keys: list[Key], storage: Tensor, tensors: Tensors, trainable: frozenset[Key], transpose: bool
) -> None:
    """Make Parameters of the trainable keys that are views of ``storage``, whose rows hold ``keys`` in order."""
    start = 0
    for key in keys:
        stop = start + tensors[key].shape[1 if transpose else 0]
        if key in trainable:
            view = storage[start:stop]
            layer.parameters[key] = nn.Parameter(view.T if transpose else view)
            layer.spans[key] = (start, stop)
        start = stop


def _check_shapes(
    tensors: Tensors, a: list[Key], b: list[Key], rows: list[Key], sizes: tuple[int, int] | None, name: str
) -> None:
    if sizes is None:
        raise CoterieError(f"the bank adapts {name!r}, which is no Linear")
    if missing := [str(key) for key in b if key not in tensors]:
        raise CoterieError(f"the bank has no {', '.join(missing)}")
    d_in, d_out = sizes
    wrong = [key for key in rows if tensors[key].shape[-1] != d_in]
    wrong += [key for i, key in enumerate(b) if tensors[key].shape != (d_out, tensors[a[i]].shape[0])]
    if wrong:
        found = ", ".join(f"{key} {list(tensors[key].shape)}" for key in wrong)
        raise CoterieError(f"{name} is a Linear of {d_in} to {d_out}; the bank has {found}")


def _head(model: nn.Module, bank: Bank, trainable: frozenset[Key]) -> tuple[str, nn.Module] | None:
    """The name of the head's module and a copy of it that holds the bank's head, or None if the bank has none."""
    keys = [key for key in bank.tensors if key.part is Part.HEAD]
    if not keys:
        return None
    name = keys[0].module.split(".")[0]
    new = copy.deepcopy(_module(model, name))
    for key in keys:
        *path, leaf = key.module.removeprefix(f"{name}.").split(".")
        owner = new.get_submodule(".".join(path))
        if leaf not in dict(owner.named_parameters(recurse=False)):
            raise CoterieError(f"the bank has a head parameter {key.module!r}, which the model has not")
        like = owner.get_parameter(leaf)
        value = bank.tensors[key].to(device=like.device, copy=True)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=key in trainable))
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner.out_features = value.shape[0]
    return name, new
