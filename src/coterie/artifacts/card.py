"""The model card of an export: README.md with the metadata that the hub reads, and what a reader wants to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from coterie.adapters.about import About
from coterie.artifacts.static import Cost
from coterie.files import write_atomic
from coterie.methods.findings import Clusters, find
from coterie.nn.locate import folder_here, hub_name
from coterie.ops.metrics import Metrics
from coterie.report.tables import show, words
from coterie.runs.summary import ClientSummary, Summary
from coterie.types import CoterieError

CARD = "README.md"
Form = Literal["static", "merged", "bundle"]
_LIBRARY = {"static": "peft", "merged": "transformers", "bundle": "coterie"}
_PIPELINE = {"classification": "text-classification", "generation": "text-generation", "multiple_choice": None}
_AUTO = {"classification": "AutoModelForSequenceClassification"}
_ON_HUB = {"accuracy": "accuracy", "macro_f1": "f1", "matthews": "matthews_correlation", "rouge_l": "rouge"}


@dataclass(frozen=True)
class Facts:
    """What a card is made from: ``summary`` is the run's, None for a bundle alone; ``command`` made the export."""

    about: About
    form: Form
    command: str
    summary: Summary | None = None
    cost: Cost | None = None
    rank: int | None = None
    language: Sequence[str] = ()

    @property
    def client(self) -> ClientSummary | None:
        """The client's rows and metrics in the run."""
        return self.summary.clients.get(self.about.client) if self.summary else None

    @property
    def metrics(self) -> Metrics:
        """What the exported form scores on the client's test rows, as far as it is known."""
        if self.cost is not None:
            return self.cost.static
        routed = self.client.test if self.client and self.form == "bundle" else {}
        return {name: value for name, value in routed.items() if math.isfinite(value)}


def write_card(folder: Path, facts: Facts) -> Path:
    """Write the card to ``folder`` and return its path."""
    path = folder / CARD
    write_atomic(path, str(card_of(facts)).encode())
    return path


def card_of(facts: Facts) -> ModelCard:
    """The card. Its metadata are those of :class:`huggingface_hub.ModelCardData`."""
    data = _metadata(facts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts)}")


def _metadata(facts: Facts) -> ModelCardData:
    about = facts.about
    licence = licence_of(about)
    return ModelCardData(
        base_model=hub_name(about.base),
        base_model_relation="finetune" if facts.form == "merged" else "adapter",
        library_name=_LIBRARY[facts.form],
        pipeline_tag=_PIPELINE[about.task],
        language=list(facts.language) or None,
        license=licence,
        tags=["coterie", "federated-learning", "lora", about.method.replace("_", "-")],
        metrics=[_ON_HUB[name] for name in facts.metrics if name in _ON_HUB] or None,
        model_name=_name(facts) if facts.metrics else None,
        eval_results=_results(facts) or None,
    )


def _results(facts: Facts) -> list[EvalResult]:
    task = _PIPELINE[facts.about.task] or "multiple-choice"
    data = facts.cost.data if facts.cost else "its own test rows"
    return [
        EvalResult(
            task, "private", f"{facts.about.client}: {data}", _ON_HUB[name], round(value, 6), metric_name=words(name)
        )
        for name, value in facts.metrics.items()
        if name in _ON_HUB
    ]


def licence_of(about: About) -> str | None:
    """The licence in the metadata of the base's own card, where that is on this machine."""
    for base in (about.base_path, hub_name(about.base)):
        folder = folder_here(base) if base else None
        card = folder / CARD if folder else None
        if card is None or not card.is_file():
            continue
        try:
            licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        except (ValueError, OSError, yaml.YAMLError):  # a card that cannot be read names no licence
            continue
        if isinstance(licence, str) and licence:
            return licence
    return None


def check_card(folder: Path) -> None:
    """Raises :class:`CoterieError` for a card that is missing, or whose metadata huggingface_hub does not read."""
    path = folder / CARD
    if not path.is_file():
        raise CoterieError(f"{folder} has no {CARD}; make it with `coterie export`")
    try:
        ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as fault:
        raise CoterieError(f"the metadata of {path} are not those of a model card: {fault}; export it again") from fault


def _name(facts: Facts) -> str:
    return f"{facts.about.client or 'newcomer'} by {facts.about.method}"


def _body(facts: Facts) -> str:
    about, licence = facts.about, licence_of(facts.about)
    which = "which validation chose" if about.export == "best" else "the last one"
    what = {
        "static": f"one static LoRA of rank {facts.rank}, which weighs the experts as they are weighed on average",
        "merged": "the base's weights with one static LoRA added to them",
        "bundle": "all its experts, its router and its head",
    }[facts.form]
    parts = [
        f"# {_name(facts)}",
        f"The model of the client `{about.client}` of a federation, trained with {about.method} by Coterie: {what}. "
        f"It is of round {about.round}, {which}.",
        "## Use",
        f"```python\n{_usage(facts)}\n```",
        *_scores(facts),
        *_federation(facts),
        "## Base and licence",
        f"The base is `{hub_name(about.base)}`"
        + (f" (SHA-256 of the adapted weights {about.base_sha256})" if about.base_sha256 else "")
        + (f", licence {licence}." if licence else ". Its licence is not known here: see its own card."),
        "## Made by",
        f"```\n{facts.command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _usage(facts: Facts) -> str:
    base, auto = hub_name(facts.about.base), _AUTO.get(facts.about.task, "AutoModelForCausalLM")
    labels = f", num_labels={len(facts.about.labels)}" if facts.about.labels and auto in _AUTO.values() else ""
    match facts.form:
        case "bundle":
            return 'import coterie\n\nmodel = coterie.load("THIS FOLDER")'
        case "merged":
            return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("THIS FOLDER")'
        case "static":
            return (
                f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
                f'base = {auto}.from_pretrained("{base}"{labels})\n'
                'model = PeftModel.from_pretrained(base, "THIS FOLDER")'
            )


def _scores(facts: Facts) -> list[str]:
    if facts.cost is not None:
        rows = [
            (words(name), show(facts.cost.routed[name], name), show(value, name))
            for name, value in facts.cost.static.items()
        ]
        return ["## Metrics", f"On {facts.cost.data}, {facts.cost.rows} rows:", _table(("", "routed", "static"), rows)]
    if not facts.metrics:
        return []
    return [
        "## Metrics",
        "On the client's own test rows:",
        _table(("", "value"), [(words(name), show(value, name)) for name, value in facts.metrics.items()]),
    ]


def _federation(facts: Facts) -> list[str]:
    parts = []
    if facts.client:
        c = facts.client
        counts = (("train", c.num_train), ("validation", c.num_validation), ("test", c.num_test))
        parts += ["## Data", _table(("split", "rows"), [(split, str(number)) for split, number in counts])]
        if facts.about.labels:
            parts.append(f"Labels, in the order of the logits: {', '.join(facts.about.labels)}.")
    if facts.summary:
        clusters = find(facts.summary.findings, Clusters)
        parts += ["## Federation", f"{len(facts.summary.clients)} clients, {facts.summary.rounds} rounds."]
        if clusters and facts.about.client in clusters.members:
            own = clusters.members[facts.about.client]
            others = [c for c, number in clusters.members.items() if number == own and c != facts.about.client]
            shared = f"with {len(others)} other clients" if others else "alone"
            parts.append(f"The clients form {clusters.number} clusters. This one is in cluster {own}, {shared}.")
    return parts


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
