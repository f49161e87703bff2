"""A client's whole bank in one file: its experts, router, gate and head, and what a reader must know of them.

:func:`coterie.nn.attach.attach` puts the bank back on its base. Where the bank is a LoRA or a sum of LoRAs with
weights that no token changes, a PEFT adapter is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.adapters.about import About
from coterie.adapters.older import Bundle2, Bundle3
from coterie.codec import CodecError, decode, encode, plain_field
from coterie.files import write_atomic
from coterie.nn.gates import gate_named, mixes
from coterie.ops.mixing import check_ranks, matrix_of
from coterie.types import NO_EXPERT, SHARED, Bank, CoterieError, Key, Part

BUNDLE_FILE = "bundle.safetensors"
ADAPTER_FOLDER = "adapter"
ALIKE = ("constant", "signed", "mixing")  # gates that no token changes
_FORMAT = 4


@dataclass(frozen=True)
class Bundle:
    """One client's bank and what a reader must know of it."""

    bank: Bank
    about: About
    format: int = _FORMAT


def write_bundle(folder: Path, bank: Bank, about: About, *, fan_in_fan_out: bool = False) -> None:
    """Write ``bank`` and ``about`` to ``folder``; where no token changes the gate, also a PEFT adapter."""
    write_atomic(folder / BUNDLE_FILE, encode(Bundle(bank, about)))
    expert = _adapter_of(bank)
    if not expert:
        return
    from coterie.adapters.write import ranks_of, write_adapter  # PEFT takes a second to import

    rank = max(ranks_of(expert).values())
    write_adapter(
        folder / ADAPTER_FOLDER,
        expert,
        rank=rank,
        alpha=bank.scaling * rank,
        about=about,
        head={key: value for key, value in bank.tensors.items() if key.part is Part.HEAD},
        fan_in_fan_out=fan_in_fan_out,
    )


def bundle_fault(bank: Bank) -> str | None:
    """Why :func:`write_bundle` cannot write ``bank``, whose experts each have an A and a B, or None."""
    try:
        _adapter_of(bank)
    except CoterieError as fault:
        return str(fault)
    return None


def read_bundle(folder: Path) -> tuple[Bank, About]:
    """The bank and the :class:`About` that :func:`write_bundle` wrote.

    Raises :class:`CoterieError` where there are none.
    """
    path = Path(folder) / BUNDLE_FILE
    try:
        blob = path.read_bytes()
        number = plain_field(blob, "format")
        reader = _READERS.get(number) if isinstance(number, int) else None
        bundle = reader(blob) if reader else None
    except OSError as fault:
        raise CoterieError(f"no {BUNDLE_FILE} in {folder}; give the folder that holds it") from fault
    except CodecError as fault:
        raise CoterieError(f"{path} is damaged or was not written by Coterie; export it again ({fault})") from fault
    if bundle is None:
        raise CoterieError(
            f"{path} has format {str(number)[:40]}, and this Coterie reads up to {_FORMAT}; install a newer one"
        )
    return bundle.bank, bundle.about


def _present(blob: bytes) -> Bundle:
    return decode(Bundle, blob)


def _older(kind: type[Bundle2]) -> Callable[[bytes], Bundle]:
    def read(blob: bytes) -> Bundle:
        older = decode(kind, blob)
        return Bundle(older.bank, older.now)

    return read


# A reader for every format that a released version wrote, forever. A change of Bundle, Bank or About is a new format,
# with a reader that fills in what older ones lack, and a bundle of it in tests/unit/adapters/bundles.
_READERS: Mapping[int, Callable[[bytes], Bundle]] = {2: _older(Bundle2), 3: _older(Bundle3), 4: _present}


def _adapter_of(bank: Bank) -> dict[Key, Tensor]:
    """What is written as a PEFT adapter: empty where tokens change the weights, or there are no experts."""
    return one_lora(bank) if bank.gate.name in ALIKE else {}


def one_lora(bank: Bank) -> dict[Key, Tensor]:
    """All experts as one, which they are with a gate that no token changes. Empty without experts.

    The rows of A are under each other, the columns of B beside each other. The weights of the gates ``signed`` and
    ``mixing`` are in B; experts that weigh 0 are left out, unless all of a module do. Raises :class:`CoterieError` for
    options and routers that do not fit the gate.
    """
    by_module: dict[str, list[Key]] = {}
    for key in sorted(key for key in bank.tensors if key.part is Part.A):
        by_module.setdefault(key.module, []).append(key)
    tensors: dict[Key, Tensor] = {}
    for module, keys in by_module.items():
        columns = _columns(bank, module, keys)
        tensors[Key(module, 0, Part.A)] = torch.cat([bank.tensors[key] for key in columns])
        tensors[Key(module, 0, Part.B)] = torch.cat(list(columns.values()), dim=1)
    return tensors


def _columns(bank: Bank, module: str, keys: Sequence[Key]) -> dict[Key, Tensor]:
    """B of a module's experts, by their A's ``keys``, with the gate's weights in it; without those that weigh 0."""
    b = {key: bank.tensors[key._replace(part=Part.B)] for key in keys}
    routed = [key for key in keys if key.expert != SHARED]
    if bank.gate.name == "constant" or not routed:
        return b
    router = bank.tensors.get(Key(module, NO_EXPERT, Part.ROUTER))
    try:
        g = gate_named(bank.gate.name)(router, None, **bank.gate.options_for(module))
        if g is None or router is None:
            return b
        if mixes(bank.gate.name):
            check_ranks(b[key].shape[1] for key in routed)
            if len(router) != len(routed):
                raise ValueError(f"a router of {len(router)} rows for {len(routed)} experts")
            mixed = torch.cat([b[key] for key in routed], dim=1) @ matrix_of(router).to(b[keys[0]].dtype)
            return b | dict(zip(routed, mixed.split(1, dim=1), strict=True))
        weights = dict(zip(routed, g[0].tolist(), strict=True))
    except (TypeError, ValueError) as fault:
        raise CoterieError(f"{module}, gate {bank.gate.name!r}: {fault}") from fault
    left = [key for key in keys if weights.get(key, 1)] or keys
    return {key: b[key] if (weight := weights.get(key, 1)) == 1 else b[key] * weight for key in left}
