"""One step in the order of time: what runs, how long, and how much memory is alive meanwhile.

Problem: a choice is a list of numbers. People ask when the peak is, what it consists of, what the
step costs; a plot wants the memory of every moment.

Idea: lay the step out as a list of spans. A profile's moments say how many regions are alive in
each; where that number changes, a forward or a backward lies between. The memory of a span is a sum
(see :mod:`wrappers.plan.chain`), for the choice as for the plain step.

Invariant: the largest span is the peak that the chain knows.

Times of moments are not known one by one: what the step takes outside of regions and the optimizer
is spread over them evenly. It matters to pictures alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from wrappers.plan.chain import chain_of, evaluate, plain_choice
from wrappers.plan.parts import Peak, Phase, Span
from wrappers.plan.records import Moment, Option, Profile, RegionProfile

__all__ = [
    "OPTIMIZER",
    "backward_bytes",
    "forward_bytes",
    "options_of",
    "peak_of",
    "plain_peak_of",
    "spans_of",
]

#: The label of the moment in which the optimizer runs.
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class _Part:
    """A span without times: a moment, or a region's forward or backward."""

    label: str
    num_alive: int
    base_bytes: int
    region: int | None = None
    is_backward: bool = False


def options_of(profile: Profile, choice: Sequence[int]) -> list[Option]:
    """By region: the option that is chosen."""
    return [profile.options(r)[o] for r, o in zip(profile.regions, choice, strict=True)]


def forward_bytes(region: RegionProfile, option: Option) -> int:
    """The most that a region's forward takes beyond what the regions before it keep."""
    return region.forward_base_bytes + option.forward_bytes


def backward_bytes(region: RegionProfile, option: Option) -> int:
    """The most that its backward takes beyond that."""
    return region.backward_base_bytes + option.backward_bytes


def spans_of(profile: Profile, choice: Sequence[int], room_bytes: int | None = None) -> list[Span]:
    """The step in the order of time, plain and with a choice.

    Args:
        profile: The step.
        choice: By region: the position of its option in the menu.
        room_bytes: What waits for copies have to make room for; None: there are none.
    """
    parts = list(_parts(profile))
    before = _Layout(profile, plain_choice(profile), None)
    after = _Layout(profile, choice, room_bytes)
    outside_us = _outside_us(profile, parts)
    spans = []
    plain_start = start = 0.0
    for part in parts:
        plain_us = before.duration_us(part, outside_us)
        duration_us = after.duration_us(part, outside_us)
        spans.append(
            Span(
                part.label,
                after.phase(part),
                part.num_alive,
                part.base_bytes,
                plain_start,
                plain_us,
                before.num_bytes(part),
                start,
                duration_us,
                after.num_bytes(part),
            )
        )
        plain_start += plain_us
        start += duration_us
    return spans


def _parts(profile: Profile) -> Iterator[_Part]:
    """Moments, with the forwards and backwards between them."""
    num = len(profile.regions)
    num_done = num_alive = 0  # forwards that are over; of these, those without their backward
    for moment in profile.moments:
        is_turned = moment.num_alive < num_alive or moment.label == OPTIMIZER
        target = num if is_turned else max(moment.num_alive, num_alive)
        while num_done < target:
            yield _forward(profile, num_done)
            num_done = num_alive = num_done + 1
        while num_alive > moment.num_alive:
            num_alive -= 1
            yield _backward(profile, num_alive)
        yield _outside(moment)
    while num_done < num:
        yield _forward(profile, num_done)
        num_done = num_alive = num_done + 1
    while num_alive > 0:
        num_alive -= 1
        yield _backward(profile, num_alive)


def _forward(profile: Profile, index: int) -> _Part:
    region = profile.regions[index]
    return _Part(f"forward of {region.fqn}", index, region.forward_base_bytes, index)


def _backward(profile: Profile, index: int) -> _Part:
    region = profile.regions[index]
    return _Part(f"backward of {region.fqn}", index, region.backward_base_bytes, index, True)


def _outside(moment: Moment) -> _Part:
    return _Part(moment.label, moment.num_alive, moment.base_bytes)


def _outside_us(profile: Profile, parts: Sequence[_Part]) -> dict[bool, float]:
    """How long each moment takes: those of the optimizer (True), all others (False)."""
    structures = [profile.structures[region.structure] for region in profile.regions]
    in_regions = sum(s.forward_us + s.backward_us for s in structures)
    rest = max(0.0, profile.step_us - profile.optimizer_us - in_regions)
    labels = [part.label == OPTIMIZER for part in parts if part.region is None]
    return {
        True: profile.optimizer_us / max(1, sum(labels)),
        False: rest / max(1, len(labels) - sum(labels)),
    }


class _Layout:
    """The memory and time of every part of the step with one choice."""

    def __init__(self, profile: Profile, choice: Sequence[int], room_bytes: int | None) -> None:
        self._profile = profile
        self._options = options_of(profile, choice)
        self._kept = [0, *accumulate(option.kept_bytes for option in self._options)]
        cost = evaluate(chain_of(profile), choice, room_bytes)
        self._copies = cost.copy_bytes or [0] * len(self._kept)
        num_offloaded = sum(option.offload_bytes for option in self._options)
        self._wait_us_per_byte = cost.stall_us / num_offloaded if num_offloaded else 0.0

    def num_bytes(self, part: _Part) -> int:
        kept = self._kept[part.num_alive] + self._copies[part.num_alive]
        if part.region is None:
            return kept + part.base_bytes
        region, option = self._profile.regions[part.region], self._options[part.region]
        bytes_of = backward_bytes if part.is_backward else forward_bytes
        return kept + bytes_of(region, option)

    def duration_us(self, part: _Part, outside_us: dict[bool, float]) -> float:
        if part.region is None:
            return outside_us[part.label == OPTIMIZER]
        option = self._options[part.region]
        structure = self._profile.structures[self._profile.regions[part.region].structure]
        if not part.is_backward:
            return structure.forward_us
        waits_us = option.offload_bytes * self._wait_us_per_byte
        return max(0.0, structure.backward_us + option.extra_us + waits_us)

    def phase(self, part: _Part) -> Phase:
        if part.region is None:
            return Phase.OPTIMIZER if part.label == OPTIMIZER else Phase.OUTSIDE
        if not part.is_backward:
            return Phase.FORWARD
        is_alone = self._options[part.region].decisions is None
        return Phase.BACKWARD if is_alone else Phase.RECOMPUTE


def plain_peak_of(profile: Profile, spans: Sequence[Span]) -> Peak:
    """The peak of the plain step."""
    plain = options_of(profile, plain_choice(profile))
    return _peak(spans, [span.plain_bytes for span in spans], plain)


def peak_of(spans: Sequence[Span], chosen: Sequence[Option]) -> Peak:
    """The peak of a step with some options."""
    return _peak(spans, [span.planned_bytes for span in spans], chosen)


def _peak(spans: Sequence[Span], sizes: Sequence[int], options: Sequence[Option]) -> Peak:
    """The largest span, the first of several."""
    if not spans:
        return Peak("", Phase.OUTSIDE, 0, 0, 0, 0, 0)
    num_bytes = max(sizes)
    top = spans[sizes.index(num_bytes)]
    phase = top.phase
    if phase is Phase.RECOMPUTE and options[top.num_alive].decisions is None:
        phase = Phase.BACKWARD  # the spans are those of a plan, the options are not
    kept = sum(option.kept_bytes for option in options[: top.num_alive])
    running = num_bytes - top.base_bytes - kept
    return Peak(top.label, phase, top.num_alive, num_bytes, top.base_bytes, kept, running)
