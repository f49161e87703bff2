"""Tiny federations on disk for end-to-end tests: a random model folder, clients' files, a config."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
from few_rounds import ranks_of

JOBS = {
    "mood": (["bad", "good"], ["awful", "great"]),
    "size": (["big", "small", "tiny"], ["huge", "little", "minute"]),
    "place": (["city", "land"], ["street", "field"]),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def classification_rows(job: str, number: int, seed: str) -> list[dict[str, Any]]:
    labels, words = JOBS[job]
    draw = random.Random(f"{job} {seed}")
    rows = []
    for i in range(number):
        label = i % len(labels)
        filler = " ".join(draw.choice(["one", "two", "three", "four"]) for _ in range(draw.randint(1, 5)))
        rows.append({"text": f"{filler} {words[label]} {draw.randint(0, 9)}", "label": labels[label]})
    return rows


def generation_rows(job: str, number: int, seed: str) -> list[dict[str, Any]]:
    return [{"prompt": row["text"], "completion": f" {row['label']}"} for row in classification_rows(job, number, seed)]


def choice_rows(job: str, number: int, seed: str) -> list[dict[str, Any]]:
    """Every row with the job's labels as its candidates, and the place of the right one."""
    labels, _ = JOBS[job]
    rows = classification_rows(job, number, seed)
    choices = [f" {label}" for label in labels]
    return [{"prompt": row["text"], "choices": choices, "label": labels.index(row["label"])} for row in rows]


def preference_rows(job: str, number: int, seed: str) -> list[dict[str, Any]]:
    """The label as the chosen answer, another one of the job as the rejected."""
    labels, _ = JOBS[job]
    return [
        {"prompt": row["text"], "chosen": f" {row['label']}", "rejected": f" {labels[labels.index(row['label']) - 1]}"}
        for row in classification_rows(job, number, seed)
    ]


ROWS = {
    "classification": classification_rows,
    "generation": generation_rows,
    "multiple_choice": choice_rows,
    "dpo": preference_rows,
}


def federation(
    folder: Path, kind: str = "classification", clients: int = 5, rows: int = 12, others: int = 6
) -> dict[str, Path]:
    """Clients ``mood-0, size-0, place-0, mood-1, ...`` with train, validation and test files under ``folder``."""
    make = ROWS[kind]
    made = {}
    for i in range(clients):
        job = list(JOBS)[i % len(JOBS)]
        place = folder / f"{job}-{i // len(JOBS)}"
        for split, share in (("train", rows), ("validation", others), ("test", others)):
            write_rows(place / f"{split}.jsonl", make(job, share, f"{split} {i}"))
        made[place.name] = place
    return made


def config(
    folder: Path,
    arch: str = "bert",
    *,
    method: str = "fedlease",
    more: str = "",
    run: str = "",
    kind: str | None = None,
    rows: int = 12,
    others: int = 6,
) -> Path:
    """A model folder, a federation and ``run.toml`` that uses both; returns the config's path.

    Every client has ``rows`` to train on, and ``others`` for validation and for the test.
    """
    kind = kind or ("classification" if arch in tiny.ENCODERS else "generation")
    tiny.folder(folder / "model", arch)
    federation(folder / "clients", kind, rows=rows, others=others)
    if kind == "dpo":
        kind = 'generation"\nobjective = "dpo'
    # Comparisons run local's config with other methods too, so its clients have one rank.
    own = {"fedlease": "warmup_rounds = 1\n", "fedamole": "experts = 8\n"}.get(method, "")
    text = f"""
[model]
path = "model"
max_length = 32
[data]
folder = "clients"
[task]
kind = "{kind}"
[lora]
rank = 2
ranks = {list(ranks_of(method) if method != "local" else ())}
dropout = 0.1
[train]
learning_rate = 0.01
epochs = 1
batch_size = 4
[method]
name = "{method}"
{own}[run]
rounds = 3
{run}
[engine]
threads = 1
device = "cpu"
{more}
"""
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path
