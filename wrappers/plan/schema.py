"""Plain dataclasses as JSON and back, with a validator that says where something is wrong.

Problem: a plan comes from a file that someone may have edited, cut off, or written with another
version. What is wrong must be found before anything is wrapped, and named.

Idea: the dataclasses are the schema. One function walks a type and a value together, both ways.
Every key must be there and none beyond them; integers are counts and bytes, so not negative;
floats are finite. What was loaded is equal to what was saved.

    >>> read(Point, {"name": "", "peak_bytes": -1, "step_us": 2.0})
    FormatError: $.peak_bytes: expected an integer of at least 0, got -1
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import types
import typing
import uuid
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["FormatError", "digest", "dump", "load", "read", "replace_file", "write"]

T = TypeVar("T")

#: Numbers that may be negative: a recompute can be faster than waiting.
_SIGNED = frozenset({"extra_us"})


class FormatError(ValueError):
    """Data does not have the form that it must have.

    Attributes:
        path: Where, such as ``$.regions[3].kept_bytes``.
    """

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.what)


def write(value: Any) -> Any:
    """Dataclasses, enums and tuples as what JSON knows; numbers get the types of their fields."""
    return _write(type(value), value)


def _write(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _write(_not_none(args), value)
    if origin is tuple:
        return [_write(args[0], each) for each in value]
    if origin is dict:
        return {str(key): _write(args[1], each) for key, each in value.items()}
    if is_dataclass(kind):
        return _write_object(kind, value)
    if issubclass(kind, enum.Enum):
        return value.value
    return kind(value)


def _write_object(kind: Any, value: Any) -> dict[str, Any]:
    return {name: _write(type_, getattr(value, name)) for name, type_ in _fields(kind).items()}


def read(kind: type[T], data: Any, path: str = "$") -> T:
    """The value of a type that JSON data stands for.

    Raises:
        FormatError: The data has another form.
    """
    result: T = _read(kind, data, path)
    return result


def _read(kind: Any, data: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _read(_not_none(args), data, path)
    if origin is tuple:
        _expect(isinstance(data, list), path, "a list", data)
        return tuple(_read(args[0], each, f"{path}[{i}]") for i, each in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), path, "an object", data)
        return {key: _read(args[1], each, _below(path, key)) for key, each in data.items()}
    if is_dataclass(kind):
        return _read_object(kind, data, path)
    if issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        is_one = isinstance(data, str) and data in values
        _expect(is_one, path, "one of " + ", ".join(map(repr, values)), data)
        return kind(data)
    return _read_plain(kind, data, path)


def _read_object(kind: Any, data: Any, path: str) -> Any:
    _expect(isinstance(data, dict), path, "an object", data)
    known = _fields(kind)
    if missing := [name for name in known if name not in data]:
        raise FormatError(path, f"missing keys: {', '.join(missing)}")
    if unknown := [name for name in data if name not in known]:
        raise FormatError(path, f"unknown keys: {', '.join(sorted(unknown))}")
    return kind(**{n: _read(t, data[n], _below(path, n)) for n, t in known.items()})


def _read_plain(kind: Any, data: Any, path: str) -> Any:
    if kind in (str, bool):
        _expect(type(data) is kind, path, {str: "a text", bool: "true or false"}[kind], data)
        return data
    is_signed = path.rpartition(".")[2] in _SIGNED
    if kind is int:
        is_good = type(data) is int and (is_signed or data >= 0)
        _expect(is_good, path, "an integer" + ("" if is_signed else " of at least 0"), data)
        return data
    assert kind is float, f"no rule for fields of type {kind}"
    is_good = type(data) in (int, float) and math.isfinite(data) and (is_signed or data >= 0)
    _expect(is_good, path, "a finite number" + ("" if is_signed else " of at least 0"), data)
    return float(data)


def _expect(is_good: bool, path: str, what: str, data: Any) -> None:
    if not is_good:
        text = json.dumps(data) if not isinstance(data, (dict, list)) else _kind_of(data)
        raise FormatError(path, f"expected {what}, got {text:.80}")


def _kind_of(data: Any) -> str:
    return "an object" if isinstance(data, dict) else f"a list of {len(data)}"


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if key.isidentifier() else f"{path}[{json.dumps(key)}]"


def _not_none(args: tuple[Any, ...]) -> Any:
    (kind,) = [each for each in args if each is not type(None)]
    return kind


@lru_cache(maxsize=64)
def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


# --- Text and files -------------------------------------------------------------------------


def dump(value: Any, *, indent: int | None = None) -> str:
    """A dataclass as JSON: canonical, the same text for equal values, unless it is indented."""
    data = write(value)
    if indent is not None:
        return json.dumps(data, allow_nan=False, indent=indent) + "\n"
    return json.dumps(data, allow_nan=False, sort_keys=True, separators=(",", ":"))


def load(text: str | bytes) -> Any:
    """The data of a JSON text, not validated yet.

    Raises:
        FormatError: It is no JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except FormatError:
        raise
    except ValueError as error:  # also bytes that are no text, and numbers of too many digits
        raise FormatError("$", f"not JSON: {error}") from None
    except RecursionError:
        raise FormatError("$", "not JSON of a plan: too deeply nested") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise FormatError("$", f"keys given twice in one object: {', '.join(twice)}")
    return data


def digest(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that at any moment there is the old one or the new one, complete."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
