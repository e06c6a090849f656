"""A model's modules under the names that a plan knows them by.

Problem: a plan is made on one model and applied to another: the same one after ``fully_shard``,
inside of DDP, compiled. These put names of their own into FQNs and change classes.

Idea: names are compared without what such wrappers add, and classes without the prefix of the
subclass that they make. ``model.blocks[0]`` is ``blocks.0`` everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from wrappers.modules.base import plain_module

__all__ = ["Place", "class_matches", "left_out", "places", "plain_name"]

#: Parts of names that come from FSDP1, torch.compile and torch's checkpoint wrapper.
_ADDED = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})

#: What FSDP2, composable DDP and parametrizations put before the name of the class.
_CLASS_PREFIXES = ("FSDP", "DDP", "Replicate", "Parametrized")


@dataclass(frozen=True)
class Place:
    """A module of a model.

    Attributes:
        name: Its plain name.
        module: The module that the user wrote.
        outer: What stands there: the module, a wrapper around it, its compiled form.
        parents: The modules above it, from the root down.
    """

    name: str
    module: nn.Module
    outer: nn.Module
    parents: tuple[nn.Module, ...]


def plain_name(fqn: str) -> str:
    """An FQN without what wrappers add: ``module.blocks.0._orig_mod`` is ``blocks.0``."""
    parts = [part for part in fqn.split(".") if part not in _ADDED]
    while parts and parts[0] == "module":  # DDP's and DataParallel's, around the whole model
        parts = parts[1:]
    return ".".join(parts)


def places(model: nn.Module) -> dict[str, Place]:
    """All modules by plain name, a shared one under its first.

    Where a wrapper and the module inside have one name, it is the module inside.
    """
    return {place.name: place for place in _walk(model)}


def _walk(model: nn.Module) -> Iterator[Place]:
    seen = set()
    stack: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", model, ())]
    while stack:
        fqn, outer, parents = stack.pop()
        module = plain_module(outer)
        if module in seen:
            continue
        seen.add(module)
        yield Place(plain_name(fqn), module, outer, parents)
        below = (*parents, module)
        prefix = f"{fqn}." if fqn else ""
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((prefix + name, child, below))


def class_matches(module: nn.Module, class_name: str) -> bool:
    """Whether a module is of a class, sharded or parametrized or not."""
    return _plain_class(type(module).__name__) == _plain_class(class_name)


def _plain_class(name: str) -> str:
    for prefix in _CLASS_PREFIXES:
        if name.startswith(prefix) and name != prefix:
            return name[len(prefix) :]
    return name


def left_out(model: nn.Module, fqns: Collection[str]) -> tuple[str, ...]:
    """Modules of the same classes as some regions that are not regions and lie in none.

    Args:
        model: The model.
        fqns: Names of its regions.
    """
    named = places(model)
    regions = [named[name] for name in map(plain_name, fqns) if name in named]
    return beside(named.values(), {r.module for r in regions}, {_class(r) for r in regions})


def beside(
    found: Iterable[Place], regions: Collection[nn.Module], classes: Collection[str]
) -> tuple[str, ...]:
    """The same for modules that were looked up, and names of classes."""
    known = {_plain_class(name) for name in classes}
    return tuple(
        place.name
        for place in found
        if _class(place) in known
        and place.module not in regions
        and not any(parent in regions for parent in place.parents)
    )


def _class(place: Place) -> str:
    return _plain_class(type(place.module).__name__)
