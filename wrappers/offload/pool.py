"""Reusable buffers under a byte budget: pinned host memory, or room in a file.

Problem: a pinned allocation takes milliseconds and stops the device, so one for each tensor
costs more than its copy. And torch's allocator rounds pinned sizes up to powers of two, so
buffers of the tensors' own sizes may take almost twice what one counts.

Idea: memory is allocated in *slabs*, whose size is a power of two, so nothing is rounded, and
cut into *slots* of size classes at most an eighth apart. A slot that is given back serves the next
tensor of its class. A training step repeats the sizes of the one before, so from the second step
on nothing is allocated.

Invariant: ``total_bytes``, what the slabs really take, never exceeds the budget, and no two slots
in use overlap.

Imports no torch: a slab's memory is what the owner's ``allocate`` has returned. Not thread-safe:
the owner's lock guards it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Pool", "Slot", "available_host_bytes"]

#: Slots begin at multiples of this: a page, as direct access to a file wants.
ALIGNMENT_BYTES = 4096

#: Memory that was not there is asked for again after so many requests in vain.
RETRY_AFTER = 1000


class Slab:
    """One allocation that slots are cut from.

    Attributes:
        memory: What the owner's ``allocate`` has returned.
        pool: The pool that it belongs to.
        size: Its bytes.
        tail: Where the part begins that no slot has been cut from.
        num_used: How many of its slots are in use.
    """

    __slots__ = ("memory", "num_used", "pool", "size", "tail")

    def __init__(self, memory: Any, pool: Pool, size: int) -> None:
        self.memory = memory
        self.pool = pool
        self.size = size
        self.tail = 0
        self.num_used = 0


class Slot:
    """A part of a slab that is in use or free.

    Attributes:
        slab: Where it lies.
        offset: Where it begins in the slab, in bytes.
        size: Its bytes: those of its size class.
        fence: The latest copy that reads or writes it. The next one has to come after.
        view: The owner's view of the memory; made once.
    """

    __slots__ = ("fence", "offset", "size", "slab", "view")

    def __init__(self, slab: Slab, offset: int, size: int) -> None:
        self.slab = slab
        self.offset = offset
        self.size = size
        self.fence: Any = None
        self.view: Any = None


class Pool:
    """Slots under a byte budget.

    Args:
        allocate: Makes the memory of a slab of so many bytes; None or MemoryError where there is
            none.
        budget_bytes: What all slabs may take together.
        slab_bytes: The least size of a slab, if the budget allows it.
        after_drop: Called when slabs have been let go of.

    Attributes:
        budget_bytes: The budget; less for a while after an allocation has failed.
        total_bytes: What the slabs take.
        used_bytes: What the slots in use take.
        peak_bytes: The most that ``total_bytes`` has been.
        num_allocations: Slabs allocated so far.
        num_taken: Slots taken so far.
        num_reused: Those among them that had been used before.
    """

    def __init__(
        self,
        allocate: Callable[[int], Any],
        *,
        budget_bytes: int,
        slab_bytes: int,
        after_drop: Callable[[], None] | None = None,
    ) -> None:
        self._allocate = allocate
        self._after_drop = after_drop
        self.budget_bytes = self._whole_budget_bytes = budget_bytes
        self._num_refused = 0
        self._slab_bytes = slab_bytes
        self._slabs: list[Slab] = []
        self._free: dict[int, list[Slot]] = {}
        self.total_bytes = self.used_bytes = self.peak_bytes = 0
        self.num_allocations = self.num_taken = self.num_reused = 0

    def take(self, num_bytes: int) -> Slot | None:
        """A slot of at least ``num_bytes``; None if budget or memory are exhausted."""
        size = class_size(num_bytes)
        slot = self._reuse(size) or self._cut(size)
        if slot is None and self._grow(size):
            slot = self._cut(size)
        if slot is None:  # A larger one is better than none.
            larger = [s for s, free in self._free.items() if free and size < s <= 2 * size]
            slot = self._reuse(min(larger)) if larger else None
        if slot is not None:
            slot.slab.num_used += 1
            self.used_bytes += slot.size
            self.num_taken += 1
        else:
            self._num_refused += 1
            if self._num_refused % RETRY_AFTER == 0:  # There may be more memory by now.
                self.budget_bytes = self._whole_budget_bytes
        return slot

    def give_back(self, slot: Slot) -> None:
        """Let another tensor use a slot, after its fence."""
        slot.slab.num_used -= 1
        self.used_bytes -= slot.size
        self._free.setdefault(slot.size, []).append(slot)

    def _reuse(self, size: int) -> Slot | None:
        free = self._free.get(size)
        if not free:
            return None
        self.num_reused += 1
        return free.pop()

    def _cut(self, size: int) -> Slot | None:
        for slab in self._slabs:
            if slab.size - slab.tail >= size:
                slot = Slot(slab, slab.tail, size)
                slab.tail += size
                return slot
        return None

    def _grow(self, size: int) -> bool:
        """Make a slab that has room for a slot of ``size``."""
        if _power_of_two(size) > self.budget_bytes:
            return False  # Nothing that could be let go of would help.
        while True:
            # Ever larger ones, so that their number stays small and little is left over.
            wanted = _power_of_two(max(size, self._slab_bytes, self.total_bytes // 2))
            while wanted >= size:
                if self.total_bytes + wanted <= self.budget_bytes:
                    if self._add_slab(wanted):
                        return True
                    # There is not so much, and asking for it again would take long.
                    self.budget_bytes = self.total_bytes + wanted - 1
                wanted //= 2
            if not self._drop_unused():
                return False

    def _add_slab(self, size: int) -> bool:
        try:
            memory = self._allocate(size)
        except MemoryError:
            memory = None
        if memory is None:
            return False
        self._slabs.append(Slab(memory, self, size))
        self.num_allocations += 1
        self.total_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)
        return True

    def _drop_unused(self) -> bool:
        """Let go of the slabs without a slot in use: their slots are of sizes no longer wanted."""
        dropped = [s for s in self._slabs if not (s.num_used or self._is_busy(s))]
        for slab in dropped:
            self._slabs.remove(slab)
            self.total_bytes -= slab.size
        for size, free in self._free.items():
            self._free[size] = [slot for slot in free if slot.slab not in dropped]
        is_any = bool(dropped)
        del dropped  # It is the last that refers to their memory.
        if is_any and self._after_drop is not None:
            self._after_drop()
        return is_any

    def _is_busy(self, slab: Slab) -> bool:
        """Whether a copy may still be using a slab's memory."""
        slots = (slot for free in self._free.values() for slot in free if slot.slab is slab)
        return any(slot.fence is not None and not slot.fence.is_done() for slot in slots)


