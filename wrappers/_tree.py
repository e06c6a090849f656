"""Arguments, keyword arguments and outputs as flat lists of tensors, and back.

A region's tensors may sit in tuples, lists, dicts, named tuples, dataclasses and in any
type that is registered with torch's pytree. :func:`flatten` takes the tensors out and
returns a function that builds the same structure around other tensors; everything that is
not a tensor is shared with the original. Containers without a tensor are returned as they
are: identity matters to user code, and a cache object must not be copied.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from wrappers import _torch

Build = Callable[[Iterator[Tensor]], Any]

#: Types that can hold no tensor; they are passed on without a look inside.
ATOMS = frozenset({type(None), int, float, bool, str, bytes, complex})


def flatten(value: Any) -> tuple[list[Tensor], Callable[[Iterable[Any]], Any]]:
    """Take the tensors out of a nested value.

    Args:
        value: Any value.

    Returns:
        The tensors in order, and a function that takes as many values in the same order and
        returns a value of the same structure with them in place.
    """
    if isinstance(value, Tensor):
        return [value], _build_single
    tensors: list[Tensor] = []
    build = _take(value, tensors)
    if build is None:
        return tensors, lambda _: value
    return tensors, lambda leaves: build(iter(leaves))


def flatten_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Callable[[Iterable[Any]], Any]]:
    """Do :func:`flatten` for ``(args, kwargs)``; quickly where all are positional tensors."""
    if not kwargs:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if len(tensors) == len(args):
            return tensors, _build_positional
    return flatten((args, kwargs))


def _build_single(leaves: Iterable[Any]) -> Any:
    return next(iter(leaves))


def _build_positional(leaves: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(leaves), {}


def _take(value: Any, tensors: list[Tensor]) -> Build | None:
    """Append the tensors of ``value``; return how to build it again, None if it has none."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return next
    kind = type(value)
    if kind in ATOMS:
        return None
    if kind is tuple or kind is list:
        return _take_children(list(value), tensors, kind)
    if kind is dict:
        keys = list(value)
        return _take_children(
            list(value.values()), tensors, lambda items: dict(zip(keys, items, strict=True))
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _take_children(list(value), tensors, kind._make)
    node = _torch.pytree_node(kind)
    if node is not None:
        to_children, to_value = node
        children, context = to_children(value)
        return _take_children(list(children), tensors, lambda items: to_value(items, context))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _take_fields(value, tensors)
    return None


def _take_fields(value: Any, tensors: list[Tensor]) -> Build | None:
    """Do for a dataclass what :func:`_take` does: frozen ones and ``init=False`` fields too."""
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    fields = {name: _take(getattr(value, name), tensors) for name in names}
    builders = {name: builder for name, builder in fields.items() if builder is not None}
    if not builders:
        return None
    shell = copy.copy(value)
    for name in builders:
        object.__setattr__(shell, name, None)

    def rebuild(leaves: Iterator[Tensor]) -> Any:
        new = copy.copy(shell)
        for name, builder in builders.items():
            object.__setattr__(new, name, builder(leaves))
        return new

    return rebuild


def _take_children(
    children: list[Any], tensors: list[Tensor], build: Callable[[list[Any]], Any]
) -> Build | None:
    builders = [_take(child, tensors) for child in children]
    if not any(builders):
        return None

    # A tensor's own place must not keep the tensor alive: autograd has it.
    constants = [
        child if builder is None else None
        for child, builder in zip(children, builders, strict=True)
    ]

    def rebuild(leaves: Iterator[Tensor]) -> Any:
        return build(
            [
                constant if builder is None else builder(leaves)
                for constant, builder in zip(constants, builders, strict=True)
            ]
        )

    return rebuild
