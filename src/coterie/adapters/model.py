"""A client's bundle as a Hugging Face model, with its tokenizer and labels: :func:`coterie.load`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coterie.adapters.bundle import BUNDLE_FILE, read_bundle
from coterie.nn.attach import attach
from coterie.nn.base import load_base
from coterie.nn.pretrained import PreTrainedTokenizerBase
from coterie.types import Bank, CoterieError, TaskKind


@dataclass(frozen=True)
class ClientModel:
    """A client's model as it was evaluated: all its experts, weighed per token, and its head.

    ``model`` is a transformers model in evaluation mode, and works in ``transformers.pipeline`` together with
    ``tokenizer``. ``labels`` are the client's label names in the order of the logits, None where there are none.
    ``bank`` is what was put on the base.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] | None
    task: TaskKind
    client: str
    method: str
    round: int
    bank: Bank


def load(folder: Path | str, client: str | None = None, *, base: str | None = None, device: str = "cpu") -> ClientModel:
    """A client's model from a run's folder, or from the folder of a bundle.

    ``client`` names the client of a run; a folder that holds a bundle itself needs none. ``base`` is the base's folder
    or hub name, by default the one that the bundle names.
    Raises :class:`CoterieError` for a folder without bundles, an unknown client, and a base that is missing or that the
    bundle does not fit.
    """
    bank, about = read_bundle(_bundle_folder(Path(folder), client))
    loaded = load_base(base or about.base, about.task, device=device)
    attach(loaded.model, bank)
    loaded.model.eval()
    labels = about.labels
    config = loaded.model.config
    if about.task == "classification" and labels:
        config.id2label = dict(enumerate(labels))  # the number of labels follows from it
        config.label2id = {label: i for i, label in enumerate(labels)}
    if loaded.longest is not None:
        loaded.tokenizer.model_max_length = loaded.longest
    return ClientModel(
        loaded.model, loaded.tokenizer, labels, about.task, about.client, about.method, about.round, bank
    )


def _bundle_folder(folder: Path, client: str | None) -> Path:
    """The folder of the bundle. Raises :class:`CoterieError` that says what is there."""
    if (folder / BUNDLE_FILE).is_file():
        return folder
    clients = sorted(path.parent.name for path in (folder / "clients").glob(f"*/{BUNDLE_FILE}"))
    if not clients:
        raise CoterieError(
            f"no {BUNDLE_FILE} in {folder} or in a client's folder below {folder / 'clients'}; give the folder of a "
            "finished run, or of a bundle"
        )
    known = ", ".join(clients[:10]) + (f" and {len(clients) - 10} more" if len(clients) > 10 else "")
    if client is None:
        raise CoterieError(f"{folder} holds several bundles; name a client: {known}")
    if client not in clients:
        raise CoterieError(f"{folder} holds no bundle of {client!r}; its clients are {known}")
    return folder / "clients" / client
