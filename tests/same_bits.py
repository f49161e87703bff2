"""Do two versions of Coterie compute the same? Runs every method, task and engine in both, and compares all bits.

    python tests/same_bits.py OLD NEW [--only PATTERN] [--engines local,batched,flower-sim] [--keep FOLDER]

OLD and NEW are checkouts (folders that hold ``src/coterie``). A case is a run of three rounds on a tiny random model;
its name is METHOD-TASK-ENGINE, and ``--only`` keeps those that match a regular expression. Compared are the tensors
and the JSON of all checkpoints, clients' states, experts and bundles, the data manifest, and every logged metric.
Times, memory, versions and texts for people are left out. Exits with 1 where anything differs.

Both versions need the dependencies of the Python that runs this. Take it after a change that must not alter results.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TASKS = {"classification": "bert", "generation": "llama", "multiple_choice": "llama"}  # and the tiny model of each
PAPER: dict[str, Any] = {"embed": "after", "embed_rows": "held_out", "inertia": 0.0, "prototype": "experts"}
METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedit": {},
    "fedlease": {"distance": "B", "warmup_rounds": 1, "max_experts": 3},
    "fedamole": {"experts": 6, **PAPER},
    "smartfed": {"router": "paper", "active": 3, "fresh_rank": 2},
}
ENGINES = {"local": {}, "batched": {"clients_per_batch": 3}, "flower-sim": {"name": "flower-sim"}}
VARIANTS: dict[str, dict[str, Any]] = {  # further cases of the reference engine
    "fedlease-shared": {"method": {"name": "fedlease", **METHODS["fedlease"]}, "task": {"head": "shared"}},
    "fedlease-cohort": {"method": {"name": "fedlease", **METHODS["fedlease"]}, "run": {"cohort": 0.7}},
    "fedlease-own": {
        "method": {"name": "fedlease", "distance": "B", "expert_start": "own", "router": "personal", "warmup_rounds": 1}
    },
    "fedamole-static": {"method": {"name": "fedamole", "experts": 6, "assignment": "static", **PAPER}},
    "smartfed-signed": {"method": {"name": "smartfed", "fresh_rank": 2}},
    "smartfed-trained": {
        "method": {"name": "smartfed", "router": "paper", "active": 3, "train_experts": ["two"], "drop_below": 0.1}
    },
    "fedit-bfloat16": {"method": {"name": "fedit"}, "engine": {"precision": "bfloat16"}},
}
IGNORED = {
    "notes",
    "seconds",
    "energy",
    "joules",
    "joules_from",
    "site_seconds",
    "at",
    "peak_memory_bytes",
    "machine",
    "versions",
    "coterie",
    "report",
}
ADAPTER = (  # what an adapter's config says; versions differ in which of PEFT's defaults they write down
    *("peft_type", "task_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("modules_to_save", "base_model_name_or_path", "inference_mode"),
)
EVENTS = ("start_state", "round", "evaluation")
SUPPORT = Path(__file__).parent / "support"


def main() -> None:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--engines", default=",".join(ENGINES), help="with commas between them")
    parser.add_argument("--keep", type=Path, help="a folder for models, rows and runs, used again by the next call")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_inputs(options.new, work)
        names = [n for n in cases() if re.search(options.only, n) and n.rsplit("-", 1)[1] in _engines(options.engines)]
        for side, tree in (("old", options.old), ("new", options.new)):
            drive(tree, work, side, names)
        faults = {name: differences(work / "old" / name, work / "new" / name) for name in names}
    for name, found in faults.items():
        print(f"{name:45} {'same' if not found else 'DIFFERS'}")
        print("".join(f"    {line}\n" for line in found[:10]), end="")
    print(f"{len(names)} cases, {sum(map(bool, faults.values()))} differ")
    sys.exit(any(faults.values()) or not names)


def _engines(text: str) -> set[str]:
    return {name.replace("flower-sim", "flowersim") for name in text.split(",")}


def cases() -> dict[str, dict[str, Any]]:
    """The config of every case, without its model and data."""
    found: dict[str, dict[str, Any]] = {}
    for method, task, engine in itertools.product(METHODS, TASKS, ENGINES):
        config = {"method": {"name": method, **METHODS[method]}, "engine": ENGINES[engine]}
        found[f"{method}-{task}-{engine.replace('-', '')}"] = {**config, "task": {"kind": task}}
    for name, config in VARIANTS.items():
        found[f"{name}-local"] = {**config, "task": {"kind": "classification", **config.get("task", {})}}
    return found


def config_of(name: str, work: Path) -> dict[str, Any]:
    """The whole config of a case."""
    config = cases()[name]
    kind = config["task"]["kind"]
    arch = TASKS[kind]
    if config["method"]["name"] == "smartfed":
        config["method"]["pool"] = str(work / f"pool-{arch}")
    return {
        **config,
        "model": {"path": str(work / arch), "max_length": 32},
        "data": {"folder": str(work / kind)},
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
        "train": {"learning_rate": 0.01, "batch_size": 4, "epochs": 1},
        "run": {"rounds": 3, "seed": 3, "keep_checkpoints": 9, **config.get("run", {})},
        "engine": {"threads": 1, **config.get("engine", {})},
    }


def make_inputs(tree: Path, work: Path) -> None:
    """Models, pools and clients' rows, made once with the new version."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "made").exists():
        subprocess.run([sys.executable, __file__, "--make", str(work)], env=_environment(tree), check=True)
        (work / "made").touch()


