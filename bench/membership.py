"""Whether a row was trained on: a small membership inference (LiRA, arXiv 2112.03570) on FedIT with and without noise.

Two clients with six intents of a bank (CLINC150) share a head, so the attacker has a whole model: what any client gets
after the last round. Of one client's 36 candidate rows each run trains on another random half. For every run, the other
runs say how sure models are of a row that they trained on and of one that they did not; the attacker knows all else.
Reported is how well it tells them apart: the area under its curve (.5: not at all), and how many rows it finds while 5%
of its claims about others are wrong. The second pair leaves out what a run says of a label as a whole, which shows how
many of its rows were trained on, and not which.

    python bench/membership.py --threads 1    # goes on where it was stopped: runs/membership has a file for each run
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, banking, datasets, table, write
from torch import Tensor

from coterie.compute.passes import logits_of
from coterie.config.load import check_config
from coterie.experiment import open_run, rounds_of
from coterie.nn.attach import attached
from coterie.ops.streams import stream
from coterie.runs.rounds import Runner
from coterie.types import Personal

INTENTS, EACH = 6, 6  # candidates of each intent
RUNS = 12
ROUNDS = 4
MODES: dict[str, dict[str, Any]] = {
    "no noise": {},
    "client, epsilon 8": {"unit": "client", "clip": 0.3, "epsilon": 8.0},
    "example, epsilon 8": {"unit": "example", "clip": 1.0, "epsilon": 8.0},
}
TARGETS = [f"layer.{n}.attention.self.{name}" for n in (4, 5) for name in ("query", "value")]


def rows_of(data: Path | None) -> list[dict[str, Any]]:
    """The candidates of both clients: first the one's, then the other's."""
    if data is None:
        return [{"text": f"intent {n % INTENTS} row {n}", "label": n % INTENTS} for n in range(2 * EACH * INTENTS)]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    by_label = [sorted((r for r in rows if r["label"] == n), key=lambda r: len(r["text"])) for n in range(INTENTS)]
    return [of[EACH * who + i] for who in range(2) for of in by_label for i in range(EACH)]


def half(number: int, rows: int) -> list[int]:
    """The candidates that a run trains on."""
    return sorted(torch.randperm(rows, generator=stream(number, "membership"))[: rows // 2].tolist())


def confidences(
    work: Path, rows: Sequence[dict[str, Any]], privacy: dict[str, Any], number: int, rounds: int, cache: Any
) -> list[float]:
    """One run: the log-odds of every candidate's label, by what a client gets after it."""
    folder, count = work / "now", len(rows) // 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mine = [rows[i] for i in half(number, count)]
    for name, of in (("one", mine), ("other", rows[count:])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of), encoding="utf-8")
    private = {**privacy, "noise_source": "seeded"} if privacy else {}
    raw = {
        "model": {"path": "minilm", "max_length": 32},
        "data": {"clients": [
            {"id": name, "train": f"{name}.jsonl", "labels": [f"intent {n}" for n in range(INTENTS)]}
            for name in ("one", "other")
        ]},
        "task": {"head": "shared"},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS},
        "train": {"learning_rate": 1e-2, "batch_size": count // 2, "epochs": 5},
        "method": {"name": "fedit"},
        "privacy": private,
        "run": {"rounds": rounds, "seed": number, "export": "last"},
        "engine": {"threads": torch.get_num_threads(), "device": "cpu", "precision": "bfloat16"},
    }  # fmt: skip
    opened = open_run(check_config(raw), folder, work, cache)
    try:
        engine, method = opened.engine, opened.method
        state = Runner(method, engine, rounds_of(opened.config), folder).run()
        (info,) = (client for client in engine.clients if client.id == "one")
        bank = method.bank(method.configure(state, [info], rounds + 1)["one"], info, Personal({}))
        return _odds(engine.workplace, bank, rows[:count])  # type: ignore[attr-defined]
    finally:
        opened.engine.close()


def _odds(workplace: Any, bank: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    from coterie.data.rows import TextRow

    batch = workplace.task.collate([workplace.task.encode(TextRow(row["text"], row["label"])) for row in rows])
    with attached(workplace.base.model, bank), torch.no_grad():
        logits = logits_of(workplace, batch.inputs).double()
    mine = logits.gather(1, batch.labels.unsqueeze(1))
    others = logits.scatter(1, batch.labels.unsqueeze(1), -torch.inf).logsumexp(1, keepdim=True)
    return [float(value) for value in (mine - others)[:, 0]]


def attack(odds: Tensor, inside: Tensor) -> tuple[float, float]:
    """The area under the attacker's curve, and its share of rows at 5% false claims. Shapes: [runs, rows] both."""
    scores = torch.zeros_like(odds)
    for run in range(len(odds)):
        rest = torch.arange(len(odds)) != run
        values, among = odds[rest], inside[rest]
        means = [torch.where(of, values, 0).sum(0) / of.sum(0).clamp_min(1) for of in (among, ~among)]
        spread = (values - torch.where(among, means[0], means[1])).square().mean().sqrt().clamp_min(1e-6)
        scores[run] = ((odds[run] - means[1]).square() - (odds[run] - means[0]).square()) / (2 * spread**2)
    members, others = scores[inside], scores[~inside]
    above = (members[:, None] > others[None]).double() + 0.5 * (members[:, None] == others[None]).double()
    return float(above.mean()), float((members > others.quantile(0.95)).double().mean())


def less_labels(odds: Tensor) -> Tensor:
    """What is left of the odds beside how sure a run is of each label on average, which its members share."""
    by_label = odds.view(len(odds), INTENTS, EACH)
    return (by_label - by_label.mean(2, keepdim=True)).flatten(1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: examples/data or ../shared/data)")
    parser.add_argument("--work", type=Path, help="a file for each run (default: runs/membership)")
    parser.add_argument("--runs", type=int, default=RUNS)


def main() -> None:
    chosen = arguments(__doc__ or "", options)
    runs, rounds = (3, 1) if chosen.quick else (chosen.runs, ROUNDS)
    found, cache = [], {}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if chosen.quick else (chosen.work or Path("runs/membership")).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows = rows_of(None if chosen.quick else banking(datasets(chosen.data).resolve(), work / "banking"))
        odds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
        for number in range(runs):
            for mode, privacy in MODES.items():
                path = work / f"{mode.replace(', ', '-').replace(' ', '-')}-{number}.json"
                if not path.exists():
                    path.write_text(json.dumps(confidences(work, rows, privacy, number, rounds, cache)))
                odds[mode].append(json.loads(path.read_text()))
    count = len(rows) // 2
    inside = torch.zeros(runs, count, dtype=torch.bool)
    for number in range(runs):
        inside[number, half(number, count)] = True
    for mode, of in odds.items():
        area, share = attack(torch.tensor(of, dtype=torch.float64), inside)
        of_labels = attack(less_labels(torch.tensor(of, dtype=torch.float64)), inside)
        row = {"mode": mode, "area": area, "found_at_5%": share, "area_less_labels": of_labels[0]}
        found.append({**row, "found_less_labels": of_labels[1], "runs": runs})
    table("membership inference", found)
    write("membership", chosen, {"rounds": rounds, "candidates": count, "modes": MODES, "rows": found})


if __name__ == "__main__":
    main()
