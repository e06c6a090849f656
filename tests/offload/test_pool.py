"""The pool: sizes, reuse, the budget at every moment, and how much the host has left."""

from __future__ import annotations

import os
import random
import weakref
from pathlib import Path

import pytest

from wrappers.offload import pool as pool_module
from wrappers.offload.pool import ALIGNMENT_BYTES, Pool, Slot, available_host_bytes, class_size

PAGE = ALIGNMENT_BYTES
MIB = 1024 * 1024


class Memory:
    """An allocation of a host."""


class Host:
    """Memory that a pool asks for; at most ``limit`` bytes of it at a time.

    Attributes:
        asked: The sizes asked for so far, whether there was memory or not.
    """

    def __init__(self, limit: int = 1 << 60, *, raises: bool = True) -> None:
        self.limit = limit
        self.raises = raises
        self.asked: list[int] = []
        self.given = 0

    def __call__(self, num_bytes: int) -> object:
        self.asked.append(num_bytes)
        if self.given + num_bytes > self.limit:
            if self.raises:
                raise MemoryError
            return None
        self.given += num_bytes
        memory = Memory()
        weakref.finalize(memory, self._take_back, num_bytes)
        return memory

    def _take_back(self, num_bytes: int) -> None:
        self.given -= num_bytes


class Fence:
    """A copy that reads or writes a slot, until it is done."""

    def __init__(self) -> None:
        self.has_happened = False

    def is_done(self) -> bool:
        return self.has_happened


def new_pool(host=None, *, budget=1 << 60, slab=64 * PAGE) -> Pool:
    return Pool(Host() if host is None else host, budget_bytes=budget, slab_bytes=slab)


def taken(pool: Pool, num_bytes: int) -> Slot:
    slot = pool.take(num_bytes)
    assert slot is not None
    return slot


def figures(pool: Pool) -> tuple[int, int, int]:
    return pool.num_allocations, pool.num_taken, pool.num_reused


# --- Size classes


def test_a_size_class_is_at_most_an_eighth_more_or_one_page():
    generator = random.Random(0)
    sizes = {0, 1, PAGE - 1, PAGE, PAGE + 1}
    sizes |= {(1 << power) + more for power in range(12, 40) for more in (-1, 0, 1)}
    sizes |= {generator.randrange(1 << generator.randrange(1, 40)) for _ in range(5000)}
    for size in sizes:
        given = class_size(size)
        assert given >= size
        assert given % PAGE == 0
        assert given > 0
        assert given - size <= max(size / 8, PAGE), size


def test_there_are_few_size_classes():
    """Sixteen pages, and then eight for each power of two, so that sizes that vary meet again."""
    classes = {class_size(size) for size in range(1, 4 * MIB + 1, 512)}
    assert len(classes) == 16 + 8 * 6
    assert {class_size(size) for size in classes} == classes


def test_a_class_of_a_power_of_two_wastes_nothing():
    for power in range(12, 40):
        assert class_size(1 << power) == 1 << power


# --- Reuse


def test_a_slot_that_was_given_back_serves_the_next_tensor_of_its_class():
    pool = new_pool()
    slot = taken(pool, 10 * PAGE)
    view = slot.view = object()
    pool.give_back(slot)
    assert taken(pool, 10 * PAGE - 100) is slot
    assert slot.view is view
    assert taken(pool, 10 * PAGE) is not slot
    assert figures(pool) == (1, 3, 1)


def test_a_slot_of_another_class_is_not_touched_while_there_is_room():
    pool = new_pool()
    slot = taken(pool, 10 * PAGE)
    pool.give_back(slot)
    for size in (9 * PAGE, 11 * PAGE):
        assert taken(pool, size) is not slot
    assert pool.num_reused == 0


