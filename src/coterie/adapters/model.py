"""A client's bundle as a Hugging Face model, with its tokenizer and labels: :func:`coterie.load`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coterie.adapters.about import About, is_here
from coterie.adapters.bundle import BUNDLE_FILE, read_bundle
from coterie.data.settings import Columns
from coterie.data.tasks import make_task
from coterie.inference.answers import Answer, Rejected
from coterie.inference.generate import end_texts
from coterie.inference.predict import Predictor, located
from coterie.nn.attach import attach
from coterie.nn.base import Base, load_base
from coterie.nn.locate import hub_name
from coterie.nn.placement import DeviceMap, Placement, input_device
from coterie.nn.pretrained import PreTrainedModel, PreTrainedTokenizerBase
from coterie.nn.prompt_cache import PromptCache
from coterie.nn.quantised import Quantize
from coterie.nn.rows import RowMask
from coterie.nn.weights import digests, fingerprint
from coterie.ops.sampling import NEW_TOKENS
from coterie.types import Bank, CoterieError, DataError, Part, TaskKind


@dataclass(frozen=True)
class ClientModel:
    """A client's model as it was evaluated: all its experts, weighed per token, and its head.

    ``model`` is a transformers model in evaluation mode, and works in ``transformers.pipeline`` together with
    ``tokenizer``. ``labels`` are the client's label names in the order of the logits, None where there are none.
    ``bank`` is what was put on the base. ``max_length`` is where the run cut its rows, in tokens. ``columns`` and
    ``max_new_tokens`` are what :meth:`predict` reads of a row, and how much it writes, unless it is given others;
    ``columns`` is None where the client's rows come from datasets with different columns.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] | None
    task: TaskKind
    client: str
    method: str
    round: int
    bank: Bank
    max_length: int = 128
    row_mask: RowMask = field(default_factory=RowMask, repr=False)
    columns: Columns | None = field(default_factory=Columns)
    max_new_tokens: int = NEW_TOKENS
    prompt_cache: PromptCache | None = field(default=None, repr=False)

    def predict(
        self, rows: Iterable[Mapping[str, object]], *, columns: Columns | None = None, batch_size: int | None = None
    ) -> list[Answer]:
        """An answer for every row, in their order: a label with probabilities, a text, or a choice with scores.

        A row maps columns to values as in a file of the run: ``{"text": "..."}``. A label in it is not read. Raises
        :class:`DataError` for the first row that cannot be answered, with its number; :meth:`predictor` goes on.
        """
        answers = []
        for _, answer in self.predictor(columns=columns, batch_size=batch_size).answers(located(rows)):
            if isinstance(answer, Rejected):
                raise DataError(answer.reason)
            answers.append(answer)
        return answers

    def predictor(
        self, *, columns: Columns | None = None, batch_size: int | None = None, max_new_tokens: int | None = None
    ) -> Predictor:
        """What answers rows one window after the other, for more rows than fit in memory.

        Raises :class:`CoterieError` where neither ``columns`` nor :attr:`columns` says how rows are read.
        """
        columns = columns or self.columns
        if columns is None:
            raise unclear_columns(self.client)
        task = make_task(self.task, self.tokenizer, self.max_length, max_new_tokens or self.max_new_tokens)
        size = batch_size or (16 if input_device(self.model).type == "cpu" else 64)
        return Predictor(self.model, task, self.labels, columns, size, self.row_mask, self.prompt_cache)


