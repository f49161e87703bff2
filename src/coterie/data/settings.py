"""The config section ``[data]``: each client's own files, or datasets to split over simulated clients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coterie.data.template import pieces
from coterie.types import Section


class Columns(Section):
    """The columns' names."""

    text: str = Field(default="text", description="column of the text to classify")
    text_pair: str | None = Field(
        default=None,
        description="column of the second sentence of a pair; none: 'text_pair', if there is such a column",
    )
    label: str = Field(
        default="label", description="column of the label: its name, or its index; for choices, the right one"
    )
    prompt: str = Field(default="prompt", description="column of the prompt (generation, multiple_choice)")
    completion: str = Field(default="completion", description="column of the completion (generation)")
    messages: str | None = Field(
        default=None,
        description="column of a conversation (generation), a list of turns; none: 'messages' or 'conversations', if "
        "there is such a column and none with prompts",
    )
    chosen: str = Field(default="chosen", description="column of the preferred answer (generation)")
    rejected: str = Field(default="rejected", description="column of the other answer (generation)")
    choices: str | None = Field(
        default=None,
        description="column of the candidates, a list of texts (multiple_choice); none: 'choices', if there is such a "
        "column, else the candidates are the label names",
    )
    template: str | None = Field(
        default=None,
        description="makes the prompt from columns, as in '{text}\\nAnswer:' (generation, multiple_choice); none: the "
        "prompt has its own column",
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Columns:
        if self.template is not None:
            pieces(self.template)
            if self.prompt != "prompt":
                raise ValueError(f"give prompt ({self.prompt!r}) or template ({self.template!r}), not both")
        return self


class ClientFiles(Section):
    """One client and its files."""

    id: str = Field(description="name of the client, and of its folders: letters, digits, '.', '_' and '-' only")
    train: str = Field(description="file of training rows: .jsonl, .csv or .parquet")
    validation: str | None = Field(
        default=None, description="file of validation rows; none: taken from the training rows"
    )
    test: str | None = Field(default=None, description="file of test rows; none: taken from the training rows")
    group: str | None = Field(
        default=None, description="the client's domain, if known; used only in pictures and by oracle controls"
    )
    labels: tuple[str, ...] | None = Field(default=None, description="the client's label names; none: data.labels")
    columns: Columns | None = Field(default=None, description="this client's column names; none: data.columns")


class DatasetEntry(Section):
    """One dataset, with settings beside its source."""

    source: str = Field(description="a dataset's folder, 'hub:NAME[/CONFIG]', 'demo:JOB'")
    name: str | None = Field(default=None, description="its name, with which client ids begin; none: from the source")
    labels: tuple[str, ...] | None = Field(default=None, description="the dataset's label names; none: data.labels")
    columns: Columns | None = Field(default=None, description="this dataset's column names; none: data.columns")


class PartitionSettings(Section):
    """How datasets are split over simulated clients."""

    name: str = Field(
        default="by_dataset",
        description="how: by_dataset, natural, dirichlet, pathological, iid or quantity_skew",
    )
    clients: int | None = Field(
        default=None,
        ge=1,
        description="number of clients; by_dataset: per dataset, 1 by default; natural: for the values with the most "
        "rows",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="dirichlet, quantity_skew: the smaller, the more uneven"
    )
    labels_per_client: int | None = Field(
        default=None, ge=1, description="pathological: number of labels of each client"
    )
    column: str | None = Field(
        default=None,
        description="natural: the column with a client per value; dirichlet, pathological: its values replace the "
        "labels",
    )
    stratify: bool | None = Field(
        None, description="by_dataset: every client has the labels in the dataset's proportions"
    )
    own_labels: bool = Field(
        default=False,
        description="a client's label space has only the labels that it has rows of, not all of the dataset's",
    )


class DataSettings(Section):
    """Where rows come from: exactly one of ``folder``, ``clients`` and ``datasets``. Paths start at the config file."""

    folder: str | None = Field(
        default=None, description="folder with one folder per client: ID/train.jsonl, .csv or .parquet"
    )
    clients: tuple[ClientFiles, ...] = Field(default=(), description="the clients and the files of each")
    datasets: tuple[str | DatasetEntry, ...] = Field(
        default=(), description="datasets to split over simulated clients: folders, 'hub:NAME[/CONFIG]', 'demo:JOB'"
    )
    partition: PartitionSettings = Field(
        default=PartitionSettings(), description="how the datasets are split over clients"
    )
    labels: tuple[str, ...] | None = Field(
        default=None, description="label names, in order; none: those of the dataset, else those in each client's rows"
    )
    columns: Columns = Field(default=Columns(), description="the columns' names")
    newcomers: tuple[str, ...] = Field(
        default=(),
        description="clients that take no part in the run, for coterie compare to see how they join it afterwards",
    )
    train_rows: int = Field(default=0, ge=0, description="training rows per client; 0: all")
    validation_rows: int = Field(default=0, ge=0, description="validation rows per client; 0: all")
    test_rows: int = Field(default=0, ge=0, description="test rows per client; 0: all")
    duplicates: Literal["warn", "refuse"] = Field(
        default="warn",
        description="rows of test or validation that are training rows too, of the same client or of another: count "
        "them and warn, or refuse the data",
    )
    validation_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the training rows used for validation where there is no validation file",
    )
    test_fraction: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="share of the training rows used for testing where there is no test file",
    )

    @model_validator(mode="after")
    def _one_way(self) -> DataSettings:
        ways = {"folder": self.folder, "clients": self.clients, "datasets": self.datasets}
        given = [f"data.{name}" for name, value in ways.items() if value]
        if len(given) != 1:
            names = " and ".join(given) if given else "none"
            raise ValueError(
                f"give exactly one of data.folder, data.clients and data.datasets; this config has {names}"
            )
        if self.partition != PartitionSettings() and not self.datasets:
            raise ValueError(f"data.partition splits data.datasets; with {given[0]} every client has its own files")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("data.validation_fraction + data.test_fraction must be below 1")
        return self
