"""Writes an expert as a standard PEFT adapter folder, for anyone who knows PEFT and does not have Coterie.

The counterpart is :mod:`coterie.adapters.read`. What an adapter cannot hold (several experts, a router, a gate) goes
into a bundle: :mod:`coterie.adapters.bundle`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, float32

from coterie.adapters.about import About, write_about
from coterie.files import write_atomic, write_json
from coterie.nn.locate import hub_name
from coterie.types import Key, Part, Tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model"  # where a PeftModel keeps the base model
_PARTS = {Part.A: "lora_A", Part.B: "lora_B"}


def write_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    rank: int,
    alpha: float,
    about: About,
    head: Tensors | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write one expert as a PEFT adapter: ``y = W0 x + s B A x``, s = alpha / rank.

    ``tensors`` holds one A [r, d_in] and one B [d_out, r] per module; a module whose r is not ``rank`` keeps the same
    s. ``head`` goes into ``modules_to_save``: load it on a model with the same number of labels. ``fan_in_fan_out`` is
    for targets that are GPT-2's ``Conv1D`` (``Target.transposed``). Everything is written in float32. ``about`` goes
    into a file beside it.
    Raises :class:`ValueError` for tensors that are not one expert, and for a head on a model that has none.
    """
    ranks = ranks_of(tensors)
    if head and about.task != "classification":
        raise ValueError(f"a model for {about.task.replace('_', ' ')} has no classification head to write")
    named = {f"{_PREFIX}.{key.module}.{_PARTS[key.part]}.weight": value for key, value in tensors.items()}
    named |= {f"{_PREFIX}.{key.module}": value for key, value in (head or {}).items()}
    weights = save({name: _plain(value) for name, value in named.items()}, metadata={"format": "pt"})
    write_atomic(folder / WEIGHTS_FILE, weights)
    task = "CAUSAL_LM" if about.task != "classification" else "SEQ_CLS" if head else None
    where = {"base_model_name_or_path": hub_name(about.base), "fan_in_fan_out": fan_in_fan_out, "task_type": task}
    write_json(folder / CONFIG_FILE, _scales(ranks, rank, alpha) | where | {"modules_to_save": _modules_to_save(head)})
    write_about(folder, about)


def _scales(ranks: Mapping[str, int], rank: int, alpha: float) -> dict[str, object]:
    """PEFT's settings of the experts.

    Those left out keep PEFT's defaults: writing them would require importing PEFT.
    """
    other = {_exactly(name): r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: alpha / rank * r for name, r in other.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def ranks_of(tensors: Tensors) -> dict[str, int]:
    """The rank of the one expert on each module.

    Raises :class:`ValueError` unless every module has an A and a B of the same expert, whose shapes match.
    """
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
            raise ValueError(f"{name}: A {list(a.shape)} and B {list(b.shape)} have no product B A")
    return {name: tensors[keys[0]].shape[0] for name, keys in modules.items()}


def _modules_to_save(head: Tensors | None) -> list[str] | None:
    return sorted({key.module.split(".")[0] for key in head}) if head else None


def _exactly(name: str) -> str:
    """A pattern that PEFT matches with the module called ``name`` and with no other that ends in it."""
    return f"^{re.escape(name)}"


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", float32, copy=True).contiguous()
