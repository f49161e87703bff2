"""``predict``: rows in, answers out, in order and without losing the good ones beside a bad one."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import bundles
import coterie
from coterie.adapters.bundle import read_bundle
from coterie.artifacts.evaluate import Client, open_client
from coterie.artifacts.load import Manifest, columns_of
from coterie.artifacts.predict import predict_file
from coterie.cli import main as cli
from coterie.data.examples import candidate, completion_losses
from coterie.data.rows import ChoiceRow, PromptRow
from coterie.data.settings import Columns, DataSettings
from coterie.data.tasks import Generation, MultipleChoice
from coterie.files import write_json
from coterie.inference.answers import ChoiceAnswer, LabelAnswer, TextAnswer
from coterie.inference.predict import BATCHES
from coterie.inference.records import Located
from coterie.types import CoterieError, DataError

TEXTS = ["x", "a very long day indeed " * 3, "the printer smokes", "b", "two words"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.finished(tmp_path_factory.mktemp("classifier"))


def test_labels_and_probabilities_are_those_of_the_model_in_the_rows_order(run: Path) -> None:
    north = coterie.load(run, "north")
    answers = north.predict([{"text": text} for text in TEXTS], batch_size=2)
    for text, answer in zip(TEXTS, answers, strict=True):
        assert isinstance(answer, LabelAnswer)
        with torch.no_grad():
            alone = north.model(**north.tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert list(answer.probabilities) == list(bundles.LABELS)
        assert list(answer.probabilities.values()) == pytest.approx(alone.tolist(), abs=1e-5)
        assert answer.label == bundles.LABELS[int(alone.argmax())]
    assert len({round(answer.columns()["probability"], 4) for answer in answers}) == len(TEXTS)  # type: ignore[call-overload]


def test_the_label_of_a_row_is_not_read(run: Path) -> None:
    north = coterie.load(run, "north")
    assert north.predict([{"text": "x", "label": "no such label"}]) == north.predict([{"text": "x"}])


def test_a_bad_row_of_a_program_is_named_by_its_number(run: Path) -> None:
    north = coterie.load(run, "north")
    with pytest.raises(DataError, match=r"rows\[1\]: the row has no text"):
        north.predict([{"text": "x"}, {"text": ""}])
    with pytest.raises(CoterieError, match=r"rows\[0\] is 'x'; a row is a mapping"):
        north.predict(["x"])  # type: ignore[list-item]


def test_a_window_bounds_the_rows_in_memory(run: Path) -> None:
    predictor = coterie.load(run, "north").predictor(batch_size=2)
    taken = 0

    def rows() -> Iterator[Located]:
        nonlocal taken
        for i in range(5 * BATCHES):
            taken += 1
            yield Located({"text": f"{i % 7} words"}, f"row {i}")

    answers = predictor.answers(rows())
    next(answers)
    assert taken == 2 * BATCHES
    assert sum(1 for _ in answers) == 5 * BATCHES - 1


def test_a_generators_answers_are_those_of_one_prompt_at_a_time(tmp_path: Path) -> None:
    south = coterie.load(bundles.finished(tmp_path, "generation"), "south")
    task = Generation(south.tokenizer, 128, 4)
    together = list(south.predictor(max_new_tokens=4).answers(Located({"prompt": text}, "") for text in TEXTS))
    for text, (_, answer) in zip(TEXTS, together, strict=True):
        prompt = dict(task.collate_prompts([PromptRow(text, "")]))
        plain = south.model.generate(**prompt, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
        new = plain[:, prompt["input_ids"].shape[1] :]
        assert answer == TextAnswer(south.tokenizer.batch_decode(new, skip_special_tokens=True)[0])


def test_a_choice_has_the_least_mean_loss(tmp_path: Path) -> None:
    north = coterie.load(bundles.finished(tmp_path, "multiple_choice"), "north")
    rows = [{"prompt": text, "choices": [" yes", " no, never", " so"]} for text in TEXTS]
    task = MultipleChoice(north.tokenizer, 128)
    for row, answer in zip(rows, north.predict(rows, batch_size=4), strict=True):
        assert isinstance(answer, ChoiceAnswer)
        example = task.encode(ChoiceRow(row["prompt"], tuple(row["choices"]), 0))  # type: ignore[arg-type]
        losses = []
        for number, tokens in enumerate(example.choices):
            batch = task.collate([candidate(example, number)])
            with torch.no_grad():
                losses.append(float(completion_losses(north.model(**batch.inputs).logits, batch)) / len(tokens))
        assert answer.scores == pytest.approx([-loss for loss in losses], abs=1e-4)
        assert (answer.index, answer.choice) == (losses.index(min(losses)), row["choices"][answer.index].strip())
    with pytest.raises(DataError, match="the row has no choices, and the client has no labels"):
        north.predict([{"prompt": "x"}])
    with_labels = replace(north, labels=("yes", "no"))
    (answer,) = with_labels.predict([{"prompt": "x"}])
    assert isinstance(answer, ChoiceAnswer)
    assert answer.choice in ("yes", "no")


def test_a_gate_by_row_answers_with_shared_prompts_what_whole_rows_get(tmp_path: Path) -> None:
    north = coterie.load(
        bundles.finished(tmp_path, "multiple_choice", gate="similarity", options={"scale": 1.0}, slots=1, experts=2),
        "north",
    )
    rows = [{"prompt": text, "choices": [" yes", " no, never", " so"]} for text in TEXTS]
    assert north.predictor().prompt_cache is not None
    shared, whole = north.predict(rows), replace(north, prompt_cache=None).predict(rows)
    for one, other in zip(shared, whole, strict=True):
        assert isinstance(one, ChoiceAnswer)
        assert isinstance(other, ChoiceAnswer)
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


# files ----------------------------------------------------------------------------------------------------------------


class Command:
    """``coterie predict ...`` with what it wrote: exit code, standard output, standard error."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *args: object, given: bytes = b"") -> tuple[int, str, str]:
        self.patch.setattr(sys, "argv", ["coterie", "predict", *map(str, args)])
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = self.capture.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_good_rows_of_a_file_are_answered_and_bad_ones_named(run: Path, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['{"id": 1, "text": "a b"}', "{", "", '{"id": 2}', '{"id": 3, "text": "c"}', "[]", '{"id": 4, "text": 5}']
    file.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    code, out, errors = command(run, file, "--client", "north")
    assert code == 1
    assert [row["id"] for row in rows_of(out)] == [1, 3]
    assert list(rows_of(out)[0]) == ["id", "text", "prediction", "probability", "probabilities"]
    assert [line.split(": ")[0] for line in errors.splitlines()[:-1]] == [f"{file}:{n}" for n in (2, 4, 6, 7, 8)]
    assert errors.splitlines()[-1] == "2 of 7 rows answered"


def test_every_format_gives_the_same_answers(run: Path, tmp_path: Path, command: Command) -> None:
    rows = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    code, expected, _ = command(run, tmp_path / "rows.jsonl", "--client", "north")
    assert (code, len(rows_of(expected))) == (0, len(TEXTS))
    for name in ("rows.csv", "rows.parquet"):
        assert command(run, tmp_path / name, "--client", "north")[:2] == (0, expected)
    assert command(run, "-", "--client", "north", given=lines.encode())[:2] == (0, expected)
    out = tmp_path / "new" / "answers.csv"
    assert command(run, tmp_path / "rows.jsonl", "--client", "north", "--out", out)[0] == 0
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [{**row, "probabilities": json.loads(row["probabilities"])} for row in written] == [
        {**row, "probability": str(row["probability"])} for row in rows_of(expected)
    ]
    assert [path.name for path in out.parent.iterdir()] == ["answers.csv"]


def test_a_column_that_an_answer_would_replace_is_an_error(run: Path, command: Command) -> None:
    given = b'{"text": "x", "prediction": "mine"}\n'
    code, out, errors = command(run, "-", "--client", "north", given=given)
    assert (code, out) == (2, "")
    assert "standard input:1: the row has a column 'prediction' already" in errors
    code, out, _ = command(run, "-", "--client", "north", "--prefix", "my_", given=given)
    assert code == 0
    assert rows_of(out)[0]["prediction"] == "mine"
    assert rows_of(out)[0]["my_prediction"] in bundles.LABELS


def test_a_csv_row_with_too_many_fields_costs_no_other_row(run: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "rows.csv").write_text('text,id\nx,1\ny,2,3\n"two\nlines",4\nz,5\n')
    code, out, errors = command(run, tmp_path / "rows.csv", "--client", "north")
    assert (code, [row["id"] for row in rows_of(out)]) == (1, ["1", "4", "5"])
    assert "rows.csv:3: 3 fields for 2 columns" in errors


def test_what_stops_all_is_an_error(run: Path, tmp_path: Path, command: Command) -> None:
    for args, text in (
        (["none.jsonl"], "none.jsonl: no such file"),
        (["rows.txt"], "unknown file type; the types are .jsonl, .csv, .parquet"),
        (["-", "--input-format", "parquet"], "standard input is 'parquet', which needs a file"),
        (["-", "--column", "text"], "'text' is not of the form role=name"),
        (["-", "--column", "txt=a"], "txt"),
    ):
        code, out, errors = command(run, *args, "--client", "north")
        assert (code, out) == (2, ""), args
        assert text in errors
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "not a Parquet file" in command(run, tmp_path / "bad.parquet", "--client", "north")[2]


def test_answers_that_could_not_be_written_are_refused_before_there_are_any(
    run: Path, tmp_path: Path, command: Command
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\na\n")
    for out, text in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "answers.parquet", "are written as .jsonl or .csv"),
        (rows, "is the file that is read"),
    ):
        code, shown, errors = command(run, rows, "--client", "north", "--out", out)
        assert (code, shown) == (2, "")
        assert text in " ".join(errors.split())
    assert rows.read_text() == "text\na\n"
    assert command(run, rows, "--client", "north", "--out", tmp_path / "answers", "--format", "csv")[0] == 0


