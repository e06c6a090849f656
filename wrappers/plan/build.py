"""From a profile and a choice of one option a region to a plan: what the choice comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from wrappers.plan.chain import chain_of, evaluate, item_of, plain_choice
from wrappers.plan.parts import Point, RegionPlan
from wrappers.plan.plan import Plan
from wrappers.plan.records import RECOMPUTE_ALL, Option, Profile
from wrappers.plan.spans import (
    backward_bytes,
    forward_bytes,
    options_of,
    peak_of,
    plain_peak_of,
    spans_of,
)

__all__ = ["build_plan"]


def build_plan(
    profile: Profile,
    choice: Sequence[int],
    *,
    budget_bytes: int,
    margin_bytes: int = 0,
    counts: str = "all",
    uncounted_bytes: int = 0,
    smallest_bytes: int | None = None,
    gap_us: float = 0.0,
    frontier: Iterable[tuple[int, float]] = (),
    hand_made: Iterable[Point] = (),
) -> Plan:
    """The plan that a choice of options is.

    Args:
        profile: The step.
        choice: By region: the position of its option in the menu.
        budget_bytes: What was asked for.
        margin_bytes: The part of it that the choice leaves free.
        counts: What the budget counts: ``"all"`` on the device or ``"activations"``.
        uncounted_bytes: What of the peaks it does not count.
        smallest_bytes: The smallest budget that anything fits into; by default what the chain says.
        gap_us: By how much, at most, another choice is faster.
        frontier: Other peaks and the shortest step time within each.
        hand_made: Policies to compare with.
    """
    room = budget_bytes - margin_bytes + uncounted_bytes
    chain = chain_of(profile)
    spans = spans_of(profile, choice, room)
    wait_us = evaluate(chain, choice, room).stall_us
    if smallest_bytes is None:
        smallest_bytes = max(0, chain.smallest()[0] + margin_bytes - uncounted_bytes)
    chosen = options_of(profile, choice)
    recompute_us = sum(option.extra_us for option in chosen)
    hardware = profile.hardware
    return Plan(
        model_class=profile.model_class,
        device=hardware.name,
        is_measured=profile.is_measured,
        is_calibrated=hardware.is_calibrated,
        torch_version=str(torch.__version__),
        world_size=profile.world_size,
        counts=counts,
        budget_bytes=budget_bytes,
        margin_bytes=margin_bytes,
        uncounted_bytes=uncounted_bytes,
        smallest_bytes=smallest_bytes,
        regions=tuple(_region_plans(profile, chosen)),
        peak=peak_of(spans, chosen),
        plain_peak=plain_peak_of(profile, spans),
        persistent=profile.persistent,
        step_us=profile.step_us + recompute_us + wait_us,
        plain_step_us=profile.step_us,
        recompute_us=recompute_us,
        wait_us=wait_us,
        gap_us=gap_us,
        spans=tuple(spans),
        frontier=tuple(Point("", peak_bytes, step_us) for peak_bytes, step_us in frontier),
        hand_made=tuple(hand_made),
        left_out=profile.left_out,
    )


def _region_plans(profile: Profile, chosen: Sequence[Option]) -> Iterator[RegionPlan]:
    plain = options_of(profile, plain_choice(profile))
    for region, option, left_alone in zip(profile.regions, chosen, plain, strict=True):
        structure = profile.structures[region.structure]
        named = sorted({decision.operator for decision in option.decisions or ()})
        counts = {name: structure.calls[name] for name in named if name in structure.calls}
        yield RegionPlan(
            region.fqn,
            region.structure,
            structure.class_name,
            option.decisions,
            counts,
            option.kept_bytes,
            left_alone.kept_bytes,
            option.offload_bytes,
            option.extra_us,
            max(forward_bytes(region, option), backward_bytes(region, option)),
        )


# --- By hand


def made_by_hand(profile: Profile) -> list[Point]:
    """What policies that people choose by hand come to: one policy for all regions, or for some."""
    structures = [profile.structures[region.structure] for region in profile.regions]
    names = dict.fromkeys(name for structure in structures for name in structure.by_hand)
    plain = [structure.options[0] for structure in structures]
    points = []
    for name in names:
        chosen = [s.by_hand.get(name, s.options[0]) for s in structures]
        points.append(_point(name, profile, chosen))
        if name == RECOMPUTE_ALL:
            for k in (2, 3, 4):
                some = [
                    c if i % k == 0 else p
                    for i, (c, p) in enumerate(zip(chosen, plain, strict=True))
                ]
                points.append(_point(f"{name} in every {k}.", profile, some))
    return points


def _point(name: str, profile: Profile, chosen: Sequence[Option]) -> Point:
    chain = chain_of(profile)
    items = tuple((item_of(r, o),) for r, o in zip(profile.regions, chosen, strict=True))
    only = dataclasses.replace(chain, items=items)
    choice = [0] * len(items)
    return Point(name, only.peak_bytes(choice), profile.step_us + only.extra_us(choice))
