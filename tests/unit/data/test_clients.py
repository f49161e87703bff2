"""From ``[data]`` to clients: their rows, their label spaces, and the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coterie.data.clients import load_data
from coterie.data.rows import SPLITS, FederatedData, PromptRow, TextRow
from coterie.data.settings import DataSettings
from coterie.types import CoterieError, DataError, TaskKind


def table(path: Path, rows: int, labels: tuple[Any, ...] = ("no", "yes"), **columns: str) -> Path:
    """A JSONL file whose texts are unique within the test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": f"{path} {i}", "label": labels[i % len(labels)], **columns} for i in range(rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(root: Path, kind: TaskKind = "classification", seed: int = 0, **settings: Any) -> FederatedData:
    return load_data(DataSettings.model_validate_json(json.dumps(settings)), kind, seed, root)


def texts(federation: FederatedData, client: int, split: str) -> list[str]:
    return [row.text for row in federation.clients[client].splits[split] if isinstance(row, TextRow)]


def all_texts(federation: FederatedData) -> list[str]:
    return [text for c in range(len(federation.clients)) for split in SPLITS for text in texts(federation, c, split)]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two datasets with 40, 12 and 16 rows, of 2 and 3 labels."""
    for name, labels in (("cats", ("no", "yes")), ("dogs", ("old", "new", "odd"))):
        for split, rows in (("train", 40), ("validation", 12), ("test", 16)):
            table(tmp_path / name / f"{split}.jsonl", rows, labels)
    return tmp_path


def test_a_folder_of_clients(tmp_path: Path) -> None:
    for name, labels in (("b", ("x", "y")), ("a", (2, 10))):
        for split, rows in (("train", 8), ("validation", 4), ("test", 6)):
            table(tmp_path / "clients" / name / f"{split}.jsonl", rows, labels)
    (tmp_path / "clients" / ".hidden").mkdir()
    (tmp_path / "clients" / "README").write_text("not a client")
    (tmp_path / "clients" / "b" / "info.json").write_text('{"group": "letters"}')
    federation = load(tmp_path, folder="clients")
    infos = [client.info for client in federation.clients]
    assert [(i.id, i.labels, i.num_train, i.num_validation, i.num_test) for i in infos] == [
        ("a", ("2", "10"), 8, 4, 6),
        ("b", ("x", "y"), 8, 4, 6),
    ]
    assert [info.group for info in infos] == [None, "letters"]
    assert federation.clients[1].splits["train"][1] == TextRow(f"{tmp_path}/clients/b/train.jsonl 1", 1)


def test_clients_with_files_of_their_own(tmp_path: Path) -> None:
    table(tmp_path / "north" / "a.jsonl", 10, ("x", "y"))
    table(tmp_path / "north" / "b.jsonl", 5, ("x", "y"))
    (tmp_path / "south.csv").write_text("body,stars\nfine,1\nbad,0\nworse,0\n")
    federation = load(
        tmp_path,
        validation_fraction=0,
        test_fraction=0,
        clients=[
            {"id": "north", "train": "north/a.jsonl", "test": "north/b.jsonl", "group": "big"},
            {
                "id": "south",
                "train": "south.csv",
                "labels": ["bad", "good"],
                "columns": {"text": "body", "label": "stars"},
            },
        ],
    )
    north, south = federation.clients
    assert (north.info.group, north.info.num_train, north.info.num_validation, north.info.num_test) == ("big", 10, 0, 5)
    assert south.splits == {
        "train": (TextRow("fine", 1), TextRow("bad", 0), TextRow("worse", 0)),
        "validation": (),
        "test": (),
    }
    assert south.info.labels == ("bad", "good")


def test_missing_splits_are_cut_from_the_training_rows(tmp_path: Path) -> None:
    table(tmp_path / "a.jsonl", 50)
    settings = {"clients": [{"id": "a", "train": "a.jsonl"}], "validation_fraction": 0.1, "test_fraction": 0.3}
    one, same, other = (load(tmp_path, seed=seed, **settings) for seed in (0, 0, 1))
    assert one.manifest["clients"]["a"]["rows"] == {"train": 30, "validation": 5, "test": 15}
    assert len(set(all_texts(one))) == 50
    assert all_texts(one) == all_texts(same)
    assert set(texts(one, 0, "test")) != set(texts(other, 0, "test"))


def test_even_a_small_file_gives_every_split_a_row(tmp_path: Path) -> None:
    table(tmp_path / "a.jsonl", 3)
    federation = load(tmp_path, clients=[{"id": "a", "train": "a.jsonl"}])
    assert federation.manifest["clients"]["a"]["rows"] == {"train": 1, "validation": 1, "test": 1}


def test_fewer_rows_of_own_files_can_be_asked_for(tmp_path: Path) -> None:
    table(tmp_path / "a.jsonl", 50)
    settings = {"clients": [{"id": "a", "train": "a.jsonl"}], "train_rows": 20, "test_rows": 4}
    federation = load(tmp_path, **settings)
    assert federation.manifest["clients"]["a"]["rows"] == {"train": 20, "validation": 5, "test": 4}
    assert len(set(all_texts(federation))) == 29
    with pytest.raises(CoterieError, match=r"client a has 35 train rows, and data\.train_rows is 36; lower it"):
        load(tmp_path, **{**settings, "train_rows": 36})


def test_datasets_are_split_by_dataset(pets: Path) -> None:
    federation = load(
        pets,
        datasets=["cats", "dogs"],
        train_rows=15,
        validation_rows=4,
        test_rows=8,
        partition={"name": "by_dataset", "clients": 2},
    )
    infos = [client.info for client in federation.clients]
    assert [(i.id, i.group) for i in infos] == [
        ("cats-0", "cats"),
        ("cats-1", "cats"),
        ("dogs-0", "dogs"),
        ("dogs-1", "dogs"),
    ]
    assert {(i.num_train, i.num_validation, i.num_test) for i in infos} == {(15, 4, 8)}
    assert [i.labels for i in infos] == [("no", "yes")] * 2 + [("new", "odd", "old")] * 2
    assert len(set(all_texts(federation))) == 4 * 27
    assert all("/cats/test" in text for c in (0, 1) for text in texts(federation, c, "test"))
    assert federation.manifest["unused"] == {"train": 20, "validation": 8, "test": 0}


def test_a_dataset_without_a_test_file_is_cut_before_it_is_split(tmp_path: Path) -> None:
    table(tmp_path / "cats" / "train.jsonl", 100)
    federation = load(tmp_path, datasets=["cats"], partition={"name": "iid", "clients": 4})
    rows = [entry["rows"] for entry in federation.manifest["clients"].values()]
    assert [sum(r[split] for r in rows) for split in SPLITS] == [70, 10, 20]
    assert len(set(all_texts(federation))) == 100
    with pytest.raises(CoterieError, match=r"need 24, but there are 20; lower data\.test_rows"):
        load(tmp_path, datasets=["cats"], test_rows=6, partition={"name": "iid", "clients": 4})
    with pytest.raises(CoterieError, match=r"but there are 0; lower .* or raise data\.test_fraction"):
        load(tmp_path, datasets=["cats"], test_rows=6, test_fraction=0, partition={"name": "iid", "clients": 4})


def test_own_labels(tmp_path: Path) -> None:
    path = tmp_path / "talk" / "train.jsonl"
    path.parent.mkdir()
    domains = {"bank": ("card", "loan"), "home": ("lamp", "door", "card")}
    records = [
        {"text": f"{d} {i}", "label": labels[i % len(labels)], "domain": d}
        for d, labels in domains.items()
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings: dict[str, Any] = {"datasets": ["talk"], "partition": {"name": "natural", "column": "domain"}}
    assert {client.info.labels for client in load(tmp_path, **settings).clients} == {("card", "door", "lamp", "loan")}
    settings["partition"]["own_labels"] = True
    federation = load(tmp_path, **settings)
    assert [(c.info.id, c.info.group, c.info.labels) for c in federation.clients] == [
        ("bank", "bank", ("card", "loan")),
        ("home", "home", ("card", "door", "lamp")),
    ]
    names = {record["text"]: record["label"] for record in records}
    for client in federation.clients:
        for row in (row for split in SPLITS for row in client.splits[split]):
            assert isinstance(row, TextRow)
            assert client.info.labels is not None
            assert client.info.labels[row.label] == names[row.text]


def test_generation_over_several_datasets(tmp_path: Path) -> None:
    for name in ("sums", "tales"):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {i}", "completion": "so"} for i in range(40)]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"name": "dirichlet", "clients": 3, "alpha": 0.3, "column": "dataset"}
    federation = load(tmp_path, "generation", datasets=["sums", "tales"], partition=partition)
    assert {client.info.labels for client in federation.clients} == {None}
    rows = [row for client in federation.clients for split in SPLITS for row in client.splits[split]]
    assert len({row.prompt for row in rows if isinstance(row, PromptRow)}) == 80


def test_the_manifest_says_who_got_what_and_is_json(pets: Path) -> None:
    partition = {"name": "pathological", "clients": 2, "labels_per_client": 1}
    federation = load(pets, datasets=["cats"], train_rows=10, partition=partition)
    manifest = json.loads(json.dumps(federation.manifest))
    assert manifest == federation.manifest
    assert manifest["partition"] == {
        **partition,
        "own_labels": False,
        "rows": {"train": 10, "validation": 0, "test": 0},
    }
    for client in federation.clients:
        entry = manifest["clients"][client.info.id]
        assert entry["rows"] == {"train": 10, "validation": 6, "test": 8}
        assert [list(counts.values()) for counts in entry["label_counts"].values()] == [[10], [6], [8]]
        assert entry["labels"] == ["no", "yes"]
        assert entry["files"] == {
            f"cats/{split}.jsonl": hashlib.sha256((pets / "cats" / f"{split}.jsonl").read_bytes()).hexdigest()
            for split in SPLITS
        }
    assert manifest["datasets"]["cats"]["rows"] == {"train": 40, "validation": 12, "test": 16}


def test_the_seed_decides_and_nothing_else(pets: Path) -> None:
    settings: dict[str, Any] = {"datasets": ["cats"], "partition": {"name": "dirichlet", "clients": 3, "alpha": 0.5}}
    one, same, other = (load(pets, seed=seed, **settings) for seed in (0, 0, 1))
    assert one == same
    assert one.clients != other.clients


def test_datasets_may_have_columns_and_names_of_their_own(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_text(f"a,b,y\none,{split},0\nthree,four,1\n")
    entry = {
        "source": ".",
        "name": "pairs",
        "columns": {"text": "a", "text_pair": "b", "label": "y"},
        "labels": ["n", "y"],
    }
    (client,) = load(tmp_path, datasets=[entry]).clients
    assert (client.info.id, client.info.labels) == ("pairs-0", ("n", "y"))
    assert client.splits["train"] == (TextRow("one", 0, "train"), TextRow("three", 1, "four"))


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_of_the_training_rows_is_no_test_split(tmp_path: Path, link: bool) -> None:
    folder = tmp_path / "all" / "a"
    train, copy = table(folder / "train.jsonl", 6), folder / "test.jsonl"
    copy.symlink_to(train) if link else copy.write_bytes(train.read_bytes())
    with pytest.raises(CoterieError, match=r"train.jsonl is a copy of .*test.jsonl; use different rows"):
        load(tmp_path, folder="all")


def test_clients_may_be_tested_on_the_same_rows_and_not_trained(tmp_path: Path) -> None:
    for client in "ab":
        table(tmp_path / "all" / client / "train.jsonl", 6)
        (tmp_path / "all" / client / "test.jsonl").write_text('{"text": "common", "label": "no"}\n')
    assert [client.info.num_test for client in load(tmp_path, folder="all").clients] == [1, 1]
    (tmp_path / "all/b/train.jsonl").write_bytes((tmp_path / "all/a/train.jsonl").read_bytes())
    with pytest.raises(CoterieError, match=r"b/train.jsonl is a copy of .*a/train.jsonl"):
        load(tmp_path, folder="all")


CLIENT = {"id": "a", "train": "a.jsonl"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clients": [{"id": "a", "train": "gone.csv"}]}, "client a: .*gone.csv: no such file"),
        ({"clients": [{"id": "a", "train": "empty.jsonl"}]}, "client a: .*empty.jsonl: no rows; add some$"),
        ({"clients": [{"id": "a", "train": "a.txt"}]}, "client a: .*a.txt: unknown file type"),
        ({"clients": [{"id": "../a", "train": "a.jsonl"}]}, "'../a' is not a valid folder name"),
        ({"clients": [{"id": "", "train": "a.jsonl"}]}, "'' is not a valid folder name"),
        ({"clients": [CLIENT, {"id": "A", "train": "b.jsonl"}]}, "two clients are called A, a"),
        ({"clients": [CLIENT, {"id": "b", "train": "./a.jsonl"}]}, "a.jsonl is given twice"),
        ({"clients": [{**CLIENT, "test": "a.jsonl"}]}, "a.jsonl is given twice"),
        ({"clients": [{**CLIENT, "labels": ["yes"]}]}, "a.jsonl:1: the label 'no' is not one of yes"),
        ({"clients": [CLIENT], "labels": ["no"]}, "a.jsonl:2: the label 'yes' is not one of no"),
        ({"clients": [CLIENT], "columns": {"text": "body"}}, "no column 'body'; its columns are text, label"),
        ({"clients": [{"id": "one", "train": "one.jsonl"}]}, "client one: 1 training row.* too few to cut"),
        ({"folder": "nowhere"}, "nowhere: no such folder; data.folder holds"),
        ({"folder": "hollow"}, "hollow: no folders; data.folder holds"),
        ({"folder": "odd"}, "'no good' is not a valid folder name"),
        ({"datasets": ["cats", "./cats"]}, "two datasets are called 'cats'"),
        ({"datasets": ["cats", {"source": "cats", "name": "c"}]}, "cats/.*jsonl is given twice"),
        ({"datasets": [{"source": "demo", "name": "d"}]}, "'demo' stands for 4 datasets"),
        ({"datasets": ["cats"], "partition": {"name": "iid"}}, "needs data.partition.clients"),
        (
            {"datasets": ["cats", "dogs"], "partition": {"name": "iid", "clients": 2}},
            "would mix datasets with different labels",
        ),
        ({"datasets": ["cats"], "train_rows": 41}, "need 41 of 'cats', but there are 40; lower data.train_rows"),
    ],
)
def test_faults_say_what_and_where(pets: Path, settings: dict[str, Any], says: str) -> None:
    table(pets / "a.jsonl", 10)
    table(pets / "b.jsonl", 10)
    table(pets / "one.jsonl", 1)
    table(pets / "odd" / "no good" / "train.jsonl", 10)
    (pets / "hollow").mkdir()
    (pets / "empty.jsonl").write_text("")
    with pytest.raises(CoterieError, match=says):
        load(pets, **settings)


def test_a_label_of_more_digits_than_python_reads_is_text(tmp_path: Path) -> None:
    long = "9" * 5000
    for split in ("train", "test"):
        table(tmp_path / "clients" / "a" / f"{split}.jsonl", 4, ("2", long))
    assert load(tmp_path, folder="clients").clients[0].info.labels == ("2", long)


@pytest.mark.parametrize("bad", ["\x1b[31m", "\u202e", "\n", "\x00"])
def test_labels_and_groups_that_are_not_shown_are_refused(bad: str, tmp_path: Path) -> None:
    records = [{"text": f"text {i}", "label": f"yes{bad}." if i % 2 else "no"} for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code = f"U\\+{ord(bad[0]):04X}"
    with pytest.raises(DataError, match=f"^client a: the label 'yes.*' has the character {code}, .*; rename it$"):
        load(tmp_path, clients=[{"id": "a", "train": "a.jsonl"}])
    table(path, 20)
    with pytest.raises(DataError, match=f"^client a: the group 'g.*' has the character {code}, .*; rename it$"):
        load(tmp_path, clients=[{"id": "a", "train": "a.jsonl", "group": f"g{bad}"}])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give exactly one of data.folder, data.clients and data.datasets; this config has none"),
        ({"folder": "a", "datasets": ["b"]}, "this config has data.folder and data.datasets"),
        ({"folder": "a", "partition": {"name": "iid"}}, "with data.folder every client has its own files"),
        ({"folder": "a", "test_fraction": 0.6, "validation_fraction": 0.5}, "must be below 1"),
        ({"folder": "a", "train_rows": -1}, "greater than or equal to 0"),
        ({"folder": "a", "rows": 1}, "Extra inputs"),
        ({"clients": [{"id": "a"}]}, "train"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DataSettings.model_validate_json(json.dumps(settings))


def test_settings_come_back_from_their_dump() -> None:
    for settings in ({"folder": "a"}, {"datasets": ["a"], "partition": {"name": "iid", "clients": 2}}):
        made = DataSettings.model_validate_json(json.dumps(settings))
        assert DataSettings.model_validate_json(made.model_dump_json()) == made


def test_every_setting_is_described() -> None:
    models, seen = [DataSettings], 0
    while models:
        model = models.pop()
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            seen += 1
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                models.append(field.annotation)
    assert seen > 20


@pytest.mark.parametrize("ways", [{"folder": "clients"}, {"datasets": ["clients/a"]}])
def test_a_client_with_one_label_is_refused(ways: dict[str, Any], tmp_path: Path) -> None:
    table(tmp_path / "clients" / "a" / "train.jsonl", 12, ("yes",))
    with pytest.raises(DataError, match=r"client a.* has only the label yes, .* data.labels"):
        load(tmp_path, **ways)
    assert load(tmp_path, labels=["no", "yes"], **ways).clients[0].info.labels == ("no", "yes")


def test_clients_with_one_of_a_datasets_labels_have_no_label_space_of_their_own(pets: Path) -> None:
    how = {"name": "pathological", "clients": 2, "labels_per_client": 1}
    assert load(pets, datasets=["cats"], partition=how).clients[0].info.labels == ("no", "yes")
    with pytest.raises(DataError, match="has only the label"):
        load(pets, datasets=["cats"], partition={**how, "own_labels": True})


# duplicates ----------------------------------------------------------------------------------------------------------


def texts_in(path: Path, texts: list[str], **columns: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": ["no", "yes"][i % 2], **columns} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_to_measure_on_that_are_elsewhere_too_are_counted(tmp_path: Path) -> None:
    for client, splits in {
        "a": {"train": ["1", "2", "3", "3"], "validation": ["4", "5", "1"], "test": ["3", "3", "4", "8", "9"]},
        "b": {"train": ["6", "7", "8"], "validation": ["10", "11"], "test": ["12", "8", "8 "]},
        "c": {"train": ["20", "21"], "validation": ["22", "23"], "test": ["24", "25"]},
    }.items():
        for split, own in splits.items():
            texts_in(tmp_path / "clients" / client / f"{split}.jsonl", own)
    found = load(tmp_path, folder="clients")
    assert found.manifest["duplicates"] == {
        "in all": {"test in others' train": 1, "test in train": 3, "test in validation": 1, "validation in train": 1},
        "a": {"test in others' train": 1, "test in train": 2, "test in validation": 1, "validation in train": 1},
        "b": {"test in train": 1},
    }
    (note,) = found.notes
    assert "1 test in others' train, 3 test in train, 1 test in validation, 1 validation in train (at a, b)" in note
    with pytest.raises(DataError, match=r"3 test in train, .* \(at a, b\); remove them, or set data.duplicates"):
        load(tmp_path, folder="clients", duplicates="refuse")


@pytest.mark.parametrize(("newcomers", "said"), [(["a"], "a takes"), (["c", "a"], "a, c take")])
def test_clients_that_take_no_part_are_noted(newcomers: list[str], said: str, tmp_path: Path) -> None:
    for client in "abc":
        for split in ("train", "validation", "test"):
            texts_in(tmp_path / client / f"{split}.jsonl", [f"{client} {split} {i}" for i in range(4)])
    (note,) = load(tmp_path, folder=".", newcomers=newcomers).notes
    assert note.startswith(f"{said} no part ([data] newcomers); coterie compare lets ")
    assert load(tmp_path, folder=".").notes == ()


@pytest.mark.parametrize("column", ["text_pair", "other"])
def test_a_row_is_the_same_where_all_that_a_model_reads_is(column: str, tmp_path: Path) -> None:
    for split, value in (("train", "x"), ("validation", "y"), ("test", "z")):
        texts_in(tmp_path / "a" / f"{split}.jsonl", [f"{i}" for i in range(4)], **{column: value})
    same = load(tmp_path, folder=".").manifest.get("duplicates", {})
    assert bool(same) == (column == "other")


def test_data_without_duplicates_have_no_word_of_them(pets: Path) -> None:
    found = load(pets, datasets=["cats", "dogs"], duplicates="refuse")
    assert "duplicates" not in found.manifest
    assert found.notes == ()


def test_prompts_with_another_completion_are_other_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completion": f" {i}"} for i in range(6)]
    for split, own in (("train", rows[:3]), ("validation", rows[3:4]), ("test", rows[2:])):
        path = tmp_path / "a" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
    found = load(tmp_path, "generation", folder=".").manifest["duplicates"]
    assert found == {key: {"test in train": 1, "test in validation": 1} for key in ("in all", "a")}


def spelled(folder: Path, labels: tuple[str, str]) -> None:
    rows = [{"text": f"{folder.name} {i}", "label": labels[i % 2]} for i in range(20)]
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("other", [("NO", "yes"), ("n o", "y"), ("no", "YES")])
@pytest.mark.parametrize("kind", ["folder", "datasets"])
def test_clients_that_spell_a_label_differently_are_refused(kind: str, other: tuple[str, str], tmp_path: Path) -> None:
    spelled(tmp_path / "all" / "a", ("no", "yes") if " " not in other[0] else ("n  o", "y"))
    spelled(tmp_path / "all" / "b", other)
    settings: dict[str, Any] = {"folder": "all"} if kind == "folder" else {"datasets": ["all/a", "all/b"]}
    with pytest.raises(DataError, match=r"client b.*: the label '.*' differs from client a.*'s '.*' only in capital"):
        load(tmp_path, **settings)
    for name in "ab":  # both listed: they are different labels
        labels = sorted({json.loads(x)["label"] for x in (tmp_path / "all" / name / "train.jsonl").open()})
        (tmp_path / "all" / name / "info.json").write_text(json.dumps({"labels": labels}))
    assert len({client.info.labels for client in load(tmp_path, **settings).clients}) == 2


def test_a_client_may_list_two_spellings_of_its_own(tmp_path: Path) -> None:
    spelled(tmp_path / "all" / "a", ("no", "NO"))
    (client,) = load(tmp_path, folder="all", labels=["no", "NO"]).clients
    assert client.info.labels == ("no", "NO")
