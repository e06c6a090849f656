"""Activation checkpointing of one module: a wrapper, or the module's own forward in place.

Both faces hold a :class:`~wrappers.engine.region.Region` and do the same at a call:

* without grad mode the call goes straight to the module: there is nothing to recompute;
* while torch.compile traces, the call goes to ``torch.utils.checkpoint``, which it knows;
* else the engine runs the module as a region.

The names and arguments are those of torch's private ``checkpoint_wrapper`` module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.engine.api import default_impl, run_compiled, run_region
from wrappers.engine.region import Region
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    faces,
    has_layer,
    require_module,
)
from wrappers.policy import CheckpointImpl

__all__ = ["CheckpointForward", "CheckpointImpl", "CheckpointWrapper", "checkpoint_wrapper"]

_CheckpointFn = Callable[..., Any]

_SETTINGS = frozenset(
    {
        "preserve_rng_state",
        "context_fn",
        "determinism_check",
        "debug",
        "early_stop",
        "policy",
        "verify",
        "allow_cache_entry_mutation",
    }
)


class _Checkpointing:
    """What the two faces have in common: the settings of a module's region.

    Attributes:
        checkpoint_impl: How the region is recomputed; of no effect with a ``checkpoint_fn``.
        checkpoint_fn: The caller's own function with its keyword arguments bound, or None.
    """

    checkpoint_impl: CheckpointImpl
    checkpoint_fn: _CheckpointFn | None
    _checkpoint_region: Region

    def _configure_region(
        self,
        checkpoint_impl: CheckpointImpl | None,
        checkpoint_fn: _CheckpointFn | None,
        impl: CheckpointImpl | None,
        kwargs: dict[str, Any],
    ) -> None:
        policy = None if checkpoint_fn is not None else kwargs.get("policy")
        self.checkpoint_impl = _resolve_impl(checkpoint_impl, impl, policy)
        self.checkpoint_fn = None
        if checkpoint_fn is not None:
            self.checkpoint_fn = partial(checkpoint_fn, **kwargs)
            kwargs = {}
        if unknown := kwargs.keys() - _SETTINGS:
            raise TypeError(
                f"unknown settings of a region: {', '.join(sorted(unknown))}. There are impl (in "
                f"place of use_reentrant), {', '.join(sorted(_SETTINGS))}."
            )
        self._checkpoint_region = Region(impl=self.checkpoint_impl, **kwargs)

    def _run_region(
        self, function: Callable[..., Any], args: Any, kwargs: Any, owner: nn.Module | None = None
    ) -> Any:
        if self.checkpoint_fn is not None:
            return self._run_checkpoint_fn(self.checkpoint_fn, function, args, kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            return run_compiled(self._checkpoint_region, function, args, kwargs)
        return run_region(self._checkpoint_region, function, args, kwargs, owner)

    def _run_checkpoint_fn(
        self, checkpoint_fn: _CheckpointFn, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.checkpoint_impl is not CheckpointImpl.REENTRANT or not kwargs:
            return checkpoint_fn(function, *args, **kwargs)
        # As in torch: a function for REENTRANT is expected to know positional arguments only.
        num_args, names = len(args), tuple(kwargs)

        def positional(*flat: Any) -> Any:
            named = dict(zip(names, flat[num_args:], strict=True))
            return function(*flat[:num_args], **named)

        return checkpoint_fn(positional, *args, *kwargs.values())

    @property
    def region_fqn(self) -> str:
        """The region's name in errors and warnings, as in the unwrapped model."""
        return self._checkpoint_region.fqn

    @region_fqn.setter
    def region_fqn(self, value: str) -> None:
        self._checkpoint_region.fqn = value


def _resolve_impl(
    checkpoint_impl: CheckpointImpl | None, impl: CheckpointImpl | None, policy: Any
) -> CheckpointImpl:
    given = [CheckpointImpl(value) for value in (checkpoint_impl, impl) if value is not None]
    if len(set(given)) == 2:
        raise ValueError(
            "checkpoint_impl and impl mean the same and contradict each other: "
            f"checkpoint_impl={given[0].name}, impl={given[1].name}; give one of them"
        )
    return given[0] if given else default_impl(policy)


