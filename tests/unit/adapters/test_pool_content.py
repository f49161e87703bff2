"""A pool whose record and tensors do not fit each other is refused, although its SHA-256 is that of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pools
import tiny
from coterie.adapters.pool import POOL_FILE, Pool, name_of, read_pool, write_pool
from coterie.types import CoterieError, Key, Part, PrivateError

FIRST = Key("encoder.layer.0.attention.self.query", 0, Part.A)
CRAFTED: dict[str, tuple[Callable[[Pool], Pool], str]] = {
    "no adapters": (lambda pool: replace(pool, adapters=(), tensors={}), "has no adapters"),
    "no ranks": (lambda pool: with_record(pool, ranks={}), "does not give adapter 'one' its ranks by module"),
    "rank 0": (
        lambda pool: with_record(pool, ranks={FIRST.module: 0}),
        "does not give adapter 'one' its ranks by module, from 1 to 3",
    ),
    "a wide range": (
        lambda pool: with_record(pool, rank=10**12),
        "does not give adapter 'one' its ranks by module, from 1 to 10+",
    ),
    "one name": (lambda pool: with_record(pool, name="two"), "has two adapters of one name"),
    "shared numbers": (lambda pool: with_record(pool, first=2), "gives adapter 'two' the number 3, which is"),
    "below 0": (lambda pool: with_record(pool, first=-2), "gives adapter 'one' the number -2, which is below 0"),
    "a module more": (
        lambda pool: with_record(pool, ranks={**pool.adapters[0].ranks, "more": 3}),
        "lacks the tensor more:0:A",
    ),
    "a module less": (
        lambda pool: with_record(pool, ranks={FIRST.module: 3}),
        "has, without a record of it, the tensor encoder",
    ),
    "another rank": (lambda pool: with_tensor(pool, lambda a: a[:2]), "records rank 3 for .*0:A, whose shape is .2, "),
    "no matrix": (lambda pool: with_tensor(pool, torch.ravel), "records rank 3 for .*0:A, whose shape is "),
    "nan": (lambda pool: with_tensor(pool, lambda a: a * math.nan), "has values in .*0:A that are not finite"),
    "inf": (lambda pool: with_tensor(pool, lambda a: a * math.inf), "has values in .*0:A that are not finite"),
}


def with_record(pool: Pool, **record: Any) -> Pool:
    """The pool with another record of its first adapter."""
    return replace(pool, adapters=(replace(pool.adapters[0], **record), *pool.adapters[1:]))


def with_tensor(pool: Pool, change: Callable[[Tensor], Tensor]) -> Pool:
    return replace(pool, tensors={**pool.tensors, FIRST: change(pool.tensors[FIRST]).contiguous()})


@pytest.mark.parametrize("case", CRAFTED)
def test_a_pool_whose_hash_is_right_is_refused_if_its_content_is_not(case: str, tmp_path: Path) -> None:
    craft, why = CRAFTED[case]
    pool = craft(pools.made(tiny.targets(tiny.model("bert")), {"one": 3, "two": 2}))
    write_pool(tmp_path, replace(pool, name=name_of(pool.tensors)))
    with pytest.raises(PrivateError, match=rf"{POOL_FILE} {why}.*; delete that file, and build the pool again with "):
        read_pool(tmp_path)


def test_a_damaged_pool_is_not_replaced_and_the_error_says_which_file_to_delete(tmp_path: Path) -> None:
    pool, path = pools.made(tiny.targets(tiny.model("bert")), {"one": 3}), tmp_path / POOL_FILE
    write_pool(tmp_path, pool)
    path.write_bytes(damaged := path.read_bytes()[:-100])
    with pytest.raises(CoterieError) as told:
        write_pool(tmp_path, pool)
    assert str(told.value).startswith(f"{path} is damaged ")
    fix = f"; delete that file, and build the pool again with `coterie pool build {tmp_path} ...`"
    assert str(told.value).endswith(fix)
    assert path.read_bytes() == damaged
    path.unlink()
    write_pool(tmp_path, pool)
    assert read_pool(tmp_path).name == pool.name
