"""What the arguments of a command name: models, samples, functions.

A target is ``my.module:name``, imported with the current directory on the path as ``python -m``
does, or a built-in model. Everything is checked where it comes in, so that an error names the
argument and not a line of the planner.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _tree
from wrappers.cli import models
from wrappers.cli.failure import Exit, Failure, call_users, place_of, text_of
from wrappers.select import ModuleTest, as_predicate, plain_modules, repeated_blocks

__all__ = ["Model", "blocks_named", "load", "load_function", "load_model", "optimizer_named"]

#: What a sample may be, and what is done with it.
SAMPLE_FORMS = (
    "a tensor (one positional argument), a tuple (positional arguments), a dict (keyword "
    "arguments) or a list of such samples"
)


def load(target: str, argument: str) -> Any:
    """Import what ``my.module:name`` names.

    Args:
        target: Names a module and, after the colon, something in it; dots go deeper.
        argument: What the user has given it as, for errors.

    Raises:
        Failure: There is no such module or name, or the import fails.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise Failure(
            Exit.USAGE,
            "import_path",
            f"{argument} `{target}` is not of the form my.module:name",
            "Write the module with dots, as in an import, then a colon and a name in it.",
            target=target,
        )
    _put_directory_on_path()
    found: Any = _import(module_name, target, argument)
    for depth, part in enumerate(attribute.split(".")):
        if not hasattr(found, part):
            owner = ":".join([module_name, *attribute.split(".")[:depth]][:2])
            raise _no_attribute(found, owner, part, target, argument)
        found = getattr(found, part)
    return found


def _put_directory_on_path() -> None:
    # A console script has its own directory there, where ``python -m`` has the current one.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _import(name: str, target: str, argument: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise Failure(
                Exit.MISSING,
                "import_fails",
                f"{argument} `{target}`: {name} imports {missing}, which is not installed"
                f"{_at(error)}",
                f"Install {missing} into this environment ({sys.prefix}).",
                target=target,
                module=missing,
            ) from error
        raise Failure(
            Exit.USAGE,
            "import_path",
            f"{argument} `{target}`: there is no module {missing} in {os.getcwd()} or on "
            "Python's path",
            "Run the command in the directory above the package, or set PYTHONPATH.",
            target=target,
            module=missing,
        ) from error
    except Exception as error:
        raise Failure(
            Exit.PROBLEM,
            "import_fails",
            f"{argument} `{target}`: importing {name} failed: {text_of(error)}{_at(error)}",
            f'See that `python -c "import {name}"` works here.',
            target=target,
            module=name,
        ) from error


def _at(error: BaseException) -> str:
    place = place_of(error)
    return f" ({place})" if place else ""


def _no_attribute(found: Any, owner: str, part: str, target: str, argument: str) -> Failure:
    close = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("__")])
    known = f" Close to it: {', '.join(close)}." if close else ""
    return Failure(
        Exit.USAGE,
        "attribute",
        f"{argument} `{target}`: {owner} has no `{part}`",
        f"Define it at the top level of the module, or correct the name.{known}",
        target=target,
        close=close,
    )


def load_function(target: str, argument: str) -> Callable[..., Any]:
    """Import something that can be called.

    Raises:
        Failure: It is not there, or not callable.
    """
    found = load(target, argument)
    if not callable(found):
        raise Failure(
            Exit.USAGE,
            "not_callable",
            f"{argument} `{target}` must be a function, got {type(found).__name__}",
            target=target,
        )
    function: Callable[..., Any] = found
    return function


# --- Models and samples ---------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model and its sample, not built yet.

    Attributes:
        name: As the user has given it.
        build: Makes the model on the default device; raises Failure.
        sample: Makes the sample on the default device; raises Failure.
        is_builtin: Whether it comes with the package.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[], Any]
    is_builtin: bool = False


def load_model(target: str, sample: str | None, *, needs_sample: bool = True) -> Model:
    """What MODEL and ``--sample`` name.

    Args:
        target: A built-in model, or ``my.module:name``.
        sample: The same for its sample; None for a built-in model's own.
        needs_sample: Whether a model without a sample is an error.

    Raises:
        Failure: One of them is not there, or a sample is missing.
    """
    if models.is_builtin(target):
        try:
            builtin = models.builtin_named(target)
        except ValueError as error:
            raise Failure(Exit.USAGE, "builtin_model", f"MODEL: {error}", target=target) from None
        make = builtin.sample if sample is None else _sample_of(sample)
        return Model(target, builtin.build, make, is_builtin=True)
    build = _model_of(target)
    if sample is None and needs_sample:
        raise Failure(
            Exit.USAGE,
            "no_sample",
            f"MODEL `{target}` needs --sample my.module:name, the input of one step",
            f"It is {SAMPLE_FORMS}, or a function without arguments that returns one.",
            target=target,
        )
    return Model(target, build, _sample_of(sample) if sample else tuple)


