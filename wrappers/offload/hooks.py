"""Saved-tensor hooks that let activations wait for backward away from their device.

The unit that moves is a storage, not a tensor. Autograd saves ``x``, ``x.t()`` and three slices
of ``x`` as five tensors; copied one by one they would take five times the memory, and a key made
of pointer and shape would confuse ``x`` with ``x.t()`` or with a later tensor at the same
address. So a storage is copied as bytes, once, and each saved tensor remembers its own dtype,
sizes, strides and offset in it. The graph held the whole storage before, so this never takes
more memory elsewhere than it sets free on the device.

Of a DTensor moves the local tensor, around which another DTensor is put when it is back.

What stays: parameters, buffers and their views, and arguments of the region that have no graph (a
batch, a mask, rotary tables), as somebody else keeps them anyway; small tensors; tensors whose
sizes and strides do not say all (other subclasses, sparse, conjugated ones).

The hooks of one forward call are one :class:`OffloadHooks`. It dies with the call; what is away
belongs to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch
from wrappers._torch import SavedTensor
from wrappers.errors import InputChangedError
from wrappers.offload.scheduler import Group
from wrappers.offload.store import (
    Claim,
    OffloadSettings,
    Store,
    begin_group,
    enter_group,
    store_for,
)

__all__ = ["OffloadHooks", "result_offloader"]


class _Moved:
    """A saved tensor whose storage is away: how the tensor lies in it."""

    __slots__ = ("claim", "dtype", "group", "offset", "settings", "size", "stride", "version")

    def __init__(
        self, tensor: Tensor, claim: Claim, group: Group, settings: OffloadSettings
    ) -> None:
        self.claim = claim
        self.group = group
        self.settings = settings
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset())
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.version = tensor._version

    @property
    def place(self) -> _torch.Place:
        """Where in its memory the tensor lies."""
        return _torch.Place(self.dtype, self.size, self.stride, self.offset, False, False)

    def unpack(self) -> Tensor:
        """Give an equal tensor back, on the device."""
        offloaded = self.claim.offloaded
        with _torch.disable_dispatch_modes():
            storage = offloaded.store.take(offloaded, self.group, self.settings)
            empty = torch.empty(0, dtype=self.dtype, device=storage.device)
            tensor = empty.set_(storage, self.offset, self.size, self.stride)
        # A region that reads the tensor in a recompute compares versions with its forward's.
        _torch.set_version(tensor, self.version)
        return tensor


class _KeptHere:
    """A saved tensor that stays where it is.

    Autograd does not look for changes in place behind hooks, so this object does.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = _without_graph(tensor)
        self.version = tensor._version

    def unpack(self) -> Tensor:
        """Give the tensor back."""
        if self.tensor._version != self.version:
            raise InputChangedError(
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in "
                f"place: version {self.tensor._version}, expected {self.version}. Change a copy "
                "of it, or change it after backward.",
                tensor=f"saved tensor {tuple(self.tensor.shape)}",
            )
        return self.tensor


class _Stays(_KeptHere):
    """A saved tensor that stays because backward wants it soon; its use tells where backward is."""

    __slots__ = ("group", "settings")

    def __init__(self, tensor: Tensor, group: Group, settings: OffloadSettings) -> None:
        super().__init__(tensor)
        self.group = group
        self.settings = settings

    def unpack(self) -> Tensor:
        """Give the tensor back."""
        with _torch.disable_dispatch_modes():
            enter_group(self.group, self.settings)
        return super().unpack()


class _Around:
    """A saved subclass, such as a DTensor, around a tensor that is away."""

    __slots__ = ("build", "packed", "version")

    def __init__(self, tensor: Tensor, packed: _Packed) -> None:
        self.build = _torch.subclass_builder(tensor)
        self.packed = packed
        self.version = tensor._version

    def unpack(self) -> Tensor:
        """Put an equal subclass around the tensor that is back."""
        inner = self.packed.unpack()
        with _torch.disable_dispatch_modes(), torch.no_grad():
            tensor = self.build(inner).detach()
        _torch.set_version(tensor, self.version)
        return tensor


#: What the graph keeps in place of a saved tensor.
_Packed = _Moved | _KeptHere | _Around | SavedTensor