def test_an_out_that_is_no_regular_file_is_written_to(run: Path, tmp_path: Path, command: Command) -> None:
    """Answers go into a pipe or a device, and to the file that a link leads to; none of these becomes a file."""
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    arguments = (run, tmp_path / "rows.jsonl", "--client", "north")
    _, expected, _ = command(*arguments)
    pipe, link, device = tmp_path / "pipe", tmp_path / "link.jsonl", tmp_path / "device.jsonl"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert command(*arguments, "--out", pipe, "--format", "jsonl")[:2] == (0, "")
    assert os.read(reader, 10_000).decode() == expected
    os.close(reader)
    link.symlink_to("answers.jsonl")
    device.symlink_to("/dev/zero")
    for out in (link, device):
        assert command(*arguments, "--out", out)[:2] == (0, "")
    assert (tmp_path / "answers.jsonl").read_text() == expected
    assert (pipe.is_fifo(), link.is_symlink(), device.is_char_device()) == (True, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "device.jsonl", "link.jsonl", "pipe", "rows.jsonl",
    ]  # fmt: skip


def test_an_out_that_is_standard_output_is_not_opened(run: Path, tmp_path: Path, command: Command) -> None:
    """It may lead to a file, which others write to as well."""
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    arguments = (run, tmp_path / "rows.jsonl", "--client", "north")
    assert command(*arguments, "--out", "/dev/stdout")[:2] == (0, command(*arguments)[1])


