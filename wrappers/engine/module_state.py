"""The state of a module that a rerun must find as the forward found it.

A function that is an ``nn.Module`` carries state which its arguments do not show. Calling it
again would update batch-norm statistics a second time, count a counter twice, run dropout in
another mode after ``.eval()``, use the original weights where ``functional_call`` had put
others, or use weights that an optimizer has changed since. So before a rerun

* ``training`` flags are set as in forward;
* buffers that the region changes are replaced by copies of what the forward started from,
  and the objects of the present are put back afterwards: each is updated exactly once;
* parameters and buffers that are other objects now are replaced by the forward's;
* a parameter that was changed in place is an error that names it.

Copies cost time, so of the large buffers only those are copied which calls change. What a
call changes is found out when the tree's modes are new: all buffers are copied then, and
compared by value, as batch norm writes without moving the version counter. A large buffer that
changes for the first time later is seen by its version counter: there is no copy to recompute
from, so that backward raises, and the next call copies it.

Parameters below an FSDP module inside the region are left alone: FSDP swaps them on purpose.
"""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _knobs, _torch
from wrappers.engine.ambient import Undo
from wrappers.errors import InputChangedError

_Dict = dict[str, Any]


class _Learned:
    """What earlier calls have shown about a module."""

    __slots__ = ("changing", "modes")

    def __init__(self) -> None:
        #: The ``training`` flags of the whole tree in calls whose changes are known.
        self.modes: set[tuple[bool, ...]] = set()
        #: Buffers that calls change, as (id of the ``_buffers`` dict, name).
        self.changing: set[tuple[int, str]] = set()


_learned: weakref.WeakKeyDictionary[nn.Module, _Learned] = weakref.WeakKeyDictionary()


class _Buffer:
    __slots__ = ("before", "holder", "is_lost", "name", "tensor", "version")

    def __init__(self, holder: _Dict, name: str, tensor: Tensor) -> None:
        self.holder = holder
        self.name = name
        self.tensor = tensor
        self.version = _torch.version(tensor)
        #: A copy of the value before the forward, while the tensor may change or has changed.
        self.before: Tensor | None = None
        #: Whether the value before the forward is not known any more.
        self.is_lost = False


