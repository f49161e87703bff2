"""Short names of modules that tell them apart."""

from __future__ import annotations

from assigned_run import MODULES
from coterie.report.modules import layers_and_matrices, short_names, shown_modules


def test_modules_have_short_names_that_tell_them_apart() -> None:
    assert list(short_names(MODULES).values()) == ["0.query", "0.value", "2.query", "2.value", "10.query", "10.value"]
    bert = [f"encoder.layer.0.{name}" for name in ("attention.output.dense", "intermediate.dense", "output.dense")]
    assert list(short_names(bert).values()) == ["0.attention.output.dense", "0.intermediate.dense", "0.output.dense"]
    assert short_names(["lm_head"]) == {"lm_head": "lm_head"}
    assert short_names(["0.b", "x.0.b"]) == {"0.b": "0.b", "x.0.b": "x.0.b"}
    assert short_names([]) == {}
    assert shown_modules(list("abcdef")) == ["a", "d", "f"]
    assert [shown_modules(list("abcdef")[:n]) for n in (0, 1, 2)] == [[], ["a"], ["a", "b"]]


def test_matrices_that_end_in_the_same_name_are_named_in_full() -> None:
    found = layers_and_matrices(
        ["m.layers.0.attention.output.dense", "m.layers.0.output.dense", "m.layers.0.attention.query", "x.y"]
    )
    assert list(found.values()) == [("0", "attention.output.dense"), ("0", "output.dense"), ("0", "query"), ("-", "y")]
