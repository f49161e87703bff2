"""What a method knows of a model: the Linears that can be adapted, the head's parameters, the longest text."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from coterie.nn.targets import DEFAULT_TARGETS
from coterie.types import BaseSpec, CoterieError, HeadParameter, Target

_POSITIONS = re.compile(r"wpe|(embed_)?pos(ition)?s?(_emb\w*)?")  # names of tables, not of 2-d or relative ones


def describe(model: nn.Module, targets: tuple[str, ...] = ()) -> BaseSpec:
    """The Linears that ``targets`` name (PEFT's defaults for the model where it is empty) and the head's parameters.

    A name matches a module whose qualified name is it or ends in ``"." + name``, outside the head and outside poolers,
    which see one vector per text and not its tokens. Raises :class:`CoterieError` for a name that matches none.
    """
    config: Any = model.config
    head = head_modules(model)
    linears = {
        name: sizes
        for name, module in model.named_modules()
        if (sizes := linear_sizes(module)) is not None and name.split(".")[0] not in head
        if "pooler" not in name.split(".")
    }
    wanted = targets or _default_targets(model, linears)
    unmatched = [target for target in wanted if not any(_matches(name, target) for name in linears)]
    if unmatched:
        raise CoterieError(f"no Linear of the model matches the target {unmatched[0]!r}; it has {_endings(linears)}")
    chosen = tuple(
        Target(name, *sizes, transposed=is_transposed(model.get_submodule(name)))
        for name, sizes in sorted(linears.items())
        if any(_matches(name, target) for target in wanted)
    )
    std = float(getattr(config, "initializer_range", None) or 0.02)
    return BaseSpec(chosen, _head_parameters(model, head), std)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a Linear, a quantised Linear or GPT-2's ``Conv1D``; None for any other module."""
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):
        sizes = getattr(module, d_in, None), getattr(module, d_out, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [d_in, d_out], as GPT-2's ``Conv1D`` does."""
    return hasattr(module, "nf")


def head_modules(model: nn.Module) -> list[str]:
    """The classification head: the children with parameters beside the base model. Empty for a causal model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def longest(model: nn.Module) -> int | None:
    """The most tokens that the model has positions for; None if there is no limit, as with relative positions.

    A table of positions may have rows that no token gets (RoBERTa: 514 rows for 512 tokens). Rotary positions have no
    end, but were trained up to the number in the config.
    """
    config: Any = model.config
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    tables = [
        module.num_embeddings - _unused_rows(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and _POSITIONS.fullmatch(name.rsplit(".", 1)[-1])
        and module.num_embeddings >= stated  # leaves out tables for the patches of an image, which are smaller
    ]
    return min([stated, *tables]) if tables or any(map(_is_rotary, model.modules())) else None


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _endings(linears: dict[str, tuple[int, int]]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))


def _default_targets(model: nn.Module, linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    kind = str(getattr(model.config, "model_type", "?"))
    if kind not in DEFAULT_TARGETS:
        raise CoterieError(f"no default targets for {kind!r} models; set [lora] targets to some of {_endings(linears)}")
    return DEFAULT_TARGETS[kind]


def _head_parameters(model: nn.Module, modules: list[str]) -> tuple[HeadParameter, ...]:
    """The parameters of the head's modules, of which exactly one Linear has one output per label."""
    if not modules:
        return ()
    config: Any = model.config
    linears = [m for name in modules for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear)]
    last = [linear for linear in linears if linear.out_features == int(config.num_labels)]
    if len(last) != 1:
        raise CoterieError(f"{type(model).__name__} has no classification head that Coterie knows; report the model")
    return tuple(
        _head_parameter(f"{name}.{leaf}", parameter, last[0])
        for name in modules
        for leaf, parameter in model.get_submodule(name).named_parameters()
    )


def _head_parameter(name: str, parameter: nn.Parameter, last: nn.Linear) -> HeadParameter:
    of_labels = parameter is last.weight or parameter is last.bias
    shape = (-1, *parameter.shape[1:]) if of_labels else tuple(parameter.shape)
    init = "normal" if parameter.ndim > 1 else "ones" if name.endswith("weight") else "zeros"
    return HeadParameter(name, shape, init)


def _unused_rows(table: nn.Embedding) -> int:
    offset = getattr(table, "offset", None)  # of OPT and BART
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _is_rotary(module: nn.Module) -> bool:
    """Whether the module holds the frequencies of rotary positions, unless they scale with the text's length."""
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    rotary = any(name.endswith(("inv_freq", "embed_positions")) for name in buffers)  # the latter in GPT-J
    return rotary and getattr(module, "rope_type", None) != "dynamic"
