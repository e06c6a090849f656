"""Times from the device at hand: of operators, a block of each kind, and what lies outside.

Nothing of the user's model runs: one block of each kind is built with made-up numbers, and what
lies outside of blocks is built without them, as times do not depend on what the numbers are. Where
experts are chosen by their inputs they do, and the times are those of an even choice.

An operator alone, between two looks at the clock, takes another time than in the middle of others,
and the engine has costs of its own. So a block also runs plainly, and with nothing, half and all of
what it needs kept, in turns; what an option costs is then

    time = scale * (operators replayed) + (engine: operators recorded, replayed) + constant

with the scale and the constant that come closest to these.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _device, _knobs, _tree
from wrappers.engine.api import run_region
from wrappers.engine.region import Region
from wrappers.plan.calls import TensorSpec, call_of
from wrappers.plan.costs import Measured, Stopwatch, TimingMode
from wrappers.plan.fakes import Fakes
from wrappers.plan.menu import policy_of
from wrappers.plan.step import replaced_forwards
from wrappers.plan.structures import Kind, Structures
from wrappers.policies import Policy
from wrappers.policy import CheckpointImpl


def make_real(specs: Sequence[TensorSpec], device: torch.device) -> list[Tensor]:
    """Tensors with something in them: numbers around zero, true, or index 0."""
    memories: dict[int, Tensor] = {}
    made = []
    for spec in specs:
        memory = memories.get(spec.memory)
        if memory is None or memory.dtype != spec.dtype:
            num = spec.memory_bytes // spec.dtype.itemsize
            if spec.dtype.is_floating_point or spec.dtype.is_complex:
                memory = torch.randn(num, dtype=torch.float32, device=device).to(spec.dtype)
            elif spec.dtype is torch.bool:
                memory = torch.ones(num, dtype=spec.dtype, device=device)
            else:
                memory = torch.zeros(num, dtype=spec.dtype, device=device)
            memories[spec.memory] = memory
        tensor = memory.as_strided(spec.size, spec.stride, spec.offset).detach()
        made.append(tensor.requires_grad_(spec.requires_grad))
    return made


class Block:
    """One block of a kind with memory, its numbers and inputs made up.

    Args:
        kind: What it is.
        module: The block.
        device: Where it runs.
    """

    def __init__(self, kind: Kind, module: nn.Module, device: torch.device) -> None:
        self._kind = kind
        self._module = module
        self._inputs = make_real(kind.call.inputs, device)
        self._regions: dict[Policy | None, Region] = {}

    def step(self, policy: Policy | None = None, *, is_plain: bool = True) -> None:
        """Forward and backward."""
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in self._inputs]
        args, kwargs = self._kind.call.build(inputs)
        with self._kind.call.surroundings():
            if is_plain:
                out = self._module(*args, **kwargs)
            else:
                out = run_region(self._region(policy), self._module, args, kwargs)
        outputs = [t for t in _tree.flatten(out)[0] if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        self._module.zero_grad(set_to_none=True)

    def forward(self) -> None:
        """A plain forward alone."""
        with self._kind.call.surroundings():
            self._kind.call.run(self._module, self._inputs)

    def _region(self, policy: Policy | None) -> Region:
        if policy not in self._regions:
            self._regions[policy] = Region(
                impl=CheckpointImpl.REPLAY, policy=policy, verify="first", fqn=self._kind.fqn
            )
        return self._regions[policy]

    @property
    def reason(self) -> str:
        """Why it must not be replayed, as its runs have shown; empty if it may."""
        reasons = [region.experience.reason for region in self._regions.values()]
        return next((reason for reason in reasons if reason), "")


def time_kinds(
    kinds: Sequence[Kind],
    fakes: Fakes,
    measured: Measured,
    device: torch.device,
    *,
    max_options: int,
) -> None:
    """Time one block of each kind on the device, and its operators.

    Args:
        kinds: Their menus are not made yet.
        fakes: Has made their modules.
        measured: Where the times of operators go.
        device: Where they run.
        max_options: Of a menu.
    """
    with _device.random_state_kept(device):
        for kind in kinds:
            block = Block(kind, fakes.realize(kind.module, device), device)
            _time_kind(kind, block, measured, device, max_options)


def _time_kind(
    kind: Kind, block: Block, measured: Measured, device: torch.device, max_options: int
) -> None:
    if kind.is_fixed:
        _set_plain_times(kind, block, Stopwatch(device))
        return
    block.step()
    with TimingMode(measured, device):
        for _ in range(_knobs.PLAN_TIMED_OPERATOR_STEPS):
            block.step()
    kind.set_costs(measured, measured.hardware, max_options=max_options)
    examples = kind.examples()
    runs: dict[Any, Callable[[], None]] = {"plain": block.step, "forward": block.forward}
    for decisions in examples:
        runs[decisions] = partial(block.step, policy_of(decisions), is_plain=False)
    times = _in_turns(runs, Stopwatch(device))
    if block.reason:
        kind.refuse(block.reason)
    kind.set_times(
        times["forward"],
        times["plain"] - times["forward"],
        {decisions: times[decisions] - times["plain"] for decisions in examples},
    )


def _set_plain_times(kind: Kind, block: Block, watch: Stopwatch) -> None:
    times = _in_turns({"forward": block.forward}, watch)
    kind.set_times(times["forward"], 0.0, {})


def _in_turns(runs: Mapping[Any, Callable[[], object]], watch: Stopwatch) -> dict[Any, float]:
    """The median of each, run in turns so that what else the machine does hits all alike."""
    for run in runs.values():
        run()
        run()  # The first replay of a region is compared with a rerun.
    found: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(_knobs.PLAN_TIMED_STEPS):
        for name, run in runs.items():
            found[name].append(watch.time_us(run))
    return {name: statistics.median(times) for name, times in found.items()}


# --- What lies outside of blocks


class _Hole(nn.Module):
    """Stands where a block was: returns tensors that were made before."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a hole is called only through its stub")


