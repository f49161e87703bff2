"""Puts a bank on a model and takes it off again. The base's own parameters are never touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coterie.nn.bank import Pass
from coterie.nn.build import BankLayers, build_layers, copies
from coterie.nn.gates import routes_by_row
from coterie.types import Bank, CoterieError, Key

_CARRIES = "_coterie_bank"  # the attribute of a model that carries one


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
    on: bool = True

    def tensors(self) -> dict[Key, Tensor]:
        """Copies of the trainable tensors as they are now, on the CPU."""
        return copies(self.parameters)

    def detach(self) -> None:
        """Leave the model as it was before."""
        if self.on:
            release(self.model)
        for handle in self.handles:
            handle.remove()
        for name, head in self.heads.items():
            self.model.set_submodule(name, head)
        self.handles, self.heads, self.on = [], {}, False


@contextmanager
def attached(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> Iterator[Attached]:
    """``attach`` for the length of a ``with`` block."""
    with attached_layers(model, build_layers(model, bank, trainable)) as handle:
        yield handle


@contextmanager
def attached_layers(model: nn.Module, built: BankLayers) -> Iterator[Attached]:
    """As :func:`attached`, of a bank whose layers are built."""
    handle = _put_on(model, built)
    try:
        yield handle
    finally:
        handle.detach()


def attach(model: nn.Module, bank: Bank, trainable: Iterable[Key] = ()) -> Attached:
    """Put ``bank`` on ``model``; gradients reach the tensors named in ``trainable`` and no others.

    Raises :class:`CoterieError` as :func:`~coterie.nn.build.build_layers` does, and for a model that carries a bank
    already, before anything changes.
    """
    return _put_on(model, build_layers(model, bank, trainable))


def claim(model: nn.Module) -> None:
    """Note that ``model`` carries a bank. Raises :class:`CoterieError` where it does already."""
    if getattr(model, _CARRIES, False):
        raise CoterieError(
            "the model carries a bank already, and a second one would be added to it; detach() the first one, or put "
            "each bank on for a `with coterie.nn.attach.attached(model, bank)` block"
        )
    setattr(model, _CARRIES, True)


def release(model: nn.Module) -> None:
    """Note that ``model`` carries no bank any more."""
    setattr(model, _CARRIES, False)


def _put_on(model: nn.Module, built: BankLayers) -> Attached:
    claim(model)
    made = Attached(model, built.parameters, built.now, [], {})
    with ExitStack() as stack:
        stack.callback(made.detach)  # unless all of it is on
        for name, layer in built.layers.items():
            made.handles.append(model.get_submodule(name).register_forward_hook(layer, with_kwargs=True))
        if any(routes_by_row(layer.gate) for layer in built.layers.values()):
            made.handles.append(built.now.rows.follow(model))
        for name, head in built.heads.items():
            before = model.get_submodule(name)
            model.set_submodule(name, head)
            made.heads[name] = before
        stack.pop_all()
    return made