def _make(work: Path) -> None:
    sys.path.insert(0, str(SUPPORT))
    import shutil

    import pools
    import sites
    import tiny

    for arch in set(TASKS.values()):
        tiny.folder(work / arch, arch)
        shutil.copytree(pools.for_tiny(arch), work / f"pool-{arch}", dirs_exist_ok=True)
    for kind in TASKS:
        sites.federation(work / kind, kind, clients=6, rows=10)


def drive(tree: Path, work: Path, side: str, names: list[str]) -> None:
    """Run the cases that are not there yet with the version in ``tree``, a process for each engine."""
    for _, group in itertools.groupby(sorted(names, key=lambda n: n.rsplit("-", 1)[1]), lambda n: n.rsplit("-", 1)[1]):
        some = [name for name in group if side == "new" or not (work / side / name / "summary.json").exists()]
        if some:
            command = [sys.executable, __file__, "--drive", str(work), side, *some]
            subprocess.run(command, env=_environment(tree), check=True)


def _drive(work: Path, side: str, names: list[str]) -> None:
    import shutil

    from coterie.__main__ import main as coterie

    for name in names:
        folder, path = work / side / name, work / f"{name}.json"
        shutil.rmtree(folder, ignore_errors=True)
        path = work / side / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(toml(config_of(name, work)), encoding="utf-8")
        sys.argv = ["coterie", "run", str(path), "--out", str(folder)]
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                coterie()
        except SystemExit as end:
            if end.code:
                print(f"{side}: {name} ended with {end.code}", file=sys.stderr)


def toml(config: Mapping[str, Any]) -> str:
    """A config of sections as TOML; JSON's scalars and lists are TOML's too."""
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in config.items()
    )


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree.resolve() / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# what is compared ----------------------------------------------------------------------------------------------------


def differences(old: Path, new: Path) -> list[str]:
    """What differs between two run folders."""
    sides = [dict(contents(folder)) for folder in (old, new)]
    if not all(any(name.startswith("summary") for name in side) for side in sides):
        return ["a run did not finish"]
    found = [f"only in {'old' if name in sides[0] else 'new'}: {name}" for name in sorted(sides[0].keys() ^ sides[1])]
    return found + [name for name in sorted(sides[0].keys() & sides[1]) if sides[0][name] != sides[1][name]]


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """Everything in a run folder that must not differ, by name."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            yield from _tensors(name, path.read_bytes())
        elif path.suffix == ".ckpt":
            yield from _tensors(name, path.read_bytes().split(b"\n", 3)[3])
        elif name in ("summary.json", "manifest.json"):
            yield from _leaves(name, json.loads(path.read_text(encoding="utf-8")))
        elif name.endswith("adapter_config.json"):
            settings = json.loads(path.read_text(encoding="utf-8"))
            yield from _leaves(name, {key: settings.get(key) for key in ADAPTER})
        elif name == "metrics.jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                event = json.loads(line)
                if event["event"] in EVENTS:
                    yield from _leaves(f"{name} {event['event']} {event['round']}", event)


def _tensors(name: str, blob: bytes) -> Iterator[tuple[str, Any]]:
    """Each tensor of a safetensors blob with its dtype, shape and bytes, and the JSON beside them."""
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    for key, value in (header.pop("__metadata__", None) or {}).items():
        text = value[8:] if key == "coterie" else value  # a checksum of it and the tensors stands before it
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        yield from _leaves(f"{name} {key}", text)
    for key, about in header.items():
        start, end = about["data_offsets"]
        yield f"{name} {key}", (about["dtype"], about["shape"], blob[8 + size + start : 8 + size + end])


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in IGNORED:
                yield from _leaves(f"{name}/{key}", item)
    elif isinstance(value, list) and value and not isinstance(value[0], (int, float, str)):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}/{i}", item)
    else:
        yield name, value


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        _make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--drive"]:
        _drive(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
