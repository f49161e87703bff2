"""Datasets by name: folders, the hub, made-up text."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie.data import sources
from coterie.data.rows import SPLITS
from coterie.data.settings import Columns
from coterie.data.sources import Dataset, demo
from coterie.types import CoterieError


def folder(path: Path, info: Any = None, **files: str) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    if info is not None:
        (path / "info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    return path


ROW = '{"text": "a", "label": 0}\n'


def load(name: str, root: Path = Path(), **columns: str) -> Dataset:
    (dataset,) = sources.load(name, root, Columns(**columns))
    return dataset


def test_every_source_keeps_the_contract() -> None:
    found = sources.sources()
    assert {"demo", "folder", "hub"} <= set(found)
    for prefix, source in found.items():
        assert prefix == source.PREFIX
        assert source.USAGE
        assert source.__doc__
        assert list(inspect.signature(source.load).parameters) == ["rest", "root", "columns"]


def test_a_folder_with_labels(tmp_path: Path) -> None:
    folder(
        tmp_path / "pets", {"labels": ["cat", "dog"], "license": "mine"}, train_jsonl=ROW, test_csv="text,label\nb,1\n"
    )
    for name in ("pets", "./pets", "folder:pets", str(tmp_path / "pets")):
        dataset = load(name, tmp_path)
        assert (dataset.name, dataset.labels) == ("pets", ("cat", "dog"))
        assert {split: len(table.records) for split, table in dataset.tables.items()} == {"train": 1, "test": 1}


@pytest.mark.parametrize("info", [None, {"labels": None}, {"source": "me"}])
def test_a_folder_need_not_name_its_labels(tmp_path: Path, info: Any) -> None:
    assert load(str(folder(tmp_path / "pets", info, train_jsonl=ROW))).labels is None


@pytest.mark.parametrize(
    ("info", "files", "says"),
    [
        (None, {"test_jsonl": ROW}, "no file of training rows; it is called train.jsonl or train.csv or train.parquet"),
        (
            None,
            {"train_jsonl": ROW, "train_csv": "text,label\na,0\n"},
            "two files of train rows, train.csv and train.jsonl",
        ),
        (None, {"train_jsonl": ROW, "dev_jsonl": ROW}, "dev.jsonl: the name is not that of a split"),
        (None, {"train_txt": "a"}, "train.txt: unknown file type"),
        ("{", {"train_jsonl": ROW}, "info.json: not a JSON object"),
        ("[]", {"train_jsonl": ROW}, "info.json: not a JSON object"),
        ({"group": 3}, {"train_jsonl": ROW}, "info.json: group is 3, not a name"),
        ({"labels": "cat"}, {"train_jsonl": ROW}, "info.json: labels is 'cat', not a list of names"),
    ],
)
def test_a_bad_folder_says_what_is_wrong(tmp_path: Path, info: Any, files: dict[str, str], says: str) -> None:
    with pytest.raises(CoterieError, match=says):
        load(str(folder(tmp_path / "pets", info, **files)))


def test_an_unknown_name_lists_what_a_dataset_may_be(tmp_path: Path) -> None:
    with pytest.raises(CoterieError) as fault:
        load("hubb:imdb", tmp_path)
    assert "hubb:imdb: no such folder" in str(fault.value)
    assert all(source.USAGE in str(fault.value) for source in sources.sources().values())


class FakeSplit:
    """As much of a ``datasets.Dataset`` as the source uses."""

    def __init__(self, records: list[dict[str, Any]], names: list[str] | None = None) -> None:
        self.records, self.column_names = records, list(records[0])
        self.features = {name: SimpleNamespace(names=names if name == "label" else None) for name in records[0]}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, column: str) -> list[Any]:
        return [record[column] for record in self.records]

    def to_list(self) -> list[dict[str, Any]]:
        return self.records


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, FakeSplit] | Exception) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any) -> Any:
        calls.append(args)
        if isinstance(splits, Exception):
            raise splits
        return splits

    exceptions = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions))
    return calls


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    split = FakeSplit([{"sentence": "a", "label": 1}], ["no", "yes"])
    hidden = FakeSplit([{"sentence": "b", "label": -1}], ["no", "yes"])
    calls = fake_hub(monkeypatch, {"train": split, "test": hidden, "extra": split})
    dataset = load("hub:nyu-mll/glue/sst2", tmp_path, text="sentence")
    assert (dataset.name, dataset.labels, set(dataset.tables)) == ("sst2", ("no", "yes"), {"train"})
    assert dataset.notes == (
        "the test split has no labels (all are -1) and was left out",
        "the split extra was not used",
    )
    assert [load(f"hub:{name}", tmp_path).name for name in ("imdb", "stanfordnlp/imdb", "./imdb")] == ["imdb"] * 3
    assert calls == [
        ("nyu-mll/glue", "sst2"),
        ("imdb", None),
        ("stanfordnlp/imdb", None),
        (str(tmp_path / "imdb"), None),
    ]


def test_a_hub_label_is_a_name_even_where_names_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": -1}]
    fake_hub(monkeypatch, {"train": FakeSplit(rows, ["1", "2"])})
    assert [record["label"] for record in load("hub:stars").tables["train"].records] == ["1", "2", -1]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (FileNotFoundError("not on the hub"), "cannot load the dataset 'hub:x': not on the hub"),
        (ValueError("no such config"), "cannot load the dataset 'hub:x': no such config"),
        ({"all": FakeSplit([{"text": "a", "label": 0}])}, "has no split 'train'; its splits are all"),
    ],
)
def test_a_hub_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch, answer: Any, says: str) -> None:
    level = logging.getLogger("huggingface_hub").level
    fake_hub(monkeypatch, answer)
    with pytest.raises(CoterieError, match=says):
        load("hub:x")
    if isinstance(answer, Exception):
        with pytest.raises(CoterieError, match=r"; for a folder write hub:\./pets/mine, or \./pets/mine for one with"):
            load("hub:pets/mine")
        with pytest.raises(CoterieError, match=r"'hub:\./x': [^;]*$"):
            load("hub:./x")
    assert logging.getLogger("huggingface_hub").level == level


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CoterieError, match=r"pip install datasets"):
        load("hub:imdb")


def test_the_real_package_reads_a_folder_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    (tmp_path / "pets").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list(
            [{"text": f"{split} {i}", "label": i % 2} for i in range(6)], features=features
        )
        rows.to_parquet(tmp_path / "pets" / f"{split}.parquet")
    dataset = load("hub:./pets", tmp_path)
    assert (dataset.name, dataset.labels) == ("pets", ("no", "yes"))
    assert dataset.tables["test"].records[1] == {"text": "test 1", "label": "yes"}


@pytest.mark.parametrize("job", list(demo.GRAMMARS))
def test_a_demo_job(job: str) -> None:
    dataset, again = load(f"demo:{job}"), load(f"demo:{job}")
    texts = [record["text"] for split in SPLITS for record in dataset.tables[split].records]
    assert {split: len(dataset.tables[split].records) for split in SPLITS} == demo.ROWS
    assert len({text.casefold() for text in texts}) == len(texts) >= 1000  # no sentence twice, whatever the split
    assert not any("{" in text or "}" in text or "  " in text for text in texts)
    assert all(dataset.tables[split].sha256 == again.tables[split].sha256 for split in SPLITS)
    assert dataset.labels is not None
    for split in SPLITS:
        counts = Counter(record["label"] for record in dataset.tables[split].records)
        assert set(counts) == set(dataset.labels)
        assert min(counts.values()) > 0.7 * max(counts.values())


def test_every_symbol_of_a_demo_grammar_is_used() -> None:
    for job, text in demo.GRAMMARS.items():
        grammar = demo._grammar(text)
        starts = {"labels", "message", "once", *grammar["labels"], *(f"aside-{label}" for label in grammar["labels"])}
        named = {symbol for options in grammar.values() for option in options for symbol in demo.SYMBOL.findall(option)}
        assert starts | named == set(grammar) | {"core", "aside", "once"}, job


def test_all_demo_jobs_at_once() -> None:
    assert [dataset.name for dataset in sources.load("demo", Path(), Columns())] == list(demo.GRAMMARS)
    with pytest.raises(CoterieError, match=r"unknown dataset 'demo:pub'; there are demo:clinic, demo:bank"):
        load("demo:pub")


def test_a_demo_job_takes_the_column_names_that_are_asked_for() -> None:
    assert load("demo:shop", text="review", label="stars").tables["train"].columns == ["review", "stars"]


def test_demo_jobs_can_be_learned_but_not_from_single_words() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    for job in demo.GRAMMARS:
        rows = demo.messages(job, 900)
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        for size, low, high in ((60, 0.5, 0.9), (500, 0.9, 1.0)):
            words = TfidfVectorizer().fit(texts[:size])
            model = LogisticRegression(C=10, max_iter=500).fit(words.transform(texts[:size]), labels[:size])
            assert low <= model.score(words.transform(texts[500:]), labels[500:]) <= high, (job, size)
