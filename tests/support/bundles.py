"""The folder of a finished run with the bundles of two clients, on a tiny base: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from coterie.adapters.bundle import write_bundle
from coterie.nn.base import load_base
from coterie.types import Bank

LABELS = ("calm", "urgent", "spam")
ARCHITECTURES = {"classification": "bert", "generation": "llama", "multiple_choice": "gpt2"}


def finished(
    folder: Path,
    kind: str = "classification",
    *,
    gate: str = "slot_top_k",
    options: Mapping[str, Any] | None = None,
    arch: str = "",
    targets: tuple[str, ...] = (),
    slots: int | None = None,
    experts: int = 3,
    **sizes: Any,
) -> Path:
    """``folder/run`` with ``clients/north`` and ``clients/south``: ``experts`` each, weighed by ``gate``.

    The base is in ``folder/model``, of another ``arch`` or with other ``sizes`` on request; the experts are on
    ``targets``, by default PEFT's. A router has ``slots`` rows, by default what ``gate`` wants.
    """
    base = tiny.folder(folder / "model", arch or ARCHITECTURES[kind], **sizes)
    made = load_base(str(base), kind, targets=targets).model  # type: ignore[arg-type]
    head = tiny.head(made, len(LABELS), over=targets) if kind == "classification" else {}
    about = tiny.about(base="model", base_path=str(base), task=kind, method="fedlease", labels=LABELS if head else None)
    for seed, client in enumerate(("north", "south")):
        own = {"own": seed} if gate == "slot_top_k" else options
        rank = 1 if gate == "mixing" else 4
        made_bank = tiny.bank(
            tiny.targets(made, targets), experts, rank, gate=gate, options=own, slots=slots, seed=seed
        )
        bank = Bank({**made_bank.tensors, **head}, made_bank.gate, made_bank.scaling)
        write_bundle(folder / "run" / "clients" / client, bank, replace(about, client=client))
    return folder / "run"
