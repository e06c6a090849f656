"""Follow the memory of a step: which storage is made by which operator, and when it dies.

A dispatch mode sees every operator and so every storage that comes into being; a weak reference
tells when it goes. What was there before the mode was entered does not count. It works alike on
tensors of a device and on fake ones, which have storages without memory.

Memory that a kernel takes and gives back within one operator is not seen, but known for some: see
:mod:`wrappers.plan.workspaces`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from wrappers import _torch, _tree
from wrappers.plan.workspaces import workspace_bytes

#: Called with an operator, its arguments, keyword arguments and result.
Observer = Callable[[Any, Any, Any, Any], None]


class Storage:
    """A storage that an operator has made.

    Attributes:
        number: It is the how manieth that was seen.
        operator: What made it.
        label: What the step was doing then.
        num_bytes: Its size now; 0 when it has died.
        died_at: Position in the list of changes at which it went; None while it is alive.
    """

    __slots__ = ("died_at", "label", "num_bytes", "number", "operator", "reference")

    def __init__(self, number: int, operator: str, label: str, num_bytes: int) -> None:
        self.number = number
        self.operator = operator
        self.label = label
        self.num_bytes = num_bytes
        self.died_at: int | None = None
        #: Tells when it dies.
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


#: What has made a storage that was empty when it was first seen: FSDP's gathered parameters.
RESIZED = "resize_"

#: Stands for what kernels take for themselves.
_WORKSPACE = Storage(-1, "workspace", "", 0)


class Memory(_torch.TorchDispatchMode):
    """Follows the storages that are made while it is entered.

    Args:
        observe: Called after each operator.

    Attributes:
        changes: What was made (positive) and what went (negative), in order: bytes and storage.
        alive_bytes: What is alive now.
        label: Noted with each storage that is made.
    """

    def __init__(self, observe: Observer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes: list[tuple[int, Storage]] = []
        self.alive_bytes = 0
        self.label = ""
        self._observe = observe
        self._known: dict[int, Storage] = {}
        self._num_seen = 0
        self._is_paused = False

    def __enter__(self) -> Memory:
        self._stop_watching = _torch.watch_resizes(self._note_resize)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stop_watching()
        for storage in self._known.values():
            storage.reference = None  # A cycle.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._is_paused:
            return out
        for tensor in [out] if isinstance(out, torch.Tensor) else _tree.flatten(out)[0]:
            if not self._is_old(tensor, args, kwargs):
                self.add(tensor, str(func))
        workspace = workspace_bytes(func, args, kwargs, out)
        if workspace:
            self._change(workspace, _WORKSPACE)
            self._change(-workspace, _WORKSPACE)
        if self._observe is not None:
            self._observe(func, args, kwargs, out)
        return out

    def add(self, tensor: torch.Tensor, operator: str) -> None:
        """Follow the storage of a tensor, unless it is followed already."""
        inner = _torch.inner_tensors(tensor)
        if inner:
            for _, part in inner:
                self.add(part, operator)
            return
        key = _torch.storage_key(tensor)
        if key is None or key in self._known:
            return
        memory = tensor.untyped_storage()
        storage = Storage(self._num_seen, operator, self.label, memory.nbytes())
        self._num_seen += 1
        self._known[key] = storage
        storage.reference = weakref.ref(memory, lambda _: self._note_death(key, storage))
        self._change(storage.num_bytes, storage)

    def _is_old(self, tensor: torch.Tensor, args: Any, kwargs: Any) -> bool:
        """Whether a result looks into memory of an argument, which was there before."""
        key = _torch.storage_key(tensor)
        if key is None or key in self._known:
            return True
        return any(key == _torch.storage_key(t) for t in _tree.flatten_call(args, kwargs)[0])

    def storage_of(self, tensor: torch.Tensor) -> Storage | None:
        """What is known about the storage of a tensor; None if it was there before."""
        key = _torch.storage_key(tensor)
        return None if key is None else self._known.get(key)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing that is made within a ``with`` block."""
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was_paused

    def now(self) -> int:
        """The present, as a position in the list of changes."""
        return len(self.changes)

    def peak(self, start: int = 0, end: int | None = None) -> int:
        """The most that was alive at once between two positions."""
        alive = sum(change for change, _ in self.changes[:start])
        peak = alive
        for change, _ in self.changes[start:end]:
            alive += change
            peak = max(peak, alive)
        return peak

    def alive_at(self, position: int) -> list[tuple[Storage, int]]:
        """The storages that were alive at a position, with their bytes."""
        alive: dict[Storage, int] = {}
        for change, storage in self.changes[:position]:
            alive[storage] = alive.get(storage, 0) + change
        return [(storage, num_bytes) for storage, num_bytes in alive.items() if num_bytes]

    def _change(self, num_bytes: int, storage: Storage) -> None:
        self.alive_bytes += num_bytes
        self.changes.append((num_bytes, storage))

    def _note_death(self, key: int, storage: Storage) -> None:
        if self._known.get(key) is storage:
            del self._known[key]
        self._change(-storage.num_bytes, storage)
        storage.num_bytes = 0
        storage.died_at = len(self.changes)
        storage.reference = None

    def _note_resize(self, memory: torch.UntypedStorage, old_bytes: int) -> None:
        storage = self._known.get(_torch.key_of_storage(memory))
        new_bytes = memory.nbytes()
        if storage is None:
            key = _torch.key_of_storage(memory)
            storage = Storage(self._num_seen, RESIZED, self.label, new_bytes - old_bytes)
            self._num_seen += 1
            self._known[key] = resized = storage
            storage.reference = weakref.ref(memory, lambda _: self._note_death(key, resized))
            self._change(new_bytes - old_bytes, storage)
            return
        self._change(new_bytes - old_bytes, storage)
        storage.num_bytes += new_bytes - old_bytes