def test_from_the_second_step_on_nothing_is_allocated_and_all_is_reused():
    generator = random.Random(1)
    sizes = [generator.randrange(1, 3 * MIB) for _ in range(40)]
    pool = new_pool(slab=MIB)
    counts = []
    for _ in range(5):
        slots = [taken(pool, size) for size in sizes]
        counts.append((pool.num_allocations, pool.total_bytes))
        for slot in reversed(slots):
            pool.give_back(slot)
    assert len(set(counts)) == 1
    assert pool.num_taken == 5 * 40
    assert pool.num_reused == 4 * 40
    assert pool.used_bytes == 0


def test_a_step_whose_slots_come_back_early_needs_no_more_than_are_in_use_at_once():
    pool = new_pool(slab=16 * PAGE)
    for _ in range(100):
        first, second = taken(pool, 5 * PAGE), taken(pool, 5 * PAGE)
        pool.give_back(first)
        pool.give_back(second)
    assert figures(pool) == (1, 200, 198)
    assert pool.total_bytes == pool.peak_bytes == 16 * PAGE


# --- Slabs


def test_slabs_are_powers_of_two_and_not_smaller_than_asked_for():
    host = Host()
    pool = new_pool(host, slab=MIB)
    for size in (100, 3 * MIB, MIB, 9 * MIB, 5 * MIB):
        taken(pool, size)
    assert all(size.bit_count() == 1 for size in host.asked)
    assert host.asked[:2] == [MIB, 4 * MIB]
    assert min(host.asked) >= MIB


def test_a_slab_size_that_is_no_power_of_two_is_rounded_up():
    host = Host()
    taken(new_pool(host, slab=MIB + 1), 1)
    assert host.asked == [2 * MIB]


def test_slabs_grow_with_the_pool_so_their_number_stays_small():
    host = Host()
    pool = new_pool(host, slab=16 * PAGE)
    for _ in range(4096):
        taken(pool, PAGE)
    assert len(host.asked) < 20
    assert pool.total_bytes == sum(host.asked) < 2 * 4096 * PAGE


def test_the_rest_of_a_slab_is_cut_before_a_new_one_is_allocated():
    host = Host()
    pool = new_pool(host, slab=16 * PAGE)
    slots = [taken(pool, size * PAGE) for size in (10, 4, 2)]
    assert [(s.offset, s.size) for s in slots] == [
        (0, 10 * PAGE),
        (10 * PAGE, 4 * PAGE),
        (14 * PAGE, 2 * PAGE),
    ]
    assert host.asked == [16 * PAGE]
    taken(pool, 1)
    assert len(host.asked) == 2


# --- The budget


def test_the_last_slab_is_smaller_where_the_budget_wants_it():
    host = Host()
    pool = new_pool(host, budget=24 * PAGE, slab=16 * PAGE)
    slots = [pool.take(8 * PAGE) for _ in range(4)]
    assert host.asked == [16 * PAGE, 8 * PAGE]
    assert [slot is not None for slot in slots] == [True, True, True, False]
    assert pool.total_bytes == pool.used_bytes == 24 * PAGE
    assert pool.num_taken == 3


def test_what_is_larger_than_the_budget_is_not_asked_for():
    host = Host()
    pool = new_pool(host, budget=16 * PAGE)
    assert pool.take(17 * PAGE) is None
    assert pool.take(16 * PAGE) is not None
    assert host.asked == [16 * PAGE]


def test_what_is_larger_than_the_budget_costs_the_others_nothing():
    """One large tensor a step must not have the buffers of all others allocated anew."""
    host = Host()
    pool = new_pool(host, budget=16 * PAGE, slab=16 * PAGE)
    for _ in range(3):
        assert pool.take(17 * PAGE) is None
        slots = [taken(pool, 4 * PAGE) for _ in range(4)]
        for slot in slots:
            pool.give_back(slot)
    assert host.asked == [16 * PAGE]


def test_no_budget_gives_no_slot():
    host = Host()
    assert new_pool(host, budget=0).take(1) is None
    assert host.asked == []


