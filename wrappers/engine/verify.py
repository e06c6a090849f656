"""Did the recompute do what the forward did? Checks, the first divergence, debug traces.

Each saved tensor is *described* when it is packed: shape, dtype, device and version counter.
The recompute's tensor in the same slot must be described alike. The version counter tells
what torch's check cannot: a weight that was changed in place between forward and backward
shows up with a higher version than the forward saw. ``determinism_check="values"`` adds a
sample of the elements.

The default check keeps no list of operators, so an error can name only where the *recompute*
was when it went another way: the Python expression that ran and the user's line that called
it, taken from the stack at that moment. Debug mode records the operators of both runs and
compares them.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrappers import _knobs, _torch

Description = tuple[Any, ...]

# --- Descriptions of saved tensors --------------------------------------------------------


def describe(tensor: Tensor) -> Description:
    """Shape, dtype, device and version of a saved tensor."""
    try:
        return (tensor.shape, tensor.dtype, tensor.device, tensor._version)
    except RuntimeError:  # a nested tensor in strided layout has no shape to show
        return ("nested", tensor.dtype, tensor.device, tensor._version)


class _Sample:
    """A few elements of a tensor, compared bit for bit only when both runs are over."""

    __slots__ = ("elements",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        with torch.no_grad(), _torch.disable_dispatch_modes():
            self.elements = _take_sample(tensor.detach())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Sample):
            return NotImplemented
        if self.elements is None or other.elements is None:
            return self.elements is other.elements
        with torch.no_grad(), _torch.disable_dispatch_modes():
            same = self.elements.eq(other.elements)
            both_nan = self.elements.isnan() & other.elements.isnan()
            return bool((same | both_nan).all())

    def __repr__(self) -> str:
        return "values differ" if self.elements is not None else "no values"


def _take_sample(tensor: Tensor) -> Tensor | None:
    """Evenly spaced elements of a dense tensor, at most VALUE_SAMPLE_ELEMENTS, copied."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return None
    if tensor.numel() == 0:
        return tensor.clone()
    # Thin out dimension by dimension: views only, so a large tensor is never copied whole.
    budget = _knobs.VALUE_SAMPLE_ELEMENTS
    for dim in sorted(range(tensor.dim()), key=lambda d: -tensor.shape[d]):
        others = tensor.numel() // tensor.shape[dim]
        keep = max(1, budget // others)
        step = -(-tensor.shape[dim] // keep)
        tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
    return tensor.clone()


def describe_with_values(tensor: Tensor) -> Description:
    """Like :func:`describe`, and a sample of the elements."""
    return (*describe(tensor), _Sample(tensor))


#: What ``determinism_check`` may be, and how each describes a saved tensor.
DETERMINISM_CHECKS: dict[str, Callable[[Tensor], Description] | None] = {
    "default": describe,
    "none": None,
    "values": describe_with_values,
}


def to_text(description: Description) -> str:
    """Write a description as ``(8, 512) bfloat16 cuda:0``."""
    shape, dtype, device, *_ = description
    size = shape if shape == "nested" else tuple(shape)
    return f"{size} {str(dtype).removeprefix('torch.')} {device}"


def is_only_version(expected: Description, got: Description) -> bool:
    """Whether two descriptions that differ do so in the version counter alone."""
    return expected[:3] == got[:3] and expected[3] != got[3]


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is NaN. True where that cannot be told."""
    try:
        with torch.no_grad(), _torch.disable_dispatch_modes():
            a, b = a.detach(), b.detach()
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
            if torch.equal(a, b):
                return True
            if not (a.is_floating_point() or a.is_complex()):
                return False
            return bool((a.eq(b) | (a.isnan() & b.isnan())).all())
    except Exception:  # Sparse, nested and quantized tensors, and what subclasses may raise.
        return True


class Mismatch(NamedTuple):
    """One slot whose recomputed tensor differs."""

    slot: int
    expected: Description
    got: Description
    tensor: Tensor
    site: Site


# --- Where the user's code is -------------------------------------------------------------


class Site(NamedTuple):
    """A place in the user's code, and the expression that ran there or below it."""

    expression: str
    location: str


_LIBRARY_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (torch.__file__, os.path.dirname(__file__))
)


@functools.cache
def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARY_FOLDERS) or filename.startswith("<frozen")