class CheckpointWrapper(ActivationWrapper, _Checkpointing):
    """A module whose activations are recomputed in backward.

    Args:
        mod: The module to wrap.
        checkpoint_impl: How the region is recomputed; NO_REENTRANT by default. Members of
            torch's enum of the same name are accepted.
        checkpoint_fn: Called instead of the engine, as ``checkpoint_fn(mod, *args, **kwargs)``
            and also without grad mode. With REENTRANT it gets positional arguments only.
        impl: The same as ``checkpoint_impl``.
        **checkpoint_fn_kwargs: Settings of the region (``preserve_rng_state``, ``context_fn``,
            ``determinism_check``, ``debug``, ``early_stop``), or what ``checkpoint_fn`` takes.

    Raises:
        TypeError: ``mod`` is not a module, or a setting is unknown.
        ValueError: Settings contradict each other.
    """

    _own_attributes = ActivationWrapper._own_attributes | {
        "checkpoint_impl",
        "checkpoint_fn",
        "_checkpoint_region",
        "region_fqn",
    }

    def __init__(
        self,
        mod: nn.Module,
        checkpoint_impl: CheckpointImpl | None = None,
        checkpoint_fn: _CheckpointFn | None = None,
        *,
        impl: CheckpointImpl | None = None,
        **checkpoint_fn_kwargs: Any,
    ) -> None:
        super().__init__(mod)
        self._configure_region(checkpoint_impl, checkpoint_fn, impl, checkpoint_fn_kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module as a region."""
        if _torch.is_fx_tracing():  # The tracer knows the wrapper, not the module inside.
            return self._checkpoint_wrapped_module.forward(*args, **kwargs)
        return self._run_region(self._checkpoint_wrapped_module, args, kwargs)

    def _wrapper_settings(self) -> str:
        return _settings_text(self)


class CheckpointForward(InPlaceForward, _Checkpointing):
    """The forward of a module that is checkpointed in place; see :func:`checkpoint_wrapper`."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint_impl: CheckpointImpl | None = None,
        checkpoint_fn: _CheckpointFn | None = None,
        *,
        impl: CheckpointImpl | None = None,
        **checkpoint_fn_kwargs: Any,
    ) -> None:
        super().__init__(module)
        self._configure_region(checkpoint_impl, checkpoint_fn, impl, checkpoint_fn_kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original forward as a region."""
        if args and args[0] is self.__self__:  # bound to the module once more, as by accelerate
            args = args[1:]
        return self._run_region(self.__wrapped__, args, kwargs, self.__self__)


def _settings_text(face: _Checkpointing) -> str:
    if face.checkpoint_fn is None:
        return f"impl={face.checkpoint_impl.name}"
    function = getattr(face.checkpoint_fn, "func", face.checkpoint_fn)
    return f"checkpoint_fn={getattr(function, '__name__', function)}"


def checkpoint_wrapper(
    module: nn.Module,
    checkpoint_impl: CheckpointImpl | None = None,
    checkpoint_fn: _CheckpointFn | None = None,
    *,
    impl: CheckpointImpl | None = None,
    inplace: bool = False,
    **checkpoint_fn_kwargs: Any,
) -> nn.Module:
    """Checkpoint the activations of a module.

    Args:
        module: The module.
        checkpoint_impl: See :class:`CheckpointWrapper`, as for all arguments but ``inplace``.
        checkpoint_fn: See there.
        impl: See there.
        inplace: Replace the module's forward instead of wrapping the module. Class, names and
            hooks stay the module's own. Undone by ``remove_activation_checkpointing``.
        **checkpoint_fn_kwargs: See :class:`CheckpointWrapper`.

    Returns:
        The wrapper; with ``inplace`` the module itself. A module that is checkpointed already
        is returned as it is, with a warning.

    Raises:
        TypeError: ``module`` is not a module, a setting is unknown, or ``inplace`` is asked of a
            TorchScript module.
        ValueError: Settings contradict each other.
    """
    if isinstance(module, nn.Module) and is_checkpointed(module):
        warnings.warn(
            f"{_described(module)} is checkpointed already: it is returned as it is and the new "
            "settings are ignored; remove_activation_checkpointing(model) undoes the first"
        )
        return module
    if not inplace:
        return CheckpointWrapper(
            module, checkpoint_impl, checkpoint_fn, impl=impl, **checkpoint_fn_kwargs
        )
    require_module(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            "the forward of a TorchScript module cannot be replaced in place: wrap the module, "
            "checkpoint_wrapper(module)"
        )
    CheckpointForward(
        module, checkpoint_impl, checkpoint_fn, impl=impl, **checkpoint_fn_kwargs
    ).install()
    return module


def is_checkpointed(module: nn.Module) -> bool:
    """Whether a module is checkpointed already: by our wrapper, in place, or by torch's wrapper."""
    return any(map(is_torch_checkpoint, faces(module))) or has_layer(module, _Checkpointing)


def is_torch_checkpoint(module: nn.Module) -> bool:
    """Whether a module is torch's wrapper for activation checkpointing, not the offloading one."""
    return _torch.is_torch_wrapper(module) and "checkpoint_fn" in vars(module)


def _described(module: nn.Module) -> str:
    fqn = getattr(module, "region_fqn", "")
    return f"region `{fqn}`" if isinstance(fqn, str) and fqn else f"a {type(module).__name__}"
