"""What the engine tests share: leaves, gradients, counters and watches."""

from __future__ import annotations

import collections
import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from wrappers import CheckpointImpl
from wrappers.engine.frame import Frame
from wrappers.engine.rerun import RerunFrame

REENTRANT = CheckpointImpl.REENTRANT
NO_REENTRANT = CheckpointImpl.NO_REENTRANT
IMPLS = [REENTRANT, NO_REENTRANT]


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf that requires grad; the same values for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """New leaves with the same values."""
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor | None]:
    """Gradients of fresh copies of the tensors, after one backward of a non-linear loss."""
    leaves = copies(tensors)
    function(*leaves).square().sum().backward()
    return [t.grad for t in leaves]


def assert_equal(got: Iterable[Any], expected: Iterable[Any]) -> None:
    """Bit for bit; None only matches None."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a is None or b is None:
            assert a is b, f"number {index}: {a} against {b}"
        else:
            assert torch.equal(a, b), f"number {index}: {a} against {b}"


class Calls:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.num = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num += 1
        return self.function(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name; ``detach`` is the hooks' own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.detach.default:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.counts[name]


def count_backward(output: Tensor, **options: Any) -> Operators:
    """The operators that one backward from ``output`` runs, recomputes included."""
    loss = output.sum()
    with Operators() as operators:
        loss.backward(**options)
    return operators


def watch(tensor: Tensor) -> StorageWeakRef:
    """Watch a tensor's memory, whoever holds it; ``expired()`` once it is free."""
    return StorageWeakRef(tensor.untyped_storage())


def live_frames(kind: type[Frame] = Frame) -> list[Any]:
    """All frames of regions that are alive, without those that wait for the collector."""
    gc.collect()  # pytest.raises of an earlier test leaves cycles.
    # Not isinstance: it would ask lazy modules and proxies for their __class__.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def shown(expression: str, line: str) -> str:
    """How an error shows an expression: before Python 3.11 there are lines, but no columns."""
    return expression if sys.version_info >= (3, 11) else line


def live_slots(frame: RerunFrame) -> int:
    """How many of a frame's slots are still in some graph."""
    return sum(ref() is not None for ref in frame.slots)


def live_objects() -> tuple[int, int]:
    """Numbers of tensors and of all objects that the collector knows."""
    objects = gc.get_objects()
    return sum(issubclass(type(o), Tensor) for o in objects), len(objects)


def counts_of_training(
    blocks: nn.ModuleList, run: Callable[..., Tensor], data: Tensor, num_steps: int
) -> list[tuple[int, int]]:
    """Train blocks that are called by ``run(block, x)``; the live objects after each step."""
    optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
    counts = []
    for _ in range(num_steps):
        x = data
        for block in blocks:
            x = run(block, x)
        x.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        del x
        counts.append(live_objects())
    return counts


def spy_on_frames(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[weakref.ref[Any]]:
    """Weak references to the frames of a kind that are made from now on, in order."""
    made: list[weakref.ref[Any]] = []
    original = kind.__init__  # type: ignore[misc]

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(kind, "__init__", spy)
    return made


class Call(nn.Module):
    """A function as a module, so that each test has a region of its own."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)
