"""A decoder cut between its body and its head, for losses that never hold the logits of all tokens.

The body is run once, on all tokens. The head, whatever it is (tied weights, a bias, a scale, soft capping), is the
model's own ``forward`` with the body's output given, so it can be run on some of the tokens at a time. A base is cut
only if a trial shows that its logits stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from coterie.nn.first_token import same_logits, trial_inputs

# What a forward pass raises where its body is not what it usually is: a decoder of some other build.
_OTHER_BUILD = (RuntimeError, AttributeError, TypeError, IndexError, ValueError)


@dataclass(frozen=True)
class SplitHead:
    """Where a decoder is cut: ``body`` is the name of the part without the head; the logits are of ``vocabulary``
    tokens."""

    body: str
    vocabulary: int

    def leaves_head(self, targets: Iterable[str]) -> bool:
        """Whether all ``targets`` are in the body. A bank on the head sees all tokens of a pass at once."""
        return all(name.startswith(f"{self.body}.") for name in targets)

    def hidden(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What enters the head [b, t, h]."""
        result: Tensor = model.get_submodule(self.body)(**inputs, use_cache=False).last_hidden_state
        return result

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """The head on what enters it. Shapes: hidden [n, h], result [n, vocabulary]."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _given(model, self.body, hidden.unsqueeze(0)):
            logits: Tensor = model.forward(input_ids=ids, use_cache=False).logits  # without hooks on the model's call
        return logits[0]


def split_head(model: nn.Module) -> SplitHead | None:
    """Where a decoder can be cut; None where a trial shows other logits."""
    prefix, inputs = str(getattr(model, "base_model_prefix", "")), trial_inputs(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        whole: Tensor = model(**inputs, use_cache=False).logits
        for name in (prefix, f"{prefix}.decoder"):
            cut = SplitHead(name, whole.shape[-1])
            if name in modules and _works(cut, model, inputs, whole):
                return cut
    return None


def _works(cut: SplitHead, model: nn.Module, inputs: Mapping[str, Tensor], whole: Tensor) -> bool:
    try:
        parts = cut.hidden(model, inputs).flatten(0, 1).split(5)
        return same_logits(whole, torch.cat([cut.logits(model, part) for part in parts]).view_as(whole))
    except _OTHER_BUILD:
        return False


def token_losses(hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """The cross entropy of every token, in float32 at least, with the logits of ``chunk`` tokens at a time.

    The gradient of each chunk is taken while its logits are there, so the backward pass needs none.
    Shapes: hidden [n, h], labels and result [n].
    """
    result: Tensor = _TokenLosses.apply(hidden, labels, logits_of, chunk)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Output:
    """A body's output; a field that it has not is None, as in transformers' outputs."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, at: int) -> Tensor:
        return (self.last_hidden_state,)[at]


class _Body(nn.Module):
    """Stands in for a body; its output is given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: object, **kwargs: object) -> _Output:
        """The output that was given."""
        return _Output(self.hidden)


@contextmanager
def _given(model: nn.Module, body: str, hidden: Tensor) -> Iterator[None]:
    own = model.get_submodule(body)
    model.set_submodule(body, _Body(hidden))
    try:
        yield
    finally:
        model.set_submodule(body, own)


class _Kept(FunctionCtx):
    """The gradient of every token's loss by what enters the head [n, h]; empty where none is needed."""

    saved_tensors: tuple[Tensor]
    needs_input_grad: tuple[bool, ...]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept, hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int
    ) -> Tensor:
        trains = ctx.needs_input_grad[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        gradients = torch.empty_like(hidden) if trains else hidden.new_empty(0)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(trains):
                given = hidden[part].detach().requires_grad_(trains)
                logits = logits_of(given)
                loss = functional.cross_entropy(
                    logits.to(torch.promote_types(logits.dtype, wide)), labels[part], reduction="none"
                )
                if trains:
                    (gradients[part],) = torch.autograd.grad(loss.sum(), given)
            losses[part] = loss.detach()
            del logits, loss
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad.unsqueeze(1).to(gradients.dtype), None, None, None
