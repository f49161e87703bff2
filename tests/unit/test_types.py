"""Keys, gates' options, head shapes: the words of `coterie.types`."""

import dataclasses

import pytest

from coterie import requests, types
from coterie.types import NO_EXPERT, SHARED, BaseSpec, ClientInfo, GateSpec, HeadParameter, Key, Part

SPELLED = {
    Key("encoder.layer.0.attention.self.query", 2, Part.A): "encoder.layer.0.attention.self.query:2:A",
    Key("model.layers.11.q_proj", SHARED, Part.B): "model.layers.11.q_proj:shared:B",
    Key("classifier.out_proj.weight", NO_EXPERT, Part.HEAD): "classifier.out_proj.weight:-:head",
    Key("odd:name.with:colons", 10, Part.ROUTER): "odd:name.with:colons:10:router",
    Key("", 0, Part.A): ":0:A",
}


@pytest.mark.parametrize(("key", "text"), SPELLED.items(), ids=str)
def test_a_key_has_one_spelling(key: Key, text: str) -> None:
    assert str(key) == text
    assert Key.parse(text) == key
    assert isinstance(Key.parse(text).part, Part)


@pytest.mark.parametrize(
    "text",
    ["", "query", "query:A", "query:0:C", "query:x:A", "query:0:a", "query::A", "query:0:A ", "query:shared :A"],
)
def test_other_texts_are_no_keys(text: str) -> None:
    with pytest.raises(ValueError, match="is not a tensor key"):
        Key.parse(text)


@pytest.mark.parametrize("text", ["query:-1:A", "query:-2:A", "query:01:A", "query: 1:A", "query:+1:A", "query:1_0:A"])
def test_a_second_spelling_of_a_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a tensor key"):
        Key.parse(text)


def test_keys_sort_by_module_then_expert_with_the_shared_one_first() -> None:
    keys = [Key("b", 0, Part.A), Key("a", 10, Part.A), Key("a", 2, Part.A), Key("a", SHARED, Part.A)]
    assert [(key.module, key.expert) for key in sorted(keys)] == [("a", SHARED), ("a", 2), ("a", 10), ("b", 0)]


def test_gate_options_of_a_module_stand_before_the_common_ones() -> None:
    gate = GateSpec("top_k", {"k": 2, "own": 0}, per_module={"query": {"k": 5}})
    assert gate.options_for("query") == {"k": 5, "own": 0}
    assert gate.options_for("value") == {"k": 2, "own": 0}
    assert gate.options == {"k": 2, "own": 0}


def test_a_head_parameter_takes_the_clients_number_of_labels() -> None:
    assert HeadParameter("classifier.weight", (-1, 384), "normal").shape_for(6) == (6, 384)
    assert HeadParameter("classifier.dense.weight", (384, 384), "normal").shape_for(6) == (384, 384)


def test_what_travels_is_frozen() -> None:
    kinds = [
        kind
        for module in (types, requests)
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.__name__
    ]
    assert len(kinds) >= 15
    assert [kind.__name__ for kind in kinds if not kind.__dataclass_params__.frozen] == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClientInfo("a", 1).num_train = 2  # type: ignore[misc]


def test_defaults_are_not_shared_between_values() -> None:
    assert GateSpec().options is not GateSpec().options
    assert BaseSpec(()).head == ()
