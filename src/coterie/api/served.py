"""The models of a run in memory: one base, and the banks of its clients on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.adapters.about import About
from coterie.adapters.bundle import BUNDLE_FILE, read_bundle
from coterie.adapters.model import Placing, base_of
from coterie.nn.attach_many import AttachedMany, attached_many
from coterie.nn.base import Base
from coterie.nn.build import build_layers
from coterie.nn.many import UnlikeError
from coterie.types import Bank, CoterieError


@dataclass(frozen=True)
class Served:
    """One base with the banks of several clients on it. ``names`` and ``abouts`` are in the order of the banks.

    ``encoder``: whether every token of a text sees the tokens after it.
    """

    base: Base
    names: tuple[str, ...]
    abouts: tuple[About, ...]
    banks: AttachedMany
    encoder: bool

    @property
    def generates(self) -> bool:
        """Whether the models write text; otherwise they classify it."""
        return self.base.kind != "classification"

    def number_of(self, name: str) -> int | None:
        """The number of the client called ``name``; None for a name that is not served."""
        return self.names.index(name) if name in self.names else None

    def longest_of(self, client: int) -> int:
        """The most tokens of a text to classify: as evaluation cut it, and as the base accepts it."""
        return min(self.abouts[client].max_length, self.base.longest or self.abouts[client].max_length)

    def prepare(self, clients: Sequence[int], tokens: int) -> None:
        """Say whose rows the next pass holds: ``clients`` [b], sorted, a number per row of ``tokens`` tokens."""
        counts = Counter(clients)
        rows = math.gcd(*counts.values())  # of one place in the pass: so no client's rows have to be filled up
        active = [client for client in sorted(counts) for _ in range(counts[client] // rows)]
        self.banks.now.choose(active, rows, tokens, [(rows, tokens)] * len(active), self.base.device)

    def by_row(self, logits: Tensor) -> list[Tensor]:
        """The logits of each row of the pass, of its own client's labels."""
        return [row for of_place in self.banks.now.split(logits) for row in of_place]


@contextmanager
def served(
    run: Path,
    clients: Sequence[str] = (),
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Served]:
    """The models of ``clients`` (none named: all) of the run in the folder ``run``, for a ``with`` block.

    ``run`` may be the folder of a single bundle. ``base``, ``device`` and ``dtype`` are as in :func:`coterie.load`.
    Raises :class:`CoterieError` for a folder without bundles, an unknown client, banks that cannot share a pass, and a
    base that is missing or has other weights.
    """
    folders = client_folders(run, clients)
    read = [read_bundle(folder) for folder in folders.values()]
    names, banks, abouts = tuple(folders), [bank for bank, _ in read], [about for _, about in read]
    _check_alike(run, names, abouts)
    loaded = base_of(banks[0], abouts[0], base, placing=Placing(device, dtype))
    loaded.model.eval()
    encoder = _sees_all(loaded)
    layers = [build_layers(loaded.model, _without_dropout(bank)) for bank in banks]
    try:
        with attached_many(loaded.model, layers) as attached:
            yield Served(loaded, names, tuple(abouts), attached, encoder)
    except UnlikeError as fault:
        raise CoterieError(f"the models of {run} cannot share a pass; serve one with --clients ({fault})") from fault


def _without_dropout(bank: Bank) -> Bank:
    return Bank(bank.tensors, bank.gate, bank.scaling)


def client_folders(run: Path, clients: Sequence[str] = ()) -> dict[str, Path]:
    """The folder of each client's bundle by the client's name, of ``clients`` (none named: all) in the folder ``run``.

    Raises :class:`CoterieError` for a folder without bundles and an unknown client.
    """
    if (run / BUNDLE_FILE).is_file():
        here = {read_bundle(run)[1].client or run.resolve().name: run}
    else:
        here = {path.parent.name: path.parent for path in sorted((run / "clients").glob(f"*/{BUNDLE_FILE}"))}
    if not here:
        raise CoterieError(
            f"no {BUNDLE_FILE} in {run} or in a client's folder below {run / 'clients'}; give the folder of a finished "
            "run, or of a bundle"
        )
    if unknown := [client for client in clients if client not in here]:
        raise CoterieError(f"{run} holds no bundle of {unknown[0]!r}; its clients are {', '.join(here)}")
    return {client: here[client] for client in dict.fromkeys(clients)} if clients else here


def _check_alike(run: Path, names: Sequence[str], abouts: Sequence[About]) -> None:
    first = abouts[0]
    for name, about in zip(names, abouts, strict=True):
        if (about.task, about.base, about.base_sha256) != (first.task, first.base, first.base_sha256):
            raise CoterieError(
                f"{run}: the bundle of {name} is for the base {about.base!r} and {about.task}, that of {names[0]} for "
                f"{first.base!r} and {first.task}; one service has one base"
            )


def _sees_all(base: Base) -> bool:
    """Whether a change of the last token changes what the base makes of those before it."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=base.device)
    if base.kind != "classification":
        return False  # checked when the base was loaded
    body = base.model.base_model
    with torch.no_grad():
        first, second = body(input_ids=ids).last_hidden_state.float()
    return not torch.allclose(first[:2], second[:2], rtol=1e-3, atol=1e-3)
