"""What is known about a step, as plain data: operators, regions, options, moments.

A step is a chain of regions in the order of their forwards, with code of the model's own around
them. What is alive at some moment of it is

    base (parameters, gradients so far, what lives outside of regions)
    + for each region whose forward is over and whose backward is not: what its option keeps
    + what the region that runs right now needs beyond that, forward or backward, recompute included

so a choice of one option a region decides the memory of every moment by sums. No tensor is in
here, and nothing that knows torch: profiles can be made on one machine and solved on another.

Bytes are bytes of storages, times are microseconds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Name of the policy by hand that keeps nothing.
RECOMPUTE_ALL = "recompute all"


class Action(enum.Enum):
    """What a plan does with the output of an operator; what it does not name is recomputed."""

    SAVE = "save"
    OFFLOAD = "offload"


@dataclass(frozen=True, order=True)
class Decision:
    """An operator of a region whose output is not recomputed.

    Attributes:
        operator: Its name, such as ``aten.mm.default``.
        ordinal: Its number among the calls of the same operator in one forward, from 0.
        action: What happens to its output.
    """

    operator: str
    ordinal: int
    action: Action = field(default=Action.SAVE, compare=False)


@dataclass(frozen=True)
class OperatorRow:
    """An operator of a region that makes memory; views are resolved to what they look at.

    Attributes:
        operator: Its name, such as ``aten.mm.default``.
        ordinal: Its number among the calls of the same operator in one forward, from 0.
        module: Name of the submodule that called it, relative to the region; empty for its own.
        output_bytes: Memory that it makes.
        saved_bytes: What of this autograd saves for backward in the plain model.
        time_us: How long it runs.
        flops: Floating-point operations, where it is a matrix product or attention; else 0.
        reads: Positions, in the region's list, of the operators whose outputs it reads.
        is_random: Whether it draws random numbers.
        is_asked_once: Whether it is never recomputed: a collective, or a choice such as top-k.
    """

    operator: str
    ordinal: int
    module: str
    output_bytes: int
    saved_bytes: int
    time_us: float
    flops: int = 0
    reads: tuple[int, ...] = ()
    is_random: bool = False
    is_asked_once: bool = False


@dataclass(frozen=True)
class Option:
    """One way to treat the activations of a region.

    Attributes:
        decisions: Which outputs are kept or offloaded; None where the region is left alone, so
            that autograd keeps what it always keeps.
        kept_bytes: What is alive from the end of the region's forward to the beginning of its
            backward that would not be without this region; its input counts here where nobody else
            keeps it, its output does not.
        extra_us: How much longer the step takes than without a region.
        forward_bytes: The most that its forward needs at once, its input and output included.
        backward_bytes: The most that its backward needs at once: what was kept, the recompute, the
            gradients of its output, input and parameters.
        offload_bytes: What goes to the host and comes back; not part of ``kept_bytes``.
    """

    decisions: tuple[Decision, ...] | None
    kept_bytes: int
    extra_us: float
    forward_bytes: int
    backward_bytes: int
    offload_bytes: int = 0


@dataclass(frozen=True)
class Structure:
    """What all regions of the same structure share.

    Attributes:
        key: Hash of operators, shapes, data types and flags.
        class_name: Class of the regions' modules.
        operators: The operators of one forward that make memory, in order.
        num_operators: All operators of one forward, views included.
        forward_us: How long a plain forward takes.
        backward_us: How long a plain backward takes.
        options: The menu, the plain option first, then by falling ``kept_bytes``. Those on which
            another is better in all respects are left out.
        is_exact: Whether all cuts were looked at that are best as to bytes kept and time; the menu
            is a selection of them where there are more than it may have.
        reason: Why the regions can only be left alone; empty if they can be recomputed.
        calls: How often each operator is called in one forward, views included, by name; empty if
            unknown.
        by_hand: What policies that people choose by hand come to, by name, to compare with.
    """

    key: str
    class_name: str
    operators: tuple[OperatorRow, ...]
    num_operators: int
    forward_us: float
    backward_us: float
    options: tuple[Option, ...]
    is_exact: bool = True
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    by_hand: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionProfile:
    """One region of the model, in the order of forwards.

    Attributes:
        fqn: Name of the module.
        structure: Key of its structure.
        forward_base_bytes: Alive when its forward begins, beyond what regions keep and its input.
        backward_base_bytes: Alive when its backward begins, beyond what regions keep and the
            gradient of its output: so also the gradients that later regions have left.
        num_calls: How often it is called in one step; its options are for all calls together.
    """

    fqn: str
    structure: str
    forward_base_bytes: int
    backward_base_bytes: int
    num_calls: int = 1


@dataclass(frozen=True)
class Moment:
    """A time of the step in which no region runs.

    Attributes:
        label: What runs then: ``"before blocks.0"``, ``"between blocks.0 and blocks.1"``,
            ``"after blocks.11"`` (the loss), ``"backward before blocks.11"``, ``"optimizer"``.
        num_alive: How many regions, from the first on, keep their activations then.
        base_bytes: The most that is alive in it beyond what these regions keep.
    """

    label: str
    num_alive: int
    base_bytes: int


@dataclass(frozen=True)
class Persistent:
    """What stays on the device between steps, and what a step leaves there for the optimizer.

    Attributes:
        parameter_bytes: Parameters and buffers, as this rank holds them.
        gradient_bytes: Gradients when backward is over.
        optimizer_bytes: The optimizer's state.
        unsharded_bytes: The most that gathered parameters and unreduced gradients take at once.
        sample_bytes: The sample.
        bucket_bytes: What DDP reduces gradients in.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    unsharded_bytes: int = 0
    sample_bytes: int = 0
    bucket_bytes: int = 0

    def start_bytes(self, *, has_gradients: bool) -> int:
        """What is on the device when a step begins, with gradients of the one before or without."""
        lasting = self.parameter_bytes + self.optimizer_bytes + self.bucket_bytes
        return lasting + self.sample_bytes + (self.gradient_bytes if has_gradients else 0)


