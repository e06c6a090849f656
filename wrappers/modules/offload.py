"""Activation offload of one module: a wrapper, or the module's own forward in place.

What autograd saves in the module's forward goes to the host and comes back in backward; see
:mod:`wrappers.offload`. The module computes exactly what it computed before.

Composed with a checkpointed region, the innermost of the two decides about a saved tensor. An
``OffloadWrapper`` of a ``CheckpointWrapper`` moves the inputs that the checkpointed region keeps,
which is the useful order. The other way round moves all activations and recomputes none of them;
what the host holds anyway is left to the checkpointed region.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wrappers import _knobs, _torch
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    has_layer,
    require_module,
    unwrap,
)
from wrappers.offload.hooks import offload_saved_tensors

__all__ = ["OffloadForward", "OffloadWrapper", "offload_wrapper"]


class _Offloading:
    """What the two faces have in common: the settings of an offloaded module.

    Attributes:
        min_bytes: Tensors of fewer bytes stay on their device.
        pin_memory: Whether host copies are pinned.
    """

    _min_bytes: int
    _pin_memory: bool

    def _configure_region(self, min_bytes: int | None, pin_memory: bool) -> None:
        if min_bytes is None:
            min_bytes = _knobs.OFFLOAD_MIN_BYTES
        if min_bytes < 0:
            raise ValueError(f"min_bytes must not be negative, got {min_bytes}")
        self._min_bytes = min_bytes
        self._pin_memory = pin_memory

    def _run_region(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A compiler places activations itself: hooks inside a traced region break the graph.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with offload_saved_tensors(min_bytes=self._min_bytes, pin_memory=self._pin_memory):
            return function(*args, **kwargs)


class OffloadWrapper(ActivationWrapper, _Offloading):
    """A module whose activations wait for backward on the host.

    Tensors on an accelerator move; parameters, views of parameters, small tensors, and all
    tensors that lie in host memory stay. Under torch.compile nothing is offloaded.

    Args:
        mod: The module to wrap.
        min_bytes: Tensors of fewer bytes stay on their device; 64 KiB by default.
        pin_memory: Whether host copies lie in pinned memory.

    Raises:
        TypeError: ``mod`` is not a module.
        ValueError: ``min_bytes`` is negative.
    """

    _own_attributes = ActivationWrapper._own_attributes | {"_min_bytes", "_pin_memory"}

    def __init__(
        self, mod: nn.Module, *, min_bytes: int | None = None, pin_memory: bool = True
    ) -> None:
        super().__init__(mod)
        self._configure_region(min_bytes, pin_memory)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module with saved tensors going to the host."""
        if _torch.is_fx_tracing():  # The tracer knows the wrapper, not the module inside.
            return self._checkpoint_wrapped_module.forward(*args, **kwargs)
        return self._run_region(self._checkpoint_wrapped_module, args, kwargs)

    def _wrapper_settings(self) -> str:
        return f"min_bytes={self._min_bytes}"


class OffloadForward(InPlaceForward, _Offloading):
    """The forward of a module that is offloaded in place; see :func:`offload_wrapper`."""

    def __init__(
        self, module: nn.Module, *, min_bytes: int | None = None, pin_memory: bool = True
    ) -> None:
        super().__init__(module)
        self._configure_region(min_bytes, pin_memory)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original forward with saved tensors going to the host."""
        return self._run_region(self.__wrapped__, args, kwargs)


def offload_wrapper(
    module: nn.Module,
    *,
    inplace: bool = False,
    min_bytes: int | None = None,
    pin_memory: bool = True,
) -> nn.Module:
    """Offload the activations of a module to the host.

    Args:
        module: The module.
        inplace: Replace the module's forward instead of wrapping the module.
        min_bytes: Tensors of fewer bytes stay on their device; 64 KiB by default.
        pin_memory: Whether host copies lie in pinned memory.

    Returns:
        The wrapper; with ``inplace`` the module itself. A module that is offloaded already is
        returned as it is, with a warning.
    """
    require_module(module)
    if is_offloaded(module):
        warnings.warn(
            f"a {type(unwrap(module)).__name__} is offloaded already: it is returned as it is"
        )
        return module
    if not inplace:
        return OffloadWrapper(module, min_bytes=min_bytes, pin_memory=pin_memory)
    OffloadForward(module, min_bytes=min_bytes, pin_memory=pin_memory).install()
    return module


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module is offloaded already: by our wrapper or in place."""
    return has_layer(module, _Offloading)
