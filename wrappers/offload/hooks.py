"""Saved-tensor hooks that keep activations on the host between forward and backward.

The unit that moves is a storage, not a tensor. Autograd saves ``x``, ``x.t()`` and three slices
of ``x`` as five tensors; copied one by one they would take five times the memory, and a key made
of pointer and shape would confuse ``x`` with ``x.t()`` or with a later tensor at the same
address. So a storage is copied as bytes, once, and each saved tensor remembers its own dtype,
sizes, strides and offset in it. The graph held the whole storage before, so this never takes
more memory on the host than it sets free on the device.

Invariant: a storage is looked up by a weak reference to it together with its version. The weak
reference keeps its address from being used again, and the version tells a copy from before a
change in place from one after it.

The hooks of one forward call are one :class:`HostOffload`. It dies with the call; the host copies
belong to the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from wrappers import _device, _torch
from wrappers._torch import SavedTensor
from wrappers.errors import InputChangedError

__all__ = ["HostOffload", "offload_saved_tensors"]


class _HostCopy:
    """The bytes of one storage on the host."""

    __slots__ = ("bytes", "device")

    def __init__(self, storage: torch.UntypedStorage, *, pin_memory: bool) -> None:
        self.device = storage.device
        source = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        self.bytes = torch.empty(
            source.shape, dtype=torch.uint8, device="cpu", pin_memory=pin_memory
        )
        self.bytes.copy_(source)

    def load(self) -> torch.UntypedStorage:
        """Copy the bytes back into a new storage on their device."""
        target = torch.empty(self.bytes.shape, dtype=torch.uint8, device=self.device)
        return target.copy_(self.bytes, non_blocking=True).untyped_storage()


class _Moved:
    """A saved tensor whose storage is on the host: how the tensor lies in it."""

    __slots__ = ("copy", "dtype", "offset", "size", "stride", "version")

    def __init__(self, tensor: Tensor, copy: _HostCopy) -> None:
        self.copy = copy
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset()
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.version = tensor._version

    def unpack(self) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=self.copy.device)
        tensor = empty.set_(self.copy.load(), self.offset, self.size, self.stride)
        # A region that reads the tensor in a recompute compares versions with its forward's.
        _torch.set_version(tensor, self.version)
        return tensor


class _Kept:
    """A saved tensor that stays where it is.

    Autograd does not look for changes in place behind hooks, so this object does.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = _without_graph(tensor)
        self.version = tensor._version

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise InputChangedError(
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in "
                f"place: version {self.tensor._version}, expected {self.version}. Change a copy "
                "of it, or change it after backward.",
                tensor=f"saved tensor {tuple(self.tensor.shape)}",
            )
        return self.tensor


class HostOffload:
    """Pack and unpack hooks for one forward call.

    Args:
        min_bytes: Tensors of fewer bytes stay.
        pin_memory: Whether host copies lie in pinned memory, where there is an accelerator.
    """

    def __init__(self, *, min_bytes: int, pin_memory: bool) -> None:
        self._min_bytes = min_bytes
        self._pin_memory = pin_memory and torch.accelerator.is_available()
        self._copies: dict[tuple[StorageWeakRef, int], _HostCopy] = {}

    def pack(self, tensor: Tensor) -> _Moved | _Kept | SavedTensor:
        """Move a tensor to the host, or keep it."""
        if _device.is_host(tensor):
            return self._pass_on(tensor)
        if self._should_stay(tensor):
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        key = (StorageWeakRef(storage), tensor._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _HostCopy(storage, pin_memory=self._pin_memory)
        return _Moved(tensor, copy)

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
            or tensor.nbytes < self._min_bytes
            or isinstance(tensor._base, nn.Parameter)
        )

    @staticmethod
    def unpack(packed: _Moved | _Kept | SavedTensor) -> Tensor:
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


@contextlib.contextmanager
def offload_saved_tensors(*, min_bytes: int, pin_memory: bool = True) -> Iterator[None]:
    """Offload what autograd saves inside the context.

    Args:
        min_bytes: Tensors of fewer bytes stay on their device.
        pin_memory: Whether to use pinned host memory.
    """
    hooks = HostOffload(min_bytes=min_bytes, pin_memory=pin_memory)
    _torch.push_saved_tensors_hooks(hooks.pack, hooks.unpack)
    try:
        yield
    finally:
        _torch.pop_saved_tensors_hooks()
