"""Writes what a run leaves behind: experts as standard PEFT adapter folders, and a client's whole bank as a bundle.

An adapter is for anyone who knows PEFT and needs nothing of Coterie. A bundle holds what an adapter cannot: several
experts, a router and a gate. ``read_bundle`` and :func:`coterie.nn.attach.attach` put it back on its base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from coterie.codec import CodecError, decode, encode
from coterie.files import write_atomic
from coterie.types import Bank, CoterieError, Json, Key, Part, TaskKind, Tensors

BUNDLE_FILE = "bundle.safetensors"
ADAPTER_FOLDER = "adapter"
_FORMAT = 1
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model"  # where a PeftModel keeps the base model
_PARTS = {Part.A: "lora_A", Part.B: "lora_B"}


@dataclass(frozen=True)
class Bundle:
    """One client's bank and what a reader must know of it: labels, base, client, method, round."""

    bank: Bank
    info: Mapping[str, Json]
    format: int = _FORMAT


def write_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    rank: int,
    alpha: float,
    base: str,
    kind: TaskKind,
    rslora: bool = False,
    head: Tensors | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write one expert as a PEFT adapter: ``y = W0 x + s B A x``, s = alpha / rank (``rslora``: alpha / sqrt(rank)).

    ``tensors`` holds one A [r, d_in] and one B [d_out, r] per module; a module whose r is not ``rank`` keeps the same
    s. ``head`` goes into ``modules_to_save``: load it on a model with as many labels. ``fan_in_fan_out`` is for
    targets that are GPT-2's ``Conv1D`` (``Target.transposed``). Everything is written in float32.
    Raises :class:`ValueError` for tensors that are not one expert, and for a head on a model without.
    """
    ranks = _ranks(tensors)
    if head and kind != "classification":
        raise ValueError(f"a model for {kind.replace('_', ' ')} has no classification head to write")
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    other = {_exactly(name): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and divides it; a scaling need not make it one
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={name: scale * (math.sqrt(r) if rslora else r) for name, r in other.items()},
        use_rslora=rslora,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM" if kind != "classification" else "SEQ_CLS" if head else None,
        modules_to_save=_modules_to_save(head) if head else None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = sorted(ranks)  # PEFT keeps a set, whose order in the file would change from run to run
    named = {f"{_PREFIX}.{key.module}.{_PARTS[key.part]}.weight": value for key, value in tensors.items()}
    named |= {f"{_PREFIX}.{key.module}": value for key, value in (head or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: _plain(value) for name, value in named.items()}, metadata={"format": "pt"})
    write_atomic(folder / _WEIGHTS_FILE, weights)
    config.save_pretrained(str(folder))


def write_bundle(folder: Path, bank: Bank, info: Mapping[str, Json], *, fan_in_fan_out: bool = False) -> None:
    """Write ``bank`` and ``info`` to ``folder``, and a PEFT adapter beside it where the bank is a plain LoRA.

    Of ``info``, the adapter's config takes ``base`` (path or hub name) and ``task`` (classification unless said).
    """
    write_atomic(folder / BUNDLE_FILE, encode(Bundle(bank, info)))
    if _is_plain(bank):
        expert = {key: value for key, value in bank.tensors.items() if key.part in _PARTS}
        rank = max(_ranks(expert).values())
        write_adapter(
            folder / ADAPTER_FOLDER,
            expert,
            rank=rank,
            alpha=bank.scaling * rank,
            base=info.get("base", ""),
            kind=info.get("task", "classification"),
            head={key: value for key, value in bank.tensors.items() if key.part is Part.HEAD},
            fan_in_fan_out=fan_in_fan_out,
        )


def read_bundle(folder: Path) -> tuple[Bank, dict[str, Any]]:
    """The bank and the info that :func:`write_bundle` wrote. Raises :class:`CoterieError` where there are none."""
    path = Path(folder) / BUNDLE_FILE
    try:
        bundle = decode(Bundle, path.read_bytes())
    except OSError as fault:
        raise CoterieError(
            f"no bundle at {folder}: cannot read {BUNDLE_FILE}; give the folder that holds it"
        ) from fault
    except CodecError as fault:
        raise CoterieError(f"{path} is damaged or was not written by Coterie; export it again ({fault})") from fault
    if bundle.format != _FORMAT:
        raise CoterieError(
            f"{path} has format {bundle.format}, this Coterie reads {_FORMAT}; use the version that wrote it"
        )
    return bundle.bank, dict(bundle.info)


def _ranks(tensors: Tensors) -> dict[str, int]:
    """The rank of the one expert on each module, checked: an A and a B of the same expert, whose shapes meet."""
    modules: dict[str, list[Key]] = {}
    for key in sorted(tensors):
        modules.setdefault(key.module, []).append(key)
    if not modules:
        raise ValueError("an adapter needs an expert; there are no tensors")
    for name, keys in modules.items():
        if [key.part for key in keys] != [Part.A, Part.B] or keys[0].expert != keys[1].expert:
            raise ValueError(f"{name}: an adapter holds one A and one B of one expert, not {', '.join(map(str, keys))}")
        a, b = (tensors[key] for key in keys)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{name}: A {list(a.shape)} and B {list(b.shape)} make no product B A")
    return {name: tensors[keys[0]].shape[0] for name, keys in modules.items()}


def _is_plain(bank: Bank) -> bool:
    """Whether the bank is a plain LoRA: gate 1 and one expert on every module it adapts."""
    modules = [key.module for key in bank.tensors if key.part is Part.A]
    return bank.gate.name == "constant" and 0 < len(modules) == len(set(modules))


def _modules_to_save(head: Tensors) -> list[str]:
    return sorted({key.module.split(".")[0] for key in head})


def _exactly(name: str) -> str:
    """A pattern that PEFT matches with the module called ``name`` and with no other that ends in it."""
    return f"^{re.escape(name)}"


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()
