"""One forward execution of a region: its function, inputs and surroundings.

A frame knows how to run the function again as forward found the world, and nothing about
saved tensors: how these are hidden and found again is what the implementations add.

A frame is owned by the autograd graph of its region (through the hooks or the node that the
implementation put there) and refers to nothing that refers to that graph, so it dies with
the graph: with backward, or with an output that nobody used.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _device, _torch, _tree
from wrappers.engine.ambient import Ambient, Undo, leave
from wrappers.engine.module_state import ModuleState
from wrappers.engine.region import Region, num_fallbacks
from wrappers.errors import CheckpointError, InputChangedError

Function = Callable[..., Any]


class _Backwards:
    """How many regions that run forward in one thread have met a backward inside."""

    __slots__ = ("num",)

    def __init__(self) -> None:
        self.num = 0


class _ThisThread(threading.local):
    def __init__(self) -> None:
        #: How many reruns this thread is in.
        self.depth = 0
        #: An object, as frames refer to it: backward may run in a thread of autograd's.
        self.backwards = _Backwards()
        #: How many regions had fallen back at the time that the running rerun repeats.
        self.as_of: int | None = None


_this_thread = _ThisThread()


def is_recomputing() -> bool:
    """Whether the calling code runs because of a recompute, not in the forward.

    Code with side effects of its own (counters, logs, metrics) can ask and stay silent the
    second time. True in the thread that recomputes, and only there.
    """
    return _this_thread.depth > 0


def is_in_region() -> bool:
    """Whether the calling code runs in a region, in its forward or in a rerun of it.

    False in the forward of a REENTRANT region, where no graph is made.
    """
    return _this_thread.as_of is not None


def enter_recompute() -> None:
    """From now on this thread recomputes."""
    _this_thread.depth += 1


def leave_recompute() -> None:
    """The end of what :func:`enter_recompute` has begun."""
    _this_thread.depth -= 1


def enter_forward(as_of: int) -> int | None:
    """From now on the fallbacks that happen in this thread do not count, as in its rerun."""
    before = _this_thread.as_of
    _this_thread.as_of = as_of
    return before


def leave_forward(before: int | None) -> None:
    """The end of what :func:`enter_forward` has begun."""
    _this_thread.as_of = before


def backwards_of_thread() -> _Backwards:
    """What counts the backwards inside of regions that run forward in this thread."""
    return _this_thread.backwards


def visible_fallbacks() -> int:
    """How many of the fallbacks so far count here: in a rerun, those before its forward."""
    as_of = _this_thread.as_of
    return num_fallbacks() if as_of is None else as_of


#: Names of the methods of a module that are a call of it as a whole.
WHOLE_CALLS = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})


def without_partials(function: Any) -> Any:
    """What a partial, or a partial of partials, calls; any other function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def module_of(function: Any, owner: nn.Module | None) -> nn.Module | None:
    """The module that a call uses: its owner, the function itself, or a bound method's object."""
    if owner is not None:
        return owner
    function = without_partials(function)
    if not isinstance(function, nn.Module):
        function = getattr(function, "__self__", None)
    return function if isinstance(function, nn.Module) else None


def _state_of(function: Any, owner: nn.Module | None) -> ModuleState | None:
    """The state of the module that a call uses."""
    module = module_of(function, owner)
    if module is None:
        return None
    function = without_partials(function)
    is_whole = owner is not None or function is module
    return ModuleState(
        module, is_whole=is_whole or getattr(function, "__name__", "") in WHOLE_CALLS
    )


class StopRerun(BaseException):
    """Ends a rerun early. Not an Exception, so that user code does not catch it by accident.

    Attributes:
        frame: The frame whose rerun ends. Set after construction: C++ turns the arguments of
            an exception that passes through it into text.
    """

    frame: Frame

    @classmethod
    def of(cls, frame: Frame) -> StopRerun:
        """Make the exception that ends a rerun of ``frame``."""
        stop = cls()
        stop.frame = frame
        frame.is_stopped = True
        return stop


def detach(tensor: Tensor) -> Tensor:
    """A leaf of its own with the same memory, version counter and ``requires_grad``."""
    detached = tensor.detach()
    return detached.requires_grad_() if tensor.requires_grad else detached