class OffloadHooks:
    """Pack and unpack hooks for one forward call, as a context.

    Args:
        store: Where tensors go.
        settings: The region's.
        key: Says which region it is; the schedule learns by it.
        fqn: Name of the region.
        module: Its parameters and buffers stay.
        arguments: Tensors that the region was called with.
    """

    def __init__(
        self,
        store: Store,
        settings: OffloadSettings,
        *,
        key: Hashable = None,
        fqn: str = "",
        module: nn.Module | None = None,
        arguments: Iterable[Tensor] = (),
    ) -> None:
        self._store = store
        self._settings = settings
        self._key = key
        self._fqn = fqn
        self._module = module
        self._arguments = [tensor for tensor in arguments if tensor.is_leaf]
        self._group: Group | None = None
        self._staying: set[int] | None = None

    def __enter__(self) -> None:
        _torch.push_saved_tensors_hooks(self.pack, self.unpack)

    def __exit__(self, *error: object) -> None:
        _torch.pop_saved_tensors_hooks()

    def pack(self, tensor: Tensor) -> _Packed:
        """Send a tensor away, or keep it."""
        store, settings = self._store, self._settings
        if type(tensor) is not Tensor:
            packed = self._pack_inner(tensor)
            if packed is not None:
                return packed
        if not store.tier.takes(tensor):
            return self._pass_on(tensor)
        with _torch.disable_dispatch_modes():
            if self._should_stay(tensor):
                return _KeptHere(tensor)
            group = self._group
            if group is None:
                group = self._group = begin_group(
                    self._key, self._fqn, keep_last=settings.keep_last
                )
            claim = store.put(_without_graph(tensor), group, settings)
            if claim is None:
                return _Stays(tensor, group, settings)
            return _Moved(tensor, claim, group, settings)

    def _pack_inner(self, tensor: Tensor) -> _Packed | None:
        """Send away the tensor that a subclass is made of; None if the subclass is to stay."""
        if isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return None
        with _torch.disable_dispatch_modes():
            waited = _torch.waited_for(tensor)
            if waited is not tensor:
                return self.pack(waited)
            inner = _torch.inner_tensors(tensor)
            if len(inner) != 1:  # Jagged tensors are told apart by a tensor in them.
                return None
            part = _torch.waited_for(inner[0][1])
            if type(part) is not Tensor or not self._store.tier.takes(part):
                return None
            packed = self.pack(part.detach())  # DTensor.from_local makes it a leaf with a gradient.
            return None if type(packed) is _KeptHere else _Around(tensor, packed)

    def _pass_on(self, tensor: Tensor) -> SavedTensor:
        """Save a tensor as if these hooks were not there: an enclosing region may want it."""
        _torch.pop_saved_tensors_hooks()
        try:
            return _torch.make_saved_tensor(_without_graph(tensor))
        finally:
            _torch.push_saved_tensors_hooks(self.pack, self.unpack)

    def _should_stay(self, tensor: Tensor) -> bool:
        return (
            not _is_plain(tensor)
            or _torch.storage_bytes(tensor) < self._settings.least_bytes
            or isinstance(tensor._base, nn.Parameter)
            or (tensor.is_leaf and tensor.requires_grad)
            or _torch.storage_key(tensor) in self._staying_storages()
        )

    def _staying_storages(self) -> set[int]:
        """Storages of what somebody else keeps for as long as the graph lives."""
        if self._staying is None:
            kept = list(self._arguments)
            if self._module is not None:
                kept += [*self._module.parameters(), *self._module.buffers()]
            kept += [part for tensor in kept for _, part in _torch.inner_tensors(tensor)]
            keys = (_torch.storage_key(tensor) for tensor in kept)
            self._staying = {key for key in keys if key is not None}
        return self._staying

    @staticmethod
    def unpack(packed: _Packed) -> Tensor:
        """Give back a tensor equal to the one that was packed."""
        return packed.unpack()


def _without_graph(tensor: Tensor) -> Tensor:
    """Give what a hook may hold: an operator's result holds the graph that holds the hook.

    Both would hold each other, through C++ where no garbage collector looks. A detached tensor
    has the same memory and version.
    """
    return tensor if tensor.is_leaf else tensor.detach()


def _is_plain(tensor: Tensor) -> bool:
    """Whether sizes, strides and offset in a storage say all about a tensor.

    False for parameters too, as for all subclasses.
    """
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
    )


#: How a policy offloads an operator's result: to the host, at once and whatever its size.
_OF_POLICIES = OffloadSettings(keep_last=0, min_bytes=0)


def result_offloader(fqn: str, key: Hashable) -> Callable[[Tensor], Any] | None:
    """What offloads the results of a region's operators in one forward call.

    Args:
        fqn: Name of the region.
        key: Says which region it is.

    Returns:
        A function that gives for a dense tensor something with ``unpack()`` and ``place``, or None
        if the tensor is to stay where it is. None where there is no device to offload from.
    """
    store = store_for(_OF_POLICIES)
    if store is None:
        return None
    groups: list[Group] = []

    def offload(tensor: Tensor) -> _Moved | None:
        if not store.tier.takes(tensor) or not _is_plain(tensor):
            return None
        with _torch.disable_dispatch_modes():
            if not groups:
                groups.append(begin_group(key, fqn or "unnamed", keep_last=0))
            detached = _torch.detach_shallow(tensor)
            claim = store.put(detached, groups[0], _OF_POLICIES, must_move=True)
            if claim is None:
                return None
            return _Moved(tensor, claim, groups[0], _OF_POLICIES)

    return offload
