"""Every key is described, a wrong one is answered with the nearest, and two configs tell in what they differ."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from coterie.config.describe import describe_config, describe_site, value_in_words
from coterie.config.load import check_config, differences, load_config, load_site, override
from coterie.config.sections import Config, EngineSettings
from coterie.methods.registry import methods
from coterie.types import CoterieError, Part

DATA = {"data": {"folder": "clients"}}


# the reference -------------------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model that an annotation holds, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in models_in(inner)]


def keys_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf below ``model`` as (dotted name without list marks, field)."""
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        for section in inner:
            yield from keys_of(section, f"{path}{name}.")
        if not inner or typing.get_origin(field.annotation) is tuple:
            yield f"{path}{name}", field


ROWS = list(describe_config())
BY_KEY = {row[0].replace("[]", ""): row for row in ROWS}


def test_every_key_of_every_section_is_described_once() -> None:
    expected = {key for key, _ in keys_of(Config) if key != "method"} | {"method.name"}
    expected |= {f"method[{name}].{key}" for name, kind in methods().items() for key, _ in keys_of(kind.Settings)}
    assert len(expected) > 60
    assert "data.clients.columns.text_pair" in expected
    assert BY_KEY.keys() == expected
    assert len(ROWS) == len(expected)
    assert {key.partition("[]")[0] for key, *_ in ROWS if "[]" in key} == {"data.clients", "data.datasets"}


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    inside = ("typing", "pathlib", "pydantic", "coterie.", "Undefined", "<class")
    bad = [
        row
        for row in ROWS
        if not all(row) or len(row[3]) < 6 or row[3].endswith(".") or any(word in " ".join(row) for word in inside)
    ]
    assert bad == []


def test_defaults_are_those_of_a_config_that_says_nothing() -> None:
    plain = check_config(DATA).model_dump()
    seen = 0
    for key, (_, _, default, _) in BY_KEY.items():
        section, _, name = key.partition(".")
        if section in ("model", "task", "lora", "train", "run", "engine"):
            value = reduce(lambda found, part: found[part], name.split("."), plain[section])
            assert default == value_in_words(value), key
            seen += 1
    assert seen > 30
    assert BY_KEY["method.name"][2] == '"fedlease"'
    assert BY_KEY["method[fedlease].warmup_rounds"][2] == "5"
    assert BY_KEY["data.clients.id"][2] == BY_KEY["data.datasets.source"][2] == "required"


def test_types_and_defaults_are_in_the_words_of_toml() -> None:
    expected = {
        "model.dtype": ("float32 | bfloat16", '"float32"'),
        "model.gradient_checkpointing": ("true or false", "false"),
        "lora.alpha": ("number", "16.0"),
        "lora.targets": ("list of text", "[]"),
        "data.labels": ("list of text, or none", "none"),
        "data.clients": ("list of section", "[]"),
        "data.datasets": ("list of text or section", "[]"),
        "engine.clients_per_batch": ("whole number, or auto", "1"),
        "method[fedlease].experts_per_cluster": ("whole number, or auto", "1"),
    }
    assert {key: BY_KEY[key][1:3] for key in expected} == expected
    site = {row[0]: row for row in describe_site()}
    parts = ("A", "B", "router", "embedding", "head")
    assert site["policy.upload"][1:3] == (f"list of {' | '.join(parts)}", json.dumps(parts))
    assert site["policy.settings"][1:3] == ("section", "{}")


def test_the_settings_of_one_method_alone() -> None:
    for name in methods():
        others = {key for key, *_ in ROWS if key.startswith("method[") and not key.startswith(f"method[{name}]")}
        assert [row for row in ROWS if row[0] not in others] == list(describe_config(name))
    with pytest.raises(CoterieError, match=r"unknown method 'fedleaze'; the methods are .*fedlease"):
        list(describe_config("fedleaze"))


# wrong keys and values -----------------------------------------------------------------------------------------------

