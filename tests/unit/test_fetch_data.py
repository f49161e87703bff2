"""examples/fetch_data.py: made-up files in the sources' formats, over file:// addresses, become dataset folders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coterie.data.sources.folder import read_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "fetch_data.py"
SENTENCES = b'1 a fine film\n0 caf\xc3\xa9 and a "dull" plot\n\n'
TREC = b"".join(b"%d Question %d \xf0 ?\n" % (number % 6, number) for number in range(520))
PAIRS = (
    '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said "no\tHe said no"\r\n0\t9\t3\tÀ\tB\r\n'
).encode()
SICK = (
    b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    b"1\tA dog\tA cat\t4.5\tCONTRADICTION\n4\tA dog\tA pet\t3.6\tENTAILMENT\n5\tA\tB\t1\tNEUTRAL\n"
)
CLINC = {
    "train": [["wire money", "transfer"], ["is it hot", "weather"]],
    "val": [["send cash", "transfer"]],
    "test": [["will it rain", "weather"]],
    "oos_train": [["who won", "oos"]],
}
DOMAINS = {"banking": ["transfer"], "travel": ["weather"]}
GSM = "".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(520)).encode()
FILES = {
    "sst2": dict.fromkeys(("train", "validation", "test"), SENTENCES),
    "trec": {"train": TREC, "test": b"5 How far ?\n"},
    "mrpc": dict.fromkeys(("train", "validation", "test"), PAIRS),
    "sick": dict.fromkeys(("train", "validation", "test"), SICK),
    "clinc150": {"rows": json.dumps(CLINC).encode(), "domains": json.dumps(DOMAINS).encode()},
    "gsm8k": {"train": GSM, "test": GSM[: GSM.index(b"\n") + 1]},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


class Mirror:
    """The made-up files below a folder, with their sizes and digests in the script's own list of datasets."""

    def __init__(self, script: ModuleType, folder: Path) -> None:
        self.script, self.folder, self.out = script, folder / "mirror", folder / "data"
        self.datasets = {name: self._put(script.DATASETS[name], files) for name, files in FILES.items()}

    def _put(self, dataset: Any, files: dict[str, bytes]) -> Any:
        assert dataset.files.keys() == files.keys()
        sources = {}
        for key, content in files.items():
            source = dataset.files[key]
            path = self.folder / source.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sources[key] = replace(source, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        return replace(dataset, files=sources)

    def file(self, name: str, key: str) -> Path:
        return self.folder / str(self.datasets[name].files[key].path)

    def fetch(self, *names: str) -> int:
        code = self.script.main([*names, "--out", str(self.out), "--base-url", self.folder.as_uri()], self.datasets)
        assert isinstance(code, int)
        return code

    def rows(self, name: str, split: str) -> list[dict[str, Any]]:
        lines = (self.out / name / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]


@pytest.fixture
def mirror(script: ModuleType, tmp_path: Path) -> Mirror:
    return Mirror(script, tmp_path)


def test_the_list_is_pinned(script: ModuleType) -> None:
    assert set(script.DATASETS) == set(FILES)
    sources = [source for dataset in script.DATASETS.values() for source in dataset.files.values()]
    assert len({source.path for source in sources}) == len({source.sha256 for source in sources}) == len(sources)
    for source in sources:
        commit = source.path.split("/")[2]
        assert (len(commit), len(source.sha256)) == (40, 64)
        assert not set(commit + source.sha256) - set("0123456789abcdef")
        assert source.size > 1000


def test_every_dataset_becomes_a_folder_that_coterie_reads(mirror: Mirror) -> None:
    assert mirror.fetch() == 0
    for name in FILES:
        assert sorted(path.name for path in (mirror.out / name).iterdir()) == [
            "info.json",
            "test.jsonl",
            "train.jsonl",
            "validation.jsonl",
        ]
        info = json.loads((mirror.out / name / "info.json").read_text(encoding="utf-8"))
        assert info["rows"] == {s: len(mirror.rows(name, s)) for s in ("train", "validation", "test")}
        dataset = read_folder(mirror.out / name)
        assert (None if dataset.labels is None else list(dataset.labels)) == info["labels"]
    assert sorted(path.name for path in mirror.out.iterdir()) == sorted(FILES)


def test_sentences(mirror: Mirror) -> None:
    assert mirror.fetch("sst2", "trec") == 0
    dull = 'cafÃ© and a "dull" plot'
    assert mirror.rows("sst2", "train") == [{"text": "a fine film", "label": 1}, {"text": dull, "label": 0}]
    assert mirror.rows("trec", "test") == [{"text": "How far ?", "label": 5}]
    assert {row["text"].split()[2] for row in mirror.rows("trec", "train")} == {"ð"}


def test_pairs_keep_their_quotation_marks(mirror: Mirror) -> None:
    assert mirror.fetch("mrpc", "sick") == 0
    assert mirror.rows("mrpc", "validation") == [
        {"text": 'He said "no', "text_pair": 'He said no"', "label": 1},
        {"text": "À", "text_pair": "B", "label": 0},
    ]
    assert [row["label"] for row in mirror.rows("sick", "test")] == [2, 1, 0]
    assert mirror.rows("sick", "train")[1] == {"text": "A dog", "text_pair": "A pet", "label": 1}


def test_intents_with_their_domains_and_without_the_others(mirror: Mirror) -> None:
    assert mirror.fetch("clinc150") == 0
    assert mirror.rows("clinc150", "train") == [
        {"text": "wire money", "label": 0, "domain": "banking"},
        {"text": "is it hot", "label": 1, "domain": "travel"},
    ]
    assert mirror.rows("clinc150", "validation") == [{"text": "send cash", "label": 0, "domain": "banking"}]
    assert mirror.rows("clinc150", "test") == [{"text": "will it rain", "label": 1, "domain": "travel"}]


@pytest.mark.parametrize(("name", "column", "source"), [("trec", "text", TREC), ("gsm8k", "prompt", GSM)])
def test_validation_rows_are_training_rows_drawn_with_a_fixed_seed(
    name: str, column: str, source: bytes, mirror: Mirror
) -> None:
    assert mirror.fetch(name) == 0
    train, validation = mirror.rows(name, "train"), mirror.rows(name, "validation")
    assert (len(train), len(validation)) == (20, 500)
    assert len({row[column] for row in [*train, *validation]}) == source.count(b"\n")
    drawn = [int(next(word for word in row[column].split() if word.isdigit())) for row in train]
    assert drawn[:4] == [316, 48, 386, 505]


def test_what_is_there_is_left_alone(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror.fetch("sick") == 0
    mirror.file("sick", "train").unlink()
    capsys.readouterr()
    assert mirror.fetch("sick") == 0
    assert capsys.readouterr().out == f"sick: already in {mirror.out / 'sick'}\n"


def faults(mirror: Mirror, capsys: pytest.CaptureFixture[str], *names: str) -> str:
    assert mirror.fetch(*names) == 1
    return capsys.readouterr().err


def test_a_download_that_was_cut_short(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    path = mirror.file("sick", "validation")
    path.write_bytes(SICK[:100])
    error = faults(mirror, capsys, "sick", "trec")
    assert error == f"sick: error: {path.as_uri()}: only 100 of {len(SICK)} bytes arrived; run this again\n"
    assert [folder.name for folder in mirror.out.iterdir()] == ["trec"]


@pytest.mark.parametrize("content", [SICK.replace(b"dog", b"fox"), SICK + b"6\tA\tB\t1\tNEUTRAL\n"])
def test_a_file_with_another_digest(content: bytes, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    path = mirror.file("sick", "test")
    path.write_bytes(content)
    error = faults(mirror, capsys, "sick")
    assert error.startswith(
        f"sick: error: {path.as_uri()}: this is another file than the one of this script: its SHA-256"
    )
    assert not mirror.out.exists()


def test_a_file_that_is_not_there(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    mirror.file("gsm8k", "test").unlink()
    error = faults(mirror, capsys, "gsm8k")
    assert "No such file" in error
    assert error.endswith("; check the network (or --base-url), and run this again\n")


def test_a_folder_of_someone_else_is_not_touched(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    (mirror.out / "sick").mkdir(parents=True)
    (mirror.out / "sick" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "exists and has no info.json; move it away, or give another --out" in faults(mirror, capsys, "sick")
    assert [path.name for path in (mirror.out / "sick").iterdir()] == ["mine.txt"]


def test_an_unknown_name(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        mirror.fetch("sst3")
    assert "unknown dataset 'sst3'; there are sst2, trec, mrpc, sick, clinc150, gsm8k" in capsys.readouterr().err
