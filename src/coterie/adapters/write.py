"""Writes an expert as a standard PEFT adapter folder, for anyone who knows PEFT and does not have Coterie.

The counterpart is :mod:`coterie.adapters.read`. What an adapter cannot hold (several experts, a router, a gate) goes
into a bundle: :mod:`coterie.adapters.bundle`.
"""

from __future__ import annotations

import re
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor, float32

from coterie.files import write_atomic
from coterie.types import Key, Part, TaskKind, Tensors

_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model"  # where a PeftModel keeps the base model
_PARTS = {Part.A: "lora_A", Part.B: "lora_B"}


def write_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    rank: int,
    alpha: float,
    base: str,
    kind: TaskKind,
    head: Tensors | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write one expert as a PEFT adapter: ``y = W0 x + s B A x``, s = alpha / rank.

    ``tensors`` holds one A [r, d_in] and one B [d_out, r] per module; a module whose r is not ``rank`` keeps the same
    s. ``head`` goes into ``modules_to_save``: load it on a model with as many labels. ``fan_in_fan_out`` is for
    targets that are GPT-2's ``Conv1D`` (``Target.transposed``). Everything is written in float32.
    Raises :class:`ValueError` for tensors that are not one expert, and for a head on a model that has none.
    """
    ranks = ranks_of(tensors)
    if head and kind != "classification":
        raise ValueError(f"a model for {kind.replace('_', ' ')} has no classification head to write")
    scale = alpha / rank
    other = {_exactly(name): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int but only divides it; a scaling need not be whole
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={name: scale * r for name, r in other.items()},
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
            raise ValueError(f"{name}: A {list(a.shape)} and B {list(b.shape)} make no product B A")
    return {name: tensors[keys[0]].shape[0] for name, keys in modules.items()}


def _modules_to_save(head: Tensors) -> list[str]:
    return sorted({key.module.split(".")[0] for key in head})


def _exactly(name: str) -> str:
    """A pattern that PEFT matches with the module called ``name`` and with no other that ends in it."""
    return f"^{re.escape(name)}"


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", float32, copy=True).contiguous()