@dataclass(frozen=True)
class Placing:
    """How a base is loaded: its device, or a ``device_map`` as in transformers; its dtype; whether it is quantised."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quantize: Quantize = "none"
    device_map: DeviceMap | None = None


def model_of(bank: Bank, about: About, base: str | None, placing: Placing) -> ClientModel:
    """``bank`` on its base, as :func:`coterie.load` makes it."""
    loaded = base_of(bank, about, base, placing=placing)
    carried = attach(loaded.model, bank)
    loaded.model.eval()
    labels = about.labels
    config = loaded.model.config
    if about.task != "classification":
        end_texts(loaded.model, loaded.tokenizer)
    if about.task == "classification" and labels:
        config.id2label = dict(enumerate(labels))  # the number of labels follows from it
        config.label2id = {label: i for i, label in enumerate(labels)}
    limit_inputs(loaded, about)
    return ClientModel(
        loaded.model, loaded.tokenizer, labels, about.task, about.client, about.method, about.round, bank,
        about.max_length, carried.now.rows, prompt_cache=loaded.prompt_cache,
        max_new_tokens=about.texts.max_new_tokens if about.texts else NEW_TOKENS,
    )  # fmt: skip


def limit_inputs(base: Base, about: About) -> None:
    """Have the tokenizer cut texts where the base ends, and texts to classify where the run cut them, too."""
    limits = [base.longest, about.max_length if about.task == "classification" else None]
    if known := [limit for limit in limits if limit is not None]:
        base.tokenizer.model_max_length = min(known)


def base_of(
    bank: Bank, about: About, base: str | None = None, *, device: str = "cpu", placing: Placing | None = None
) -> Base:
    """The base of a bundle: ``base``, or the folder or the name that the bundle has.

    Raises :class:`CoterieError` where it is not here or has other weights than the base that the bank was trained on.
    """
    how = placing or Placing(device)
    path = path_of(about, base)
    try:
        loaded = load_base(
            path,
            about.task,
            targets=adapted_modules(bank),
            device=how.device,
            dtype=how.dtype,
            quantize=how.quantize,
            placement=Placement(how.device_map) if how.device_map is not None else None,
        )
    except CoterieError as fault:
        if base or is_here(about):
            raise
        was = f", which was in {about.base_path} where it was exported" if about.base_path else ""
        raise CoterieError(f"no base {about.base!r} here{was}: give its folder as base=... ({fault})") from fault
    check_base(loaded, bank, about)
    if about.chat_template:
        loaded.tokenizer.chat_template = about.chat_template
    return loaded


def adapted_modules(bank: Bank) -> tuple[str, ...]:
    """The names of the modules that ``bank`` adapts: the targets of its run, which PEFT may have no defaults for."""
    return tuple(sorted({key.module for key in bank.tensors if key.part is Part.A}))


def path_of(about: About, base: str | None = None) -> str:
    """Where the base of a bundle is: ``base``, or the folder or the name that the bundle has."""
    return base or (about.base_path if is_here(about) else hub_name(about.base))


def check_base(base: Base, bank: Bank, about: About) -> None:
    """Raises :class:`CoterieError` for a base with other weights than the one that the bank was trained on."""
    modules = adapted_modules(bank)
    here = fingerprint(digests(base.path, modules), modules)
    if here and about.base_sha256 and here != about.base_sha256:
        raise CoterieError(
            f"{base.path} has other weights than the base that the bundle was trained on, {about.base!r} (SHA-256 "
            f"{about.base_sha256[:12]}, not {here[:12]}); give the folder of that base as base=..."
        )


def unclear_columns(client: str) -> CoterieError:
    """The error where nothing says which of several datasets' columns the rows have."""
    whose = f"the rows of {client}" if client else "the clients' rows"
    return CoterieError(
        f"{whose} come from datasets with different columns: give the columns of yours, as in --column text=body, or "
        "columns=Columns(...)"
    )


def read_client(folder: Path, client: str | None) -> tuple[Bank, About]:
    """The bundle of ``client`` in a run's ``folder``, or that in the folder of a bundle, which is its client's alone.

    Raises :class:`CoterieError` that says what is there.
    """
    bank, about = read_bundle(bundle_folder(folder, client))
    if client is not None and about.client != client:
        raise CoterieError(f"{folder} is the bundle of {about.client}, not of {client}; give the run's folder")
    return bank, about


def bundle_folder(folder: Path, client: str | None) -> Path:
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
