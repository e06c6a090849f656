"""The state of a module that a rerun must find as the forward found it.

A function that is an ``nn.Module`` carries state which its arguments do not show. Calling it
again would update batch-norm statistics a second time, count a counter twice, run dropout in
another mode after ``.eval()``, use the original weights where ``functional_call`` had put
others, or use weights that an optimizer has changed since. So before a rerun

* plain attributes (numbers, strings, flags such as ``training``, None) are set as in forward;
* buffers that the region changes are replaced by copies of what the forward started from;
* parameters and buffers that are other objects now are replaced by the forward's;
* a parameter that was changed in place is an error that names it. One that the region itself
  changes in forward is left alone. Where the region is not the whole module but one of its methods,
  the error comes only if an operator reads the parameter.

Afterwards the attributes, parameters and buffers of the present are put back, whatever the rerun
did to them: each is updated exactly once.

Copies cost time, so of the large buffers only those are copied which calls change. What a
call changes is found out when the tree's modes are new: all buffers are copied then, and
compared by value, as batch norm writes without moving the version counter. A large buffer that
changes for the first time later is seen by its version counter: there is no copy to recompute
from, so that backward raises, and the next call copies it.

Parameters below an FSDP module inside the region are left alone: FSDP swaps them on purpose.
Reruns in several threads leave the module in order, but while one runs, the buffers that it
replaces are replaced for all: do not call such a module in one thread while another recomputes it.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wrappers import _device, _knobs, _torch, _tree
from wrappers.engine.ambient import Undo
from wrappers.errors import InputChangedError

_Dict = dict[str, Any]


class _Learned:
    """What earlier calls have shown about a module; places are (id of the dict, name)."""

    __slots__ = ("buffers", "modes", "parameters")

    def __init__(self) -> None:
        #: The ``training`` flags of the whole tree in calls whose changes are known.
        self.modes: set[tuple[bool, ...]] = set()
        #: Buffers that calls change.
        self.buffers: set[tuple[int, str]] = set()
        #: Parameters that calls change in place: ``max_norm`` of an embedding, a clamped weight.
        self.parameters: set[tuple[int, str]] = set()


_learned: weakref.WeakKeyDictionary[nn.Module, _Learned] = weakref.WeakKeyDictionary()


def _learned_about(module: nn.Module) -> _Learned:
    learned = _learned.get(module)
    if learned is None:
        learned = _learned[module] = _Learned()
    return learned


class _Parameter:
    __slots__ = ("first_version", "holder", "last_version", "name", "tensor")

    def __init__(self, holder: _Dict, name: str, tensor: Tensor) -> None:
        self.holder = holder
        self.name = name
        self.tensor = tensor
        #: Version counters at the start and at the end of the forward.
        self.first_version = _torch.version(tensor)
        self.last_version: int | None = None

    @property
    def place(self) -> tuple[int, str]:
        return id(self.holder), self.name


class _Buffer:
    __slots__ = ("before", "holder", "is_lost", "is_statistic", "name", "tensor", "version")

    def __init__(self, holder: _Dict, name: str, tensor: Tensor, is_statistic: bool) -> None:
        self.holder = holder
        self.name = name
        self.tensor = tensor
        self.is_statistic = is_statistic
        self.version = _torch.version(tensor)
        #: A copy of the value before the forward, while the tensor may change or has changed.
        self.before: Tensor | None = None
        #: Whether the value before the forward is not known any more.
        self.is_lost = False

    @property
    def place(self) -> tuple[int, str]:
        return id(self.holder), self.name


class ModuleState:
    """Attributes, parameters and buffers of a module tree at the start of one forward.

    Args:
        module: Root of the tree: what the region calls.
        is_whole: Whether the region is a call of the module, and not of some method of it.
    """

    __slots__ = (
        "_attributes",
        "_is_first",
        "_is_whole",
        "_lazy",
        "_modes",
        "_restored",
        "_scripted",
        "_seen",
        "buffers",
        "fsdp_modules",
        "module",
        "parameters",
    )

    def __init__(self, module: nn.Module, *, is_whole: bool = True) -> None:
        self.module = module
        self._is_whole = is_whole
        self.fsdp_modules: list[nn.Module] = []
        self.parameters: list[_Parameter] = []
        self.buffers: list[_Buffer] = []
        self._attributes = _Attributes()
        self._seen: set[int] = set()
        #: Buffers that the forward has yet to create.
        self._lazy: list[tuple[_Dict, str]] = []
        self._scripted: list[tuple[nn.Module, bool]] = []
        self._modes: list[bool] = []
        self._is_first = False
        self._restored: list[Tensor] = []
        self._collect(module, _torch.fsdp_types())
        if self.buffers:
            self._copy_buffers()

    def _collect(self, module: nn.Module, fsdp_types: tuple[type, ...] | None) -> None:
        """Walk the tree; ``fsdp_types`` is None below an FSDP module."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._modes.append(module.training)
        if isinstance(module, torch.jit.ScriptModule):
            self._scripted.append((module, module.training))
            return  # Its containers are views that TorchScript makes anew at each look.
        if fsdp_types and isinstance(module, fsdp_types):
            self.fsdp_modules.append(module)
            fsdp_types = None
        self._collect_attributes(module)
        if fsdp_types is not None:
            parameters: _Dict = module._parameters
            for name, parameter in parameters.items():
                if parameter is not None and not is_lazy(parameter):
                    self.parameters.append(_Parameter(parameters, name, parameter))
        buffers: _Dict = module._buffers
        if buffers:
            is_statistic = isinstance(module, _torch.NormWithStatistics)
            for name, buffer in buffers.items():
                if buffer is None:
                    continue
                if is_lazy(buffer):
                    self._lazy.append((buffers, name))
                else:
                    self.buffers.append(_Buffer(buffers, name, buffer, is_statistic))
        for child in module._modules.values():
            if child is not None:
                self._collect(child, fsdp_types)

    def _collect_attributes(self, module: nn.Module) -> None:
        face: nn.Module | None = module
        while face is not None:
            self._attributes.add(face)
            # A wrapper has the containers of the module inside, but not its attributes.
            face = face.__dict__.get("_checkpoint_wrapped_module")

    def _copy_buffers(self) -> None:
        learned = _learned_about(self.module)
        self._is_first = tuple(self._modes) not in learned.modes
        limit = _knobs.BUFFER_COPY_BYTES
        copies: dict[int, Tensor] = {}  # two modules may share a buffer
        with _hidden():
            for buffer in self.buffers:
                tensor = buffer.tensor
                if (
                    self._is_first
                    or buffer.is_statistic
                    or tensor.numel() * tensor.element_size() <= limit
                    or buffer.place in learned.buffers
                ):
                    buffer.before = copies.get(id(tensor))
                    if buffer.before is None:
                        buffer.before = copies[id(tensor)] = tensor.detach().clone()

    def finish(self) -> None:
        """Note, at the end of the forward, what it has changed."""
        self._attributes.finish()
        for parameter in self.parameters:
            version = parameter.last_version = _torch.version(parameter.tensor)
            if version != parameter.first_version:
                _learned_about(self.module).parameters.add(parameter.place)
        if self.buffers:
            self._finish_buffers()
        for holder, name in self._lazy:
            tensor = holder.get(name)
            if tensor is not None and not is_lazy(tensor):
                # What it was before this forward nobody knows, but a rerun must not change it.
                buffer = _Buffer(holder, name, tensor, is_statistic=True)
                with _hidden():
                    buffer.before = tensor.detach().clone()
                self.buffers.append(buffer)

    def _finish_buffers(self) -> None:
        learned = _learned_about(self.module)
        for buffer in self.buffers:
            # A comparison waits for an accelerator, so there it is made in first calls only.
            is_compared = buffer.before is not None and (
                self._is_first or _device.is_host(buffer.tensor)
            )
            if _torch.version(buffer.tensor) != buffer.version or (
                is_compared and not _is_equal(buffer.before, buffer.tensor)
            ):
                learned.buffers.add(buffer.place)
                buffer.is_lost = buffer.before is None
            elif not buffer.is_statistic and buffer.place not in learned.buffers:
                buffer.before = None
        learned.modes.add(tuple(self._modes))

    def enter(self, undo: Undo, fqn: str, *, is_used: bool) -> None:
        """Give the module the forward's state.

        Args:
            undo: Receives calls that put the present state back, to be made in reverse order.
            fqn: Name of the region, for the error.
            is_used: Whether a backward goes through the rerun's graph: what the rerun leaves in
                attributes that the forward did not touch is then meant for that backward.

        Raises:
            InputChangedError: A parameter was changed in place since the forward (see the file's
                head), or a large buffer by the forward, for the first time.
        """
        self._guard_parameters(undo, fqn)
        self._attributes.enter(undo, only_changed=is_used)
        for module, training in self._scripted:
            undo.append(partial(setattr, module, "training", module.training))
            module.training = training
        for parameter in self.parameters:
            if parameter.holder.get(parameter.name) is not parameter.tensor:
                _swap(parameter.holder, parameter.name, parameter.tensor, undo)
        stand_ins: dict[int, Tensor] = {}
        for buffer in self.buffers:
            tensor = buffer.tensor
            if buffer.is_lost:
                raise self._lost(buffer, fqn)
            if buffer.before is not None:
                stand_in = stand_ins.get(id(tensor))
                if stand_in is None:
                    with _hidden():
                        stand_in = stand_ins[id(tensor)] = buffer.before.clone()
                    stand_in._stands_for = tensor, get_ident()  # type: ignore[attr-defined]
                    self._restored.append(stand_in)
                tensor = stand_in
            # Also where nothing is to be swapped: the rerun itself may put another one there.
            _swap(buffer.holder, buffer.name, tensor, undo)
        if self._restored:
            undo.append(self._restored.clear)

    def _guard_parameters(self, undo: Undo, fqn: str) -> None:
        changed = [
            p
            for p in self.parameters
            if p.last_version is not None and _torch.version(p.tensor) != p.last_version
        ]
        learned = _learned.get(self.module)
        own_changes = set() if learned is None else learned.parameters
        for parameter in self.parameters if own_changes else ():
            if parameter.place in own_changes:
                present = parameter.tensor.detach().clone()
                undo.append(partial(self._require_same, parameter.tensor, present, fqn))
        tensors = [p.tensor for p in changed if p.place not in own_changes]
        if not tensors:
            return
        if self._is_whole:
            raise self._changed(tensors[0], fqn)
        guard = _ReadGuard(tensors, lambda tensor: self._changed(tensor, fqn))
        guard.__enter__()  # type: ignore[no-untyped-call]
        undo.append(partial(guard.__exit__, None, None, None))

    def _require_same(self, tensor: Tensor, present: Tensor, fqn: str) -> None:
        """Refuse a region that changes a parameter again when it runs again."""
        if not _is_equal(present, tensor.detach()):
            tensor.data.copy_(present)
            name = self.name_of(tensor)
            raise InputChangedError(
                f"region `{fqn}`: the forward itself changes {name} in place, and would change it "
                "again in every recompute. Make the change outside of the region, or do not "
                "checkpoint it.",
                fqn=fqn,
                tensor=name,
            )

    def trainable_leaves(self) -> list[Tensor]:
        """The parameters that a backward adds gradients to."""
        tensors = [parameter.tensor for parameter in self.parameters]
        return [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]

    def may_change(self, tensor: Tensor) -> bool:
        """Whether a saved tensor's version says nothing, as the region itself changes the tensor.

        It is a view of a copy that stands in for a buffer right now, or of such a parameter.
        """
        if any(_torch.is_same_storage(tensor, restored) for restored in self._restored):
            return True
        learned = _learned.get(self.module)
        return learned is not None and any(
            parameter.place in learned.parameters
            and _torch.is_same_storage(tensor, parameter.tensor)
            for parameter in self.parameters
        )

    def name_of(self, tensor: Tensor) -> str:
        """Name a tensor that is, or is a view of, a parameter or buffer; else return ``""``."""
        return name_in(self.module, tensor)

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


