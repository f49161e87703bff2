"""The last layer of an encoder, computed for the first token alone where the head reads no other.

In the last layer every token attends to every token, but a head that reads the first token never sees what becomes of
the others. So what enters the layer's output projection of attention, [b, t, h], is cut to [b, 1, h]; keys and values
are still those of all tokens. A base is cut so only if a trial shows that its logits stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.placement import input_device

_MODELS = frozenset(
    ["bert", "camembert", "deberta-v2", "electra", "ernie", "megatron-bert", "roberta", "xlm-roberta", "xlm-roberta-xl"]
)
_OUTPUT = re.compile(r"(.*\.layer\.\d+\.)attention\.output")
_TOLERANCE = 5e-6  # other shapes round otherwise, in every layer, and on every machine in its own way
_ROWS, _TOKENS, _PADDING = 2, 8, 3  # of the trial; the padding is the second row's


@dataclass(frozen=True)
class FirstToken:
    """Where the last layer of a model may be cut: what enters ``module``, its output projection of attention, and
    its residual. ``layer`` is the prefix of all names in that layer.
    """

    module: str
    layer: str

    def keeps_all_tokens(self, targets: Iterable[str]) -> bool:
        """Whether all ``targets`` still see all tokens.

        One behind the cut would see fewer: its dropout would draw other masks, and its use of experts and load-balance
        loss would be those of first tokens.
        """
        behind = [name for name in targets if name.startswith(self.layer)]
        return all(name.startswith(f"{self.layer}attention.self.") for name in behind)

    @contextmanager
    def only(self, model: nn.Module) -> Iterator[None]:
        """Cut the last layer of ``model`` for the length of a ``with`` block."""
        handle = model.get_submodule(self.module).register_forward_pre_hook(_first)
        try:
            yield
        finally:
            handle.remove()


def first_token(model: nn.Module) -> FirstToken | None:
    """Where the last layer of a classifier may be cut; None where a trial shows other logits, or the model is no
    encoder whose layers are those of BERT."""
    names = [match for name, _ in model.named_modules() if (match := _OUTPUT.fullmatch(name))]
    if not names or getattr(model.config, "model_type", None) not in _MODELS:
        return None
    cut = FirstToken(names[-1].group(), names[-1].group(1))
    inputs = trial_inputs(model)
    with torch.no_grad():
        whole: Tensor = model(**inputs, use_cache=False).logits
        try:
            with cut.only(model):
                short: Tensor = model(**inputs, use_cache=False).logits
        except (RuntimeError, IndexError):  # what reads the last layer needs all tokens
            return None
    return cut if same_logits(whole, short) else None


def same_logits(whole: Tensor, short: Tensor) -> bool:
    """Whether the logits are equal to 5e-6; in half precision to four roundings of the largest."""
    largest, eps = float(whole.abs().max()), torch.finfo(whole.dtype).eps
    limit = _TOLERANCE * max(1.0, largest) if eps < _TOLERANCE else 4 * eps * largest
    return whole.shape == short.shape and float((whole - short).abs().max()) <= limit


def _first(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies: for a view with gaps between its rows, a Linear would copy its weight once for each row."""
    return tuple(arg[:, :1].contiguous() for arg in args)


def trial_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two rows; the second ends with padding."""
    device = input_device(model)
    config: Any = model.config
    pad = int(getattr(config, "pad_token_id", None) or 0)
    ids = torch.arange(_ROWS * _TOKENS, device=device).view(_ROWS, _TOKENS) % int(config.vocab_size)
    mask = torch.ones_like(ids)
    ids[1, -_PADDING:], mask[1, -_PADDING:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}
