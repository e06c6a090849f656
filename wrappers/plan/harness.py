"""Run one region alone on fake tensors, with a policy, on the engine: what does it really take?

The figures of a menu are not estimated: the engine that will run the plan runs here too, on tensors
without memory, and every storage that it makes is followed until it dies. Only the time is added
up from the operators that it has replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wrappers import _knobs, _torch, _tree
from wrappers.engine import holders
from wrappers.engine.holders import Holder
from wrappers.engine.region import Region
from wrappers.engine.replay import ReplayFrame
from wrappers.plan.calls import Call, TensorSpec, make_tensors
from wrappers.plan.memory import Memory
from wrappers.policies import Policy
from wrappers.policy import CheckpointImpl


class Costs(Protocol):
    """How long an operator takes."""

    def time_us(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        """Microseconds of one call."""
        ...

    def flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """Floating-point operations of one call."""
        ...


@dataclass
class Run:
    """What one forward and backward of a region has come to.

    Attributes:
        kept_bytes: Alive after the forward, without the outputs.
        forward_bytes: The most in the forward.
        backward_bytes: The most in the backward.
        gradient_bytes: What it leaves behind: the gradients of parameters.
        offload_bytes: What was moved to the host.
        frame: Of the region; None where it ran plainly.
        forward_us: What the operators of the forward take, where costs are given.
        backward_us: The same for the backward, a recompute included.
        has_backward: Whether a gradient flows through it at all.
        is_forward_over: Whether backward has begun.
    """

    kept_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    gradient_bytes: int = 0
    offload_bytes: int = 0
    frame: ReplayFrame | None = None
    forward_us: float = 0.0
    backward_us: float = 0.0
    has_backward: bool = True
    is_forward_over: bool = False


class _Entry(torch.autograd.Function):
    """Makes the region's own inputs, and drops their gradients."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, specs: Sequence[TensorSpec]) -> Any:
        made = make_tensors(specs, seed.device)
        ctx.mark_non_differentiable(
            *[t for t, spec in zip(made, specs, strict=True) if not spec.requires_grad]
        )
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


