"""What keeps a tensor between forward and backward, and notices if it is changed in place.

A tensor from outside of a region, or a result that a policy keeps, is *held*. While no region
surrounds this one, the tensor itself is kept beside its version, which is what autograd does.
Else autograd keeps it, under the hooks of the region around, which so hides it (rule 2).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Protocol

from torch import Tensor

from wrappers import _torch


class Holder(Protocol):
    """Keeps a tensor until backward."""

    def unpack(self) -> Tensor:
        """Give the tensor back; raise RuntimeError if it was changed in place since."""
        ...

    @property
    def place(self) -> _torch.Place | None:
        """Where in its memory the tensor lies."""
        ...


class Held:
    """A tensor from outside of a region while no hooks are active around it.

    All that a SavedTensor is then, and cheaper.
    """

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = _torch.version(tensor)

    @property
    def place(self) -> _torch.Place | None:
        """Where in its memory the tensor lies."""
        return _torch.place_of(self.tensor)

    def unpack(self) -> Tensor:
        """Give the tensor back; raise RuntimeError if it was changed in place since."""
        if _torch.version(self.tensor) != self.version:
            raise RuntimeError(
                "a variable needed for the recompute has been modified by an inplace operation: "
                f"it is at version {_torch.version(self.tensor)}, expected {self.version}"
            )
        return self.tensor


class Hidden:
    """A tensor from outside of the region, in the keeping of the region around this one."""

    __slots__ = ("__weakref__", "place", "saved")

    def __init__(self, tensor: Tensor) -> None:
        self.place = _torch.place_of(tensor)
        self.saved = _torch.make_saved_tensor(tensor)

    def unpack(self) -> Tensor:
        """Ask the region around for the tensor."""
        return self.saved.unpack()


class Kept(Held):
    """An operator's result that the policy keeps, while no region surrounds this one.

    Attributes:
        name: The operator's.
    """

    __slots__ = ("name",)

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.name = name


class KeptElsewhere:
    """An operator's result that the policy keeps on the host, or in a region around this one.

    Attributes:
        name: The operator's.
        is_offloaded: Whether it is on the host.
        num_uses: How many unpacks share one copy back.
    """

    __slots__ = ("__weakref__", "_copy", "_holder", "_num_left", "is_offloaded", "name", "num_uses")

    def __init__(self, holder: Holder, name: str, *, is_offloaded: bool = False) -> None:
        self._holder = holder
        self.name = name
        self.is_offloaded = is_offloaded
        self.num_uses = 0
        self._num_left = 0
        self._copy: Tensor | None = None

    @property
    def place(self) -> _torch.Place | None:
        """Where in its memory the tensor lies."""
        return self._holder.place

    def unpack(self) -> Tensor:
        """Give the tensor back, on the device where it belongs."""
        if not self.is_offloaded:
            return self._holder.unpack()
        if self._copy is None:
            self._copy = self._holder.unpack()
            self._num_left = self.num_uses
        copy = self._copy
        self._num_left -= 1
        if self._num_left <= 0:
            self._copy = None
        return copy


#: Offloads the results of one forward call: gives a holder, or None if a result is to stay.
Offloader = Callable[[Tensor], Holder | None]


def _offloads_nothing(fqn: str, key: Hashable) -> Offloader | None:
    return None


#: Makes the offloader of a forward call, from the region's name and what tells it from others;
#: None where there is no device to offload from. The rooms meet in ``modules``.
make_offloader: Callable[[str, Hashable], Offloader | None] = _offloads_nothing


def connect_offloading(make: Callable[[str, Hashable], Offloader | None]) -> None:
    """Say how results are offloaded that a policy wants on the host."""
    global make_offloader
    make_offloader = make


class Owned:
    """Stands for what holds a kept output and belongs to slots."""

    __slots__ = ("_reference",)

    def __init__(self, holder: Holder) -> None:
        self._reference = weakref.ref(holder)

    def unpack(self) -> Tensor:
        """Give the output back."""
        return self.holder.unpack()

    @property
    def place(self) -> _torch.Place | None:
        """Where in its memory the tensor lies."""
        return self.holder.place

    @property
    def is_gone(self) -> bool:
        """Whether all the slots have gone, and the output with them."""
        return self._reference() is None

    @property
    def holder(self) -> Holder:
        """What holds the output, as long as one of the slots lives."""
        holder = self._reference()
        assert holder is not None, "a kept output is needed whose slots have all gone"
        return holder


class Unchecked:
    """A kept result that may be changed in place."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def place(self) -> _torch.Place | None:
        """Where in its memory the tensor lies."""
        return _torch.place_of(self.tensor)

    def unpack(self) -> Tensor:
        """Give the tensor back, as it is now."""
        return self.tensor


def num_bytes(holder: Holder) -> int:
    """Bytes of what is held; 0 where it is no strided memory."""
    place = holder.place
    return 0 if place is None else place.size.numel() * place.dtype.itemsize
