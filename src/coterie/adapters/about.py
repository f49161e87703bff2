"""What a reader must know of an export: its base, its round, its labels. It is in a bundle, and beside an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie.data.chat import TrainedTurns
from coterie.data.dpo import Objective
from coterie.files import read_json, write_json
from coterie.types import CoterieError, ExportedAs, TaskKind

ABOUT_FILE = "coterie.json"


@dataclass(frozen=True)
class Texts:
    """How a run of generation read, wrote and scored texts, by its ``[task]``.

    ``turns`` are the assistant's turns of a conversation that the loss counts. ``objective`` says what rows of
    preferences are measured by: the loss of the chosen answers ("likelihood"), or the margin of rewards with ``beta``
    ("dpo"). ``scores`` names the scores of generated text, and is empty where none was generated; those of the kind
    ``module:function`` are left out, because whoever uses a bundle imports nothing that it names. ``max_new_tokens``,
    ``temperature`` and ``top_p`` say how text is generated, ``seed`` which tokens are drawn.
    """

    turns: TrainedTurns
    objective: Objective
    beta: float
    scores: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class About:
    """Where an export came from, and what it takes to use it.

    ``round`` is the round that it is of, and ``export`` says which that is: the one that validation chose ("best"), or
    the last ("last"). ``base`` is the base's name (on the hub, the alias ``minilm``, or that of its folder),
    ``base_path`` its folder on the machine that wrote this, ``base_sha256`` a digest of its weights
    (:func:`coterie.nn.weights.fingerprint`), "" if unknown. ``max_length`` is in tokens. ``client`` and ``labels``, in
    the order of the logits, are those of a client's bank. ``chat_template`` is the run's own, "" for the tokenizer's.
    ``texts`` is None for other tasks than generation, and for exports of older versions, which did not say.
    """

    method: str
    round: int
    export: ExportedAs
    task: TaskKind
    base: str
    base_path: str = ""
    base_sha256: str = ""
    max_length: int = 128
    client: str = ""
    labels: tuple[str, ...] | None = None
    chat_template: str = ""
    texts: Texts | None = None


def read_about(folder: Path) -> About | None:
    """What is said of the adapter in ``folder``; None where there is no such file.

    Raises :class:`CoterieError` for one that is damaged.
    """
    path = folder / ABOUT_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        return _ABOUT.validate_python(content)
    except ValidationError as fault:
        raise CoterieError(f"{path} is not what Coterie wrote: {fault.errors()[0]['msg']}; delete it") from fault


def is_here(about: About) -> bool:
    """Whether the base is still in its folder on this machine."""
    return bool(about.base_path) and Path(about.base_path).is_dir()


def write_about(folder: Path, about: About) -> None:
    """Write ``about`` to ``folder``, beside an adapter."""
    write_json(folder / ABOUT_FILE, asdict(about))


_ABOUT = TypeAdapter(About)
