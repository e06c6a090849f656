"""Activation offload of one module: a wrapper, or the module's own forward in place.

What autograd saves in the module's forward goes to the host and comes back in backward; see
:mod:`wrappers.offload`. The module computes exactly what it computed before.

Composed with a checkpointed region, an ``OffloadWrapper`` of a ``CheckpointWrapper`` moves the
inputs that the checkpointed region keeps, which is the useful order. The other way round there is
nothing worth moving, as the region recomputes its activations in backward: the wrapper inside says
so once and does nothing.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wrappers import _torch, _tree
from wrappers.engine.frame import is_in_region
from wrappers.engine.holders import connect_offloading
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    has_layer,
    require_module,
    unwrap,
)
from wrappers.offload.hooks import OffloadHooks, result_offloader
from wrappers.offload.store import OffloadSettings, store_for

__all__ = ["OffloadForward", "OffloadWrapper", "offload_wrapper"]

# The engine decides what a policy moves to the host, the offload room moves it; they meet here.
connect_offloading(result_offloader)


class _Once:
    """Says yes once. An object, as a rerun puts a module's plain attributes back."""

    __slots__ = ("_is_over",)

    def __init__(self) -> None:
        self._is_over = False

    def is_due(self) -> bool:
        """Whether this is the first time."""
        was_over, self._is_over = self._is_over, True
        return not was_over


class _Offloading:
    """What the two faces have in common: the settings of an offloaded module.

    Attributes:
        offload_settings: The settings.
        region_fqn: The region's name in errors and warnings, as in the unwrapped model.
    """

    offload_settings: OffloadSettings
    region_fqn: str
    _warning: _Once

    def _configure_region(self, settings: dict[str, Any]) -> None:
        if settings.get("directory") is not None:
            settings["directory"] = os.fspath(settings["directory"])
        self.offload_settings = OffloadSettings(**settings)
        self.region_fqn = ""
        self._warning = _Once()

    def _run_region(
        self, module: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        # A compiler places activations itself: hooks inside a traced region break the graph.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        store = store_for(self.offload_settings)
        if store is None or self._is_pointless():
            return function(*args, **kwargs)
        hooks = OffloadHooks(
            store,
            self.offload_settings,
            key=id(self),
            fqn=self.region_fqn or type(module).__name__,
            module=module,
            arguments=_tree.flatten_call(args, kwargs)[0],
        )
        with hooks:
            return function(*args, **kwargs)

    def _is_pointless(self) -> bool:
        """Whether a checkpointed region around this one recomputes all activations anyway."""
        if not is_in_region():
            return False
        if self._warning.is_due():
            name = f"`{self.region_fqn}`" if self.region_fqn else "that is offloaded"
            warnings.warn(
                f"region {name} lies inside a checkpointed one, which recomputes its activations: "
                "none of them is worth moving, so nothing is offloaded here. Offload the "
                "checkpointed module instead: offload_wrapper(checkpoint_wrapper(module)).",
                stacklevel=2,
            )
        return True


class OffloadWrapper(ActivationWrapper, _Offloading):
    """A module whose activations wait for backward on the host, or on a disk.

    Parameters, buffers, views of them, arguments without a graph (a batch, a mask), small tensors,
    and for the host tier all tensors that lie in host memory, stay. Under torch.compile, in a
    transform of torch.func, while a CUDA graph is captured and without grad mode nothing is
    offloaded.

    Args:
        mod: The module to wrap.
        **settings: Those of :func:`offload_wrapper`, except ``inplace``.

    Raises:
        TypeError: ``mod`` is not a module, or a setting has a wrong type.
        ValueError: A setting has a wrong value.
        OSError: No file can be written in the directory.
    """

    _own_attributes = ActivationWrapper._own_attributes | {
        "offload_settings",
        "region_fqn",
        "_warning",
    }

    def __init__(self, mod: nn.Module, **settings: Any) -> None:
        super().__init__(mod)
        self._configure_region(settings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module with saved tensors going away."""
        inner = self._checkpoint_wrapped_module
        if _torch.is_fx_tracing():  # The tracer knows the wrapper, not the module inside.
            return inner.forward(*args, **kwargs)
        return self._run_region(inner, inner, args, kwargs)

    def _wrapper_settings(self) -> str:
        return _described(self.offload_settings)


class OffloadForward(InPlaceForward, _Offloading):
    """The forward of a module that is offloaded in place; see :func:`offload_wrapper`."""

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__(module)
        self._configure_region(settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original forward with saved tensors going away."""
        return self._run_region(self.__self__, self.__wrapped__, args, kwargs)


def _described(settings: OffloadSettings) -> str:
    """The settings that are not the default's, as in a call."""
    default = OffloadSettings()
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    given = {k: v for k, v in values.items() if v != getattr(default, k)}
    return ", ".join(f"{k}={v!r}" for k, v in given.items()) or "tier='host'"


def offload_wrapper(
    module: nn.Module,
    *,
    inplace: bool = False,
    tier: str = "host",
    directory: str | os.PathLike[str] | None = None,
    min_bytes: int | None = None,
    keep_last: int = 1,
    max_inflight_bytes: int | None = None,
    prefetch: int = 1,
    ratio: float = 1.0,
    checksum: bool = False,
) -> nn.Module:
    """Let the activations of a module wait for backward on the host, or on a disk.

    Copies run beside the compute, on streams of their own (or in threads), and start when a tensor
    is saved. The device memory is free once its copy is done. Backward finds the tensors fetched
    ahead, in the order that the first step has shown. Nothing blocks the calling thread, unless
    the tensors of a machine without an accelerator go to a disk.

    Args:
        module: The module, such as one transformer block.
        inplace: Replace the module's forward instead of wrapping the module.
        tier: ``"host"``: pinned host memory, for tensors of an accelerator. ``"disk"``: a file,
            for those of the host too.
        directory: For the disk tier: where the file is. It is removed with the process.
        min_bytes: Tensors whose memory (that of their base, for a view) is smaller stay on their
            device; 64 KiB by default.
        keep_last: How many of the regions at the end of the forward keep their activations, as
            backward wants them at once. From the second step on.
        max_inflight_bytes: Bytes of device memory that copies may have in use in each direction:
            tensors that are leaving, and tensors that are back before backward wants them. By
            default 256 MiB, or twice the largest tensor if that is more. More hides longer copies,
            less saves more memory.
        prefetch: How many regions are fetched ahead of the one that backward is in.
        ratio: The part of the bytes that is offloaded, between 0 and 1.
        checksum: Compare checksums of what comes back to a device, which makes the calling thread
            wait for each copy. What comes from a file is always compared with what was written.

    Returns:
        The wrapper; with ``inplace`` the module itself. A module that is offloaded already is
        returned as it is, with a warning.

    Raises:
        TypeError: ``module`` is not a module, or a setting has a wrong type.
        ValueError: A setting has a wrong value.
        OSError: No file can be written in the directory.
    """
    require_module(module)
    if is_offloaded(module):
        warnings.warn(
            f"a {type(unwrap(module)).__name__} is offloaded already: it is returned as it is"
        )
        return module
    settings = {
        "tier": tier,
        "directory": directory,
        "min_bytes": min_bytes,
        "keep_last": keep_last,
        "max_inflight_bytes": max_inflight_bytes,
        "prefetch": prefetch,
        "ratio": ratio,
        "checksum": checksum,
    }
    if not inplace:
        return OffloadWrapper(module, **settings)
    OffloadForward(module, **settings).install()
    return module


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module is offloaded already: by our wrapper or in place."""
    return has_layer(module, _Offloading)