def name_in(module: nn.Module, tensor: Tensor) -> str:
    """Name a tensor that shares memory with a module's parameter or buffer; else ``""``."""
    for kind, named in (
        ("parameter", module.named_parameters()),
        ("buffer", module.named_buffers()),
    ):
        for name, candidate in named:
            if _torch.is_same_storage(tensor, candidate):
                return f"{kind} `{name}`"
    return ""


class _ReadGuard(_torch.TorchDispatchMode):
    """Raises when an operator reads one of the tensors."""

    def __init__(self, tensors: list[Tensor], error: Callable[[Tensor], Exception]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self._error = error

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: _Dict | None = None
    ) -> Any:
        for tensor in _tree.flatten((args, kwargs))[0]:
            for guarded in self._tensors:
                if _torch.is_same_storage(tensor, guarded):
                    raise self._error(guarded)
        return func(*args, **(kwargs or {}))


class _Attributes:
    """The ``__dict__`` of every module of a tree at the start of a forward.

    What a rerun finds again are numbers, flags, strings and None. The copies hold other objects
    only where they are still the module's when the forward ends.
    """

    __slots__ = ("_changed", "_nows", "_sizes", "_starts")

    def __init__(self) -> None:
        self._nows: list[_Dict] = []
        self._starts: list[_Dict] = []
        self._sizes: list[tuple[int, ...]] = []
        #: By the index of a module: the names that the forward has set.
        self._changed: dict[int, set[str]] = {}

    def add(self, module: nn.Module) -> None:
        """Take a module's attributes."""
        now = module.__dict__
        self._nows.append(now)
        self._starts.append(now.copy())
        self._sizes.append(_sizes(now))

    def finish(self) -> None:
        """Note which attributes the forward has set.

        A module that creates a child, a parameter or a hook in its first call and marks that in an
        attribute would create them again in a rerun that finds the attribute as forward did. So
        where anything has been created, a rerun finds all attributes but the modes as they are.
        """
        for index, (now, start) in enumerate(zip(self._nows, self._starts, strict=True)):
            if not _is_same(now, start):
                self._changed[index] = {k for k in now if now[k] is not start.get(k, self)}
                self._starts[index] = _plain(start)
        if self._sizes != [_sizes(now) for now in self._nows]:
            keys = ("training",)
            self._starts = [{k: start[k] for k in keys if k in start} for start in self._starts]

    def enter(self, undo: Undo, *, only_changed: bool) -> None:
        """Set the attributes as in forward; put the present ones back in the end."""
        thread = get_ident()
        befores: list[_Dict] = []
        with _lock:
            for now in self._nows:
                reruns = _reruns.setdefault(id(now), [])
                # While another thread's rerun is under way, what is there is not the present.
                is_replaced = bool(reruns) and reruns[-1][0] != thread
                befores.append(reruns[0][1] if is_replaced else now.copy())
                reruns.append((thread, befores[-1]))
        names: dict[int, set[str]] | None = None
        if only_changed:
            names = {index: set(changed) for index, changed in self._changed.items()}
        undo.append(partial(self._leave, befores, names))
        for index, (now, start) in enumerate(zip(self._nows, self._starts, strict=True)):
            if _is_same(now, start):
                continue
            for name, value in _plain(start).items():
                if now.get(name, self) is not value:
                    now[name] = value
                    if names is not None:
                        names.setdefault(index, set()).add(name)

    def _leave(self, befores: list[_Dict], names: dict[int, set[str]] | None) -> None:
        """Put attributes back: all, or for the module of each index those with these names."""
        thread = get_ident()
        with _lock:
            for now in self._nows:
                reruns = _reruns[id(now)]
                del reruns[_last(reruns, thread)]
                if not reruns:
                    del _reruns[id(now)]
        for index, (now, before) in enumerate(zip(self._nows, befores, strict=True)):
            if _is_same(now, before):
                continue
            touched = now.keys() | before.keys() if names is None else names.get(index, ())
            for name in touched:
                if name in before:
                    now[name] = before[name]
                else:
                    now.pop(name, None)


