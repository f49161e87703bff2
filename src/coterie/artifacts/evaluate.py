"""``coterie evaluate``: what a client's model scores on labelled rows, by the code that scores it during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coterie.adapters.about import About
from coterie.adapters.model import base_of, check_base, read_client, unclear_columns
from coterie.artifacts.load import reading_of
from coterie.comparison.cross import data_of
from coterie.compute.loading import eval_rows, workplaces
from coterie.compute.preferences import scoring_of
from coterie.compute.score import ChoiceScoring, Scoring, score
from coterie.compute.workplace import Workplace
from coterie.config.load import check_config
from coterie.data.dpo import Dpo
from coterie.data.examples import Batch
from coterie.data.files import read_table
from coterie.data.outputs import Output
from coterie.data.parse import parse
from coterie.data.rows import ClientData, PreferenceRow, client_data
from coterie.data.settings import Columns
from coterie.data.tasks import Task, Tokenizer, make_task
from coterie.experiment import set_threads
from coterie.ops.metrics import Metrics, calibration_error, confusion
from coterie.ops.sampling import Sampling
from coterie.requests import Score
from coterie.runs.folder import read_config
from coterie.types import Bank, CoterieError

TEST = "test"


@dataclass(frozen=True)
class Evaluation:
    """What a client's model scores on ``rows`` rows.

    ``metrics`` are those of the run, with the loss. ``confusion`` [label, prediction] counts rows in the order of
    ``labels``, and is None where rows have no labels in common. ``calibration_error`` is None where there are no
    probabilities (:func:`coterie.ops.metrics.calibration_error`).
    """

    client: str
    data: str
    rows: int
    metrics: Metrics
    labels: tuple[str, ...] | None = None
    confusion: Sequence[Sequence[int]] | None = None
    calibration_error: float | None = None


@dataclass(frozen=True)
class Client:
    """A client's exported bank on its base, ready to score: ``workplace`` has the run's precision and task.

    ``unclear``: the run's objective is not known, because its bundle is of an older format and there is no run.
    """

    bank: Bank
    about: About
    workplace: Workplace
    columns: Columns | None
    unclear: bool = False

    def evaluate(self, rows: ClientData, data: str, split: str = TEST) -> Evaluation:
        """What the bank scores on a split of ``rows``, which ``data`` names."""
        request = Score([self.bank], split)
        if self.about.task == "classification":
            scoring: Scoring = _Confident(self.workplace, rows, self.about.round, request, self.bank)
        else:
            scoring = scoring_of(self.workplace, rows, self.about.round, request, self.bank)
        (scored,) = score([scoring])
        truth, predicted = _classes(scoring)
        labels = self.about.labels if truth else None
        right = [t == p for t, p in zip(truth, predicted, strict=True)]
        error = None
        if isinstance(scoring, _Confident) and truth:
            error = calibration_error(torch.cat(scoring.confidence).tolist(), right)
        return Evaluation(
            self.about.client,
            data,
            scored.examples,
            {"loss": scored.loss, **scored.metrics},
            labels,
            confusion(truth, predicted, len(labels)) if labels else None,
            error,
        )

    def rows_of(self, file: Path) -> ClientData:
        """The labelled rows of a file, as the client's test rows. Raises :class:`DataError` for a bad row.

        Raises :class:`CoterieError` where the columns are not known, and for preferences where the objective is not.
        """
        if self.columns is None:
            raise unclear_columns(self.about.client)
        rows, labels = parse({"train": read_table(file, TEST)}, self.columns, self.about.task, self.about.labels)
        if self.unclear and any(isinstance(row, PreferenceRow) for row in rows["train"]):
            raise CoterieError(
                f"{file} has preferences, and a bundle of this older format does not say how its run measured them; "
                f"give the folder of the run, or --column completion={self.columns.chosen} for the loss of the chosen "
                "answers"
            )
        return client_data(self.about.client, None, {"train": (), "validation": (), TEST: rows["train"]}, labels)


@dataclass
class _Confident(Scoring):
    """Scores that keep the probability of every prediction."""

    confidence: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch, output: Output) -> None:
        """Add a batch, as :class:`Scoring` does."""
        super().add(batch, output)
        if isinstance(output, Tensor) and self.task.kind == "classification":
            self.confidence.append(output.float().softmax(-1).amax(-1))


def _classes(scoring: Scoring) -> tuple[list[int], list[int]]:
    """The labels of the rows and what was predicted, both as numbers; empty where rows share no labels."""
    if isinstance(scoring, ChoiceScoring):
        if scoring.client.info.labels is None:
            return [], []
        return [e.label for e in scoring.examples], scoring.chosen()
    if not scoring.truth:
        return [], []
    return torch.cat(scoring.truth).tolist(), torch.cat(scoring.predicted).tolist()


def evaluate(
    folder: Path | str,
    client: str | None = None,
    *,
    data: Path | str | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    base: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """What the model of ``client`` scores on the rows of the file ``data``, by default on its own rows in the run.

    ``split`` is of its own rows: "test" by default. ``folder`` is that of a run, or of a bundle, which needs ``data``.
    ``device`` is by default the one of the run's config, or the CPU for a bundle. ``columns`` replace the run's.
    Raises :class:`CoterieError` for ``data`` with a ``split``, for what :func:`coterie.load` refuses, for rows without
    labels, and for data that are no longer the run's.
    """
    if data is not None and split is not None:
        raise CoterieError(f"the rows of {data} have no splits; leave out the data or the split")
    opened, root = open_client(Path(folder), client, columns=columns, base=base, device=device), Path(folder)
    if data is not None:
        return opened.evaluate(opened.rows_of(Path(data)), str(data))
    split = split or TEST
    return opened.evaluate(own_rows(root, opened.about.client), f"its own {split} rows", split)


def open_client(
    folder: Path,
    client: str | None,
    *,
    columns: Columns | None = None,
    base: str | None = None,
    device: str | None = None,
) -> Client:
    """The bank of ``client`` in ``folder`` with a base to score it on."""
    bank, about = read_client(folder, client)
    columns = columns or reading_of(folder, about.client)[0]
    if not (folder / "config.json").is_file():
        loaded = base_of(bank, about, base, device=device or "cpu")
        seed = about.texts.seed if about.texts else 0
        size = eval_rows("auto", loaded.device)
        workplace = Workplace(loaded, task_of(about, loaded.tokenizer), seed, eval_batch_size=size)
        return Client(bank, about, workplace, columns, unclear=about.task == "generation" and about.texts is None)
    raw, root = read_config(folder)
    config = check_config(raw)
    if base:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    if device:
        config = config.on(device)
    set_threads(config)
    workplace = workplaces(config, root, {})[0]
    check_base(workplace.base, bank, about)
    return Client(bank, about, workplace, columns)


def task_of(about: About, tokenizer: Tokenizer) -> Task:
    """The task that a bundle was trained on, as far as the bundle says.

    Raises :class:`CoterieError` for a score that would be imported by the bundle's word.
    """
    texts = about.texts
    if texts is None:
        return make_task(about.task, tokenizer, about.max_length)
    if code := [name for name in texts.scores if ":" in name]:
        raise CoterieError(
            f"this bundle names the function {code[0]} as a score, and nothing is imported by a bundle's word; "
            "ask for a bundle that Coterie wrote"
        )
    dpo = Dpo(texts.beta) if texts.objective == "dpo" else None
    sampling, generates = Sampling(texts.temperature, texts.top_p), bool(texts.scores)
    return make_task(
        about.task,
        tokenizer,
        about.max_length,
        texts.max_new_tokens,
        generates,
        texts.turns,
        texts.scores,
        dpo,
        sampling,
    )


def own_rows(folder: Path, client: str) -> ClientData:
    """The rows of ``client`` in the run, loaded again. Raises :class:`CoterieError` where the run has no data here."""
    if not (folder / "config.json").is_file():
        raise CoterieError(f"{folder} holds a bundle without its run; give the rows with --data FILE")
    raw, root = read_config(folder)
    if "data" not in raw:
        raise CoterieError(f"the rows of {folder} are at its sites; give rows with --data FILE")
    clients = {of.info.id: of for of in data_of(folder, check_config(raw), root).clients}
    if client not in clients:
        raise CoterieError(f"the data of {folder} have no client {client!r}; give its rows with --data FILE")
    return clients[client]


def plain(evaluation: Evaluation) -> Mapping[str, object]:
    """The evaluation as JSON."""
    return {
        "client": evaluation.client,
        "data": evaluation.data,
        "rows": evaluation.rows,
        "metrics": dict(evaluation.metrics),
        "labels": evaluation.labels,
        "confusion": evaluation.confusion,
        "calibration_error": evaluation.calibration_error,
    }
