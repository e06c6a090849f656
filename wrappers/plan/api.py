"""From a model and a budget to a plan: the functions that users call.

profile(model, sample)              what each region can keep, and what it costs
make_plan(profile, "12GiB")         the fastest choice that fits
plan_for(build_model, ...)          both, for a device and a number of ranks that are not here
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wrappers import _device
from wrappers.apply import ApplyReport, connect_planner, find_regions
from wrappers.errors import InfeasibleBudgetError, WrapperError
from wrappers.modules.base import require_module
from wrappers.plan import budget, ranks
from wrappers.plan.build import build_plan, made_by_hand
from wrappers.plan.chain import chain_of
from wrappers.plan.costs import Measured, Roofline
from wrappers.plan.elsewhere import AcceleratorOperators
from wrappers.plan.hardware import find_hardware
from wrappers.plan.optimizers import OptimizerLike
from wrappers.plan.plan import Plan
from wrappers.plan.profile import LossFn, Profiler, loss_of, samples_of, with_buckets
from wrappers.plan.progress import progress_bar
from wrappers.plan.records import Hardware, Profile
from wrappers.plan.sharding import Sharding, sharding_for, sharding_of
from wrappers.plan.timing import time_kinds, time_outside
from wrappers.select import ModuleTest, repeated_blocks

__all__ = ["make_plan", "plan_for", "profile"]

#: What a budget can count.
COUNTS = ("all", "activations")


def profile(
    model: nn.Module,
    sample: Any,
    *,
    check_fn: ModuleTest | None = None,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    hardware: Hardware | str | None = None,
    sharding: Sharding | None = None,
    has_gradients: bool = False,
    max_options: int = 40,
) -> Profile:
    """Look at one training step: what is alive when, and what each region can keep.

    The model itself is not run and does not change. Memory comes from a step on tensors without
    memory, on which the engine really runs. Times are measured on the model's device, one block of
    each kind; or derived from a description of a device that need not be here.

    Args:
        model: On its device, or on the meta device if ``hardware`` is given. Modules must be in
            the mode in which they train.
        sample: A batch: a tensor is one positional argument, a tuple are positional arguments, a
            dict is arguments by name. A list means several samples: what is planned holds for
            each of them.
        check_fn: Which modules are regions, as for
            :func:`~wrappers.apply_activation_checkpointing`; by default what the model repeats:
            :func:`wrappers.select.repeated_blocks`.
        loss_fn: Makes the loss of what the model returns; by default its ``loss`` where it has
            one, else the sum.
        optimizer: The optimizer, or what makes one of parameters: its state counts, and what its
            step takes. Without it neither does.
        hardware: A preset's name, ``"this"`` for what :func:`wrappers.calibrate` has stored, or a
            description. None: measure on the model's device.
        sharding: How FSDP2 will shard the model, where it does not yet:
            :func:`wrappers.plan.sharding.sharding_for`. What it has sharded is seen.
        has_gradients: Whether parameters have gradients when a step begins: gradient accumulation,
            or ``zero_grad(set_to_none=False)``.
        max_options: How many options a region's menu has at most; at least 8.

    Raises:
        WrapperError: No region is found, or the model does not run without values.
        ValueError: The sample holds no tensor, or no hardware is called like this.
        TypeError: ``model`` is not a module.
    """
    require_module(model)
    if max_options < 8:
        raise ValueError(f"max_options must be at least 8, got {max_options}")
    has_buckets = isinstance(model, DistributedDataParallel)
    if isinstance(model, DistributedDataParallel):
        inside: Any = model.module
        model = inside
    samples = samples_of(sample)
    chosen = repeated_blocks() if check_fn is None else check_fn
    device = _device_of(model)
    if hardware is None and _device.has_no_memory(device):
        raise ValueError(
            "a model on the meta device has no device to measure times on: pass hardware=, such "
            'as "H100", or "this" after wrappers.calibrate()'
        )
    is_measured = hardware is None
    described = find_hardware(hardware, device if is_measured else None)
    is_elsewhere = not is_measured and _device.is_host_type(device) and _has_link(described)
    costs = Measured(Roofline(described))
    at = torch.device("cpu") if _device.has_no_memory(device) else device
    regions = list(find_regions(model, chosen))
    if not regions:
        raise WrapperError(
            f"no region found in the {type(model).__name__}: check_fn chooses no module that has a "
            "forward. Name the blocks, such as check_fn=wrappers.select.by_class(Block)."
        )
    if sharding is None:
        sharding = sharding_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(random.setstate, random.getstate())
        if is_elsewhere:
            stack.enter_context(AcceleratorOperators())
        mesh = None if sharding is None else stack.enter_context(sharding.mesh())
        profiler = Profiler(
            model,
            regions=regions,
            loss_fn=loss_fn,
            optimizer=optimizer,
            hardware=described,
            costs=costs,
            device=at,
            sharding=sharding,
            mesh=mesh,
            has_gradients=has_gradients,
            has_buckets=has_buckets,
            is_elsewhere=is_elsewhere,
            max_options=max_options,
        )
        profiler.look(samples)
        if is_measured:
            _measure(profiler, samples, loss_fn or loss_of, costs, device)
        return replace(profiler.profile(), is_measured=is_measured)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _has_link(hardware: Hardware) -> bool:
    """Whether a device is another one than the host."""
    return hardware.d2h_bytes_per_s > 0


def _measure(
    profiler: Profiler,
    samples: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    loss_fn: LossFn,
    costs: Measured,
    device: torch.device,
) -> None:
    """Replace derived times by measured ones."""
    structures, fakes = profiler.structures, profiler.fakes
    kinds = list(structures.kinds.values())
    time_kinds(kinds, fakes, costs, device, max_options=profiler.max_options)
    for one, (args, kwargs) in zip(profiler.passes, samples, strict=True):

        def run(outside: nn.Module, args: Any = args, kwargs: Any = kwargs) -> tuple[Any, Tensor]:
            output = outside(*args, **kwargs)
            return output, loss_fn(output)

        one.outside_us = time_outside(
            profiler.inner, structures.modules, fakes, structures, run, device
        )


def make_plan(
    profile: Profile,
    memory_budget: int | float | str,
    *,
    count: str = "all",
    margin: int | float | str | None = None,
    frontier_points: int = 10,
    progress: Callable[[float], object] | None = None,
) -> Plan:
    """The fastest way through a step within a memory budget.

    Args:
        profile: Of the step.
        memory_budget: Bytes; or with a unit, ``"12GiB"``; or a share of the device, ``"90%"``.
        count: ``"all"``: the budget is for everything on the device: parameters, gradients, the
            optimizer's state, the sample, activations. ``"activations"``: for what the step adds
            to what was there when it began.
        margin: What of the budget is left free for fragmentation, in bytes, with a unit, or as a
            share of the budget. By default 2% where the allocator rounds and keeps blocks, as on
            an accelerator, nothing on a CPU.
        frontier_points: At so many other budgets the best time is computed too, for pictures; 0
            for none.
        progress: Called with the part that is done; by default a bar, where rich is installed and
            it takes longer than a second.

    Raises:
        InfeasibleBudgetError: Nothing fits; it carries the smallest budget that does.
        ValueError: The budget cannot be read.
        ImportError: numpy or scipy is missing.
    """
    from wrappers.plan import solve

    _require_count(count)
    capacity = profile.hardware.memory_bytes or None
    budget_bytes = budget.budget_bytes(memory_budget, capacity_bytes=capacity)
    margin_bytes = _margin(margin, budget_bytes, profile.hardware)
    uncounted = 0 if count == "all" else profile.start_bytes
    chain = chain_of(profile)
    limit = budget_bytes - margin_bytes + uncounted
    smallest_bytes = budget.smallest_budget(
        chain.smallest()[0] - uncounted, lambda size: _margin(margin, size, profile.hardware)
    )
    try:
        with (
            progress_bar("planning")
            if progress is None
            else contextlib.nullcontext(progress) as report
        ):
            found = solve.solve(chain, limit, progress=report)
    except solve.DoesNotFitError as error:
        raise _infeasible(profile, error, budget_bytes, smallest_bytes, count) from None
    plain_us = profile.step_us
    points: list[tuple[int, float]] = []
    if frontier_points:
        points = [
            (point.peak_bytes, plain_us + point.extra_us)
            for point in solve.frontier(chain, frontier_points)
        ]
    return build_plan(
        profile,
        found.choice,
        budget_bytes=budget_bytes,
        margin_bytes=margin_bytes,
        counts=count,
        uncounted_bytes=uncounted,
        smallest_bytes=smallest_bytes,
        gap_us=found.gap_us,
        frontier=points,
        hand_made=made_by_hand(profile),
    )


def _require_count(count: str) -> None:
    if count not in COUNTS:
        raise ValueError(f"count is one of {', '.join(COUNTS)}, got {count!r}")


def _margin(margin: int | float | str | None, budget_bytes: int, hardware: Hardware) -> int:
    if margin is None:
        return int(budget_bytes * budget.MARGIN_PERCENT / 100) if _has_link(hardware) else 0
    return budget.budget_bytes(margin, capacity_bytes=budget_bytes) if margin else 0


def _infeasible(
    profile: Profile,
    error: Any,
    budget_bytes: int,
    smallest: int,
    count: str,
) -> InfeasibleBudgetError:
    names = [region.fqn for region in profile.regions]
    is_end = error.index >= len(names)
    fqn = "" if is_end else names[error.index]
    where = "outside of all regions" if is_end else f"in region `{fqn}`"
    persistent = profile.persistent
    lasting = persistent.parameter_bytes + persistent.gradient_bytes + persistent.optimizer_bytes
    hints = ["a smaller batch or shorter sequences"]
    if count == "all" and lasting > smallest / 2:
        hints.insert(0, "sharding parameters over more ranks")
    if is_end:
        hints.append("a loss that is computed in chunks, as the head's output is the peak")
    else:
        hints.append("smaller regions: check_fn can choose parts of this one")
    return InfeasibleBudgetError(
        f"a budget of {_size(budget_bytes)} cannot be met: the smallest that can is "
        f"{smallest} bytes ({_size(smallest)}), which the step needs {where}; parameters, "
        f"gradients and optimizer state are {_size(lasting)} of what is on the device. "
        f"What helps: {'; '.join(hints)}.",
        fqn=fqn,
        budget_bytes=budget_bytes,
        smallest_bytes=smallest,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def plan_for(
    model_fn: Callable[[], nn.Module],
    sample_fn: Callable[[], Any],
    *,
    device: Hardware | str,
    budget: int | float | str,
    world_size: int = 1,
    fsdp: bool = False,
    mp_policy: Any = None,
    check_fn: ModuleTest | None = None,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | None = None,
    has_gradients: bool = False,
    count: str = "all",
    margin: int | float | str | None = None,
) -> Plan:
    """A plan for a model that is too large for this machine, on a device that is not here.

    Args:
        model_fn: Builds the model; called under the meta device, so that nothing is allocated.
        sample_fn: Makes a sample, there too; see :func:`profile`.
        device: The device's description or preset.
        budget: See :func:`make_plan`.
        world_size: How many ranks there are.
        fsdp: Whether FSDP2 shards each region, and the rest of the model, over the ranks. Without
            it, several ranks mean DDP, which needs buckets for gradients.
        mp_policy: FSDP2's MixedPrecisionPolicy.
        check_fn: See :func:`profile`.
        loss_fn: See there.
        optimizer: See there; what makes one.
        has_gradients: See there.
        count: See :func:`make_plan`.
        margin: See there.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        WrapperError: The model does not run on tensors without memory.
        ValueError: ``mp_policy`` is given without ``fsdp``, or an argument cannot be read.
    """
    if mp_policy is not None and not fsdp:
        raise ValueError("mp_policy is FSDP2's: pass fsdp=True with it, or build the model in it")
    with torch.device("meta"):
        model = model_fn()
        sample = sample_fn()
    chosen = repeated_blocks() if check_fn is None else check_fn
    is_sharded = fsdp and world_size > 1
    sharding = None
    if is_sharded:
        regions = list(find_regions(model, chosen))
        sharding = sharding_for(regions, world_size, mp_policy)
    found = profile(
        model,
        sample,
        check_fn=chosen,
        sharding=sharding,
        loss_fn=loss_fn,
        optimizer=optimizer,
        hardware=device,
        has_gradients=has_gradients,
    )
    if world_size > 1 and not is_sharded:
        found = with_buckets(found, world_size)
    return make_plan(found, budget, count=count, margin=margin)


def plan_and_apply(
    model: nn.Module,
    sample: Any,
    memory_budget: int | float | str,
    *,
    check_fn: ModuleTest | None,
    inplace: bool,
    count: str = "all",
    margin: int | float | str | None = None,
    strict: bool = False,
    verify: str = "never",
    **options: Any,
) -> ApplyReport:
    """What ``apply_activation_checkpointing(model, memory_budget=...)`` does."""
    if unknown := options.keys() - _PROFILE_OPTIONS:
        raise TypeError(
            f"unknown arguments: {', '.join(sorted(unknown))}. With a memory_budget there are "
            f"count, margin, strict, verify, and {', '.join(sorted(_PROFILE_OPTIONS))}"
        )
    # What can be refused at once is not refused after a profile.
    _require_count(count)
    budget.budget_bytes(memory_budget, capacity_bytes=budget.capacity_bytes(_device_of(model)) or 1)
    plan = ranks.plan_together(
        lambda: profile(model, sample, check_fn=check_fn, **options),
        lambda found: make_plan(
            found, memory_budget, count=count, margin=margin, frontier_points=0
        ),
    )
    report = plan.apply(model, inplace=inplace, strict=strict, verify=verify)
    return replace(report, plan=plan)


#: Arguments of :func:`profile` that can be given with a memory budget.
_PROFILE_OPTIONS = frozenset(
    {"loss_fn", "optimizer", "hardware", "sharding", "has_gradients", "max_options"}
)

connect_planner(plan_and_apply)
