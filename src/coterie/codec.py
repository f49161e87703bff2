"""Turns values into bytes and back: tensors as safetensors, the rest as JSON in its header. No pickle.

A value is a frozen dataclass, a mapping, a tuple, list or set, a scalar, an enum of strings, a
:class:`~coterie.types.Key`, None, or a tensor, nested as its type hints say; a mapping has Key, int or str keys. A
field hinted ``Json`` holds plain JSON and comes back as JSON does (tuples as lists). Every dtype that safetensors
knows comes back bit for bit, bfloat16 included. The bytes depend on the value alone, and carry a checksum.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from coterie.text import parse_json
from coterie.types import Key

T = TypeVar("T")
_TENSOR = "$tensor"
_META = "coterie"
_FAULTS = (struct.error, KeyError, TypeError, ValueError, RecursionError, SafetensorError)
_SCALARS: dict[object, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (float, int)}


class CodecError(ValueError):
    """The bytes were not written by this codec, are damaged, or do not fit the type."""


def encode(value: object) -> bytes:
    """``value`` as one safetensors blob. Raises :class:`TypeError` for a type that the codec cannot write."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_to_tree(value, "", tensors), separators=(",", ":"))
    return save(_unshared(tensors), metadata={_META: _checksum(text, tensors) + text})


def decode(kind: type[T], blob: bytes) -> T:
    """The value of type ``kind`` that :func:`encode` made ``blob`` from. Raises :class:`CodecError`."""
    try:
        (size,) = struct.unpack("<Q", blob[:8])
        meta = json.loads(blob[8 : 8 + size])["__metadata__"][_META]
        checksum, text, tensors = meta[:8], meta[8:], load(blob)
        if checksum != _checksum(text, tensors):
            raise CodecError("the checksum differs, so the bytes are damaged")
        return cast(T, _from_tree(kind, parse_json(text), tensors))
    except _FAULTS as fault:
        raise CodecError(f"cannot decode {len(blob)} bytes as {getattr(kind, '__name__', kind)}: {fault}") from fault


def plain_field(blob: bytes, name: str) -> object:
    """The field ``name`` of the dataclass that :func:`encode` made ``blob`` from, without its type.

    For a field that says which type to decode: a format's number. Raises :class:`CodecError`.
    """
    try:
        (size,) = struct.unpack("<Q", blob[:8])
        return parse_json(json.loads(blob[8 : 8 + size])["__metadata__"][_META][8:])[name]
    except _FAULTS as fault:
        raise CodecError(f"cannot read {name!r} in {len(blob)} bytes: {fault}") from fault


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Eight hexadecimal digits over everything in a blob: safetensors itself does not notice a flipped bit."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, each with its own storage: safetensors refuses views of a larger or a shared storage."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        result[name] = tensor.clone() if shared else tensor
    return result


def _to_tree(value: object, path: str, tensors: dict[str, torch.Tensor]) -> object:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu").contiguous()
        return {_TENSOR: path}
    if isinstance(value, Key):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _to_tree(getattr(value, f.name), f"{path}/{f.name}", tensors) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return _mapping_to_tree(value, path, tensors)
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (bytes, bytearray, memoryview)):
        items = sorted(value) if isinstance(value, Set) else value
        return [_to_tree(item, f"{path}/{i}", tensors) for i, item in enumerate(items)]
    raise TypeError(f"the codec cannot write {type(value).__name__} (at {path or 'the top'})")


def _mapping_to_tree(value: Mapping[object, object], path: str, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, item in value.items():
        if not isinstance(key, (str, int, Key)) or isinstance(key, bool):
            raise TypeError(f"the codec cannot write {type(key).__name__} as a mapping's key (at {path or 'the top'})")
        if str(key) in tree:
            raise TypeError(f"two keys of one mapping are written {str(key)!r} (at {path or 'the top'})")
        # Escaped as in a JSON pointer, so that {"a/b": x} and {"a": {"b": x}} name two tensors.
        tree[str(key)] = _to_tree(item, f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}", tensors)
    return tree


def _from_tree(kind: object, tree: object, tensors: Mapping[str, torch.Tensor]) -> object:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return tree
    if kind is torch.Tensor:
        return tensors[_as(dict, tree)[_TENSOR]]
    if kind is Key:
        return Key.parse(_as(str, tree))
    if origin in (typing.Union, types.UnionType):
        return _from_union(kind, tree, tensors)
    if origin is typing.Literal:
        return _member(tree, typing.get_args(kind))
    if kind in _SCALARS:
        return _as(cast(type[object], kind), tree)
    if not isinstance(origin, type):
        raise CodecError(f"the codec cannot read {kind}")
    if issubclass(origin, enum.StrEnum):
        return origin(_as(str, tree))
    if dataclasses.is_dataclass(origin):
        return _dataclass_from(origin, _as(dict, tree), tensors)
    return _collection_from(kind, origin, tree, tensors)


def _collection_from(kind: object, origin: type, tree: object, tensors: Mapping[str, torch.Tensor]) -> object:
    args = typing.get_args(kind)
    if issubclass(origin, Mapping) and args:
        read = _key(args[0])
        items = _as(dict, tree)
        result = {read(k): _from_tree(args[1], v, tensors) for k, v in items.items()}
        if len(result) != len(items):
            raise CodecError(f"two keys of one mapping are the same: {sorted(items)}")
        return result
    if origin is tuple and args:
        members = _as(list, tree)
        kinds = args[:1] * len(members) if args[1:] == (Ellipsis,) else args
        return tuple(_from_tree(of, member, tensors) for of, member in zip(kinds, members, strict=True))
    if issubclass(origin, (Sequence, Set)) and len(args) == 1:
        made = (_from_tree(args[0], item, tensors) for item in _as(list, tree))
        return list(made) if issubclass(origin, Sequence) else set(made) if origin is set else frozenset(made)
    raise CodecError(f"the codec cannot read {kind}; name the type of its items, as in list[int]")


def _dataclass_from(kind: type, tree: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> object:
    names = {field.name for field in dataclasses.fields(kind)}
    if tree.keys() != names:
        raise CodecError(f"{kind.__name__} has the fields {sorted(names)}, the bytes hold {sorted(tree)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _from_tree(hints[name], tree[name], tensors) for name in tree})


def _from_union(kind: object, tree: object, tensors: Mapping[str, torch.Tensor]) -> object:
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if len(members) != 1 or len(members) == len(typing.get_args(kind)):
        raise CodecError(f"the codec cannot read {kind}; of unions it reads only 'X | None'")
    return None if tree is None else _from_tree(members[0], tree, tensors)


def _as(kind: type[T], tree: object) -> T:
    """``tree`` if it is of ``kind``. A bool is not an int, but an int is a float."""
    if type(tree) not in _SCALARS.get(kind, (kind,)):
        raise CodecError(f"expected {kind.__name__}, found {type(tree).__name__}")
    return cast(T, tree)


def _member(tree: object, members: Sequence[object]) -> object:
    if tree not in members:
        raise CodecError(f"expected one of {list(members)}, found {tree!r}")
    return tree


def _key(kind: object) -> Callable[[str], object]:
    if kind is Key:
        return Key.parse
    if kind in (int, str):
        return cast(Callable[[str], object], kind)
    raise CodecError(f"the codec cannot read a mapping with keys {kind}; they must be Key, int or str")
