"""Predicates that choose modules: by class, by name, by position, by size, by repetition.

A predicate is a callable ``module -> bool``, so it goes wherever a ``check_fn`` goes, and a plain
callable goes wherever a predicate goes. Combine them with ``&``, ``|`` and ``~``:

    every_nth(2, by_class(Block)) & ~by_name("encoder.**")

Idea: some questions have no answer for a module alone ("every second one", "named layers.*").
Such a predicate is first *bound* to a model, which turns it into a plain set of modules;
``apply_activation_checkpointing`` binds what it is given. A bound predicate asks nothing any more.

Names and positions are those of the unwrapped model; a predicate is asked about the module inside
the wrappers, so ``by_class(Block)`` also finds a wrapped ``Block``.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from wrappers.errors import WrapperError
from wrappers.modules.base import plain_module

__all__ = [
    "Predicate",
    "all_but_last",
    "as_predicate",
    "by_class",
    "by_name",
    "every_nth",
    "min_params",
    "repeated_blocks",
]

ModuleTest = Callable[[nn.Module], bool]


class Predicate(ABC):
    """A question about a module that can be combined with others."""

    @abstractmethod
    def __call__(self, module: nn.Module) -> bool:
        """Answer for one module.

        Raises:
            WrapperError: The answer needs the whole model and the predicate is not bound.
        """

    def bind(self, model: nn.Module) -> Predicate:
        """Return a predicate that needs to know nothing beyond the module it is asked about.

        Args:
            model: Root of the tree.
        """
        return self

    def __and__(self, other: ModuleTest) -> Predicate:
        return _Combined("&", all, (self, as_predicate(other)))

    def __rand__(self, other: ModuleTest) -> Predicate:
        return _Combined("&", all, (as_predicate(other), self))

    def __or__(self, other: ModuleTest) -> Predicate:
        return _Combined("|", any, (self, as_predicate(other)))

    def __ror__(self, other: ModuleTest) -> Predicate:
        return _Combined("|", any, (as_predicate(other), self))

    def __invert__(self) -> Predicate:
        return _Not(self)


class _Plain(Predicate):
    """Any callable."""

    def __init__(self, test: ModuleTest, text: str = "") -> None:
        self._test = test
        self._text = text or getattr(test, "__name__", repr(test))

    def __call__(self, module: nn.Module) -> bool:
        return bool(self._test(module))

    def __repr__(self) -> str:
        return self._text


class _Combined(Predicate):
    def __init__(
        self,
        sign: str,
        combine: Callable[[Iterable[bool]], bool],
        parts: tuple[Predicate, ...],
    ) -> None:
        self._sign = sign
        self._combine = combine
        self._parts = parts

    def __call__(self, module: nn.Module) -> bool:
        return self._combine(part(module) for part in self._parts)

    def bind(self, model: nn.Module) -> Predicate:
        parts = tuple(part.bind(model) for part in self._parts)
        return _Combined(self._sign, self._combine, parts)

    def __repr__(self) -> str:
        return f"({f' {self._sign} '.join(map(repr, self._parts))})"


class _Not(Predicate):
    def __init__(self, part: Predicate) -> None:
        self._part = part

    def __call__(self, module: nn.Module) -> bool:
        return not self._part(module)

    def bind(self, model: nn.Module) -> Predicate:
        return _Not(self._part.bind(model))

    def __repr__(self) -> str:
        return f"~{self._part!r}"


class _NeedsModel(Predicate):
    """A predicate that becomes a set of modules once it knows the model."""

    def __init__(self, text: str, choose: Callable[[nn.Module], Iterable[nn.Module]]) -> None:
        self._text = text
        self._choose = choose

    def __call__(self, module: nn.Module) -> bool:
        raise WrapperError(
            f"{self} depends on the whole model and cannot be asked about a "
            f"{type(module).__name__} alone: pass it to apply_activation_checkpointing as "
            f"check_fn, or call {self}.bind(model) first"
        )

    def bind(self, model: nn.Module) -> Predicate:
        return _Plain(frozenset(self._choose(model)).__contains__, self._text)

    def __repr__(self) -> str:
        return self._text


def as_predicate(test: ModuleTest) -> Predicate:
    """Return ``test`` as a predicate.

    Raises:
        TypeError: ``test`` is not callable.
    """
    if isinstance(test, Predicate):
        return test
    if not callable(test):
        raise TypeError(f"a predicate must be callable, got {type(test).__name__}: {test!r:.80}")
    return _Plain(test)


def by_class(*types: type[nn.Module]) -> Predicate:
    """Choose instances of the given classes and of their subclasses.

    Args:
        *types: At least one class.

    Raises:
        TypeError: No class is given, or something that is not a class.
    """
    if not types or not all(isinstance(cls, type) for cls in types):
        raise TypeError(f"by_class takes one or more classes, got {types!r:.80}")
    names = ", ".join(cls.__name__ for cls in types)
    return _Plain(lambda module: isinstance(module, types), f"by_class({names})")


def by_name(pattern: str) -> Predicate:
    """Choose modules by a glob on their FQN.

    Args:
        pattern: ``*`` stands for any characters but dots, so ``layers.*`` are the direct children
            of ``layers``; ``**`` for any characters; ``**.`` at the start also for nothing, so
            ``**.attn`` finds ``attn`` at every depth; ``?`` for one character but a dot; ``[seq]``
            and ``[!seq]`` as in the shell. A shared module is found by each of its names.
    """
    matches = re.compile(_regex(pattern)).fullmatch

    def choose(model: nn.Module) -> Iterator[nn.Module]:
        for fqn, module in plain_modules(model, remove_duplicate=False):
            if fqn and matches(fqn):
                yield module

    return _NeedsModel(f"by_name({pattern!r})", choose)


_GLOB_PARTS = re.compile(r"(^\*\*\.)|(\*\*)|(\*)|(\?)|\[(!?)([^\]]+)\]|(.)", re.DOTALL)


def _regex(pattern: str) -> str:
    parts = []
    for match in _GLOB_PARTS.finditer(pattern):
        any_start, any_chars, star, question, negation, sequence, character = match.groups()
        if any_start:
            parts.append(r"(?:.*\.)?")
        elif any_chars:
            parts.append(".*")
        elif star:
            parts.append(r"[^.]*")
        elif question:
            parts.append(r"[^.]")
        elif sequence:
            escaped = sequence.replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            parts.append(f"[{'^.' if negation else ''}{escaped}]")
        else:
            parts.append(re.escape(character))
    return "".join(parts)


def every_nth(n: int, predicate: ModuleTest, offset: int = 0) -> Predicate:
    """Choose every n-th of the modules that another predicate chooses.

    Args:
        n: Distance between two chosen modules, at least 1.
        predicate: Chooses the modules to count, in the order of ``named_modules``.
        offset: How many of them to leave out at the start.

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n`` is less than 1 or ``offset`` negative.
    """
    if not isinstance(n, int):
        raise TypeError(f"every_nth takes the distance first, got {type(n).__name__}")
    if n < 1 or offset < 0:
        raise ValueError(f"every_nth needs n >= 1 and offset >= 0, got n={n}, offset={offset}")
    counted = as_predicate(predicate)
    text = f"every_nth({n}, {counted!r}{f', offset={offset}' if offset else ''})"
    return _NeedsModel(text, lambda model: _chosen(counted, model)[offset::n])


def all_but_last(k: int, predicate: ModuleTest) -> Predicate:
    """Choose what another predicate chooses, without the last ``k`` in ``named_modules`` order.

    Backward begins with the last modules: their activations would be dropped only to be
    recomputed at once.

    Args:
        k: How many to leave out, at least 0.
        predicate: Chooses the modules to count.

    Raises:
        TypeError: ``k`` is not an integer.
        ValueError: ``k`` is negative.
    """
    if not isinstance(k, int):
        raise TypeError(f"all_but_last takes the number first, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"all_but_last needs k >= 0, got k={k}")
    counted = as_predicate(predicate)

    def choose(model: nn.Module) -> list[nn.Module]:
        chosen = _chosen(counted, model)
        return chosen[: len(chosen) - k] if k < len(chosen) else []

    return _NeedsModel(f"all_but_last({k}, {counted!r})", choose)


def repeated_blocks() -> Predicate:
    """Choose what a model repeats: its transformer blocks, its residual blocks.

    These are the modules of one class that stand in a ``ModuleList`` or ``Sequential``, in two
    places or more; where several classes do, those with the most parameters. What lies inside of
    them does not count: the experts of a block are no blocks. A single layer of ``torch.nn`` is
    none either, and a plain ``Sequential`` only where nothing else repeats.

    Raises:
        ValueError: When it is bound: nothing repeats in the model.
    """
    return _NeedsModel("repeated_blocks()", _repeated)


def _repeated(model: nn.Module) -> Iterable[nn.Module]:
    for is_block in (_is_own_block, _is_sequential_block):
        blocks = _outermost(plain_module(model), _listed(model, is_block))
        if blocks:
            # Of equals the first one met: the dict is in the order of named_modules.
            return max(blocks.values(), key=_num_elements)
    raise ValueError(
        f"nothing repeats in this {type(model).__name__}: no class has two modules in a ModuleList "
        "or Sequential, single layers aside. Say which modules are its blocks, such as "
        "wrappers.select.by_class(Block)"
    )


def _is_own_block(module: nn.Module) -> bool:
    """Whether a module in a list can be a block: it has a forward, and is not a single layer."""
    if type(module) is nn.Sequential or not has_forward(module):
        return False
    is_layer = type(module).__module__.startswith("torch.nn.") and not module._modules
    return not is_layer and _has_params(module, 1)


def _is_sequential_block(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and _has_params(module, 1)


def _listed(model: nn.Module, is_block: ModuleTest) -> set[nn.Module]:
    """The possible blocks that stand in lists, of classes that do so in two places or more."""
    found = [
        plain_module(child)
        for _, module in plain_modules(model)
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child in module._modules.values()
        if child is not None
    ]
    found = [module for module in found if is_block(module)]
    counts = Counter(map(type, found))
    return {module for module in found if counts[type(module)] > 1}


def _outermost(
    root: nn.Module, listed: set[nn.Module]
) -> dict[type[nn.Module], dict[nn.Module, None]]:
    """By class, the listed modules that lie in no other one; classes with one place left out."""
    blocks: dict[type[nn.Module], dict[nn.Module, None]] = {}
    num_places: Counter[type[nn.Module]] = Counter()
    seen: set[nn.Module] = set()
    stack = [root]
    while stack:
        module = stack.pop()
        if module in listed and module is not root:
            blocks.setdefault(type(module), {})[module] = None
            num_places[type(module)] += 1
        elif module not in seen:
            seen.add(module)
            children = [plain_module(m) for m in module._modules.values() if m is not None]
            stack.extend(reversed(children))
    return {kind: found for kind, found in blocks.items() if num_places[kind] > 1}


def _num_elements(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {p: None for m in modules for p in m.parameters()})


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called; a ``ModuleList`` cannot."""
    # Not type(module).forward, which TorchScript's classes refuse.
    defined = inspect.getattr_static(type(module), "forward", None)
    return defined is not nn.Module.forward or "forward" in module.__dict__


def min_params(n: int) -> Predicate:
    """Choose modules with at least ``n`` parameter elements, those of submodules included.

    Args:
        n: Number of elements; a parameter that occurs twice in a module counts once.
    """
    return _Plain(lambda module: _has_params(module, n), f"min_params({n})")


def _has_params(module: nn.Module, n: int) -> bool:
    total = 0
    for parameter in module.parameters():
        total += parameter.numel()
        if total >= n:
            return True
    return total >= n


def _chosen(predicate: Predicate, model: nn.Module) -> list[nn.Module]:
    bound = predicate.bind(model)
    root = plain_module(model)  # is never wrapped, so it is not counted
    return [m for _, m in plain_modules(model) if m is not root and bound(m)]


def plain_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules as in the unwrapped model, in the order of ``named_modules``.

    Args:
        model: Root of the tree.
        remove_duplicate: Whether to yield a shared module once, under its first name.
    """
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        fqn, outer = stack.pop()
        module = plain_module(outer)
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield fqn, module
        prefix = f"{fqn}." if fqn else ""
        children = [
            (prefix + name, child)
            for name, child in module._modules.items()
            if child is not None  # an empty Sequential is false
        ]
        stack.extend(reversed(children))
