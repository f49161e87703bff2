"""Rows of multiple choice: candidates of their own or the label names, prompts made by a template, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.files import read_table, table_of
from coterie.data.parse import parse
from coterie.data.rows import SPLITS, ChoiceRow, FederatedData, PromptRow, Row, TextRow, label_of
from coterie.data.settings import Columns, DataSettings
from coterie.data.template import columns_of, fill
from coterie.types import CoterieError, TaskKind

RECORDS = [
    {"prompt": "2 + 2 =", "choices": [" four", " five"], "label": 0},
    {"prompt": "Tea or", "choices": [" coffee", ' "mate", cold', " not"], "label": 2},
]
ROWS = (ChoiceRow("2 + 2 =", (" four", " five"), 0), ChoiceRow("Tea or", (" coffee", ' "mate", cold', " not"), 2))


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(
    records: list[dict[str, Any]], labels: list[str] | None = None, kind: TaskKind = "multiple_choice", **columns: str
) -> tuple[tuple[Row, ...], tuple[str, ...] | None]:
    found, names = parse({"train": table_of("t", records)}, Columns(**columns), kind, labels)
    return found["train"], names


# candidates of the rows' own -----------------------------------------------------------------------------------------


def test_the_three_types_of_file_hold_the_same(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", RECORDS)
    lines = [f"{r['prompt']},{quoted(json.dumps(r['choices']))},{r['label']}" for r in RECORDS]
    (tmp_path / "a.csv").write_text("prompt,choices,label\n" + "\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        found, names = parse({"train": read_table(tmp_path / name)}, Columns(), "multiple_choice", None)
        assert found == {"train": ROWS}, name
        assert names is None


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize(
    ("choices", "label", "names", "answer"),
    [
        ([" yes", " no"], 1, None, 1),
        ([" yes", " no"], 1.0, None, 1),
        ([" yes", " no"], "1", None, 1),
        ([" yes", " no"], "no", None, 1),
        ([" yes", " no"], " no", None, 1),
        (["1", "2", "0"], 1, None, 1),  # a number is a place
        (["1", "2", "0"], "0", None, 2),  # text is a candidate
        (["an elm", "a fir"], "B", ["A", "B", "C"], 1),  # a label name is a place
        (["B", "A"], "B", ["A", "B"], 0),  # but a candidate first of all
        (["an elm", "a fir"], 1, ["A", "B"], 1),
    ],
)
def test_the_label_is_a_place_or_a_text(choices: list[str], label: Any, names: list[str] | None, answer: int) -> None:
    found, _ = rows([{"prompt": "x", "choices": choices, "label": label}], names)
    assert found == (ChoiceRow("x", tuple(choices), answer),)
    assert label_of(found[0]) == answer


def test_candidates_that_all_rows_share_are_the_label_names() -> None:
    same = [{"prompt": "x", "choices": [" a", " b"], "label": label} for label in (0, 1)]
    turned = [same[0], {**same[1], "choices": [" b", " a"]}]
    assert rows(same)[1] == ("a", "b")
    assert rows(turned)[1] is None
    tables = {"train": table_of("one", same), "test": table_of("two", turned)}
    assert parse(tables, Columns(), "multiple_choice", None)[1] is None


def test_columns_may_have_other_names() -> None:
    record = {"question": "Is it?", "endings": ["it is", "no"], "gold": 1}
    found, _ = rows([record], prompt="question", choices="endings", label="gold")
    assert found == (ChoiceRow("Is it?", ("it is", "no"), 1),)


GOOD = {"prompt": "x", "choices": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": 2}, r"t:2: the label 2 is out of range for 2 candidates; 0 is the first"),
        ({"label": -1}, r"t:2: the label -1 is out of range for 2 candidates"),
        ({"label": "c"}, r"t:2: the label 'c' is not one of the candidates a, b"),
        ({"label": "2", "choices": ["0", "1"]}, r"t:2: the label '2' is not one of the candidates 0, 1"),
        ({"label": "C", "labels": ["A", "B", "C"]}, r"t:2: the label C is out of range for 2 candidates"),
        ({"label": [0]}, r"t:2: the label \[0\] is neither text nor an integer"),
        ({"label": None}, r"t:2: the row has no label"),
        ({"prompt": " "}, r"t:2: the row has no prompt"),
        ({"prompt": 3}, r"t:2: prompt is 3, not text"),
        ({"choices": None}, r"t:2: the row has no choices"),
        ({"choices": []}, r"t:2: choices holds 0 candidate\(s\); give two or more"),
        ({"choices": ["a"]}, r"t:2: choices holds 1 candidate\(s\)"),
        ({"choices": ["a", " "]}, r"t:2: choices\[1\] is empty"),
        ({"choices": ["a", 5]}, r"t:2: choices\[1\] is 5, not text"),
        ({"choices": ["a", "b", " a"]}, r"t:2: a candidate is listed twice in choices, a, b,  a"),
        ({"choices": "a, b"}, r"t:2: choices is 'a, b', not a list of texts"),
        ({"choices": {"text": ["a", "b"]}}, r"t:2: choices is \{'text': .*\}, not a list of texts"),
    ],
)
def test_a_bad_row_says_where(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    labels = change.get("labels")
    path = jsonl(tmp_path / "t", [GOOD, {**GOOD, **change}]).rename(tmp_path / "t.jsonl")
    with pytest.raises(CoterieError, match=says.replace("t:2", r"t\.jsonl:2")):
        parse({"train": read_table(path)}, Columns(), "multiple_choice", labels)


def test_a_column_of_candidates_that_was_asked_for_is_needed() -> None:
    with pytest.raises(
        CoterieError, match=r"t: no column 'options'; its columns are prompt, choices, label\. Set data"
    ):
        rows([GOOD], choices="options")
    with pytest.raises(CoterieError, match=r"t: no column 'prompt'; .*Set data.columns.prompt, or data.columns.templ"):
        rows([{"text": "x", "choices": ["a", "b"], "label": 0}])


# label names as candidates -------------------------------------------------------------------------------------------

TEXTS = [{"text": "a", "text_pair": "b", "label": "no"}, {"text": "c", "text_pair": "d", "label": "yes"}]


def test_without_candidates_they_are_the_label_names() -> None:
    template = "{text}, so {text_pair}?\nAnswer:"
    found, names = rows(TEXTS, template=template)
    prompts = ("a, so b?\nAnswer:", "c, so d?\nAnswer:")
    assert found == tuple(ChoiceRow(prompt, (" no", " yes"), i) for i, prompt in enumerate(prompts))
    assert names == ("no", "yes")
    named, names = rows([{**record, "label": i} for i, record in enumerate(TEXTS)], ["yes", "no"], template=template)
    assert named == tuple(ChoiceRow(prompt, (" yes", " no"), i) for i, prompt in enumerate(prompts))
    assert names == ("yes", "no")


def test_a_space_parts_prompt_and_label_name_where_there_is_none() -> None:
    records = [{"prompt": prompt, "label": "x"} for prompt in ("ab", "ab\n", "ab ")]
    found, _ = rows(records, ["x", "y"])
    assert [row.choices for row in found if isinstance(row, ChoiceRow)] == [(" x", " y"), ("x", "y"), ("x", "y")]
    written, _ = rows([{**records[0], "choices": ["x", "y"]}])
    assert written == (ChoiceRow("ab", ("x", "y"), 0),), "candidates of the row's own are left as they are"


def test_label_names_that_make_no_choice() -> None:
    record = {"prompt": "x", "label": "a"}
    with pytest.raises(CoterieError, match=r"t: the candidates are the label names, two or more .*, not 'a'; .*labels"):
        rows([record, record])
    with pytest.raises(CoterieError, match=r"two or more and none of them empty, not 'a', ''"):
        rows([record], ["a", ""])
    with pytest.raises(CoterieError, match=r"t, row 1: the label 'a' is not one of b, c"):
        rows([record], ["b", "c"])


# templates -----------------------------------------------------------------------------------------------------------


def test_a_template_is_filled_with_columns_as_they_are_called() -> None:
    assert fill("{{{a b}}} {n}: {a b}{{}}", {"a b": "{x}", "n": "1"}) == "{{x}} 1: {x}{}"
    assert columns_of("{a.b}{c[0]} {d} {c[0]}") == ["a.b", "c[0]", "d"]
    found, _ = rows([{"say it": "hi", "n": 3, "completion": "yo"}], kind="generation", template="{say it} {n}")
    assert found == (PromptRow("hi 3", "yo"),)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{text", r"expected '\}' before end of string; write \{\{ and \}\} for braces"),
        ("text}", r"Single '\}' encountered.*write \{\{ and \}\} for braces"),
        ("{} {text}", r"\{\} is not a column"),
        ("{text!r}", r"\{text!r\} is not a column; put only a column's name in braces"),
        ("{text:>9}", r"\{text:>9\} is not a column"),
        ("Answer:", r"'Answer:' names no column, so all prompts would be the same"),
        ("{{text}}", r"names no column, so all"),
    ],
)
def test_a_template_that_cannot_be_is_an_error_of_the_config(template: str, says: str) -> None:
    with pytest.raises(CoterieError, match=r"(?s)\[data\] columns: .*" + says):
        check_config({"data": {"folder": "x", "columns": {"template": template}}})


@pytest.mark.parametrize(
    ("template", "kind", "says"),
    [
        (
            "{text} {body}",
            "multiple_choice",
            r"t: no column 'body' for data\.columns\.template; its columns are text, te",
        ),
        ("{text} {label}", "multiple_choice", r"template has \{label\}, which puts the answer into the prompt"),
        ("{text} {completion}", "generation", r"template has \{completion\}, which puts the answer into the prompt"),
        ("{text}", "classification", r"template is for prompts, and task\.kind is classification; leave it out"),
        ("{text} {more}", "multiple_choice", r"t, row 2: the row has no more"),
        ("{text} {list}", "multiple_choice", r"t, row 1: list is \['x'\], neither text nor a number"),
    ],
)
def test_a_template_that_does_not_fit_the_rows(template: str, kind: TaskKind, says: str) -> None:
    records = [{**TEXTS[0], "list": ["x"], "completion": "z"}, {**TEXTS[1], "list": ["x"], "completion": "z"}]
    if "more" in template:
        records[0]["more"] = "x"
    with pytest.raises(CoterieError, match=says):
        rows(records, kind=kind, template=template)


def test_a_prompt_comes_from_one_place() -> None:
    with pytest.raises(CoterieError, match=r"give prompt \('question'\) or template \('\{text\}'\), not both"):
        check_config({"data": {"folder": "x", "columns": {"prompt": "question", "template": "{text}"}}})


def test_settings_come_back_from_their_dump() -> None:
    made = DataSettings.model_validate({"folder": "a", "columns": {"template": "{text}\n", "choices": "options"}})
    assert DataSettings.model_validate_json(made.model_dump_json()) == made


# clients -------------------------------------------------------------------------------------------------------------


def load(root: Path, kind: TaskKind = "multiple_choice", **settings: Any) -> FederatedData:
    return load_data(DataSettings.model_validate_json(json.dumps(settings)), kind, 0, root)


def dataset(root: Path, name: str, labels: tuple[str, ...], number: int = 40, **columns: str) -> None:
    records = [{"text": f"{name} {i}", "label": labels[i % len(labels)], **columns} for i in range(number)]
    jsonl(root / name / "train.jsonl", records)


PROMPT = {"template": "{text} is"}


def test_datasets_of_classification_are_split_by_their_labels(tmp_path: Path) -> None:
    dataset(tmp_path, "pets", ("cat", "dog", "hen"), 60)
    partition = {"name": "pathological", "clients": 3, "labels_per_client": 2}
    settings: dict[str, Any] = {"datasets": ["pets"], "columns": PROMPT}
    whole = load(tmp_path, **settings, partition=partition)
    texts = load(tmp_path, "classification", datasets=["pets"], partition=partition)
    for one, other in zip(whole.clients, texts.clients, strict=True):
        assert one.info == other.info
        assert one.info.labels == ("cat", "dog", "hen")
        for split in SPLITS:
            expected = [
                ChoiceRow(f"{row.text} is", (" cat", " dog", " hen"), row.label)
                for row in other.splits[split]
                if isinstance(row, TextRow)
            ]
            assert list(one.splits[split]) == expected
            assert expected
    assert {**whole.manifest, "kind": ""} == {**texts.manifest, "kind": ""}

    own = load(tmp_path, **settings, partition={**partition, "own_labels": True})
    for client, before in zip(own.clients, whole.clients, strict=True):
        assert len(client.info.labels or ()) == 2
        for split in SPLITS:
            for row, old in zip(client.splits[split], before.splits[split], strict=True):
                assert isinstance(row, ChoiceRow)
                assert isinstance(old, ChoiceRow)
                assert row.choices == tuple(f" {name}" for name in client.info.labels or ())
                assert row.choices[row.answer] == old.choices[old.answer]

    single = {**partition, "labels_per_client": 1, "own_labels": True}
    with pytest.raises(CoterieError, match=r"client client-0 has rows of only one label, (cat|dog|hen).*own_labels"):
        load(tmp_path, **settings, partition=single)


def test_one_client_may_mix_datasets_whose_candidates_differ(tmp_path: Path) -> None:
    dataset(tmp_path, "pets", ("cat", "dog"))
    dataset(tmp_path, "moods", ("glad", "sad", "mad"))
    federation = load(
        tmp_path, datasets=["pets", "moods"], columns=PROMPT, partition={"name": "dirichlet", "clients": 2, "alpha": 9}
    )
    for client in federation.clients:
        assert client.info.labels is None
        choices = {row.choices for row in client.splits["train"] if isinstance(row, ChoiceRow)}
        assert choices == {(" cat", " dog"), (" glad", " mad", " sad")}
    with pytest.raises(CoterieError, match="would mix datasets with different labels"):
        load(tmp_path, "classification", datasets=["pets", "moods"], partition={"name": "iid", "clients": 2})
    with pytest.raises(CoterieError, match=r"own_labels: the rows of client client-0 have no labels in common"):
        load(
            tmp_path,
            datasets=["pets", "moods"],
            columns=PROMPT,
            partition={"name": "iid", "clients": 2, "own_labels": True},
        )


def test_rows_with_candidates_of_their_own_have_no_labels_to_split_by(tmp_path: Path) -> None:
    made = [{"prompt": f"p {i}", "choices": [f"a{i}", f"b{i}"], "label": i % 2, "by": "xy"[i % 2]} for i in range(40)]
    jsonl(tmp_path / "own" / "train.jsonl", made)
    partition = {"name": "dirichlet", "clients": 2, "alpha": 1.0}
    with pytest.raises(CoterieError, match=r"candidates of their own, have no labels to split by; set data\.partition"):
        load(tmp_path, datasets=["own"], partition=partition)
    federation = load(tmp_path, datasets=["own"], partition={**partition, "column": "by"})
    assert {client.info.labels for client in federation.clients} == {None}
    found = {(r.prompt, r.choices, r.answer) for c in federation.clients for s in SPLITS for r in c.splits[s]}  # type: ignore[union-attr]
    assert found == {(r["prompt"], tuple(r["choices"]), r["label"]) for r in made}  # type: ignore[arg-type]
