"""Pools from real PEFT adapters: what is cut and put back has the adapter's effect, and what cannot be is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pools
import tiny
from coterie.adapters.pool import (
    POOL_FILE,
    Excess,
    cut,
    match_modules,
    name_of,
    norms,
    out_of_line,
    put_back,
    read_pool,
    total,
    write_pool,
)
from coterie.adapters.read import build_pool, read_adapter
from coterie.adapters.write import write_adapter
from coterie.cli.main import app
from coterie.nn.attach import attached
from coterie.types import Bank, CoterieError, Key, Part

torch.set_num_threads(1)
TOKENS = torch.tensor([[5, 9, 12, 7, 3, 22], [8, 30, 11, 2, 17, 6]])
NAMES = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn",)}
KIND = {"bert": "bare", "llama": "generation", "gpt2": "generation"}


def base_of(folder: Path, arch: str) -> Path:
    path = folder / arch
    return path if path.exists() else tiny.folder(path, arch)


def adapter(folder: Path, arch: str, name: str = "a", *, seed: int = 1, kind: str | None = None, **config: Any) -> Path:
    """An adapter folder that PEFT itself wrote, with A and B both random."""
    path = base_of(folder, arch)
    model = tiny.model(arch, kind or KIND[arch])
    model.name_or_path = model.config._name_or_path = str(path)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(NAMES[arch])}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        made = get_peft_model(model, LoraConfig(**{**settings, **config}))
        for parameter_name, parameter in made.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(folder / name)
    settings_path = folder / name / "adapter_config.json"
    stated = json.loads(settings_path.read_text())
    settings_path.write_text(json.dumps({**stated, "base_model_name_or_path": str(path)}))
    return folder / name


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def out_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


CASES = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "other ranks": ("bert", {"rank_pattern": {"value": 7}, "alpha_pattern": {r"layer\.0\.attention\.self\.query": 1}}),
    "some layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "transposed": ("gpt2", {"fan_in_fan_out": True}),
    "one rank": ("bert", {"r": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_into_rank_one_experts_it_has_the_effect_that_peft_gives_it(case: str, tmp_path: Path) -> None:
    arch, settings = CASES[case]
    folder = adapter(tmp_path, arch, **settings)
    pool = build_pool([str(folder)])
    experts = cut(pool.tensors)
    assert all(1 in value.shape for value in experts.values())
    assert len(experts) == 2 * sum(pool.size(module) for module in pool.modules)

    model = tiny.model(arch, KIND[arch]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(tiny.model(arch, KIND[arch]), str(folder)).double()
    names = match_modules(pool, [name for name, _ in model.named_modules()])
    bank = Bank({key._replace(module=names[key.module]): value.double() for key, value in experts.items()})
    plain, expected = out_of(model), out_of(theirs)
    with attached(model, bank):
        ours = out_of(model)
    assert (expected - plain).abs().max() > 0.1
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()

    back = put_back(experts, {key: value.shape[int(key.part is Part.B)] for key, value in pool.tensors.items()})
    assert back.keys() == pool.tensors.keys()
    assert all(torch.equal(back[key], value) for key, value in pool.tensors.items())


def test_a_pool_of_adapters_that_differ_is_numbered_recorded_and_read_back(tmp_path: Path) -> None:
    one = adapter(tmp_path, "llama", "one", r=4)
    two = adapter(
        tmp_path, "llama", "two", seed=2, r=2, target_modules=["v_proj"], rank_pattern={"layers.0.*v_proj": 3}
    )
    (two / "README.md").write_text("---\nlibrary_name: peft\nlicense: apache-2.0\n---\nlicense: other\n")
    pool = build_pool([str(one), f"second={two}"])
    assert [(a.name, a.experts, a.licence) for a in pool.adapters] == [
        ("one", range(4), None),
        ("second", range(4, 7), "apache-2.0"),
    ]
    assert pool.adapters[1].ranks == {"layers.0.self_attn.v_proj": 3, "layers.1.self_attn.v_proj": 2}
    assert [pool.size(f"layers.{layer}.self_attn.v_proj") for layer in (0, 1)] == [7, 6]
    assert {e for m, e, _ in cut(pool.tensors) if m == "layers.1.self_attn.v_proj"} == {0, 1, 2, 3, 4, 5}
    assert pool.adapters[0].source == str(one)

    write_pool(tmp_path / "pool", pool)
    again = read_pool(tmp_path / "pool")
    assert again.name == pool.name == name_of(pool.tensors)
    assert (again.adapters, again.base) == (pool.adapters, str(tmp_path / "llama"))
    assert build_pool([str(one), str(two)]).name == pool.name  # names and paths do not count
    assert build_pool([str(two), str(one)]).name != pool.name
    write_pool(tmp_path / "pool", pool)
    with pytest.raises(CoterieError, match="already holds another pool"):
        write_pool(tmp_path / "pool", build_pool([str(one)]))


def test_adapters_for_classification_and_for_the_bare_model_fit_one_pool(tmp_path: Path) -> None:
    bare = adapter(tmp_path, "bert", "bare")
    headed = adapter(tmp_path, "bert", "headed", kind="classification", task_type="SEQ_CLS")
    pool = build_pool([str(bare), str(headed)])
    assert {pool.size(module) for module in pool.modules} == {8}
    assert [a.left_out for a in pool.adapters] == [(), ("classifier", "score")]


def test_what_coterie_exports_goes_in(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "llama", "llama")
    tensors = {
        key._replace(expert=0): value
        for key, value in tiny.bank(tiny.targets(tiny.model("llama", "generation"))).tensors.items()
    }
    write_adapter(tmp_path / "global", tensors, rank=4, alpha=8, about=tiny.about(base=str(path), task="generation"))
    pool = build_pool([str(tmp_path / "global")])
    names = {module: f"model.{module}" for module in pool.modules}
    for (module, _, part), value in pool.tensors.items():
        scale = 2.0 if part is Part.B else 1.0
        assert torch.equal(value, tensors[Key(names[module], 0, part)] * scale)


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "another kind": ({"peft_type": "LOHA"}, "type LOHA"),
    "biases": ({"bias": "lora_only"}, "biases"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
    "tokens": ({"trainable_token_indices": [1]}, "embedding"),
    "layers twice": ({"layer_replication": [[0, 2]]}, "repeats layers"),
    "a key from later": ({"use_telepathy": True}, "use_telepathy"),
    "a wrong rank": ({"r": 5}, "says r = 5"),
    "an alpha beyond all floats": ({"lora_alpha": 10**400}, "the alpha of .* is not within 1e"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_rank_one_experts_cannot_represent_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[case]
    folder = edit(adapter(tmp_path, "llama"), **changes)
    with pytest.raises(CoterieError, match=reason):
        read_adapter(folder)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    file = adapter(tmp_path, "llama") / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name.replace("lora_A", "lora_A.other"): tensors[name] + 1}, file)
    with pytest.raises(CoterieError, match=r"more than one lora_A of .*; keep one"):
        read_adapter(tmp_path / "a")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "llama")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CoterieError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CoterieError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder)
    with pytest.raises(CoterieError, match="not an adapter folder"):
        read_adapter(tmp_path)


def test_whole_modules_beside_the_lora_are_refused_unless_a_head(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "llama", task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with pytest.raises(CoterieError, match="all of lm_head"):
        read_adapter(folder)


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    good = adapter(tmp_path, "llama")
    wide = tiny.folder(tmp_path / "wide", "llama", hidden_size=64)
    with pytest.raises(CoterieError, match=r"does not fit .*a Linear of 48 to 64"):
        build_pool([str(good)], str(wide))
    with pytest.raises(CoterieError, match="no such Linear outside its head"):
        build_pool([str(good)], str(tiny.folder(tmp_path / "gpt2", "gpt2")))
    other = edit(adapter(tmp_path, "llama", "other"), base_model_name_or_path="somewhere/else")
    with pytest.raises(CoterieError, match="for one base"):
        build_pool([str(good), str(other)])
    assert len(build_pool([str(good), str(other)], str(tmp_path / "llama")).adapters) == 2
    assert len(build_pool([str(good)]).weights) == 6, "the base's weights are recorded"
    with pytest.raises(CoterieError, match=r"an adapter's name '\\x1b\[2J' has the character U\+001B.*NAME=FOLDER"):
        build_pool([f"\x1b[2J={good}"])
    with pytest.raises(CoterieError, match="two adapters are named 'a'"):
        build_pool([str(good), str(good)])


def test_the_commands_build_and_show_and_a_damaged_pool_is_told(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, "llama", "one"), adapter(tmp_path, "llama", "two", seed=2)
    place, run = tmp_path / "pool", CliRunner()
    done = run.invoke(app, ["pool", "build", str(place), "--adapters", str(one), str(two)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    shown = run.invoke(app, ["pool", "show", str(place)], catch_exceptions=False)
    assert shown.output == done.output
    for text in (read_pool(place).name, "one", "two", "6 matrices with 8 experts of rank 1"):
        assert text in shown.output
    assert "checks the base's weights on 6 of 6 matrices" in shown.output
    other = edit(adapter(tmp_path, "llama", "other"), base_model_name_or_path="some/where")
    command = ["pool", "build", str(tmp_path / "pool2"), str(other), "--base", str(tmp_path / "llama")]
    said = run.invoke(app, command, catch_exceptions=False)
    assert "note: other names the base some/where" in said.output
    blob = bytearray((place / POOL_FILE).read_bytes())
    blob[-3] ^= 1
    (place / POOL_FILE).write_bytes(blob)
    with pytest.raises(CoterieError, match="damaged"):
        read_pool(place)
    with pytest.raises(CoterieError, match="coterie pool build"):
        read_pool(tmp_path)


def test_experts_of_several_runs_are_named_after_their_runs(tmp_path: Path) -> None:
    for seed, run in enumerate(("one", "two")):
        adapter(tmp_path, "llama", f"{run}/experts/expert-0", seed=seed)
    runs = [word for run in ("one", "two") for word in ("--run", str(tmp_path / run))]
    done = CliRunner().invoke(app, ["pool", "build", str(tmp_path / "pool"), *runs], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [made.name for made in read_pool(tmp_path / "pool").adapters] == ["one-expert-0", "two-expert-0"]


def louder(folder: Path, times: float) -> Path:
    """The adapter with its B multiplied."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: value * times if "lora_B" in name else value for name, value in load_file(path).items()}
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("others", [1, 2])
def test_an_adapter_that_is_out_of_line_is_named(others: int, tmp_path: Path) -> None:
    """Fifty times another's B is named; three times is not."""
    plain = [adapter(tmp_path, "llama", f"plain{i}", seed=i) for i in range(others)]
    loud, firm = (adapter(tmp_path, "llama", name, seed=7) for name in ("loud", "firm"))
    pool = build_pool([str(path) for path in [*plain, louder(firm, 3)]])
    assert out_of_line(norms(pool)) == {}
    a, b = (pool.tensors[Key(pool.modules[0], 0, part)] for part in (Part.A, Part.B))
    apart = float((b.norm(dim=0) * a.norm(dim=1)).norm())
    by_module = norms(pool)["plain0"]
    assert by_module[pool.modules[0]] == pytest.approx(max(float((b @ a).norm()), apart), rel=1e-5)
    assert total(by_module) == pytest.approx(float(torch.tensor([*by_module.values()]).square().mean().sqrt()))

    run, place = CliRunner(), str(tmp_path / "pool")
    command = ["pool", "build", place, *map(str, plain), str(louder(loud, 50))]
    built = run.invoke(app, command, catch_exceptions=False).output
    (note,) = [" ".join(part.split()) for part in built.split("note: ")[1:]]
    assert note.startswith("loud is out of line: its norm (of B A, over its matrices) is ")
    assert 35 < float(note.split(" is ")[2].split(" times")[0]) < 70
    assert run.invoke(app, ["pool", "show", place], catch_exceptions=False).output == built


