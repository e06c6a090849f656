"""What the tests of offloading share: work that takes time, and a transport that is strict."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import wrappers
from wrappers.offload.simulated import SimulatedTransport

T = TypeVar("T")

#: Nothing here takes so long; what does hangs.
HANG_S = 40.0


class Work(torch.autograd.Function):
    """A product with a vector that saves its input and takes time on the compute stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, owner: Layer) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.owner = owner
        owner.compute(owner.forward_s, "forward")
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        ctx.owner.compute(ctx.owner.backward_s, "backward")
        return grad * w, (grad * x).sum(0), None


class Layer(nn.Module):
    """One operator that takes a time.

    Attributes:
        compute: Called with seconds and a name; a transport's method.
    """

    def __init__(self, dim: int, forward_s: float = 0.0, backward_s: float = 0.0) -> None:
        super().__init__()
        self.forward_s = forward_s
        self.backward_s = backward_s
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, dim))
        self.compute: Callable[[float, str], None] = _no_time

    def forward(self, x: Tensor) -> Tensor:
        return Work.apply(x, self.weight, self)


def _no_time(seconds: float, name: str) -> None:
    pass


def stack(
    num_blocks: int, *, num_layers: int = 1, dim: int = 16, forward_s=0.0, backward_s=0.0
) -> nn.Sequential:
    """Blocks of layers; the times are a block's."""
    return nn.Sequential(
        *(
            nn.Sequential(
                *(
                    Layer(dim, forward_s / num_layers, backward_s / num_layers)
                    for _ in range(num_layers)
                )
            )
            for _ in range(num_blocks)
        )
    )


def compute_on(model: nn.Module, compute: Callable[[float, str], None]) -> None:
    """Let a model's layers take their time on a transport."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.compute = compute


def step(
    model: nn.Module, x: Tensor, before_backward: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The output and the gradients of one step, whose graph is gone afterwards."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x * 1.0)  # Not a leaf, so that the first region offloads it too.
    loss = out.square().sum()
    before_backward()
    loss.backward()
    gradients = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    return [out.detach(), *gradients]


def are_equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all are equal, bit for bit."""
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


def within(function: Callable[[], T], seconds: float = HANG_S) -> T:
    """Call a function in a thread of its own; fail, and show where it stands, if it hangs."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        frame = sys._current_frames()[thread.ident]  # type: ignore[index]
        text = "".join(traceback.format_stack(frame))
        raise AssertionError(f"hangs after {seconds} s:\n{text}")
    if errors:
        raise errors.pop()
    return results.pop()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a thread that needs no virtual time."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(1e-3)


class StrictTransport(SimulatedTransport):
    """A simulated transport that also finds memory let go of too early, and can forget to wait.

    A queued copy of the simulation holds its source and target; a device's does not. Here the
    copies work on shadows: what dies before its copy is over is noted, and gives garbage.

    Args:
        forget: Pairs of who waits and for whom, of ``"compute"``, ``"D2H"`` and ``"H2D"``: waits
            that are left out. A planted bug.
        **settings: Those of a simulated transport.

    Attributes:
        violations: Memory that has died under a copy.
        outstanding_bytes: The most bytes in each direction that were queued and not yet copied.
    """

    def __init__(self, *, forget: set[tuple[str, str]] = frozenset(), **settings: Any) -> None:
        super().__init__(**settings)
        self.violations: list[str] = []
        self.outstanding_bytes = {"D2H": 0, "H2D": 0}
        self.forgotten = forget
        #: By the id of a copy's event: the event, its direction and bytes, and where they land.
        self._copies: dict[int, tuple[Any, str, int, Any, Tensor]] = {}

    def wait(self, stream: Any, event: Any) -> None:
        waiter = getattr(stream, "name", "compute")
        copied = self._copies.get(id(event))
        if (waiter, copied[1] if copied else "compute") in self.forgotten:
            return
        super().wait(stream, event)
        if copied is not None and waiter == "compute":
            self._land(copied)

    def _land(self, copied: tuple[Any, str, int, Any, Tensor]) -> None:
        _, direction, _, target, shadow = copied
        if direction == "H2D" and (tensor := target()) is not None:
            tensor.copy_(shadow)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        direction, now_s = stream.name, self.now_s()
        if direction == "D2H":
            shadow = source.clone()
            super().copy(target, shadow, stream)
            watched = source.untyped_storage()
        else:
            shadow = torch.full_like(target, 255)
            super().copy(shadow, source, stream)
            watched = target.untyped_storage()
        event = stream.last
        weakref.finalize(watched, self._check_death, direction, event, shadow)
        self._copies[id(event)] = event, direction, source.numel(), weakref.ref(target), shadow
        pending = [
            n for e, d, n, *_ in self._copies.values() if d == direction and e.moment_s > now_s
        ]
        self.outstanding_bytes[direction] = max(self.outstanding_bytes[direction], sum(pending))

    def _check_death(self, direction: str, event: Any, shadow: Tensor) -> None:
        if self.now_s() < event.moment_s:
            self.violations.append(f"memory of a {direction} copy has died before its end")
            shadow.fill_(255)


def offload_blocks(model: torch.nn.Sequential, **settings: Any) -> torch.nn.Sequential:
    for index, block in enumerate(model):
        model[index] = wrappers.offload_wrapper(block, min_bytes=0, **settings)
    return model
