"""What a plan consists of, as plain data.

A plan says for each region what is kept of it, and what is expected to come of that: the memory of
every moment of the step, plain and planned, and how long the step takes. Bytes are bytes of
storages, times are microseconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from wrappers.plan.records import Decision, Persistent

__all__ = ["VERSION", "Measured", "Peak", "Phase", "PlanData", "Point", "RegionPlan", "Span"]

#: Version of the format that plans are saved in.
VERSION = 1


class Phase(enum.Enum):
    """What runs in a span of the step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"  # a region's backward with the recompute in it
    OUTSIDE = "outside"
    OPTIMIZER = "optimizer"

    @property
    def text(self) -> str:
        """Where a peak lies then, in words."""
        return _PHASES[self]

    @property
    def is_in_region(self) -> bool:
        """Whether a region runs."""
        return self in (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE)


_PHASES = {
    Phase.FORWARD: "in the forward of a region",
    Phase.BACKWARD: "in the backward of a region that keeps everything",
    Phase.RECOMPUTE: "in the recompute and backward of a region",
    Phase.OUTSIDE: "outside of any region",
    Phase.OPTIMIZER: "in the optimizer's step",
}


@dataclass(frozen=True)
class RegionPlan:
    """What the plan does with one region.

    Attributes:
        fqn: Name of the module in the plain model.
        structure: Key of its structure.
        class_name: Class of the module.
        decisions: Which outputs are kept or offloaded, the rest is recomputed; None where the
            region is left alone.
        counts: How often each operator named by a decision is called in one forward, views
            included; those of which it is unknown are left out.
        kept_bytes: What it keeps from its forward to its backward.
        plain_bytes: The same where it is left alone.
        offload_bytes: What goes to the host and comes back.
        extra_us: What the decisions add to the step.
        need_bytes: The most that its forward or backward takes, base included, beyond what the
            regions before it keep.
    """

    fqn: str
    structure: str
    class_name: str
    decisions: tuple[Decision, ...] | None
    counts: dict[str, int]
    kept_bytes: int
    plain_bytes: int
    offload_bytes: int
    extra_us: float
    need_bytes: int

    @property
    def is_wrapped(self) -> bool:
        """Whether the plan does anything with it."""
        return self.decisions is not None


@dataclass(frozen=True)
class Span:
    """A part of the step: a region's forward or backward, or what runs between regions.

    Attributes:
        label: What it is, for people.
        phase: What runs.
        num_alive: How many regions, from the first on, keep their activations meanwhile.
        base_bytes: What is alive in it beyond regions.
        plain_start_us: When it begins in the plain step.
        plain_us: How long it takes there.
        plain_bytes: The most that is alive in it there.
        start_us: When it begins in the planned step.
        duration_us: How long it takes there.
        planned_bytes: The most that is alive in it there.
    """

    label: str
    phase: Phase
    num_alive: int
    base_bytes: int
    plain_start_us: float
    plain_us: float
    plain_bytes: int
    start_us: float
    duration_us: float
    planned_bytes: int


@dataclass(frozen=True)
class Peak:
    """The moment of the step with the most memory, and what that is.

    Attributes:
        label: The span it lies in.
        phase: What runs.
        num_alive: How many regions keep something for their backwards; if a region runs, it is the
            next one.
        num_bytes: All of it: the sum of the three below.
        base_bytes: Parameters, gradients so far, what lives outside of regions.
        kept_bytes: What regions keep for their backwards.
        running_bytes: What the region that runs needs beyond that, and copies under way.
    """

    label: str
    phase: Phase
    num_alive: int
    num_bytes: int
    base_bytes: int
    kept_bytes: int
    running_bytes: int


@dataclass(frozen=True)
class Point:
    """A peak and the step time that goes with it.

    Attributes:
        name: What leads there; empty for a point of the frontier.
        peak_bytes: The most memory at once.
        step_us: How long the step takes.
    """

    name: str
    peak_bytes: int
    step_us: float


@dataclass(frozen=True)
class Measured:
    """What a step has really come to.

    Attributes:
        peak_bytes: The most memory at once, counted as the plan's peak: everything on the device.
        step_us: How long the planned step takes.
        plain_step_us: How long the step takes without a plan.
    """

    peak_bytes: int
    step_us: float
    plain_step_us: float | None = None


@dataclass(frozen=True)
class PlanData:
    """All that a plan says; :class:`~wrappers.plan.plan.Plan` adds what can be done with it.

    Attributes:
        version: Version of the format.
        model_class: Class of the model.
        device: Name of the hardware that times are for.
        is_measured: Whether times were measured on the device.
        is_calibrated: Whether the hardware description was measured.
        torch_version: With which torch the plan was made.
        world_size: How many ranks share the model.
        counts: What the budget counts: ``"all"`` on the device, or ``"activations"``.
        budget_bytes: The budget.
        margin_bytes: The part of it that is kept free for fragmentation.
        uncounted_bytes: What of the peaks the budget does not count.
        smallest_bytes: The smallest budget that the step fits into, margin included.
        regions: In the order of their forwards.
        peak: The predicted peak.
        plain_peak: That of the plain step.
        persistent: What stays on the device between steps.
        step_us: The predicted step time.
        plain_step_us: That of the plain step.
        recompute_us: What the step takes longer because of recomputes.
        wait_us: What it takes longer because of waits for copies.
        gap_us: By how much, at most, a better plan would be faster.
        spans: The step in the order of time.
        frontier: Peaks and the shortest step times within them.
        hand_made: The same for policies that were not planned.
        left_out: Modules of the regions' classes that are not regions; None if unknown.
    """

    model_class: str
    device: str
    is_measured: bool
    is_calibrated: bool
    torch_version: str
    world_size: int
    counts: str
    budget_bytes: int
    margin_bytes: int
    uncounted_bytes: int
    smallest_bytes: int
    regions: tuple[RegionPlan, ...]
    peak: Peak
    plain_peak: Peak
    persistent: Persistent
    step_us: float
    plain_step_us: float
    recompute_us: float
    wait_us: float
    gap_us: float
    spans: tuple[Span, ...]
    frontier: tuple[Point, ...] = ()
    hand_made: tuple[Point, ...] = ()
    left_out: tuple[str, ...] | None = None
    version: int = field(default=VERSION)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak, everything on the device."""
        return self.peak.num_bytes

    @property
    def num_wrapped(self) -> int:
        """How many regions are wrapped."""
        return sum(region.is_wrapped for region in self.regions)

    @property
    def ratio(self) -> float:
        """The predicted step time by that of the plain step."""
        return self.step_us / self.plain_step_us if self.plain_step_us else 1.0