class _Exit(torch.autograd.Function):
    """Takes the outputs; makes their gradients in backward."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Any:
        ctx.specs = [(t.shape, t.dtype, t.device) for t in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return tuple(torch.empty(s, dtype=dtype, device=d) for s, dtype, d in ctx.specs)


class Harness:
    """A region on its own: a module and a call of it, both on fake tensors.

    Args:
        mode: The fake mode that the module's tensors belong to.
        module: The region's module.
        call: What it is called with.
        device: Of its tensors.
        has_gradients: Whether parameters have gradients already, to which backward adds.
    """

    def __init__(
        self,
        mode: Any,
        module: nn.Module,
        call: Call,
        device: torch.device,
        *,
        has_gradients: bool = False,
    ) -> None:
        self._mode = mode
        self._module = module
        self._call = call
        self._device = device
        self._has_gradients = has_gradients

    def run(
        self,
        policy: Policy | None = None,
        *,
        is_plain: bool = False,
        costs: Costs | None = None,
        fqn: str = "",
    ) -> Run:
        """Run forward and backward once.

        Args:
            policy: What the region keeps.
            is_plain: Run it without a region, as the plain model does.
            costs: How long operators take.
            fqn: The region's name.
        """
        if is_plain:
            return self._run_once(None, costs)
        region = Region(impl=CheckpointImpl.REPLAY, policy=policy, verify="never", fqn=fqn)
        run = self._run_once(region, costs)
        measured = region.experience.measured
        if measured is not None and measured.num_bytes <= _knobs.REPLAY_AT_ONCE_BYTES:
            # From its second call on it is replayed at once.
            again = self._run_once(region, costs)
            again.frame, again.offload_bytes = run.frame, run.offload_bytes
            return again
        return run

    def _run_once(self, region: Region | None, costs: Costs | None) -> Run:
        run = Run()

        def add(*call: Any) -> None:
            time_us = costs.time_us(*call) if costs is not None else 0.0
            if run.is_forward_over:
                run.backward_us += time_us
            else:
                run.forward_us += time_us

        memory = Memory(add if costs is not None else None)
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        torch.clear_autocast_cache()
        with self._mode:
            outside = self._make_outside()
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter) if self._has_gradients else None
            try:
                with memory, _away(run):
                    self._run(run, memory, outside, region)
            finally:
                torch.clear_autocast_cache()
                for parameter in parameters:
                    parameter.grad = None
        return run

    def call_text(self) -> str:
        """What calls of the same structure have in common, as text."""
        call = self._call
        inputs = [(*spec.key(), spec.is_own) for spec in call.inputs]
        return repr((inputs, [spec.is_own for spec in call.outputs], call.is_grad_enabled))

    def _make_outside(self) -> dict[int, Tensor]:
        """By position: the inputs that live outside anyway, and their gradients."""
        specs = self._call.inputs
        positions = [i for i, spec in enumerate(specs) if not spec.is_own]
        tensors = make_tensors([specs[i] for i in positions], self._device)
        return {
            i: t.detach().requires_grad_(specs[i].requires_grad)
            for i, t in zip(positions, tensors, strict=True)
        }

    def _run(
        self,
        run: Run,
        memory: Memory,
        outside: dict[int, Tensor],
        region: Region | None,
    ) -> None:
        specs = self._call.inputs
        own = [i for i, spec in enumerate(specs) if spec.is_own]
        inputs: list[Any] = [outside.get(i) for i in range(len(specs))]
        if own:
            seed = torch.empty((), device=self._device, requires_grad=True)
            made = _Entry.apply(seed, [specs[i] for i in own])  # type: ignore[no-untyped-call]
            for i, tensor in zip(own, made, strict=True):
                inputs[i] = tensor
            del made, tensor
        args, kwargs = self._call.build(inputs)
        del inputs
        with self._call.surroundings():
            if region is None:
                out = self._module(*args, **kwargs)
            else:
                run.frame = ReplayFrame(region, self._module)
                out = run.frame.run_forward(self._module, args, kwargs)
        del args, kwargs
        forward_end = memory.now()
        run.forward_bytes = memory.peak(0, forward_end)
        outputs = _tree.flatten(out)[0]
        del out
        own_outputs = {
            memory.storage_of(t)
            for t, spec in zip(outputs, self._call.outputs, strict=False)
            if spec.is_own
        }
        outputs = [t for t in outputs if t.requires_grad]
        if not outputs:
            run.has_backward = False
            return
        alive_outputs = {s.number: s for t in outputs if (s := memory.storage_of(t))}
        end = _Exit.apply(*outputs)  # type: ignore[no-untyped-call]
        del outputs
        # What dies now is held by nobody but the one who called the region.
        of_others = sum(s.num_bytes for s in alive_outputs.values() if s not in own_outputs)
        kept = memory.alive_bytes - of_others
        # Generators' states are no tensors of the fake mode.
        states = run.frame.random_state_bytes if run.frame is not None else 0
        run.kept_bytes = kept - _torch.storage_bytes(end) + states
        start = memory.now()
        run.is_forward_over = True
        end.backward()
        run.backward_bytes = memory.peak(start) - _torch.storage_bytes(end) + states
        del end
        run.gradient_bytes = memory.alive_bytes


class _Away:
    """Holds a result that would be on the host: nothing of it is in the device's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.place = _torch.place_of(tensor)
        self._make = partial(
            torch.empty_strided,
            tensor.size(),
            tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
        )

    def unpack(self) -> Tensor:
        """Make the tensor again."""
        return self._make()


@contextlib.contextmanager
def _away(run: Run) -> Iterator[None]:
    """Let policies move results out of the device's memory, and count them."""

    def make(fqn: str, key: Any) -> Any:
        def offload(tensor: Tensor) -> Holder:
            run.offload_bytes += _torch.storage_bytes(tensor)
            return _Away(tensor)

        return offload

    before = holders.make_offloader
    holders.connect_offloading(make)
    try:
        yield
    finally:
        holders.connect_offloading(before)
