"""A base without its weights, which computes shapes alone: to find out what it would need before it is loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coterie.nn.base import Base, use_checkpointing
from coterie.nn.locate import files_of
from coterie.nn.pretrained import Quantize, load_tokenizer, unloaded_model
from coterie.nn.spec import describe, head_modules
from coterie.nn.split_head import SplitHead
from coterie.types import TaskKind


def shapes_alone() -> FakeTensorMode:
    """A ``with`` block in which tensors have no numbers: their shapes, types and sizes are those of real ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def weight_bytes(model: nn.Module, quantize: Quantize) -> int:
    """The bytes of a model's weights and buffers, quantised as bitsandbytes does it: every Linear but the head, in 4
    bits with a float32 for 64 weights, or in 8 bits with one for each row."""
    tensors = [*model.parameters(), *model.buffers()]
    whole = sum(tensor.nbytes for tensor in tensors)
    if quantize == "none":
        return whole
    heads = {*head_modules(model), "lm_head", "embed_out"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[0] not in heads:
            number, weight = module.weight.numel(), module.weight
            whole += (number * 9 // 16 if quantize == "nf4" else number + 4 * len(weight)) - weight.nbytes
    return whole


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