class _TimedStub(torch.autograd.Function):
    """Returns tensors, and gradients, that were made before."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Sequence[Tensor], gradients: Any, anchor: Tensor, *tensors: Any
    ) -> Any:
        ctx.gradients = gradients
        made = [output.detach() for output in outputs]
        ctx.mark_non_differentiable(
            *[t for t, o in zip(made, outputs, strict=True) if not o.requires_grad]
        )
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None, None, *ctx.gradients


def time_outside(
    fake: nn.Module,
    regions: Mapping[str, nn.Module],
    fakes: Fakes,
    structures: Structures,
    run: Callable[[nn.Module], tuple[Any, Tensor]],
    device: torch.device,
) -> float:
    """How long a step takes outside of regions, in microseconds.

    Args:
        fake: The model on fake tensors.
        regions: Its regions by FQN, which are left out.
        fakes: Has made it.
        structures: Say what regions return.
        run: Runs forward and loss.
        device: Where it runs.
    """
    holes: dict[str, nn.Module] = {fqn: _Hole() for fqn in regions}
    memo: dict[int, Any] = {}
    for fqn, module in regions.items():
        memo.update(dict.fromkeys(map(id, module.modules())))
        memo[id(module)] = holes[fqn]
    with _device.random_state_kept(device):
        outside = fakes.realize(fake, device, memo)
    made: dict[Any, tuple[list[Tensor], list[Any]]] = {}
    # Stands for the parameters of a region, so that what it returns has a gradient.
    anchor = torch.zeros((), device=device, requires_grad=True)

    def enter(fqn: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = structures.describe(fqn, call_of(args, kwargs))
        tensors = _tree.flatten_call(args, kwargs)[0]
        key = fqn, tuple(spec.key() for spec in call.inputs)
        if key not in made:
            gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]
            made[key] = make_real(call.outputs, device), gradients
        outputs, gradients = made[key]
        stubbed = _TimedStub.apply(outputs, gradients, anchor, *tensors)  # type: ignore[no-untyped-call]
        results = list(stubbed)
        for output, given in call.passed_on:
            results[output] = tensors[given]
        return call.build_output(results)

    def step() -> None:
        _, loss = run(outside)
        if loss.requires_grad:
            loss.backward()
        outside.zero_grad(set_to_none=True)

    with _device.random_state_kept(device), replaced_forwards(holes, enter):
        return _in_turns({"outside": step}, Stopwatch(device))["outside"]