class Model:
    """What a pool must hold, worked out from the slots that it has given."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.used: list[Slot] = []

    def check(self) -> None:
        pool = self.pool
        assert pool.total_bytes <= pool.budget_bytes
        assert pool.total_bytes == sum(slab.size for slab in pool._slabs)
        assert pool.used_bytes == sum(slot.size for slot in self.used) <= pool.total_bytes
        assert pool.peak_bytes >= pool.total_bytes
        ranges: dict[int, list[tuple[int, int]]] = {}
        for slot in self.used:
            assert slot.slab in pool._slabs
            assert slot.offset % PAGE == 0
            ranges.setdefault(id(slot.slab), []).append((slot.offset, slot.offset + slot.size))
        for slab in pool._slabs:
            assert slab.num_used == len(ranges.get(id(slab), ()))
            end = 0
            for start, stop in sorted(ranges.get(id(slab), ())):
                assert start >= end, "slots in use overlap"
                end = stop
            assert end <= slab.size


@pytest.mark.parametrize("seed", range(6))
def test_random_takes_and_returns_never_exceed_the_budget_and_never_overlap(seed):
    generator = random.Random(seed)
    budget = generator.choice([300 * PAGE, 1000 * PAGE + 17, 512 * PAGE])
    host = Host(limit=generator.choice([1 << 60, budget // 2]))

    def allocate(num_bytes: int) -> object:
        assert host.given + num_bytes <= budget  # also while slabs make room for others
        return host(num_bytes)

    pool = new_pool(allocate, budget=budget, slab=32 * PAGE)
    model = Model(pool)
    fences: list[Fence] = []
    num_taken = num_refused = 0
    for _ in range(3000):
        if model.used and generator.random() < 0.5:
            slot = model.used.pop(generator.randrange(len(model.used)))
            if generator.random() < 0.3:
                slot.fence = Fence()
                fences.append(slot.fence)
            pool.give_back(slot)
            del slot  # It would keep the memory of a slab that is dropped.
        else:
            size = generator.randrange(1, generator.choice([2, 10, 60]) * PAGE)
            slot = pool.take(size)
            if slot is None:
                num_refused += 1
            else:
                assert slot.size >= size
                num_taken += 1
                model.used.append(slot)
        if fences and generator.random() < 0.3:
            fences.pop(0).has_happened = True
        model.check()
        assert host.given == pool.total_bytes
    assert pool.num_taken == num_taken
    assert num_taken > 500
    assert num_refused > 50
    for slot in model.used:
        pool.give_back(slot)
    assert pool.used_bytes == 0


# --- Sizes that change


def test_slabs_whose_sizes_nobody_wants_any_more_make_room_for_others():
    host = Host()
    pool = new_pool(host, budget=32 * PAGE, slab=16 * PAGE)
    before = [taken(pool, 4 * PAGE) for _ in range(8)]
    for slot in before:
        pool.give_back(slot)
    after = [taken(pool, 16 * PAGE) for _ in range(2)]
    assert host.asked == [16 * PAGE] * 4
    assert pool.total_bytes == pool.used_bytes == 32 * PAGE
    assert pool.peak_bytes == 32 * PAGE
    assert not {slot.slab for slot in before} & {slot.slab for slot in after}
    # Free slots of what was dropped do not come back.
    assert pool.take(4 * PAGE) is None


def test_a_slab_with_one_slot_in_use_is_not_dropped():
    pool = new_pool(budget=32 * PAGE, slab=16 * PAGE)
    slots = [taken(pool, 4 * PAGE) for _ in range(8)]
    for slot in slots[1:]:
        pool.give_back(slot)
    big = taken(pool, 16 * PAGE)
    assert pool.take(16 * PAGE) is None
    assert slots[0].slab in pool._slabs
    assert big.slab is not slots[0].slab
    assert taken(pool, 4 * PAGE).slab is slots[0].slab


def test_a_slab_that_a_copy_is_still_using_is_not_dropped():
    pool = new_pool(budget=16 * PAGE, slab=16 * PAGE)
    slots = [taken(pool, 4 * PAGE) for _ in range(4)]
    fence = slots[1].fence = Fence()
    slots[2].fence = done = Fence()
    done.has_happened = True
    for slot in slots:
        pool.give_back(slot)
    assert pool.take(16 * PAGE) is None
    assert pool.num_allocations == 1
    fence.has_happened = True
    assert pool.take(16 * PAGE) is not None
    assert pool.num_allocations == 2


def test_a_slot_is_reused_while_a_copy_is_still_using_it():
    """Whoever takes it comes after its fence."""
    pool = new_pool()
    slot = taken(pool, PAGE)
    fence = slot.fence = Fence()
    pool.give_back(slot)
    assert taken(pool, PAGE) is slot
    assert slot.fence is fence


def test_a_larger_slot_is_better_than_none():
    pool = new_pool(budget=16 * PAGE, slab=16 * PAGE)
    sizes = (3, 5, 8)
    slots = {size: taken(pool, size * PAGE) for size in sizes}
    pool.give_back(slots[8])
    pool.give_back(slots[5])
    assert taken(pool, 4 * PAGE) is slots[5]  # the smallest of those
    assert taken(pool, 4 * PAGE) is slots[8]
    assert pool.used_bytes == 16 * PAGE
    assert pool.take(4 * PAGE) is None
    assert pool.num_reused == 2
    pool.give_back(slots[8])  # It is of its own class again.
    assert taken(pool, 8 * PAGE) is slots[8]


def test_a_slot_of_more_than_twice_the_size_is_not_wasted():
    pool = new_pool(budget=16 * PAGE, slab=16 * PAGE)
    slot, _ = taken(pool, 11 * PAGE), taken(pool, 5 * PAGE)
    pool.give_back(slot)
    assert pool.take(5 * PAGE) is None
    assert taken(pool, 6 * PAGE) is slot


# --- No memory


def test_memory_that_was_not_there_is_asked_for_again_later(monkeypatch):
    monkeypatch.setattr("wrappers.offload.pool.RETRY_AFTER", 5)
    host = Host(limit=0, raises=True)
    pool = new_pool(host, slab=PAGE)
    for _ in range(5):
        assert pool.take(PAGE) is None
    assert len(host.asked) == 1
    host.limit = 8 * PAGE
    assert pool.take(PAGE) is not None
    assert host.asked == [PAGE, PAGE]


@pytest.mark.parametrize("raises", [True, False], ids=["MemoryError", "None"])
def test_memory_that_is_not_there_ends_the_growth_and_is_not_asked_for_again(raises):
    host = Host(limit=24 * PAGE, raises=raises)
    pool = new_pool(host, slab=16 * PAGE)
    slots = [taken(pool, 8 * PAGE) for _ in range(3)]
    # Half as much was tried where a whole slab was not to be had.
    assert host.asked == [16 * PAGE, 16 * PAGE, 8 * PAGE]
    assert pool.take(8 * PAGE) is None
    asked = len(host.asked)
    assert pool.take(8 * PAGE) is None
    assert len(host.asked) == asked
    # A smaller piece might be there, and is asked for once.
    assert pool.take(PAGE) is None
    assert host.asked[asked:] == [4 * PAGE, 2 * PAGE, PAGE]
    assert pool.take(PAGE) is None
    assert len(host.asked) == asked + 3
    assert pool.total_bytes == 24 * PAGE
    assert pool.budget_bytes == 25 * PAGE - 1
    assert pool.num_allocations == 2
    pool.give_back(slots[1])
    assert taken(pool, 8 * PAGE) is slots[1]


def test_other_errors_of_the_allocation_are_not_hidden():
    def allocate(num_bytes: int) -> object:
        raise ValueError("of the owner")

    pool = new_pool(allocate)
    with pytest.raises(ValueError, match="of the owner"):
        pool.take(1)
    assert pool.total_bytes == pool.used_bytes == pool.num_taken == 0


# --- What the host has left


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The root of a file system of its own, of a machine that has 1000 KiB left."""
    monkeypatch.setattr(pool_module, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    write(tmp_path, "proc/meminfo", "MemTotal: 4000 kB\nMemFree: 1 kB\nMemAvailable: 1000 kB\n")
    return tmp_path


def write(root: Path, path: str, text: object) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


MACHINE = 1000 * 1024


def test_the_machine_alone(root):
    assert available_host_bytes() == MACHINE


@pytest.mark.parametrize("text", ["MemTotal: 4000 kB", "MemAvailable: many kB", None])
def test_without_a_figure_the_machine_has_what_it_is_made_of(root, text):
    if text is None:
        (root / "proc/meminfo").unlink()
    else:
        write(root, "proc/meminfo", text)
    expected = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_host_bytes() == expected


def version_2(root, folder: str, limit: object, used: object, stat: str = "") -> None:
    for name, value in (("max", limit), ("current", used), ("stat", stat)):
        write(root, f"sys/fs/cgroup/{folder}/memory.{name}", value)


def test_cgroup_version_2_limits_below_the_machines(root):
    write(root, "proc/self/cgroup", "0::/a/b")
    version_2(root, "a/b", 300_000, 100_000)
    assert available_host_bytes() == 200_000


def test_page_cache_counts_as_available(root):
    write(root, "proc/self/cgroup", "0::/a/b")
    version_2(root, "a/b", 300_000, 100_000, "anon 7\ninactive_file 5000\nactive_file 9")
    assert available_host_bytes() == 205_000


def test_the_narrowest_limit_of_all_cgroups_above_counts(root):
    write(root, "proc/self/cgroup", "0::/a/b/c")
    version_2(root, "a/b/c", "max", 10)
    version_2(root, "a/b", 900_000, 100_000)
    version_2(root, "a", 500_000, 200_000)
    version_2(root, ".", 990_000, 200_000)
    assert available_host_bytes() == 300_000
    version_2(root, ".", 990_000, 800_000)  # also the root's, as a container sees it
    assert available_host_bytes() == 190_000


def test_files_outside_of_the_cgroups_are_not_read(root):
    write(root, "proc/self/cgroup", "0::/a")
    write(root, "sys/fs/memory.max", 5)
    write(root, "sys/fs/memory.current", 1)
    assert available_host_bytes() == MACHINE


@pytest.mark.parametrize("limit", ["max", 1 << 60])
def test_a_cgroup_without_a_limit_leaves_what_the_machine_has(root, limit):
    write(root, "proc/self/cgroup", "0::/a")
    version_2(root, "a", limit, 10)
    assert available_host_bytes() == MACHINE


def test_a_limit_that_is_exceeded_leaves_nothing(root):
    write(root, "proc/self/cgroup", "0::/a")
    version_2(root, "a", 100, 300)
    assert available_host_bytes() == 0


def test_a_limit_without_a_usage_says_nothing(root):
    write(root, "proc/self/cgroup", "0::/a")
    write(root, "sys/fs/cgroup/a/memory.max", 100)
    assert available_host_bytes() == MACHINE


def version_1(root, folder: str, limit: int, used: int, stat: str = "") -> None:
    for name, value in (("limit_in_bytes", limit), ("usage_in_bytes", used), ("stat", stat)):
        write(root, f"sys/fs/cgroup/memory/{folder}/memory.{name}", value)


def test_cgroup_version_1_limits_below_the_machines(root):
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/")
    version_1(root, "a", 300_000, 100_000, "total_inactive_file 3000")
    assert available_host_bytes() == 203_000


def test_a_container_of_version_1_sees_its_limit_at_the_root(root):
    """Its path is that of the machine, where its own files are not."""
    write(root, "proc/self/cgroup", "9:hugetlb,memory:/docker/0123")
    version_1(root, ".", 300_000, 100_000)
    assert available_host_bytes() == 200_000


def test_controllers_of_other_things_are_not_looked_at(root):
    write(root, "proc/self/cgroup", "5:cpu:/a")
    version_1(root, "a", 100, 0)
    assert available_host_bytes() == MACHINE