@dataclass(frozen=True)
class Holding:
    """A storage that is alive at the peak of the plain step.

    Attributes:
        fqn: The region whose activations it belongs to; empty outside of regions.
        operator: What has made it; ``parameter``, ``gradient``, ``input`` where no operator has.
        num_bytes: Its size.
        holder: Who keeps it: ``autograd``, ``region``, ``model``, ``optimizer`` or ``user``.
    """

    fqn: str
    operator: str
    num_bytes: int
    holder: str


@dataclass(frozen=True)
class Hardware:
    """What a device can do, as far as the time of a step depends on it.

    Attributes:
        name: Such as ``H100``.
        matmul_flops: Floating-point operations a second that matrix products reach, by data type
            (``"float32"``, ``"bfloat16"``, ...).
        memory_bytes_per_s: Bandwidth of the device's memory.
        h2d_bytes_per_s: Bandwidth of copies to the device; 0 where there is no such copy.
        d2h_bytes_per_s: Bandwidth of copies to the host; 0 where there is no such copy.
        launch_us: Time that an operator takes at least; views take none.
        region_us: What the engine takes for a region, forward and backward together.
        record_us: What it takes for an operator of the forward.
        replay_us: What it takes for an operator that is replayed, besides the operator.
        memory_bytes: Memory of the device; 0 if unknown.
        is_calibrated: Whether it was measured on a machine, and not taken from a data sheet.
        efficiency: What a class of operators (``"bmm"``, ``"attention"``, ...) reaches of
            ``matmul_flops``; 1 where it is not named.
        half_sides: By such a class: the shortest side of a product at which half of its rate is
            reached; 0 where it is not named.
        attention_block: Keys that attention computes with at once: what a causal mask hides is
            left out in blocks of so many.
        element_ns: What an element costs beyond its bytes, by operator (``"aten.gelu"``) or class
            of operators (``"random"``), where computing takes longer than memory.
        fresh_bytes_per_s: Rate at which memory can be touched for the first time, on top of its
            use; 0 where that costs nothing.
        fresh_min_bytes: Outputs of at least this size get memory that was never touched.
    """

    name: str
    matmul_flops: dict[str, float]
    memory_bytes_per_s: float
    h2d_bytes_per_s: float = 0.0
    d2h_bytes_per_s: float = 0.0
    launch_us: float = 0.0
    region_us: float = 0.0
    record_us: float = 0.0
    replay_us: float = 0.0
    memory_bytes: int = 0
    is_calibrated: bool = False
    efficiency: dict[str, float] = field(default_factory=dict)
    half_sides: dict[str, float] = field(default_factory=dict)
    attention_block: int = 128
    element_ns: dict[str, float] = field(default_factory=dict)
    fresh_bytes_per_s: float = 0.0
    fresh_min_bytes: int = 0


@dataclass(frozen=True)
class Profile:
    """One step of a model, as :func:`wrappers.profile` has seen it.

    Attributes:
        model_class: Class of the model.
        regions: In the order of their forwards.
        structures: By key.
        moments: What happens between regions, in the order of the step.
        persistent: What stays between steps; part of all bases.
        step_us: How long the plain step takes, optimizer included if there is one.
        optimizer_us: What the optimizer's part of it is.
        hardware: The device that the times are for.
        is_measured: Whether times were measured on the device, and not derived.
        holdings: What is alive at the peak of the plain step, largest first.
        world_size: How many ranks share the model.
        left_out: Modules of the regions' classes that are not regions; None if unknown.
        has_gradients: Whether parameters have gradients when the step begins.
    """

    model_class: str
    regions: tuple[RegionProfile, ...]
    structures: dict[str, Structure]
    moments: tuple[Moment, ...]
    persistent: Persistent
    step_us: float
    hardware: Hardware
    optimizer_us: float = 0.0
    is_measured: bool = False
    holdings: tuple[Holding, ...] = ()
    world_size: int = 1
    left_out: tuple[str, ...] | None = None
    has_gradients: bool = False

    @property
    def start_bytes(self) -> int:
        """What is on the device when a step begins."""
        return self.persistent.start_bytes(has_gradients=self.has_gradients)

    def options(self, region: RegionProfile) -> tuple[Option, ...]:
        """The menu of a region."""
        return self.structures[region.structure].options

    def report(self) -> Any:
        """Tables for people; ``print`` shows them.

        What stays on the device, regions by structure with their operators, and what is alive at
        the peak of the plain step: why memory is what it is.
        """
        assert _report is not None, "tables are connected when the package is imported"
        return _report(self)


_report: Callable[[Profile], Any] | None = None


def connect_report(report: Callable[[Profile], Any]) -> None:
    """Say who makes tables of a profile, as this file knows nothing of tables."""
    global _report
    _report = report