class Frame:
    """One forward execution of a region.

    Args:
        region: The region's settings.
        function: What the region runs.
        args: Positional arguments of this execution.
        kwargs: Keyword arguments of this execution.
        owner: The module whose state the function uses; found out if not given.

    Attributes:
        is_stopped: Whether the rerun, or the last one, was told to end early.
        as_of: How many regions had fallen back when the forward began.
        runs_backward: Whether a backward inside the region has run in its forward. One that needs
            no saved tensor of the region's (a sum's) cannot be seen.
        tensors: The tensors among the arguments, flat, until :meth:`take_tensors`.
    """

    #: Whether a backward goes through the graph of a rerun.
    builds_used_graph = False

    __slots__ = (
        "__weakref__",
        "_backwards",
        "_is_probe",
        "_num_backwards",
        "_rebuild",
        "ambient",
        "as_of",
        "function",
        "is_stopped",
        "module_state",
        "num_inputs",
        "region",
        "runs_backward",
        "tensors",
    )

    def __init__(
        self,
        region: Region,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        owner: nn.Module | None = None,
    ) -> None:
        self.region = region
        self.function = function
        self.as_of = visible_fallbacks()
        self.tensors, self._rebuild = _tree.flatten_call(args, kwargs)
        self.num_inputs = len(self.tensors)
        self.module_state = state = _state_of(function, owner)
        self.runs_backward = False
        self.is_stopped = False
        self._backwards = backwards = _this_thread.backwards
        self._num_backwards = backwards.num
        self._is_probe = not region.preserve_rng_state and region.habits.should_probe(
            None if state is None else state.module.training
        )
        takes_rng = region.preserve_rng_state or self._is_probe
        self.ambient = Ambient(_device.rng_devices(self.tensors) if takes_rng else None)

    @property
    def fqn(self) -> str:
        """Name of the region."""
        return self.region.fqn

    def take_tensors(self) -> list[Tensor]:
        """Hand over the flat input tensors: from now on autograd keeps them, not the frame."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def note_backward(self) -> None:
        """Note that a backward inside the region needs its saved tensors before the forward ends.

        Regions around this one, whose forwards run too, will see it in the thread's count.
        """
        self.runs_backward = True
        self._backwards.num += 1

    def finish_forward(self) -> None:
        """Note what the forward has changed; to be called when the function has returned."""
        if self.module_state is not None:
            self.module_state.finish()
        if self._backwards.num != self._num_backwards:  # in this region or in one inside
            self.runs_backward = True
        if self._is_probe:
            if self.ambient.has_drawn():
                self.region.habits.warn_random(self.fqn)
            self.ambient.forget_rng()
        elif self.ambient.python_random is not None:
            self.ambient.forget_python_random()

    def rerun(self, tensors: list[Tensor]) -> Any:
        """Call the function again, on these tensors, as forward found the world.

        Grad mode is on in the call. Whatever was changed for the call is put back, also when
        the function raises. A backward inside the region does not add to the parameters'
        gradients again; what it adds to ``tensors`` is the caller's to deal with.

        Args:
            tensors: The input tensors, in the order of :meth:`take_tensors`.

        Returns:
            What the function returned; None if a hook has ended the rerun early.
        """
        self.is_stopped = False
        undo: Undo = [_enable_grad if torch.is_grad_enabled() else _disable_grad]
        _torch.set_grad_enabled(True)
        _this_thread.depth += 1
        as_of, _this_thread.as_of = _this_thread.as_of, self.as_of
        try:
            self.ambient.enter(undo)
            if self.module_state is not None:
                self.module_state.enter(undo, self.fqn, is_used=self.builds_used_graph)
                if self.module_state.fsdp_modules:
                    undo.append(_torch.prefetch_inside_only(self.module_state.module))
            if self.runs_backward:  # Only then: what other threads add meanwhile would be lost.
                self._set_gradients_aside(undo)
            args, kwargs = self._rebuild(tensors)
            return self.function(*args, **kwargs)
        except StopRerun as stop:
            if stop.frame is not self:
                raise
            return None
        except RuntimeError as error:
            if self.is_stopped and "TorchScript interpreter" in str(error):
                return None  # It has turned the stop into an error of its own.
            raise
        finally:
            _this_thread.depth -= 1
            _this_thread.as_of = as_of
            leave(undo)

    def _set_gradients_aside(self, undo: Undo) -> None:
        for leaf in self.module_state.trainable_leaves() if self.module_state else ():
            undo.append(functools.partial(setattr, leaf, "grad", leaf.grad))
            leaf.grad = None

    def explain_changed_input(self, index: int, cause: RuntimeError) -> RuntimeError:
        """Turn autograd's complaint about an input's version into an error that names it."""
        if isinstance(cause, CheckpointError) or "inplace" not in str(cause):
            return cause
        name = self.name_of_input(index)
        return InputChangedError(
            f"region `{self.fqn}`: {name} was changed in place after the forward had read it, so "
            "the recompute would start from other values. Pass a copy, or make the change out of "
            f"place. The cause: {cause}",
            fqn=self.fqn,
            tensor=name,
        )

    def name_of_input(self, index: int) -> str:
        """Name an input tensor by its flat position: ``argument 0``, ``argument `mask```."""
        try:
            args, kwargs = self._rebuild([torch.empty(0)] * self.num_inputs)
        except Exception:  # A class that checks what its fields are.
            return "an argument"
        for name, value in (*enumerate(args), *kwargs.items()):
            count = len(_tree.flatten(value)[0])
            if index < count:
                return f"argument {name}" if isinstance(name, int) else f"argument `{name}`"
            index -= count
        return "an argument"


def _enable_grad() -> None:
    _torch.set_grad_enabled(True)


def _disable_grad() -> None:
    _torch.set_grad_enabled(False)
