"""Puts the banks and heads of many clients on one model, and takes them off again; see :mod:`coterie.nn.many`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.nn.attach import claim, release
from coterie.nn.build import BankLayers
from coterie.nn.many import ManyLayer, ManyPass


@dataclass
class AttachedMany:
    """Many clients' banks on a model, each with its parameters and pass; ``now`` says which ones a pass is for.

    ``layers`` are the banks by module.
    """

    clients: Sequence[BankLayers]
    now: ManyPass
    layers: Mapping[str, ManyLayer]


@contextmanager
def attached_many(model: nn.Module, clients: Sequence[BankLayers]) -> Iterator[AttachedMany]:
    """Put the banks on the model for the length of a ``with`` block.

    Raises :class:`UnlikeError` if they differ in dropout, kind of masks or dtype, and :class:`CoterieError` for a model
    that carries a bank already, before anything changes.
    """
    now = ManyPass()
    names = sorted({name for client in clients for name in client.layers})
    layers = {name: ManyLayer([client.layers.get(name) for client in clients], now) for name in names}
    heads = {name: model.get_submodule(name) for name in sorted({name for client in clients for name in client.heads})}
    claim(model)
    with ExitStack() as stack:
        stack.callback(release, model)
        for name, layer in layers.items():
            handle = model.get_submodule(name).register_forward_hook(layer, with_kwargs=True)
            stack.callback(handle.remove)
        if any(layer.by_row for layer in layers.values()):
            stack.callback(now.row_mask.follow(model).remove)
        for name, head in heads.items():
            model.set_submodule(name, ManyHead([client.heads.get(name, head) for client in clients], now))
            stack.callback(model.set_submodule, name, head)
        yield AttachedMany(clients, now, layers)


class ManyHead(nn.Module):
    """Every active client's own copy of a part of the head on its rows; outputs padded to the widest label space."""

    def __init__(self, heads: Sequence[nn.Module], now: ManyPass) -> None:
        super().__init__()
        self.heads, self.now = list(heads), now  # a plain list: the copies are no part of the model

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Shapes: x [c*b, ...], result [c*b, ..., widest]."""
        parts = x.split(self.now.rows)
        outputs = [self.heads[c](part, *args, **kwargs) for c, part in zip(self.now.active, parts, strict=True)]
        self.now.widths = [output.shape[-1] for output in outputs]
        widest = max(self.now.widths)
        return torch.cat([functional.pad(output, (0, widest - output.shape[-1])) for output in outputs])