class ModuleState:
    """Modes, parameters and buffers of a module tree at the start of one forward.

    Args:
        module: Root of the tree: what the region calls.
    """

    __slots__ = (
        "_is_first",
        "_learned",
        "_restored",
        "_versions",
        "buffers",
        "fsdp_modules",
        "modes",
        "module",
        "parameters",
    )

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modes: list[tuple[nn.Module, bool]] = []
        self.fsdp_modules: list[nn.Module] = []
        self.parameters: list[tuple[_Dict, str, Tensor]] = []
        self.buffers: list[_Buffer] = []
        self._versions: list[int] | None = None
        self._restored: list[Tensor] = []
        self._collect(module, _torch.fsdp_types())
        if self.buffers:
            self._copy_buffers()

    def _collect(self, module: nn.Module, fsdp_types: tuple[type, ...] | None) -> None:
        """Walk the tree; ``fsdp_types`` is None below an FSDP module."""
        self.modes.append((module, module.training))
        if isinstance(module, torch.jit.ScriptModule):
            return  # Its containers are views that TorchScript makes anew at each look.
        if fsdp_types and isinstance(module, fsdp_types):
            self.fsdp_modules.append(module)
            fsdp_types = None
        if fsdp_types is not None:
            parameters: _Dict = module._parameters
            for name, parameter in parameters.items():
                if parameter is not None:
                    self.parameters.append((parameters, name, parameter))
        buffers: _Dict = module._buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                self.buffers.append(_Buffer(buffers, name, buffer))
        for child in module._modules.values():
            if child is not None:
                self._collect(child, fsdp_types)

    def _copy_buffers(self) -> None:
        learned = _learned.get(self.module)
        if learned is None:
            learned = _learned[self.module] = _Learned()
        self._learned = learned
        self._is_first = tuple([training for _, training in self.modes]) not in learned.modes
        limit = _knobs.BUFFER_COPY_BYTES
        chosen = [
            b
            for b in self.buffers
            if self._is_first
            or b.tensor.numel() * b.tensor.element_size() <= limit
            or (id(b.holder), b.name) in learned.changing
        ]
        if chosen:
            with _hidden():
                for buffer in chosen:
                    buffer.before = buffer.tensor.detach().clone()

    def finish(self) -> None:
        """Note, at the end of the forward, what it has changed."""
        self._versions = [_torch.version(parameter) for _, _, parameter in self.parameters]
        if not self.buffers:
            return
        learned = self._learned
        for buffer in self.buffers:
            if _torch.version(buffer.tensor) != buffer.version or (
                self._is_first and not _is_equal(buffer.before, buffer.tensor)
            ):
                learned.changing.add((id(buffer.holder), buffer.name))
                buffer.is_lost = buffer.before is None
            elif (id(buffer.holder), buffer.name) not in learned.changing:
                buffer.before = None
        learned.modes.add(tuple([training for _, training in self.modes]))

    def enter(self, undo: Undo, fqn: str) -> None:
        """Give the module the forward's state.

        Args:
            undo: Receives calls that put the present state back, to be made in reverse order.
            fqn: Name of the region, for the error.

        Raises:
            InputChangedError: A parameter was changed in place since the forward, or a large
                buffer by the forward, for the first time.
        """
        if self._versions is not None:
            for (_, _, parameter), version in zip(self.parameters, self._versions, strict=True):
                if _torch.version(parameter) != version:
                    raise self._changed(parameter, fqn)
        for module, training in self.modes:
            if module.training is not training:
                undo.append(partial(setattr, module, "training", module.training))
                module.training = training
        for holder, name, parameter in self.parameters:
            if holder.get(name) is not parameter:
                _swap(holder, name, parameter, undo)
        for buffer in self.buffers:
            tensor = buffer.tensor
            if buffer.is_lost:
                raise self._lost(buffer, fqn)
            if buffer.before is not None:
                with _hidden():
                    tensor = buffer.before.clone()
                self._restored.append(tensor)
            if buffer.holder.get(buffer.name) is not tensor:
                _swap(buffer.holder, buffer.name, tensor, undo)
        if self._restored:
            undo.append(self._restored.clear)

    def trainable_leaves(self) -> list[Tensor]:
        """The parameters that a backward adds gradients to."""
        return [p for _, _, p in self.parameters if p.is_leaf and p.requires_grad]

    def is_restored(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of a copy that stands in for a buffer right now."""
        return any(_torch.is_same_storage(tensor, restored) for restored in self._restored)

    def name_of(self, tensor: Tensor) -> str:
        """Name a tensor that is, or is a view of, a parameter or buffer; else return ``""``."""
        for kind, named in (
            ("parameter", self.module.named_parameters()),
            ("buffer", self.module.named_buffers()),
        ):
            for name, candidate in named:
                if _torch.is_same_storage(tensor, candidate):
                    return f"{kind} `{name}`"
        return ""

    def _lost(self, buffer: _Buffer, fqn: str) -> InputChangedError:
        name = self.name_of(buffer.tensor) or f"buffer `{buffer.name}`"
        return InputChangedError(
            f"region `{fqn}`: the forward changed {name} in place for the first time, and its "
            f"value from before is lost: buffers over {_knobs.BUFFER_COPY_BYTES} bytes are copied "
            "only once they are known to change. This step has no right gradient, the next has. "
            "To lose none, change the buffer in the region's first call already.",
            fqn=fqn,
            tensor=name,
        )

    def _changed(self, parameter: Tensor, fqn: str) -> InputChangedError:
        name = self.name_of(parameter) or "a parameter"
        return InputChangedError(
            f"region `{fqn}`: {name} was changed in place between forward and backward, so a "
            "recompute would use other values than the forward did. Run backward before the "
            "optimizer step or any other update, or do not checkpoint this region.",
            fqn=fqn,
            tensor=name,
        )


def _swap(holder: _Dict, name: str, tensor: Tensor, undo: Undo) -> None:
    if name in holder:
        undo.append(partial(holder.__setitem__, name, holder[name]))
    else:
        undo.append(partial(holder.pop, name, None))
    holder[name] = tensor


def _hidden() -> contextlib.AbstractContextManager[Any]:
    """Keep our own copies out of the sight of a policy's dispatch mode."""
    return _torch.disable_dispatch_modes() if _torch.has_dispatch_modes() else _NOTHING


_NOTHING = contextlib.nullcontext()


def _is_equal(before: Tensor | None, after: Tensor) -> bool:
    if before is None or after.is_meta or type(after) is not Tensor:
        return True  # Only the version counter can tell.
    with _hidden():
        return torch.equal(before, after)