def _user_frame(frame: types.FrameType | None) -> types.FrameType | None:
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def current_site() -> Site:
    """Where user code is right now; to be called from a hook while an operator runs."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS[1]):
        frame = frame.f_back
    user = _user_frame(frame)
    if frame is None or user is None:
        return Site("", "")
    return Site(
        _expression(frame.f_code, frame.f_lasti, frame.f_lineno),
        f"{user.f_code.co_filename}:{user.f_lineno}",
    )


def _expression(code: types.CodeType, lasti: int, lineno: int) -> str:
    """The source of the expression at an instruction: ``torch.mm(a, b)``; else its line."""
    line = linecache.getline(code.co_filename, lineno)
    if hasattr(code, "co_positions"):  # Python 3.11
        first, last, begin, end = list(code.co_positions())[lasti // 2]
        if first == last == lineno and begin is not None and end is not None:
            return line.encode()[begin:end].decode()
    return line.strip()


# --- Debug traces -------------------------------------------------------------------------


class _Operator(NamedTuple):
    """One recorded operator; the line number is worked out only when it is printed."""

    func: Any
    output: Any
    code: types.CodeType | None
    lasti: int

    def location(self) -> str:
        if self.code is None:
            return "?"
        line = self.code.co_firstlineno
        for start, end, number in self.code.co_lines():
            if start <= self.lasti < end and number is not None:
                line = number
        return f"{self.code.co_filename}:{line}"

    def __str__(self) -> str:
        shape, dtype = self.output if self.output is not None else ((), None)
        result = f" -> {tuple(shape)} {str(dtype).removeprefix('torch.')}" if dtype else ""
        return f"{self.func}{result}  ({self.location()})"


_INSERTED = frozenset({torch.ops.aten.detach.default})


class _Recorder(_torch.TorchDispatchMode):
    """Writes down every operator of one run and where the user called it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[_Operator] = []
        self.num_dropped = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func in _INSERTED:  # The hooks detach; that is no work of the region's.
            return out
        if len(self.operators) >= _knobs.DEBUG_TRACE_OPERATORS:
            self.num_dropped += 1
            return out
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        meta = (first.shape, first.dtype) if type(first) is Tensor else None
        frame = _user_frame(sys._getframe(1))
        if frame is None:
            self.operators.append(_Operator(func, meta, None, 0))
        else:
            self.operators.append(_Operator(func, meta, frame.f_code, frame.f_lasti))
        return out


class DebugTrace:
    """The operators of a region's forward and of its latest recompute."""

    def __init__(self) -> None:
        self.forward = _Recorder()
        self.recompute = _Recorder()

    def start_recompute(self) -> _torch.TorchDispatchMode:
        """Forget the previous recompute; return the mode that records the next."""
        self.recompute = _Recorder()
        return self.recompute

    def first_difference(self) -> int | None:
        """Position of the first operator that differs; None if one list begins the other."""
        for index, (a, b) in enumerate(
            zip(self.forward.operators, self.recompute.operators, strict=False)
        ):
            if a.func is not b.func or a.output != b.output:
                return index
        return None

    def report(self) -> str:
        """Both lists around the first difference, for an error's text."""
        forward, recompute = self.forward.operators, self.recompute.operators
        index = self.first_difference()
        if index is None:
            index = min(len(forward), len(recompute))
            head = f"The first {index} operators agree"
            if len(recompute) < len(forward):
                head += "; the recompute ended there"
        else:
            head = (
                f"First operator that differs: number {index}\n"
                f"  forward:   {forward[index]}\n"
                f"  recompute: {recompute[index]}"
            )
        begin = max(0, index - _knobs.DEBUG_PRINTED_OPERATORS // 2)
        end = begin + _knobs.DEBUG_PRINTED_OPERATORS
        parts = [head]
        for title, run in (("forward", self.forward), ("recompute", self.recompute)):
            total = len(run.operators) + run.num_dropped
            parts.append(f"Operators of the {title} ({total}, from number {begin}):")
            parts += [f"  {begin + i:4d}  {op}" for i, op in enumerate(run.operators[begin:end])]
        return "\n".join(parts)
