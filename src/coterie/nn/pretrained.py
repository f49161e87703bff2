"""Loads a model and its tokenizer with transformers, quietly, and explains what is wrong with their files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers import (
    DynamicCache as DynamicCache,
)
from transformers import (
    PreTrainedModel as PreTrainedModel,
)
from transformers import (
    PreTrainedTokenizerBase as PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from coterie.nn.locate import files_of
from coterie.nn.placement import DeviceMap, Placement, on_disk
from coterie.nn.quantised import Quantize, check_parts, offloaded
from coterie.nn.quiet import quiet_bitsandbytes
from coterie.nn.spec import head_modules, linear_sizes
from coterie.types import CoterieError, TaskKind

T = TypeVar("T")
_OFFLOADED = "dispatched on the CPU or the disk"  # what transformers says of parts that it finds no room for
_PROBE_LABELS = 7  # a number of labels that differs from all sizes in the model; replaced for every client
_OPTIONAL = ("pooler",)  # parts that some checkpoints lack; they are then drawn from a fixed stream and frozen


class _Options(TypedDict):
    """The arguments for loading a model with transformers."""

    config: PretrainedConfig
    dtype: torch.dtype
    quantization_config: NotRequired[BitsAndBytesConfig]
    device_map: NotRequired[DeviceMap]
    max_memory: NotRequired[dict[int | str, int | str] | None]


def load_model(
    path: str, kind: TaskKind, dtype: torch.dtype, quantize: Quantize, device: str, placement: Placement | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model of the files at ``path``, on ``device`` and without dropout, and its tokenizer.

    ``placement`` puts the parts of the model on several devices instead, as in transformers.

    The head's weights, which a base does not have, are drawn from a fixed stream.
    Raises :class:`CoterieError` for files that hold no such model, or not all of one.
    """
    with _quiet(path):
        tokenizer = load_tokenizer(path)
        config: PretrainedConfig = _loaded(AutoConfig.from_pretrained, path)
        _disable_dropout(config)
        config.pad_token_id = tokenizer.pad_token_id
        if kind == "classification":
            config.num_labels = _PROBE_LABELS
        options: _Options = {"config": config, "dtype": dtype}
        if quantize != "none":
            skip = head_modules(_on_meta(config, kind)) if kind == "classification" else []
            options["quantization_config"] = _quantization(quantize, dtype, skip)
            options["device_map"] = {"": device}
        if placement is not None:
            if importlib.util.find_spec("accelerate") is None:
                raise CoterieError("device_map needs accelerate: pip install accelerate")
            unread = _on_meta(config, kind).to(dtype)
            placement.check(unread)
            check_parts(placement, unread, quantize)
            options["device_map"], options["max_memory"] = placement.resolved()
        model = _model(path, kind, options)
    if quantize != "none":
        model = _differentiable(model)
    elif placement is None:
        model = model.to(device)
    for module in model.modules():
        _disable_dropout(module)
    model.requires_grad_(False)
    model.eval()
    return model, tokenizer


def bare_linears(path: str) -> dict[str, tuple[int, int]]:
    """``(d_in, d_out)`` of every Linear of a base without its head or output layer. Its weights are not read."""
    path = files_of(path, weights=False)
    with _quiet(path):
        config: PretrainedConfig = _loaded(AutoConfig.from_pretrained, path)
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(config)
    return {name: sizes for name, module in model.named_modules() if (sizes := linear_sizes(module)) is not None}


def outline(path: str, kind: TaskKind) -> nn.Module:
    """The model of the files at ``path`` as :func:`load_model` makes it, without its weights, which are not read."""
    with _quiet(path):
        config: PretrainedConfig = _loaded(AutoConfig.from_pretrained, path)
        if kind == "classification":
            config.num_labels = _PROBE_LABELS
        return _on_meta(config, kind)


def unloaded_model(path: str, kind: TaskKind, dtype: torch.dtype, pad: int) -> PreTrainedModel:
    """The frozen model of the files at ``path`` as :func:`load_model` makes it, with weights that were not read."""
    with _quiet(path):
        config: PretrainedConfig = _loaded(AutoConfig.from_pretrained, path)
        _disable_dropout(config)
        config.pad_token_id = pad
        if kind == "classification":
            config.num_labels = _PROBE_LABELS
        auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    for module in model.modules():
        _disable_dropout(module)
    return model.requires_grad_(False).eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the files at ``path``. Raises :class:`CoterieError` for one that is missing or cannot pad."""
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer.from_pretrained, path)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # For a folder without tokenizer files, transformers makes one with an empty vocabulary.
        raise CoterieError(f"{path!r} has no tokenizer; save the model's tokenizer there (tokenizer.json)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise CoterieError(
            f"the tokenizer of {path!r} has no padding token; set pad_token in its tokenizer_config.json"
        )
    return tokenizer


def _model(path: str, kind: TaskKind, options: _Options) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, loaded = _loaded(
            auto.from_pretrained, path, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    drawn = {*head_modules(model), *_OPTIONAL}
    names = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    if lost := sorted(name for name in names if not drawn & set(name.split("."))):
        raise CoterieError(
            f"{path!r} has no matching weights for {lost[0]!r} ({len(lost)} such tensors in all), which a "
            f"{type(model).__name__} needs; is it a whole model, and one for {kind.replace('_', ' ')}?"
        )
    if unread := sorted(name for name in names if model.get_parameter(name).is_meta and on_disk(model, name)):
        raise CoterieError(
            f"[model] device_map leaves {unread[0]!r} on the disk, but the files at {path!r} do not have it; name a "
            "device or cpu for that part, or allow more in [model] max_memory"
        )
    return model


def _on_meta(config: PretrainedConfig, kind: TaskKind) -> nn.Module:
    """The model of ``config`` without its weights."""
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    return model


def _disable_dropout(thing: object) -> None:
    """Set every dropout probability that a config (and those in it) or a module holds to 0."""
    for name, value in list(vars(thing).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(thing, name, 0.0)
        elif isinstance(value, PretrainedConfig) and isinstance(thing, PretrainedConfig):
            _disable_dropout(value)
    if isinstance(thing, _DropoutNd):
        thing.p = 0.0


def _quantization(kind: str, dtype: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
    """transformers' settings to quantise every Linear except the output layer and those inside the modules ``skip``."""
    quiet_bitsandbytes()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CoterieError(f"quantize = {kind!r} needs bitsandbytes: pip install bitsandbytes")
    keep = {"llm_int8_skip_modules": skip} if skip else {}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **keep)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **keep)


def _differentiable(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from a shortcut on CPUs with bfloat16.

    Outside training mode it repacks a 4-bit weight for a product that has no gradient; whatever trains below that
    weight would silently get zeros.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _quiet(path: str) -> Iterator[None]:
    """Hide transformers' warnings about a missing head and, for a local folder, its progress bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if Path(path).is_dir():  # a download shows its progress
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _loaded(load: Callable[..., T], path: str, **options: object) -> T:
    """What ``load``, a ``from_pretrained`` of transformers, makes of the files at ``path``."""
    how = options.get("quantization_config")
    quantised = isinstance(how, BitsAndBytesConfig)
    faults = (OSError, ValueError, ImportError, SafetensorError, *((RuntimeError,) if quantised else ()))
    try:
        return load(path, **options)
    except faults as fault:
        if isinstance(how, BitsAndBytesConfig) and _OFFLOADED in str(fault):
            raise CoterieError(offloaded("int8" if how.load_in_8bit else "nf4")) from fault
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise CoterieError(f"cannot load the model {path!r}{' quantised' if quantised else ''}: {reason}") from fault
