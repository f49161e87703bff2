"""``coterie export``: a client's model as files of other tools, with a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.adapters.bundle import write_bundle
from coterie.adapters.merge import write_merged
from coterie.adapters.model import adapted_modules, base_of
from coterie.adapters.write import ranks_of, write_adapter
from coterie.artifacts.card import Facts, Form, write_card
from coterie.artifacts.evaluate import Client, open_client, own_rows
from coterie.artifacts.static import Cost, cost, mean_weights, static_bank, weighs_alike
from coterie.data.rows import ClientData
from coterie.nn.spec import is_transposed
from coterie.runs.summary import SUMMARY, read_summary
from coterie.types import Bank, CoterieError, Part


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote: the folder, the rank of a static form and what it costs, where that was measured."""

    folder: Path
    form: Form
    rank: int | None = None
    cost: Cost | None = None


def export(
    folder: Path | str,
    client: str | None,
    out: Path | str,
    *,
    form: Form = "bundle",
    rank: int | None = None,
    data: Path | str | None = None,
    base: str | None = None,
    device: str | None = None,
    language: Sequence[str] = (),
    command: str = "",
) -> Exported:
    """Write the model of ``client`` to the folder ``out``, which must be new or empty.

    ``form``: its ``bundle``; its routed mixture as one ``static`` LoRA that PEFT reads, of the sum of the experts'
    ranks or cut to ``rank``; or ``merged`` into the base's weights, as a transformers folder. A static form weighs
    every expert as the client's validation rows weigh it on average, and is measured against the routed one on its test
    rows; ``data`` is a file of labelled rows to use for both.
    Raises :class:`CoterieError` for what :func:`coterie.load` refuses, and where a mixture has no rows to weigh it on.
    """
    path, target = Path(folder), Path(out)
    if target.exists() and any(target.iterdir()):
        raise CoterieError(f"{target} is not empty; name another folder")
    opened = open_client(path, client, base=base, device=device)
    summary = read_summary(path / SUMMARY) if (path / SUMMARY).is_file() else None
    if form == "bundle":
        write_bundle(target, opened.bank, opened.about, fan_in_fan_out=_transposed(opened))
        write_card(target, Facts(opened.about, form, command, summary, language=tuple(language)))
        return Exported(target, form)
    static, measured = _static(path, opened, rank, Path(data) if data else None)
    widest = max(ranks_of({key: v for key, v in static.tensors.items() if key.part is not Part.HEAD}).values())
    if form == "static":
        _write_static(target, opened, static, widest)
    else:
        write_merged(target, base_of(opened.bank, opened.about, base), static, opened.about)
    write_card(target, Facts(opened.about, form, command, summary, measured, widest, tuple(language)))
    return Exported(target, form, widest, measured)


def _static(folder: Path, client: Client, rank: int | None, data: Path | None) -> tuple[Bank, Cost | None]:
    """The static form, and its cost where there are rows to measure it on."""
    if data is not None:
        given = client.rows_of(data)
        static = static_bank(client.bank, mean_weights(client, given, "test"), rank)
        return static, cost(client, static, given, "test", str(data))
    try:
        own = own_rows(folder, client.about.client)
    except CoterieError as fault:
        if weighs_alike(client.bank):
            return static_bank(client.bank, {}, rank), None  # rows would only measure it
        text = "its gate weighs experts by the text: give labelled rows with --data FILE"
        raise CoterieError(f"{client.about.client}: {text} ({fault})") from fault
    static = static_bank(client.bank, mean_weights(client, own, _split_of(own)), rank)
    if not own.splits["test"]:
        return static, None
    return static, cost(client, static, own, "test", "its own test rows")


def _split_of(rows: ClientData) -> str:
    """Where the gates are averaged: validation rows, or training rows where there are none."""
    return "validation" if rows.splits["validation"] else "train"


def _write_static(folder: Path, client: Client, static: Bank, rank: int) -> None:
    experts = {key: value for key, value in static.tensors.items() if key.part is not Part.HEAD}
    head = {key: value for key, value in static.tensors.items() if key.part is Part.HEAD}
    write_adapter(
        folder,
        experts,
        rank=rank,
        alpha=static.scaling * rank,
        about=client.about,
        head=head or None,
        fan_in_fan_out=_transposed(client),
    )


def _transposed(client: Client) -> bool:
    model = client.workplace.base.model
    return any(is_transposed(model.get_submodule(name)) for name in adapted_modules(client.bank))