def _plain(attributes: _Dict) -> _Dict:
    atoms = _tree.ATOMS
    return {name: value for name, value in attributes.items() if type(value) in atoms}


def _last(reruns: list[tuple[int, _Dict]], thread: int) -> int:
    """Position of the last rerun of a thread."""
    return max(index for index, (other, _) in enumerate(reruns) if other == thread)


def _is_same(a: _Dict, b: _Dict) -> bool:
    """Whether two dicts hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a.values(), b.values()))


#: Reruns that have attributes replaced right now: by the id of the ``__dict__``, the threads and
#: what each puts back.
_reruns: dict[int, list[tuple[int, _Dict]]] = {}
_lock = Lock()


def _sizes(attributes: _Dict) -> tuple[int, ...]:
    """How many parameters, children, buffers and hooks a module has."""
    return (
        len(attributes["_parameters"]),
        len(attributes["_modules"]),
        len(attributes["_buffers"]),
        len(attributes["_forward_hooks"]),
        len(attributes["_forward_pre_hooks"]),
        len(attributes["_backward_hooks"]),
    )


def _swap(holder: _Dict, name: str, tensor: Tensor, undo: Undo) -> None:
    present = holder.get(name)
    if present is None and name not in holder:
        undo.append(partial(holder.pop, name, None))
    else:
        original, thread = getattr(present, "_stands_for", (present, None))
        if thread == get_ident():
            original = present  # A rerun around this one has put it there.
        undo.append(partial(holder.__setitem__, name, original))
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
