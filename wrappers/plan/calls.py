"""One call of a region, so that it can be made again on other tensors, alone.

A tensor that comes in is the *region's own* if nobody else keeps it: the output of the layer
before. It then lives as long as the region needs it and counts as what the region keeps. All others
are *outside*: masks, position tables, what the model looks at again later. In the same way an
output is the region's own if autograd saves it inside and nobody else keeps it.

    harness     entry ──► inputs ──► region ──► outputs ──► exit ──► one number
    backward    drops    gradients ◄────────── gradients ◄ made
                them
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wrappers import _torch, _tree
from wrappers.engine.ambient import Ambient, Undo, leave


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor looks like.

    Attributes:
        size: Its shape.
        stride: Its strides, in elements.
        offset: Where in its memory it begins, in elements.
        dtype: Data type of its elements.
        requires_grad: Whether a gradient flows to it.
        memory_bytes: Size of the memory that it looks into.
        memory: Number of its memory among those of the call: equal for tensors that share it.
        is_own: Whether nobody but the region keeps it; of an output: and whether that does.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    memory_bytes: int
    memory: int
    is_own: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it fills its memory."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True) if n)
        is_filled = reach * self.dtype.itemsize == self.memory_bytes
        return is_filled and self.offset == 0 and 0 not in self.size

    def key(self) -> tuple[Any, ...]:
        """What calls of the same structure have in common."""
        return (self.size, self.stride, self.dtype, self.requires_grad, self.memory)


def specs_of(tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    """What some tensors look like, and which of them share memory."""
    numbers: dict[int | None, int] = {}
    specs = []
    for tensor in tensors:
        key = _torch.storage_key(tensor)
        number = numbers.setdefault(key, len(numbers)) if key is not None else -1
        is_plain = key is not None
        specs.append(
            TensorSpec(
                tuple(tensor.shape),
                tuple(tensor.stride()) if is_plain else (),
                int(tensor.storage_offset()) if is_plain else 0,
                tensor.dtype,
                tensor.requires_grad,
                _torch.storage_bytes(tensor),
                number,
            )
        )
    return tuple(specs)


def make_tensors(
    specs: Sequence[TensorSpec],
    device: torch.device,
    memories: dict[int, Tensor] | None = None,
) -> list[Tensor]:
    """Make tensors that look like this, without content and without a graph."""
    memories = {} if memories is None else memories
    made = []
    for spec in specs:
        memory = memories.get(spec.memory)
        if memory is None and spec.is_whole:  # No view: hooks on outputs tell these apart.
            made.append(
                torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=device)
            )
            memories[spec.memory] = made[-1]
            continue
        if memory is None or memory.dtype != spec.dtype:
            num = spec.memory_bytes // spec.dtype.itemsize
            memory = torch.empty(num, dtype=spec.dtype, device=device)
            memories[spec.memory] = memory
        made.append(memory.as_strided(spec.size, spec.stride, spec.offset))
    return made


@dataclass(frozen=True)
class Call:
    """The arguments and results of one call of a region, without the tensors.

    Attributes:
        build: Makes ``(args, kwargs)`` from as many tensors as there are inputs.
        inputs: The tensors among the arguments.
        constants: The rest of the arguments, as text.
        outputs: The tensors in the result.
        build_output: Makes the result from tensors.
        passed_on: By position of an output: of the input that it is, where it is one.
        ambient: The state around it, autocast above all; None: whatever there is.
        is_grad_enabled: Whether it is made in grad mode.
    """

    build: Callable[[Sequence[Any]], Any]
    inputs: tuple[TensorSpec, ...]
    constants: str = ""
    outputs: tuple[TensorSpec, ...] = ()
    build_output: Callable[[Sequence[Any]], Any] = list
    passed_on: tuple[tuple[int, int], ...] = ()
    ambient: Ambient | None = None
    is_grad_enabled: bool = True

    def key(self) -> tuple[Any, ...]:
        """What calls of the same structure have in common."""
        around = None if self.ambient is None else (self.ambient.settings, self.ambient.autocast)
        inputs = tuple(spec.key() for spec in self.inputs)
        return inputs, self.constants, repr(around), self.is_grad_enabled

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """The state around the call, within a ``with`` block."""
        undo: Undo = []
        with torch.set_grad_enabled(self.is_grad_enabled):
            try:
                if self.ambient is not None:
                    self.ambient.enter(undo)
                yield
            finally:
                leave(undo)
                # Autocast's casts of parameters live as long as its context.
                torch.clear_autocast_cache()

    def with_own(self, own: Sequence[bool]) -> Call:
        """The same call, but for which inputs are the region's own."""
        return replace(self, inputs=_with_own(self.inputs, own))

    def with_own_outputs(self, own: Sequence[bool]) -> Call:
        """The same call, but for which outputs are the region's own."""
        return replace(self, outputs=_with_own(self.outputs, own))

    def run(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function with these tensors."""
        args, kwargs = self.build(tensors)
        return function(*args, **kwargs)


def _with_own(specs: Sequence[TensorSpec], own: Sequence[bool]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, is_own=o) for spec, o in zip(specs, own, strict=True))


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Describe a call whose result is not known yet."""
    tensors, build = _tree.flatten_call(args, kwargs)
    constants = _told(build([_HOLE] * len(tensors)))
    return Call(
        build,
        specs_of(tensors),
        constants,
        ambient=Ambient(None),
        is_grad_enabled=torch.is_grad_enabled(),
    )


_HOLE = type("Hole", (), {"__repr__": lambda self: "tensor"})()


def _told(value: Any) -> str:
    """A value as text: by value where it is plain or a container, else by identity."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_told(v)}' for k, v in value.items())}}}"
    if value is _HOLE or isinstance(value, (int, float, str, bool, type(None), torch.dtype)):
        return repr(value)
    return f"{type(value).__qualname__} {id(value)}"


def with_output(
    call: Call, inputs: Sequence[Tensor], output: Any, saved: Collection[int | None] = ()
) -> Call:
    """The same call with what it has returned.

    Args:
        call: The call.
        inputs: Its tensors.
        output: What it has returned.
        saved: Keys of the memory that autograd has saved inside.
    """
    tensors, build = _tree.flatten(output)
    own = [_torch.storage_key(tensor) in saved for tensor in tensors]
    by_id = {id(tensor): position for position, tensor in enumerate(inputs)}
    passed_on = tuple((i, by_id[id(t)]) for i, t in enumerate(tensors) if id(t) in by_id)
    outputs = _with_own(specs_of(tensors), own)
    return replace(call, outputs=outputs, build_output=build, passed_on=passed_on)
