"""What moves when: the order of backward, and how many bytes may be on their way.

A *group* is one forward call of an offloaded region: its tensors leave together and are wanted
together. A *step* is a run of groups from the first forward to the moment when backward has
reached all of them. Within a step two things happen: a group begins (forward), a group is entered
(the first of its tensors is unpacked). ::

    plain          begin 0  begin 1  begin 2  enter 2  enter 1  enter 0
    pipeline 1F1B  begin 0  begin 1  begin 2  begin 3  enter 1  enter 0  begin 4 ...

The first step shows the order. From then on, as long as the same regions begin in the same order,
the schedule knows at each point which groups backward wants next, so they are fetched ahead, and
which groups it wants so soon after their forward that they had better stay. Until then it
expects the latest group first. A wrong guess costs time or memory, never a value: what has not
been fetched ahead is fetched when it is unpacked.

Nothing here keeps a group alive: groups belong to the tensors that the graph holds.

Imports no torch, and knows of tensors only that they have a number of bytes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

__all__ = ["Group", "InFlight", "Schedule"]

#: Orders of steps that are remembered, by the region that begins them.
MAX_REMEMBERED = 16

#: A step that is this long without an end is none: something is kept alive on purpose.
MAX_GROUPS = 10_000


class Group:
    """One forward call of an offloaded region.

    Attributes:
        fqn: Name of the region.
        step: The step that it belongs to.
        index: Its place among the groups of the step.
        stays: Whether backward wants it so soon that it stays on the device.
        is_entered: Whether backward has reached it.
        seen_bytes: Bytes that could have been offloaded.
        moved_bytes: Bytes of them that were.
        members: Weak references to what was offloaded, in the order of the forward.
        staying: What has been found to stay, by the store's keys.
    """

    __slots__ = (
        "__weakref__",
        "fqn",
        "index",
        "is_entered",
        "members",
        "moved_bytes",
        "seen_bytes",
        "staying",
        "stays",
        "step",
    )

    def __init__(self, step: _Step, index: int, fqn: str, stays: bool) -> None:
        self.step = step
        self.index = index
        self.fqn = fqn
        self.stays = stays
        self.is_entered = False
        self.seen_bytes = self.moved_bytes = 0
        self.members: list[weakref.ref[Any]] = []
        self.staying: set[Hashable] = set()

    def __del__(self) -> None:
        self.step.waiting.discard(self.index)

    def should_move(self, num_bytes: int, ratio: float) -> bool:
        """Whether a tensor belongs to the part of the group's bytes that is to be offloaded."""
        self.seen_bytes += num_bytes
        if self.stays or self.moved_bytes + num_bytes > ratio * self.seen_bytes:
            return False
        self.moved_bytes += num_bytes
        return True

    def keep(self, key: Hashable, num_bytes: int) -> None:
        """Note that a tensor has found no room."""
        self.staying.add(key)
        self.moved_bytes -= num_bytes


class _Order:
    """The order in which a step's groups were begun and entered.

    Attributes:
        keys: The regions, in the order of the forward.
        entered: Indices of groups, in the order of backward.
        place: By index: its place in ``entered``.
        distance: By index: how many groups were begun or entered between its forward and its
            backward.
    """

    __slots__ = ("distance", "entered", "keys", "place")

    def __init__(self, keys: list[Hashable], events: list[tuple[bool, int]]) -> None:
        self.keys = keys
        self.entered = [index for is_begin, index in events if not is_begin]
        self.place = {index: place for place, index in enumerate(self.entered)}
        begun_at = {index: at for at, (is_begin, index) in enumerate(events) if is_begin}
        self.distance = {
            index: at - begun_at[index] - 1
            for at, (is_begin, index) in enumerate(events)
            if not is_begin
        }


class _Step:
    """The groups from one forward to the end of their backward.

    Attributes:
        waiting: Indices of the groups that live and that backward has not reached.
        entered: Indices of those that it has reached.
        expected: The order of a step before that has been like this one so far.
    """

    __slots__ = ("entered", "events", "expected", "groups", "keys", "waiting")

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self.events: list[tuple[bool, int]] = []
        self.groups: list[weakref.ref[Group]] = []
        self.waiting: set[int] = set()
        self.entered: set[int] = set()
        self.expected: _Order | None = None

    @property
    def is_over(self) -> bool:
        """Whether the next group begins another step.

        It does too where backward has reached the latest group and others still wait: they belong
        to a graph that is kept, perhaps for good.
        """
        has_turned = bool(self.groups) and (len(self.keys) - 1) in self.entered
        return has_turned or not self.waiting or len(self.keys) >= MAX_GROUPS

    def after(self, group: Group) -> Iterator[Group]:
        """The groups away that backward is expected to want after ``group``, nearest first."""
        order = self.expected
        if order is not None and group.index in order.place:
            indices = iter(order.entered[order.place[group.index] + 1 :])
        else:
            indices = iter(range(group.index - 1, -1, -1))
        for index in indices:
            found = self.groups[index]() if index < len(self.groups) else None
            if found is not None and not (found.is_entered or found.stays):
                yield found


