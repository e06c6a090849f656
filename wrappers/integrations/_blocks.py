"""Which modules are a model's transformer blocks, where classes are given by name.

transformers models list in ``_no_split_modules`` the classes whose instances must stay on one
device, which are their blocks; accelerate's FSDP plugin lists the classes that it shards. Both may
name a class whose instances lie in a block (an expert, a projection). A region in a region is
recomputed twice, so of nested modules only the outermost is a block here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from wrappers.modules.base import plain_module

__all__ = ["no_split_blocks", "no_split_names", "outermost_named"]


def no_split_names(model: nn.Module) -> frozenset[str]:
    """Names of the classes that a model, or a part of it, lists in ``_no_split_modules``."""
    listed = (getattr(module, "_no_split_modules", None) for module in model.modules())
    return frozenset(name for names in listed for name in names or ())


def no_split_blocks(model: nn.Module, others: str) -> dict[str, Any]:
    """What chooses the blocks of ``_no_split_modules``, for ``apply_activation_checkpointing``.

    Args:
        model: The model, a part of which may have the list.
        others: Who else could have named the blocks and has not, for the error.

    Raises:
        ValueError: There is no such list.
    """
    if names := no_split_names(model):
        return {"check_fn": outermost_named(model, names)}
    raise ValueError(
        f"nothing says which modules of this {type(model).__name__} are its blocks: {others} and "
        "the model has no _no_split_modules. Pass check_fn, such as wrappers.select.by_class(Block)"
    )


def outermost_named(model: nn.Module, names: Iterable[str]) -> Callable[[nn.Module], bool]:
    """A ``check_fn`` for the outermost modules below a model whose class has one of the names.

    Args:
        model: Root of the tree; never chosen itself.
        names: Names of classes; a subclass counts.
    """
    wanted = frozenset(names)
    blocks: set[nn.Module] = set()
    stack = list(plain_module(model).children())
    while stack:
        module = plain_module(stack.pop())
        if wanted.isdisjoint(cls.__name__ for cls in type(module).__mro__):
            stack.extend(module.children())
        else:
            blocks.add(module)
    return blocks.__contains__
