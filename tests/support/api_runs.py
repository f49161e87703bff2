"""A finished run's folder with the bundles of clients that differ in experts, labels and gates, on a tiny base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from coterie.adapters.bundle import write_bundle
from coterie.nn.base import load_base
from coterie.types import Bank

CLIENTS = ("east", "north", "south")
LABELS = {"east": ("yes", "no"), "north": ("calm", "urgent", "spam"), "south": ("a", "b", "c", "d", "e")}


def make_run(
    folder: Path, arch: str = "bert", gate: str = "slot_top_k", chat: bool = False, never: str = "", **about: Any
) -> Path:
    """The bundles of three clients. With ``gate`` slot_top_k they have 2, 3 and 4 experts.

    The client ``never`` has one expert and no router, as where it never took part.
    """
    base = tiny.folder(folder / "model", arch, chat=chat)
    task = "classification" if arch in tiny.ENCODERS else "generation"
    made = load_base(str(base), task).model
    for number, client in enumerate(CLIENTS):
        options = {"slot_top_k": {"own": 1}, "similarity": {"scale": 1.0}, "scaled_dot_product": {"k": 2}}.get(gate, {})
        experts, slots = (2, 1) if gate == "similarity" else (2 + number, None)
        shared = 2 if gate == "scaled_dot_product" else 0
        routed = {"experts": experts, "gate": gate, "options": options, "slots": slots, "shared": shared}
        bank = tiny.bank(
            tiny.targets(made), seed=number, scaling=1.0 + number, dropout=0.1, **({} if client == never else routed)
        )
        head = tiny.head(made, len(LABELS[client]), seed=number) if task == "classification" else {}
        said = tiny.about(
            base="model", base_path=str(base), task=task, method="fedlease", client=client,
            labels=LABELS[client] if head else None, **about,
        )  # fmt: skip
        whole = Bank({**bank.tensors, **head}, bank.gate, bank.scaling, bank.dropout)
        write_bundle(folder / "run" / "clients" / client, whole, replace(said))
    return folder / "run"