class Schedule:
    """Learns the order of a step's groups, and says what backward wants next.

    Not thread-safe: the owner's lock guards it.
    """

    def __init__(self) -> None:
        self._step = _Step()
        self._orders: dict[Hashable, _Order] = {}

    def begin(self, key: Hashable, fqn: str, *, keep_last: int) -> Group:
        """The group of a region's forward call.

        Args:
            key: Says which region it is.
            fqn: The region's name.
            keep_last: Groups stay that are so near to the end of the forward.
        """
        if self._step.is_over:
            self._learn(self._step)
            self._step = _Step()
        step = self._step
        index = len(step.keys)
        if not index:
            step.expected = self._orders.get(key)
        order = step.expected
        if order is not None and (index >= len(order.keys) or order.keys[index] != key):
            order = step.expected = None
        distance = order.distance.get(index) if order is not None else None
        # Each of the groups after it is begun and entered in between.
        stays = distance is not None and distance // 2 < keep_last
        group = Group(step, index, fqn, stays)
        step.keys.append(key)
        step.groups.append(weakref.ref(group))
        step.events.append((True, index))
        step.waiting.add(index)
        return group

    def enter(self, group: Group, distance: int) -> list[Group]:
        """Note that backward has reached a group; say which ones to fetch ahead.

        Args:
            group: The group.
            distance: How many of them.
        """
        step = group.step
        if not group.is_entered:
            group.is_entered = True
            step.events.append((False, group.index))
            step.waiting.discard(group.index)
            step.entered.add(group.index)
        ahead = step.after(group)
        return [found for _, found in zip(range(distance), ahead, strict=False)]

    def _learn(self, step: _Step) -> None:
        entered = any(not is_begin for is_begin, _ in step.events)
        if not entered or len(step.keys) >= MAX_GROUPS:
            return  # A forward without a backward tells nothing.
        self._orders.pop(step.keys[0], None)
        self._orders[step.keys[0]] = _Order(step.keys, step.events)
        if len(self._orders) > MAX_REMEMBERED:
            del self._orders[next(iter(self._orders))]


class Copy(Protocol):
    """What is on its way."""

    nbytes: int

    def is_done(self) -> bool:
        """Whether it has arrived; never blocks."""
        ...

    def finish(self) -> None:
        """Make whatever comes next on the device wait for it."""
        ...

    def settle(self) -> None:
        """Let go of what the copy alone has kept alive."""
        ...


class InFlight:
    """Copies on their way, first in, first out, under a limit of bytes and of copies.

    Attributes:
        nbytes: Bytes on their way now.
        peak_bytes: The most that there have been.
    """

    def __init__(self, max_copies: int) -> None:
        self._copies: deque[Copy] = deque()
        self._max_copies = max_copies
        self.nbytes = 0
        self.peak_bytes = 0

    def __len__(self) -> int:
        return len(self._copies)

    def has_room(self, num_bytes: int, limit_bytes: int) -> bool:
        """Whether so many bytes more stay within the limit. One copy may always go alone."""
        if not self._copies:
            return True
        return self.nbytes + num_bytes <= limit_bytes and len(self._copies) < self._max_copies

    def make_room(self, num_bytes: int, limit_bytes: int) -> None:
        """Wait for the oldest copies until so many bytes more stay within the limit."""
        self.poll()
        while not self.has_room(num_bytes, limit_bytes):
            self._copies[0].finish()
            self._settle_first()

    def add(self, copy: Copy) -> None:
        """Count a copy that has begun."""
        self._copies.append(copy)
        self.nbytes += copy.nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def poll(self) -> None:
        """Let go of the copies that have arrived."""
        while self._copies and self._copies[0].is_done():
            self._settle_first()

    def finish_all(self) -> None:
        """Wait for all of them."""
        while self._copies:
            self._copies[0].finish()
            self._settle_first()

    def _settle_first(self) -> None:
        copy = self._copies.popleft()
        self.nbytes -= copy.nbytes
        copy.settle()
