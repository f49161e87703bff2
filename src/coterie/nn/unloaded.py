"""A base without its weights, which computes shapes alone: to find out what it would need before it is loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coterie.nn.base import Base, use_checkpointing
from coterie.nn.locate import files_of
from coterie.nn.pretrained import load_tokenizer, unloaded_model
from coterie.nn.spec import describe
from coterie.nn.split_head import SplitHead
from coterie.types import TaskKind


def shapes_alone() -> FakeTensorMode:
    """A ``with`` block in which tensors have no numbers: their shapes, types and sizes are those of real ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def unloaded_base(
    path: str,
    kind: TaskKind,
    mode: AbstractContextManager[object],
    *,
    targets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
) -> Base:
    """The base of the files at ``path``, whose weights are not read. ``mode`` is of :func:`shapes_alone`.

    Its head counts as one that can be cut from its body, as those of almost all decoders can.
    """
    path = files_of(path, weights=False)
    tokenizer = load_tokenizer(path)
    with mode, torch.device(device):
        model = unloaded_model(path, kind, dtype, tokenizer.pad_token_id)
    if gradient_checkpointing:
        use_checkpointing(model)
    config = model.config.get_text_config()
    split = None if kind == "classification" else SplitHead(model.base_model_prefix, int(config.vocab_size))
    attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    return Base(model, tokenizer, describe(model, targets), path, kind, attention, None, split)