def test_experts_that_cancel_are_as_large_as_each_of_them() -> None:
    """A gate may choose one of two experts of rank 1 whose sum has no effect."""
    model = tiny.model("bert")
    pool = pools.made(tiny.targets(model), {"one": 2, "two": 2})
    pairs = {}
    for key, value in pool.tensors.items():
        if key.expert == 0:
            first = value[:1] if key.part is Part.A else value[:, :1]
            sign = 1.0 if key.part is Part.A else -1.0
            pairs[key] = 40 * torch.cat([first, sign * first], dim=int(key.part is Part.B))
    hidden = replace(pool, tensors={**pool.tensors, **pairs})
    key = next(iter(pairs))
    a, b = (hidden.tensors[key._replace(part=part)] for part in (Part.A, Part.B))
    assert float((b @ a).norm()) < 1e-3 * norms(pool)["one"][key.module]
    assert [*out_of_line(norms(hidden))] == ["one"]


EVEN = {"q": 1.0, "v": 1.0}
WEAK = {"q": 0.01, "v": 0.01}
OUT_OF_LINE: dict[str, tuple[dict[str, dict[str, float]], dict[str, Excess]]] = {
    "all in one matrix": (
        {"a": EVEN, "b": EVEN, "bad": {"q": 21.0, "v": 0.5, "k": 0.5, "o": 0.5, "up": 0.5}},
        {"bad": Excess(21.0, 20, "q")},
    ),
    "on a matrix of its own": (
        {"a": EVEN, "b": EVEN, "bad": {**{f"m{i}": 1.0 for i in range(9)}, "k": 22.0}},
        {"bad": Excess(22.0, 20, "k")},
    ),
    "where the others hardly are": ({"a": {"q": 1.4, "v": 0.01}, "b": {"q": 0.2, "v": 0.4}}, {}),
    "a weak one of three": ({"a": EVEN, "b": EVEN, "weak": WEAK}, {}),
    "of two, the larger": ({"a": EVEN, "weak": WEAK}, {"a": Excess(100.0, 10)}),
    "one without effect": ({"a": EVEN, "zero": {"q": 0.0}}, {}),
    "the most extreme first": (
        {"a": EVEN, "b": EVEN, "c": EVEN, "x": {"q": 20.0}, "y": {"q": 40.0}},
        {"y": Excess(40.0, 10), "x": Excess(20.0, 10)},
    ),
    "never all": (
        {"a": {str(i): 100.0 * (i == 0) for i in range(500)}, "b": {str(i): 100.0 * (i == 1) for i in range(510)}},
        {"a": Excess(pytest.approx(22.6, abs=0.1), 20, "0")},
    ),
}


@pytest.mark.parametrize("case", OUT_OF_LINE)
def test_who_is_out_of_line(case: str) -> None:
    of_pool, expected = OUT_OF_LINE[case]
    found = out_of_line(of_pool)
    assert found == expected
    assert [*found] == [*expected]