def class_size(num_bytes: int) -> int:
    """The size of the slots that serve so many bytes: at most an eighth more, or one page."""
    step = max(ALIGNMENT_BYTES, _power_of_two(max(num_bytes, 1)) // 16)
    return -(-num_bytes // step) * step or ALIGNMENT_BYTES


def _power_of_two(num_bytes: int) -> int:
    """The least power of two that is not less."""
    return 1 << (num_bytes - 1).bit_length()


def available_host_bytes() -> int:
    """How many bytes this process may still take: what the machine or its cgroup has left.

    A container's limit is its cgroup's, of which the machine's own figures know nothing. Page
    cache counts as available, as the kernel gives it up.
    """
    available = _meminfo_bytes()
    for folder in cgroups():
        limit, used = read_int(folder / "memory.max"), read_int(folder / "memory.current")
        if limit is None:  # version 1
            limit = read_int(folder / "memory.limit_in_bytes")
            used = read_int(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            available = min(available, max(0, limit - used + _page_cache_bytes(folder)))
    return available


def _meminfo_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024
    except (OSError, StopIteration, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def cgroups() -> list[Path]:
    """The memory cgroups of this process, up to the root of what it sees."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        folder = base / path.lstrip("/")
        found += [f for f in (folder, *folder.parents) if base == f or base in f.parents]
    return found


def _page_cache_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    figures = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(figures.get("inactive_file", figures.get("total_inactive_file", 0)))


def read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ``max`` is no number, and no limit
        return None