CLIENT = {"id": "north", "train": "a.jsonl"}
WRONG = {  # what is wrong: (the config, what the error says)
    "section": ({**DATA, "trian": {}}, r"^unknown key 'trian'; did you mean 'train'\?$"),
    "key": ({**DATA, "run": {"round": 3}}, r"^\[run\] unknown key 'round'; did you mean 'rounds'\?$"),
    "nested": (
        {"data": {"folder": "x", "columns": {"lable": "y"}}},
        r"^\[data\.columns\] unknown key 'lable'; did you mean 'label'\?$",
    ),
    "in a list": (
        {"data": {"clients": [CLIENT, {**CLIENT, "tset": "b"}]}},
        r"^\[data\.clients\.1\] unknown key 'tset'; did you mean 'test'\?$",
    ),
    "in a section that may be left out": (
        {"data": {"clients": [{**CLIENT, "columns": {"txt": "t"}}]}},
        r"^\[data\.clients\.0\.columns\] unknown key 'txt'; did you mean 'text'\?$",
    ),
    "in a list of names or sections": (
        {"data": {"datasets": ["a", {"source": "b", "nam": "c"}]}},
        r"^\[data\.datasets\.1\] unknown key 'nam'; did you mean 'name'\?$",
    ),
    "of the method": (
        {**DATA, "method": {"name": "fedlease", "linkages": "single"}},
        r"^\[method\] unknown key 'linkages'; did you mean 'linkage'\?$",
    ),
    "of another method": (
        {**DATA, "method": {"name": "local", "linkage": "single"}},
        r"^\[method\] 'linkage' is a setting of fedlease, and not of local; move it to \[methods\.fedlease\], ",
    ),
    "nothing is near": ({**DATA, "lora": {"zzz": 1}}, r"^\[lora\] unknown key 'zzz'; the keys are rank, ranks, alpha"),
    "type": ({**DATA, "run": {"rounds": "ten"}}, r"^\[run\] rounds: .*integer.* \(found 'ten'\)$"),
    "choice": ({**DATA, "train": {"schedule": "no"}}, r"^\[train\] schedule: .*'constant', 'linear' or 'cosine'.*'no'"),
    "range": ({**DATA, "lora": {"dropout": 1.0}}, r"^\[lora\] dropout: .*less than 1 \(found 1\.0\)$"),
    "no section": ({**DATA, "run": 3}, r"^run = 3 .*must be a section$"),
    "method is no section": ({**DATA, "method": "fedit"}, r"^method = 'fedit' .*must be a section$"),
    "two faults": (
        {**DATA, "run": {"rounds": 0, "sed": 1}},
        r"^\[run\] rounds: .*\(found 0\); \[run\] unknown key 'sed'; did you mean 'seed'\?$",
    ),
    "a number as text": ({**DATA, "lora": {"rank": "4"}}, r"^\[lora\] rank: .*valid integer \(found '4'\)$"),
    "true for a number": ({**DATA, "lora": {"rank": True}}, r"^\[lora\] rank: .*valid integer \(found True\)$"),
    "true for 1": ({**DATA, "method": {"min_experts": True}}, r"^\[method\] min_experts: .*integer \(found True\)$"),
    "of train": ({**DATA, "train": {"epochs": "2"}}, r"^\[train\] epochs: .*valid integer \(found '2'\)$"),
    "a method's": ({**DATA, "method": {"warmup_rounds": "1"}}, r"^\[method\] warmup_rounds: .*integer \(found '1'\)$"),
    "of data": ({"data": {"folder": "x", "train_rows": "3"}}, r"^\[data\] train_rows: .*integer \(found '3'\)$"),
    "infinite": ({**DATA, "lora": {"alpha": float("inf")}}, r"^\[lora\] alpha: .*finite number \(found inf\)$"),
    "no number": ({**DATA, "lora": {"alpha": float("nan")}}, r"^\[lora\] alpha: .*finite number \(found nan\)$"),
    "a rank of none": ({**DATA, "lora": {"ranks": {"a": 0}}}, r"^\[lora\] ranks: a rank must be at least 1$"),
    "ranks of another kind": ({**DATA, "lora": {"ranks": 4}}, r"^\[lora\] ranks: "),
    "ranks for one rank": (
        {**DATA, "lora": {"ranks": [2, 4]}, "method": {"name": "fedit"}},
        r"^\[lora\] ranks: all clients of fedit have the same rank; leave ranks out, .* different ones: .*flexlora",
    ),
    "a date": ({**DATA, "run": {"seed": date(2026, 1, 2)}}, r"^\[run\] seed: .*integer \(found '2026-01-02'\)$"),
    "half of a character": ({"data": {"folder": "\udcff"}}, r"^the config cannot be read: .*U\+DCFF, half of a surr"),
    "sites": (
        {**DATA, "federation": {"sites": ["North", "south", "north"]}},
        r"^\[federation\] sites: ids must differ by more than capital letters, not North, north",
    ),
    "nothing": ({}, r"^data: Field required$"),
    "two ways": ({"data": {"folder": "x", "datasets": ["y"]}}, r"^data: give exactly one .*folder and data\.datasets"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_says_where_and_what(name: str) -> None:
    raw, message = WRONG[name]
    with pytest.raises(CoterieError, match=message):
        check_config(raw)


def test_a_close_miss_of_any_key_is_answered_with_that_key() -> None:
    seen = 0
    for key, _ in keys_of(Config):
        *sections, name = key.split(".")
        if len(sections) != 1 or sections[0] == "data":
            continue
        for typo in (name[:-1], f"{name}s", name[0] + name):
            if typo in Config.model_fields[sections[0]].annotation.model_fields:  # type: ignore[union-attr]
                continue
            with pytest.raises(CoterieError, match=rf"\[{sections[0]}\] unknown key '{typo}'; did you mean '{name}'\?"):
                check_config({**DATA, sections[0]: {typo: 1}})
            seen += 1
    assert seen > 90


# overrides and differences -------------------------------------------------------------------------------------------


def test_overrides_are_toml_or_plain_text() -> None:
    raw = {"run": {"rounds": 3}, **DATA}
    before = json.dumps(raw)
    texts = ["run.rounds=5", "lora.targets=['query', \"value\"]", "model.path=my/model", "task.generate=true"]
    changed = override(raw, [*texts, " train.learning_rate = 1e-3", "data.columns.text=a=b", "run.rounds=6"])
    assert changed == {
        "run": {"rounds": 6},
        "data": {"folder": "clients", "columns": {"text": "a=b"}},
        "lora": {"targets": ["query", "value"]},
        "model": {"path": "my/model"},
        "task": {"generate": True},
        "train": {"learning_rate": 0.001},
    }
    assert json.dumps(raw) == before
    for bad in ("rounds=3", "run.rounds", "", "=3"):
        with pytest.raises(CoterieError, match=r"is not of the form section\.key=value"):
            override(raw, [bad])
    with pytest.raises(CoterieError, match="rounds is not a section"):
        override(raw, ["run.rounds.x=3"])


BAD_TOML = {  # what is wrong: (the file, what the error says)
    "no TOML": ("[run\n", r"run\.toml is not valid TOML: .*line 1"),
    "not UTF-8": (b'[data]\nfolder = "caf\xe9"\n', r"run\.toml is not valid TOML: 'utf-8' codec"),
    "brackets": ("x = " + "[" * 100_000, r"run\.toml is not valid TOML: its brackets are nested too deep"),
    "digits": ("x = " + "1" * 4301, r"run\.toml is not valid TOML: it has a number with thousands of digits"),
    "hexadecimal digits": ("[run]\nseed = 0x" + "f" * 4301, r"config cannot be read: it has a number with thousands"),
    "a key of many parts": ("a" + ".a" * 100_000 + " = 1", r"run\.toml is not .*: line 1 has a key with thousands of"),
    "a section of many parts": ("\n[a" + " . a" * 2_000 + "]", r"run\.toml is not .*: line 2 has a key with thousands"),
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_a_file_that_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    content, message = BAD_TOML[name]
    path = tmp_path / "run.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CoterieError, match=message):
        load_config(path)


def test_dots_in_text_are_not_parts_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    template = "{text}" + "." * 3000
    path.write_text(f'[data]\nfolder = "x"\ncolumns.template = "{template}"\n')
    assert load_config(path).data.columns.template == template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run.seed=" + "1" * 4301, r"--set run\.seed=1{40}\.\.\.: it has a number with thousands of digits"),
        ("lora.targets=" + "[" * 100_000, r"--set lora\.targets=\[{40}\.\.\.: its brackets are nested too deep"),
        ("a" + ".a" * 100_000 + "=1", r"--set 'a\.a.*: no setting is nested that deeply"),
    ],
)
def test_an_override_that_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        override(DATA, [text])


def test_whole_numbers_are_numbers_and_lists_are_lists() -> None:
    """Strict, and yet what TOML has no other word for: 6 for 6.0, a list, a section in a section."""
    texts = ["lora.rank=4", "lora.alpha=6", "lora.targets=['query']", "engine.clients_per_batch=auto"]
    config = check_config(override(DATA, [*texts, "data.labels=['no', 'yes']", "data.columns.text=body"]))
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 6.0, ("query",))
    assert type(config.lora.alpha) is float
    assert (config.data.labels, config.data.columns.text) == (("no", "yes"), "body")
    assert check_config(override({**DATA, "run": {"seed": 1}}, ["engine.clients_per_batch=3"])).run.seed == 1
    with pytest.raises(CoterieError, match=r"^\[engine\] clients_per_batch: .*integer \(found '3'\)"):
        check_config(override(DATA, ["engine.clients_per_batch='3'"]))


