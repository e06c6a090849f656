"""The memory of every moment of a step, from one option a region; and what is possible at all.

A region ``i`` with option ``o`` is feasible where

    kept(before i) + need(i, o) <= budget        need: the larger of its forward and its backward,
                                                 base included

and a moment in which ``k`` regions are alive, where ``kept(k) + base <= budget``. Both are sums
over a *prefix* of the chain, as backward meets the regions in the opposite order: while the
backward of ``i`` runs, all regions before it are alive and none behind it.

So the smallest budget that anything fits into is found from the end of the chain to its beginning,
exactly: ``need(i) = min over o of max(need(i, o), kept(o) + need(i + 1))``.

[Note: Copies]
What is offloaded is still on the device for a while after its forward, and is there again for a
while before its backward. Copies of a direction share one bandwidth, ``D`` to the host and ``H``
back, and run beside the regions; both directions at once. With ``d(k)`` for what region ``k``
offloads, ``T(k)`` for how long its forward or its backward takes, recompute included:

- The copy of ``d(k)`` begins when the forward of ``k`` is over. What is still on its way out when
  the forward of ``k`` begins is ``b(k)``:
  ``b(k + 1) = max(0, b(k) - D T(k)) + d(k)``, and a wait of ``s`` before takes ``D s`` from it.
- ``d(k)`` is back when the backward of ``k`` begins, and not earlier than it must be for that. So
  what lower regions have on the device at the end of the backward of ``k`` is ``p(k)``, which is
  the same seen backwards in time:
  ``p(k + 1) = max(0, p(k) - H T(k)) + d(k)``, and a wait of ``z`` takes ``H z`` from it.
- Both count as memory, wherever the first ``k`` regions are alive: ``max(b(k), p(k))`` of it, as
  both consist of the regions just before ``k``. What is in ``p`` when backward begins has stayed
  on the device since its forward, which the same sums cover.
- A wait is added to the step. It is as short as the budget allows, and as late in the recurrence:
  an earlier one can only take what the copies would have done anyway.

A region's ``need(k, o)`` counts all of its own ``d(k)``. With waits long enough ``b`` and ``p`` are
zero everywhere, so the smallest budget is the formula above, offloading or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wrappers.plan.records import Option, Profile, RegionProfile

_NEVER_FITS = 2**62


@dataclass(frozen=True)
class Item:
    """An option of one region, as the choice over regions sees it.

    Attributes:
        kept_bytes: What it keeps until its backward.
        need_bytes: The most that its forward or backward takes, base included, beyond what the
            regions before it keep.
        extra_us: What it adds to the step.
        offload_bytes: What goes to the host and comes back.
    """

    kept_bytes: int
    need_bytes: int
    extra_us: float
    offload_bytes: int = 0


@dataclass(frozen=True)
class Chain:
    """The choice over regions: minimise the sum of ``extra_us`` within a budget.

    Attributes:
        items: By region, in the order of forwards: its options.
        bases: ``bases[k]``: the most that is alive beyond what regions keep in a moment in which
            the first ``k`` are alive; one more than there are regions.
        forward_us: By region: how long its plain forward takes; copies to the host run beside it.
        backward_us: By region: how long its plain backward takes, without a recompute.
        d2h_bytes_per_us: Bandwidth of copies to the host; 0: nothing can be offloaded.
        h2d_bytes_per_us: Bandwidth of copies back.
        step_us: How long the plain step takes.
    """

    items: tuple[tuple[Item, ...], ...]
    bases: tuple[int, ...]
    forward_us: tuple[float, ...]
    backward_us: tuple[float, ...]
    step_us: float
    d2h_bytes_per_us: float = 0.0
    h2d_bytes_per_us: float = 0.0

    @property
    def can_offload(self) -> bool:
        """Whether there are copies to the host and back."""
        return self.d2h_bytes_per_us > 0 and self.h2d_bytes_per_us > 0

    def peak_bytes(self, choice: Sequence[int]) -> int:
        """The most that is alive at once with an option for each region, copies aside."""
        return max(self.needs(choice))

    def needs(self, choice: Sequence[int]) -> list[int]:
        """By region, and for the end of the forward: the most that is alive then, copies aside.

        A region's entry counts the moments before it as well.
        """
        kept = 0
        needs = []
        for items, chosen, base in zip(self.items, choice, self.bases[:-1], strict=True):
            needs.append(kept + max(items[chosen].need_bytes, base))
            kept += items[chosen].kept_bytes
        return [*needs, kept + self.bases[-1]]

    def extra_us(self, choice: Sequence[int]) -> float:
        """What the options add to the step, waits for copies aside."""
        return sum(i[o].extra_us for i, o in zip(self.items, choice, strict=True))

    def smallest_after(self) -> list[int]:
        """By region, and for the end of the forward: the least that the chain needs from there on.

        It is what it needs beyond what the regions before keep; see the module's docstring.
        """
        needs = [self.bases[-1]]
        for items, base in zip(reversed(self.items), reversed(self.bases[:-1]), strict=True):
            needs.append(max(base, min(self._need(i, needs[-1]) for i in items)))
        return needs[::-1]

    def smallest(self) -> tuple[int, list[int]]:
        """The smallest budget in which the step fits, and a choice for it.

        With offloading, waits for copies may be as long as they must.
        """
        after = self.smallest_after()
        choice = []
        for items, need_after in zip(self.items, after[1:], strict=True):
            needs = [self._need(item, need_after) for item in items]
            choice.append(needs.index(min(needs)))
        return after[0], choice

    def _need(self, item: Item, need_after: int) -> int:
        if item.offload_bytes and not self.can_offload:
            return _NEVER_FITS
        return max(item.need_bytes, item.kept_bytes + need_after)


class Cost(NamedTuple):
    """What a choice costs.

    Attributes:
        peak_bytes: The most that is alive at once, copies included.
        extra_us: What it adds to the step, waits for copies included.
        stall_us: The waits.
        copy_bytes: By how many regions are alive: what of copies is on the device besides; empty
            where there are none.
    """

    peak_bytes: int
    extra_us: float
    stall_us: float
    copy_bytes: tuple[int, ...] = ()


def evaluate(chain: Chain, choice: Sequence[int], budget_bytes: int | None = None) -> Cost:
    """The peak and the time of a choice. See [Note: Copies].

    Args:
        chain: The choice over regions.
        choice: An option for each region.
        budget_bytes: What the waits for copies have to make room for; None: there are none. Where
            the choice does not fit however long it waits, the peak is larger than the budget.

    Raises:
        ValueError: An option offloads, and the chain has no bandwidth for it.
    """
    needs = chain.needs(choice)
    copies = []
    stall_us = out_bytes = back_bytes = 0.0
    for k, need in enumerate(needs):
        if out_bytes or back_bytes:
            room = math.inf if budget_bytes is None else max(budget_bytes - need, 0)
            stall_us += max(out_bytes - room, 0) / chain.d2h_bytes_per_us
            stall_us += max(back_bytes - room, 0) / chain.h2d_bytes_per_us
            out_bytes, back_bytes = min(out_bytes, room), min(back_bytes, room)
        copies.append(math.ceil(max(out_bytes, back_bytes)))
        if k == len(choice):
            break
        item = chain.items[k][choice[k]]
        if item.offload_bytes and not chain.can_offload:
            raise ValueError(
                f"option {choice[k]} of region {k} offloads {item.offload_bytes} bytes, but the "
                "chain has no bandwidth for copies to the host and back"
            )
        backward_us = chain.backward_us[k] + max(item.extra_us, 0.0)
        out_bytes = max(out_bytes - chain.d2h_bytes_per_us * chain.forward_us[k], 0.0)
        back_bytes = max(back_bytes - chain.h2d_bytes_per_us * backward_us, 0.0)
        out_bytes += item.offload_bytes
        back_bytes += item.offload_bytes
    peak = max(need + copied for need, copied in zip(needs, copies, strict=True))
    extra_us = chain.extra_us(choice) + stall_us
    return Cost(peak, extra_us, stall_us, tuple(copies) if any(copies) else ())


def item_of(region: RegionProfile, option: Option) -> Item:
    """An option of a region, its base included."""
    need_bytes = max(
        region.forward_base_bytes + option.forward_bytes,
        region.backward_base_bytes + option.backward_bytes,
    )
    return Item(option.kept_bytes, need_bytes, option.extra_us, option.offload_bytes)


def chain_of(profile: Profile) -> Chain:
    """What a profile says about the choice over its regions."""
    num = len(profile.regions)
    bases = [0] * (num + 1)
    for moment in profile.moments:
        bases[moment.num_alive] = max(bases[moment.num_alive], moment.base_bytes)
    items = []
    for region in profile.regions:
        items.append(tuple(item_of(region, option) for option in profile.options(region)))
    hardware = profile.hardware
    structures = [profile.structures[region.structure] for region in profile.regions]
    return Chain(
        tuple(items),
        tuple(bases),
        tuple(s.forward_us for s in structures),
        tuple(s.backward_us for s in structures),
        profile.step_us,
        hardware.d2h_bytes_per_s / 1e6,
        hardware.h2d_bytes_per_s / 1e6,
    )


def plain_choice(profile: Profile) -> list[int]:
    """The choice that leaves every region alone."""
    return [_plain(profile.options(region)) for region in profile.regions]


def _plain(options: Sequence[Option]) -> int:
    return next(i for i, option in enumerate(options) if option.decisions is None)
