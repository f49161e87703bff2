"""The base: a frozen model with its tokenizer, and what a method knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.machine import devices
from coterie.nn.first_token import FirstToken, first_token
from coterie.nn.locate import MINILM, files_of, resolve
from coterie.nn.placement import Placement, input_device
from coterie.nn.pretrained import PreTrainedModel, PreTrainedTokenizerBase, load_model, outline
from coterie.nn.prompt_cache import PromptCache, prompt_cache
from coterie.nn.quantised import Quantize
from coterie.nn.spec import describe, head_modules, longest
from coterie.nn.split_head import SplitHead, split_head
from coterie.nn.weights import identified
from coterie.types import BaseSpec, CoterieError, TaskKind


@dataclass(frozen=True)
class Base:
    """A frozen model, its tokenizer, and what a method knows of it. ``path`` is where the files were read.

    ``first_token``: where the last layer may be computed for the first token alone; ``split_head``: where a decoder can
    be cut between its body and its head; None: nowhere. ``prompt_cache``: how candidates share a prompt; None: not at
    all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    path: str
    kind: TaskKind
    attention: str
    first_token: FirstToken | None = None
    split_head: SplitHead | None = None
    prompt_cache: PromptCache | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's first weights compute, and batches go."""
        return input_device(self.model)

    def use_attention(self, name: str | None) -> None:
        """Switch the model's implementation of attention; None: the one that it was loaded with.

        Raises :class:`CoterieError` for one that the model or this machine does not have.
        """
        try:
            self.model.set_attn_implementation(name or self.attention)
        except (ImportError, ValueError) as fault:
            reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
            raise CoterieError(f"[engine] attention = {name!r} does not work here: {reason}") from fault

    def hold_linears(self, dtype: torch.dtype) -> None:
        """Keep the frozen Linears in the dtype in which autocast computes them.

        The results are the same bits, without a cast of all weights in every pass. Weights that an embedding shares,
        the head and quantised Linears stay as they are.
        """
        shared = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        heads = set(head_modules(self.model))
        for name, module in self.model.named_modules():
            if type(module) is nn.Linear and id(module.weight) not in shared and name.split(".")[0] not in heads:
                for part, value in list(module.named_parameters(recurse=False)):
                    setattr(module, part, nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad))

    @property
    def packs_flat(self) -> bool:
        """Whether packed rows go through the model as a single one, for attention of variable length."""
        return str(getattr(self.model.config, "_attn_implementation", "")).startswith("flash")

    @property
    def vocabulary(self) -> int:
        """The number of tokens that a decoder has logits for, as its config has it."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)

    @property
    def longest(self) -> int | None:
        """The most tokens that the model accepts, prompt and completion together; None: no limit."""
        return longest(self.model)


def load_base(
    name: str,
    kind: TaskKind,
    *,
    targets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    quantize: Quantize = "none",
    device: str = "cpu",
    placement: Placement | None = None,
    gradient_checkpointing: bool = False,
    root: Path | None = None,
) -> Base:
    """Load a model from its absolute folder, a hub name or the alias ``minilm``, freeze it, and describe its targets.

    ``root`` is where a relative folder of that name would be. ``placement`` puts parts of the model on several
    devices, as in transformers, and ``device`` then counts for nothing.
    Dropout of the base is turned off: the only noise in training is the bank's own dropout, whose stream is known.
    Raises :class:`CoterieError` for a name that the hub does not know, a folder that holds no model or only part of
    one, targets that match nothing, a model that is not a decoder where one is needed, a device that this machine does
    not have, and gradient checkpointing with a model that does not support it.
    """
    path = resolve(name)
    if Path(path).is_dir() and name != MINILM and not Path(name).expanduser().is_absolute():
        raise CoterieError(f"{name!r} is a hub name, and a folder here; give the whole path of the folder, {path}")
    _check_device(device)
    path = files_of(path, root)
    model, tokenizer = load_model(path, kind, dtype, quantize, device, placement)
    if gradient_checkpointing:
        use_checkpointing(model)
    if kind != "classification":
        _check_causal(model, path)
    attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    spec = identified(describe(model, targets), path)
    classifies = kind == "classification"
    cut, split = (first_token(model), None) if classifies else (None, split_head(model))
    cache = prompt_cache(model) if kind == "multiple_choice" else None
    return Base(model, tokenizer, spec, path, kind, attention, cut, split, cache)


def spec_at(name: str, kind: TaskKind, targets: tuple[str, ...] = ()) -> BaseSpec:
    """The ``spec`` of the base that :func:`load_base` would load, without loading its weights.

    Raises :class:`CoterieError` as :func:`load_base` does.
    """
    path = files_of(resolve(name))
    return identified(describe(outline(path, kind), targets), path)


def use_checkpointing(model: PreTrainedModel) -> None:
    """Have ``model`` compute activations again in the backward pass. Raises :class:`CoterieError` where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise CoterieError(f"{type(model).__name__} does not support gradient_checkpointing; leave it out of [model]")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints only in training mode; no dropout is left to turn on


def _check_causal(model: nn.Module, path: str) -> None:
    """Raise for a model whose logits at a token depend on later ones, as those of an encoder with an output layer."""
    device = input_device(model)
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=device)
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(first[:2], second[:2], rtol=1e-2, atol=1e-2):
        raise CoterieError(
            f"{path} is not a decoder: its output at a token depends on later tokens; for generation and multiple "
            "choice give a causal language model, or set [task] kind to classification"
        )


def _check_device(device: str) -> None:
    """Raises :class:`CoterieError` for a device that torch does not know, or that this machine does not have."""
    here = devices()
    if device not in {*here, *(name.partition(":")[0] for name in here)}:
        lacks = device.startswith("cuda") and torch.version.cuda is None
        built = " (this torch is built without CUDA)" if lacks else ""
        raise CoterieError(f"[engine] device = {device!r} is not available{built}; this machine has {', '.join(here)}")
