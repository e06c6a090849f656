"""Plain data as JSON and tensors, for a layout in which nothing is pickled.

JSON knows less than Python: what it would change (tuples, keys that are no text, bytes) is written
as an object with the key ``$`` that names the type. Tensors are given names and go elsewhere.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_ATOMS = (bool, int, float, str, type(None))
_DICTS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SEQUENCES = {"tuple": tuple, "set": set, "Size": torch.Size}


def encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON's types.

    Args:
        name: The entry's name; its tensors are named after it.
        value: Plain data.
        tensors: Gets the tensors in it.

    Raises:
        TypeError: JSON has no words for a value.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [encode(name, each, tensors) for each in value]
    if kind is dict and all(type(key) is str for key in value) and "$" not in value:
        return {key: encode(name, each, tensors) for key, each in value.items()}
    if isinstance(value, Tensor):
        key = f"{name}#{len(tensors)}"
        tensors[key] = value
        return {"$": "tensor", "name": key}
    if kind is bytes:
        return {"$": "bytes", "base64": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$": "complex", "parts": [value.real, value.imag]}
    if kind is torch.dtype:
        return {"$": "dtype", "name": str(value).partition(".")[2]}
    for word, type_ in _DICTS.items():
        if kind is type_:
            pairs = [[encode(name, k, tensors), encode(name, v, tensors)] for k, v in value.items()]
            return {"$": word, "items": pairs}
    for word, type_ in _SEQUENCES.items():
        if kind is type_:
            return {"$": word, "items": [encode(name, each, tensors) for each in value]}
    raise TypeError(
        f"`{name}` holds a {kind.__name__}, which the layout 'safetensors' has no way to write: "
        "use numbers, strings, tensors, lists and dicts, or layout='dcp'"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that :func:`encode` was given."""
    if isinstance(value, list):
        return [decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    word = value.get("$")
    if word is None:
        return {key: decode(each, tensors) for key, each in value.items()}
    if word == "tensor":
        return tensors[value["name"]]
    if word == "bytes":
        return base64.b64decode(value["base64"])
    if word == "complex":
        return complex(*value["parts"])
    if word == "dtype":
        dtype = getattr(torch, value["name"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"no dtype: {value['name']}")
        return dtype
    items = decode(value["items"], tensors)
    return _DICTS[word](dict(items)) if word in _DICTS else _SEQUENCES[word](items)


def tensor_names(value: Any) -> list[str]:
    """Names of the tensors in an encoded value."""
    if isinstance(value, list):
        return [name for each in value for name in tensor_names(each)]
    if not isinstance(value, dict):
        return []
    if value.get("$") == "tensor":
        return [str(value.get("name"))]
    return [name for each in value.values() for name in tensor_names(each)]
