"""Turns values into bytes and back: tensors as safetensors, the rest as JSON in its header. No pickle.

A value is a frozen dataclass, a mapping, a tuple or list, a scalar or None, or a tensor, nested as its type hints
say; a mapping may have :class:`~coterie.types.Key`, int or str keys. Every dtype that safetensors knows comes back bit
for bit, bfloat16 included. The bytes depend on the value alone: the same value gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from coterie.types import Key

T = TypeVar("T")
_TENSOR = "$tensor"
_META = "coterie"


class CodecError(ValueError):
    """The bytes are not what this codec writes, or do not fit the type asked for."""


def encode(value: Any) -> bytes:
    """``value`` as one safetensors blob. Raises :class:`TypeError` for a type that the codec does not know."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _to_tree(value, "", tensors)
    return save(tensors, metadata={_META: json.dumps(tree, separators=(",", ":"))})


def decode(kind: type[T], blob: bytes) -> T:
    """The value of type ``kind`` that :func:`encode` made ``blob`` from. Raises :class:`CodecError`."""
    try:
        (size,) = struct.unpack("<Q", blob[:8])
        tree = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"][_META])
        return cast(T, _from_tree(kind, tree, load(blob)))
    except (struct.error, KeyError, TypeError, ValueError, SafetensorError) as fault:
        raise CodecError(f"cannot decode {len(blob)} bytes as {getattr(kind, '__name__', kind)}: {fault}") from fault


def _to_tree(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        own = value.detach().to("cpu").contiguous()
        tensors[path] = own.clone() if own.untyped_storage().nbytes() != own.nbytes else own
        return {_TENSOR: path}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: _to_tree(getattr(value, f.name), f"{path}/{f.name}", tensors) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): _to_tree(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (Sequence, frozenset, set)):
        items = sorted(value) if isinstance(value, (frozenset, set)) else value
        return [_to_tree(item, f"{path}/{i}", tensors) for i, item in enumerate(items)]
    raise TypeError(f"the codec does not know {type(value).__name__} (at {path or 'the top'})")


def _from_tree(kind: Any, tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    origin = typing.get_origin(kind)
    if kind is torch.Tensor:
        return tensors[tree[_TENSOR]]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _same_fields(kind, hints, tree)
        return kind(**{name: _from_tree(hints[name], tree[name], tensors) for name in hints})
    if origin in (typing.Union, types.UnionType):
        return _from_union(kind, tree, tensors)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_value = typing.get_args(kind)
        return {_key(of_key)(k): _from_tree(of_value, v, tensors) for k, v in tree.items()}
    if origin is tuple:
        return tuple(_from_tree(of, item, tensors) for of, item in _tuple_items(kind, tree))
    if origin is not None and isinstance(origin, type) and issubclass(origin, (Sequence, frozenset)):
        (of_item,) = typing.get_args(kind)
        items = (_from_tree(of_item, item, tensors) for item in tree)
        return frozenset(items) if issubclass(origin, frozenset) else list(items)
    return tree


def _same_fields(kind: type, hints: Mapping[str, Any], tree: Any) -> None:
    if not isinstance(tree, dict) or tree.keys() != hints.keys():
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise CodecError(f"{kind.__name__} has the fields {sorted(hints)}, the bytes hold {found}")


def _from_union(kind: Any, tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if tree is None:
        return None
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if len(members) != 1:
        raise CodecError(f"the codec reads 'X | None' and no other union, not {kind}")
    return _from_tree(members[0], tree, tensors)


def _tuple_items(kind: Any, tree: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    args = typing.get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        return ((args[0], item) for item in tree)
    return zip(args, tree, strict=True)


def _key(kind: Any) -> Callable[[str], Any]:
    return Key.parse if kind is Key else int if kind is int else str