def test_a_site_is_strict_too(tmp_path: Path) -> None:
    path = tmp_path / "SITE.toml"
    text = '[site]\nid = "north"\nserver = "x:1"\n[data]\ntrain = "a.jsonl"\n[policy]\nupload = ["A", "B"]\n'
    path.write_text(f"{text}max_steps = 3\n")
    assert load_site(path).policy.upload == (Part.A, Part.B)
    path.write_text(f'{text}max_steps = "3"\n')
    with pytest.raises(CoterieError, match=r"^\[policy\] max_steps: .*valid integer \(found '3'\)$"):
        load_site(path)


def test_differences_names_keys_that_were_added_taken_away_or_changed() -> None:
    old = {"a": {"x": 1, "y": [1, 2], "z": {"deep": None}}, "b": {"k": 1}, "same": {"n": 0.5}}
    assert differences(old, json.loads(json.dumps(old))) == []
    new = {"a": {"x": 2, "y": [2, 1], "z": {"deep": 3}}, "c": {"k": 1}, "same": {"n": 0.5}}
    assert differences(old, new) == ["a.x", "a.y", "a.z.deep", "b.k", "c.k"]
    assert differences(new, old) == differences(old, new)


def test_a_file_and_its_overrides_make_a_config(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\nfolder = "x"\n[lora]\nrank = 4\nalpha = 6\n[method]\nname = "fedlease"\nmax_experts = 3\n')
    config = load_config(path, ["lora.rank=2", "method.linkage=single", "run.seed=7", "task.head=shared"])
    plan = config.plan()
    assert (plan.rank, plan.alpha, plan.scaling, plan.seed, plan.head) == (2, 6.0, 3.0, 7, "shared")
    assert (plan.dropout, plan.rounds, plan.optim) == (config.lora.dropout, config.run.rounds, config.train)
    own: Any = config.method_settings()
    assert (own.max_experts, own.linkage, own.warmup_rounds) == (3, "single", 5)


def test_a_setting_of_another_method_says_where_it_belongs(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[data]\nfolder = "x"\n[method]\nname = "fedlease"\nwarmup_rounds = 2\n')
    message = r"\[method\] 'warmup_rounds' is a setting of fedlease, and not of fedit; move it to \[methods\.fedlease\]"
    with pytest.raises(CoterieError, match=message):
        load_config(path, ["method.name=fedit"])
    path.write_text('[data]\nfolder = "x"\n[method]\nname = "fedlease"\n[methods.fedlease]\nwarmup_rounds = 2\n')
    assert load_config(path).method["warmup_rounds"] == 2
    assert load_config(path, ["method.name=fedit"]).method == {"name": "fedit"}
    with pytest.raises(CoterieError, match=r"\[methods\.fedit\] 'assignment' is a setting of .*fedamole"):
        check_config({"data": {"folder": "x"}, "methods": {"fedit": {"assignment": "static"}}})
    with pytest.raises(CoterieError, match=r"\[method\] unknown key 'warm_rounds'; did you mean 'warmup_rounds'"):
        check_config({"data": {"folder": "x"}, "method": {"name": "fedlease", "warm_rounds": 2}})


def test_flash_attention_is_left_out_on_a_cpu() -> None:
    flash = EngineSettings(device="cuda", attention="flash_attention_2")
    assert flash.on("cpu") == EngineSettings(device="cpu", attention="auto")
    assert flash.on("cuda:1") == EngineSettings(device="cuda:1", attention="flash_attention_2")
    assert EngineSettings(attention="eager").on("cpu").attention == "eager"