def _model_of(target: str) -> Callable[[], nn.Module]:
    found = load(target, "MODEL")
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise _not_a_model(target, found, "")

    def build() -> nn.Module:
        model = call_users(
            found,
            f"MODEL `{target}`: building the model failed",
            "It is called without arguments; call it in Python to see the whole error.",
            kind="model_build",
        )
        if not isinstance(model, nn.Module):
            raise _not_a_model(target, model, " returned")
        return model

    return build


def _not_a_model(target: str, found: object, returned: str) -> Failure:
    return Failure(
        Exit.USAGE,
        "not_a_model",
        f"MODEL `{target}`{returned or ' is'} a {type(found).__name__}",
        "It must be an nn.Module, or a function without arguments that returns one.",
        target=target,
    )


def _sample_of(target: str) -> Callable[[], Any]:
    found = load(target, "--sample")

    def make() -> Any:
        sample = found
        if callable(found) and not isinstance(found, Tensor):
            sample = call_users(
                found,
                f"--sample `{target}`: making the sample failed",
                "It is called without arguments; call it in Python to see the whole error.",
                kind="sample_build",
            )
        _check_sample(sample, target)
        return sample

    return make


def _check_sample(sample: object, target: str) -> None:
    parts = sample if isinstance(sample, list) else [sample]
    for part in parts:
        if not isinstance(part, (Tensor, tuple, dict)):
            raise _bad_sample(target, f"is {_described(part, sample)}")
        if isinstance(part, dict) and not all(isinstance(key, str) for key in part):
            raise _bad_sample(target, "is a dict whose keys are no names of arguments")
        if not _tree.flatten(part)[0]:
            raise _bad_sample(target, f"is {_described(part, sample)} without a tensor in it")
    if not parts:
        raise _bad_sample(target, "is an empty list")


def _described(part: object, sample: object) -> str:
    kind = type(part).__name__
    return f"a list with a {kind}" if part is not sample else f"a {kind}"


def _bad_sample(target: str, what: str) -> Failure:
    return Failure(
        Exit.USAGE,
        "sample",
        f"--sample `{target}` {what}",
        f"A sample is {SAMPLE_FORMS}.",
        target=target,
    )


# --- What else the planner is told ----------------------------------------------------------


def blocks_named(class_name: str | None, check_fn: str | None) -> ModuleTest:
    """Which modules are regions: by ``--blocks``, by ``--check-fn``, or what repeats.

    Raises:
        Failure: The function is not there.
    """
    if check_fn is not None:
        return load_function(check_fn, "--check-fn")
    if class_name is None:
        return repeated_blocks()
    return functools.partial(_is_of_class, class_name)


def _is_of_class(class_name: str, module: nn.Module) -> bool:
    return any(kind.__name__ == class_name for kind in type(module).__mro__)


def check_blocks(model: nn.Module, blocks: ModuleTest, asked: str) -> None:
    """See that something of a model is chosen.

    Raises:
        Failure: Nothing is.
    """
    try:
        bound = as_predicate(blocks).bind(model)
    except ValueError as error:  # repeated_blocks
        remedy = "Name their class, --blocks Block, or give --check-fn my.module:is_block."
        raise Failure(Exit.USAGE, "no_blocks", str(error).partition(" Say ")[0], remedy) from None
    modules = [module for fqn, module in plain_modules(model) if fqn]
    if any(
        call_users(
            functools.partial(bound, module),
            f"{asked} failed on a {type(module).__name__}",
            "It is called with each module of the model and returns a bool.",
            kind="check_fn",
        )
        for module in modules
    ):
        return
    counts = Counter(type(module).__name__ for module in modules)
    classes = ", ".join(f"{name} ({count})" for name, count in counts.most_common(20))
    raise Failure(
        Exit.USAGE,
        "no_blocks",
        f"{asked} chooses no module of the model",
        f"Classes in the model: {classes or 'none'}.",
        classes=dict(counts),
    )


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer] | None] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}


def optimizer_named(name: str) -> Callable[..., Any] | None:
    """What makes an optimizer of parameters; None for a step without one.

    Raises:
        Failure: The function is not there.
    """
    if name in _OPTIMIZERS:
        return _OPTIMIZERS[name]
    if ":" not in name:
        raise Failure(
            Exit.USAGE,
            "optimizer",
            f"--optimizer `{name}` is not known",
            f"Give one of {', '.join(_OPTIMIZERS)}, or my.module:make, a function that gets the "
            "parameters and returns an optimizer.",
        )
    return load_function(name, "--optimizer")