def test_a_rows_columns_are_those_of_the_run(tmp_path: Path, command: Command) -> None:
    run = bundles.finished(tmp_path, "generation")
    data = {"folder": "clients", "columns": {"template": "{question}\nAnswer:"}}
    config = {"data": data, "task": {"kind": "generation", "max_new_tokens": 3}}
    write_json(run / "config.json", {"root": str(tmp_path), "config": config})
    north = coterie.load(run, "north")
    assert north.predict([{"question": "why"}]) == north.predict([{"prompt": "why\nAnswer:"}], columns=Columns())
    assert north.max_new_tokens == 3
    code, out, _ = command(run, "-", "--client", "north", given=b'{"question": "why"}\n')
    assert code == 0
    code, other, _ = command(
        run, "-", "--client", "north", "--column", "template={q}\nAnswer:", given=b'{"q": "why"}\n'
    )
    assert (code, rows_of(other)[0]["prediction"]) == (0, rows_of(out)[0]["prediction"])


def test_the_columns_of_a_client_come_before_those_of_all() -> None:
    own, shared = Columns(text="own"), Columns(text="all")
    files = ({"id": "north", "train": "a.csv", "columns": own}, {"id": "south", "train": "b.csv"})
    data = DataSettings(clients=files, columns=shared)  # type: ignore[arg-type]
    assert (columns_of(data, "north", Manifest()), columns_of(data, "south", Manifest())) == (own, shared)
    dataset = DataSettings(datasets=({"source": "x", "columns": own},))  # type: ignore[arg-type]
    assert columns_of(dataset, "x-0", Manifest()) == own


def test_a_clients_columns_are_those_of_the_datasets_that_its_rows_come_from(tmp_path: Path, command: Command) -> None:
    run = bundles.finished(tmp_path)
    datasets = [{"source": "a", "columns": {"text": "body"}}, {"source": "b", "columns": {"text": "title"}}, "c"]
    config = {"data": {"datasets": datasets}, "task": {"kind": "classification"}}
    write_json(run / "config.json", {"root": str(tmp_path), "config": config})
    files = {name: {"files": {f"{name}/train.csv": "0"}} for name in ("a", "b", "c")}
    mixed = {"files": {**files["a"]["files"], **files["c"]["files"]}}
    write_json(run / "manifest.json", {"seed": 0, "clients": {"north": files["b"], "south": mixed}, "datasets": files})
    north = coterie.load(run, "north")
    assert north.columns == Columns(text="title")
    assert north.predict([{"title": "x"}]) == north.predict([{"text": "x"}], columns=Columns())
    south = coterie.load(run, "south")
    with pytest.raises(
        CoterieError, match=r"rows of south come from datasets with different columns: .*--column text="
    ):
        south.predict([{"text": "x"}])
    assert len(south.predict([{"text": "x"}], columns=Columns())) == 1
    code, out, errors = command(run, "-", "--client", "south", given=b'{"body": "why"}\n')
    assert (code, out) == (2, "")
    assert "--column text=body" in " ".join(errors.split())
    assert command(run, "-", "--client", "south", "--column", "text=body", given=b'{"body": "why"}\n')[0] == 0
    bank, about = read_bundle(run / "clients" / "south")
    with pytest.raises(CoterieError, match="rows of south come from datasets with different columns"):
        Client(bank, about, open_client(run / "clients" / "south", None).workplace, south.columns).rows_of(tmp_path)


def test_a_file_that_fails_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": "x", "prediction": 1}\n')
    predictor, out = coterie.load(run, "north").predictor(), tmp_path / "out"
    with pytest.raises(CoterieError, match="prediction"):
        predict_file(predictor, str(tmp_path / "rows.jsonl"), out / "answers.jsonl", reject=print)
    assert list(out.iterdir()) == []
