"""Copies on the simulated transport: their order, lifetimes, budgets and times.

Each rule of the diagram in ``wrappers.offload.transfer`` has a program that gives right values as
long as the rule is kept. Its test leaves the rule out, too, and sees the program go wrong.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import wrappers
from tests.offload.helpers import (
    StrictTransport,
    are_equal,
    compute_on,
    offload_blocks,
    stack,
    step,
)
from wrappers import _device, _knobs
from wrappers.offload.pool import Pool
from wrappers.offload.scheduler import InFlight
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import (
    OffloadSettings,
    Store,
    begin_group,
    finish_offloading,
    reset_offloading,
)
from wrappers.offload.transfer import AcceleratorTransport, HostTier, Sent

CPU = torch.device("cpu")
PAGE = 4096
#: A copy of a page takes 0.5 + 4 seconds.
SLOW: dict[str, Any] = {"bandwidth_bytes_per_s": 1024.0, "latency_s": 0.5}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_knobs, "OFFLOAD_SLAB_BYTES", 1 << 16)
    reset_offloading()
    yield
    reset_offloading()


def full(value: int, nbytes: int = PAGE) -> Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def host_tier(transport: Any, **settings: Any) -> HostTier:
    settings = {"pinned_bytes": 1 << 20, "pageable_bytes": 0, **settings}
    return HostTier(transport, note=lambda key, text: None, **settings)


# --- Rules of order -----------------------------------------------------------------------------


def is_reused_slot_right(device: StrictTransport) -> bool:
    """A slot goes to another tensor while a copy back still reads it."""
    tier = host_tier(device)
    sent = tier.send(full(1), PAGE)
    assert sent is not None
    device.synchronize(sent.event)
    landing = tier.fetch(sent)
    tier.discard(sent)
    later = tier.send(full(2, 16), 16)  # Small, so that it would be there first.
    assert later is not None
    assert later.slot is sent.slot
    device.compute(PAGE / device.bandwidth_bytes_per_s)  # Enough for the small one alone.
    assert not landing.is_done()
    later.is_done()
    tier.land(landing, "compute")
    again = tier.fetch(later)
    tier.land(again, "compute")
    return are_equal([landing.target, again.target], [full(1), full(2, 16)])


def is_copy_straight_back_right(device: StrictTransport) -> bool:
    """Bytes are wanted back while they wait behind others on their way out."""
    tier = host_tier(device)
    first, second = tier.send(full(1), PAGE), tier.send(full(2), PAGE)
    assert first is not None
    assert second is not None
    landing = tier.fetch(second)
    tier.land(landing, "compute")
    return are_equal([landing.target], [full(2)])


def is_step_right(device: StrictTransport) -> bool:
    """Three steps of a stack that waits for copies in both directions."""
    model, x = stack(5, num_layers=2), torch.randn(8, 16)
    expected = step(model, x)
    offload_blocks(model, max_inflight_bytes=1024)
    results = [step(model, x) for _ in range(3)]
    assert device.num_copies("H2D") > 10
    assert device.waited_s() > 0 or device.forgotten
    return all(are_equal(result, expected) for result in results) and not device.violations


@pytest.mark.parametrize(
    ("program", "waiter", "waited"),
    [
        pytest.param(is_reused_slot_right, "D2H", "H2D", id="D2H waits for the slot's fence"),
        pytest.param(is_copy_straight_back_right, "H2D", "D2H", id="H2D waits for its D2H"),
        pytest.param(is_step_right, "compute", "H2D", id="unpack waits for the H2D"),
        pytest.param(is_step_right, "compute", "D2H", id="a full pipe waits for the D2H"),
    ],
)
@pytest.mark.parametrize("bandwidth", [1024.0, 102400.0])
def test_each_wait_is_needed(program, waiter, waited, bandwidth):
    settings = {"bandwidth_bytes_per_s": bandwidth, "latency_s": PAGE / 2 / bandwidth}
    with StrictTransport(**settings) as device:
        assert program(device)
    reset_offloading()
    with StrictTransport(forget={(waiter, waited)}, **settings) as device:
        assert not program(device)


# --- Rules of lifetime --------------------------------------------------------------------------


def make_store(device: Any) -> tuple[Store, OffloadSettings]:
    return Store(host_tier(device), "host"), OffloadSettings(min_bytes=0, keep_last=0)


def is_source_kept(device: StrictTransport) -> bool:
    """Nobody but the copy holds the tensor."""
    store, settings = make_store(device)
    group = begin_group("a", "a", keep_last=0)
    away = store.put(full(1), group, settings)
    device.compute(2.0)
    other = store.put(full(2), group, settings)  # Lets go of what has left, and of nothing else.
    assert away is not None
    assert other is not None
    device.compute(8.0)
    results = [store.take(claim.offloaded, group, settings) for claim in (away, other)]
    values = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in results]
    return are_equal(values, [full(1), full(2)]) and not device.violations


def is_dropped_landing_kept(device: StrictTransport) -> bool:
    """Backward turns to another group before a copy that was begun ahead has come."""
    store, settings = make_store(device)
    b, a = (begin_group(name, name, keep_last=0) for name in "ba")  # backward goes from a to b
    in_a = [store.put(full(1), a, settings), store.put(full(2), a, settings)]
    in_b = store.put(full(3), b, settings)
    device.compute(20.0)
    for away, group in ((in_a[1], a), (in_b, b)):
        assert away is not None
        store.take(away.offloaded, group, settings)
    assert store.stats().num_ahead >= 1
    assert in_a[0] is not None
    first = in_a[0].offloaded
    assert first.landing is None or first.is_ahead
    finish(store, device)
    return not device.violations


def is_dead_landing_kept(device: StrictTransport) -> bool:
    """The graph goes while a copy that was begun ahead is under way."""
    store, settings = make_store(device)
    group = begin_group("a", "a", keep_last=0)
    away = [store.put(full(value), group, settings) for value in (1, 2, 3)]
    device.compute(20.0)
    assert away[2] is not None
    store.take(away[2].offloaded, group, settings)
    assert [claim.offloaded.is_ahead for claim in away if claim is not None] == [True, True, False]
    away.clear()
    finish(store, device)
    assert store.stats().used_bytes == 0
    return not device.violations


def finish(store: Store, device: StrictTransport) -> None:
    store.finish()
    assert not store._dropped
    assert store.stats().num_alive <= 3


@pytest.mark.parametrize(
    ("program", "owner", "name", "without"),
    [
        pytest.param(
            is_source_kept, Sent, "is_done", lambda self: True, id="the source until its D2H"
        ),
        pytest.param(
            is_step_right, Sent, "finish", lambda self: None, id="the source of a full pipe"
        ),
        pytest.param(
            is_dropped_landing_kept,
            Store,
            "_drop_landing",
            lambda self, landing: None,
            id="a dropped target until its H2D",
        ),
        pytest.param(
            is_dead_landing_kept,
            Store,
            "_drop_landing",
            lambda self, landing: None,
            id="a dead graph's target until its H2D",
        ),
    ],
)
def test_memory_is_held_until_its_copy_ends(program, owner, name, without, monkeypatch):
    with StrictTransport(**SLOW) as device:
        assert program(device)
    reset_offloading()
    monkeypatch.setattr(owner, name, without)
    with StrictTransport(**SLOW) as device:
        assert not program(device)


def test_the_source_is_free_as_soon_as_its_copy_ends():
    with SimulatedTransport(**SLOW) as device:
        store, settings = make_store(device)
        group = begin_group("a", "a", keep_last=0)
        away = [store.put(full(value), group, settings) for value in range(4)]
        alive = [device.device_bytes]
        for _ in range(4):
            device.compute(4.5)
            store.stats()  # Works off what has left.
            gc.collect()
            alive.append(device.device_bytes)
        assert alive[0] == 4 * PAGE
        assert alive[-1] == 0
        assert alive == sorted(alive, reverse=True)
        assert [claim.offloaded.sent.origin for claim in away if claim is not None] == [None] * 4


def test_what_has_not_left_is_not_copied_back():
    with StrictTransport(**SLOW) as device:
        store, settings = make_store(device)
        group = begin_group("a", "a", keep_last=0)
        tensor = full(1)
        away = store.put(tensor, group, settings)
        assert away is not None
        storage = store.take(away.offloaded, group, settings)
        assert storage.data_ptr() == tensor.untyped_storage().data_ptr()
        assert device.num_copies("H2D") == 0
        assert device.waited_s() == 0
        assert store.stats().num_unmoved == 1


@pytest.mark.parametrize("bandwidth", [1e8, 1e6])
def test_a_transport_that_is_100_times_slower_changes_no_value(bandwidth):
    model, x = stack(6, num_layers=3), torch.randn(8, 16)
    expected = step(model, x)
    offload_blocks(model, max_inflight_bytes=2048)
    with StrictTransport(bandwidth_bytes_per_s=bandwidth, latency_s=1 / bandwidth) as device:
        for _ in range(4):
            assert are_equal(step(model, x), expected)
        assert device.num_copies("H2D") > 30
        assert device.violations == []


# --- Budgets at every moment --------------------------------------------------------------------


@pytest.fixture
def budgets(monkeypatch):
    """Check all budgets after each operation; return how many checks there were."""
    checks: Counter[str] = Counter()
    in_use: dict[int, tuple[Pool, int, int]] = {}

    def check_pool(pool: Pool) -> None:
        checks["pool"] += 1
        assert pool.used_bytes <= pool.total_bytes <= pool.peak_bytes <= pool.budget_bytes
        assert sum(slab.size for slab in pool._slabs) == pool.total_bytes

    def take(self, num_bytes):
        slot = originals[Pool, "take"](self, num_bytes)
        check_pool(self)
        if slot is not None:
            start = (id(slot.slab), slot.offset)
            for other in in_use.values():
                assert other[0] != start[0] or (
                    slot.offset + slot.size <= other[1] or other[2] <= slot.offset
                )
            assert slot.offset + slot.size <= slot.slab.size
            in_use[id(slot)] = (id(slot.slab), slot.offset, slot.offset + slot.size)
        return slot

    def give_back(self, slot):
        originals[Pool, "give_back"](self, slot)
        del in_use[id(slot)]
        check_pool(self)

    limits: dict[int, int] = {}

    def make_room(self, num_bytes, limit_bytes):
        originals[InFlight, "make_room"](self, num_bytes, limit_bytes)
        limits[id(self)] = limit_bytes

    def add(self, copy):
        originals[InFlight, "add"](self, copy)
        checks["in flight"] += 1
        assert self.nbytes == sum(c.nbytes for c in self._copies)
        assert self.nbytes <= limits[id(self)] or len(self) == 1
        assert len(self) <= self._max_copies

    def fetch_ahead(self, offloaded, limit_bytes):
        result = originals[Store, "fetch_ahead"](self, offloaded, limit_bytes)
        checks["ahead"] += 1
        known = {id(o): o for o in (*self._away.values(), *self._dead)}
        ahead = sum(o.sent.nbytes for o in known.values() if o.is_ahead)
        assert ahead == self._ahead_bytes <= limit_bytes
        return result

    replaced = {
        (Pool, "take"): take,
        (Pool, "give_back"): give_back,
        (InFlight, "make_room"): make_room,
        (InFlight, "add"): add,
        (Store, "fetch_ahead"): fetch_ahead,
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), function in replaced.items():
        monkeypatch.setattr(owner, name, function)
    return checks


@pytest.mark.parametrize("bandwidth", [2.0**12, 2.0**20])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("limit_bytes", [1, 512, 1024, 3000, 1 << 20])
def test_budgets_hold_at_every_moment(budgets, limit_bytes, prefetch, bandwidth):
    model, x = stack(6, num_layers=3), torch.randn(8, 16)
    nbytes = x.nbytes
    expected = step(model, x)
    offload_blocks(model, max_inflight_bytes=limit_bytes, prefetch=prefetch, keep_last=0)
    with StrictTransport(bandwidth_bytes_per_s=bandwidth, latency_s=0.0) as device:
        for _ in range(3):
            assert are_equal(step(model, x), expected)
        finish_offloading()
        stats = wrappers.offload_stats()["host"]
        assert device.outstanding_bytes["D2H"] <= max(limit_bytes, nbytes)
        # Besides those ahead: the one that backward waits for.
        assert device.outstanding_bytes["H2D"] <= (limit_bytes // nbytes + 1) * nbytes
        assert stats.inflight_bytes <= max(limit_bytes, nbytes)
        assert stats.peak_bytes == device.pinned_bytes
        assert (stats.num_alive, stats.used_bytes) == (0, 0)
        assert device.violations == []
    assert budgets["pool"] >= 2 * 3 * 18
    assert budgets["in flight"] == 3 * 18
    assert budgets["ahead"] > 0


@pytest.mark.parametrize("host_bytes", [0, 1 << 14, 3 << 14, 1 << 16])
def test_the_pool_stays_within_the_host_memory(budgets, host_bytes, monkeypatch):
    monkeypatch.setattr(_knobs, "OFFLOAD_PINNED_BYTES", 1 << 18)
    monkeypatch.setattr(_knobs, "OFFLOAD_PAGEABLE_BYTES", 0)
    model, x = stack(6, num_layers=3, dim=64), torch.randn(16, 64)  # 18 pages a step
    expected = step(model, x)
    offload_blocks(model, keep_last=0)
    with StrictTransport(host_bytes=host_bytes) as device:
        with pytest.warns(UserWarning, match="no room left"):
            first = step(model, x)
        assert are_equal(first, expected)
        for _ in range(2):
            assert are_equal(step(model, x), expected)
        assert device.pinned_bytes <= host_bytes
        stats = wrappers.offload_stats()["host"]
        assert stats.num_kept > 0
        assert stats.num_out + stats.num_kept == 3 * 18
        # Slabs are as large as still fit, so none of it is left over.
        assert (stats.num_out, stats.peak_bytes) == (3 * host_bytes // PAGE, host_bytes)


@pytest.mark.parametrize(
    ("owner", "name", "planted"),
    [
        (InFlight, "has_room", lambda self, num_bytes, limit_bytes: True),
        (Store, "_no_longer_ahead", lambda self, o: setattr(o, "is_ahead", False)),
        (Pool, "_reuse", lambda self, size: (self._free.get(size) or [None])[-1]),
    ],
)
def test_a_broken_budget_would_be_seen(budgets, owner, name, planted, monkeypatch):
    model, x = stack(6, num_layers=3), torch.randn(8, 16)
    offload_blocks(model, max_inflight_bytes=1024)
    monkeypatch.setattr(owner, name, planted)
    with StrictTransport(**SLOW), pytest.raises((AssertionError, KeyError)):
        [step(model, x) for _ in range(3)]


# --- Times ----------------------------------------------------------------------------------------

NUM_BLOCKS = 16
FORWARD_S, BACKWARD_S = 1.0, 2.0  # of a block
COMPUTE_S = NUM_BLOCKS * (FORWARD_S + BACKWARD_S)
NUM_LAYERS = 4


class Timed:
    """The last of some steps of 16 blocks, in virtual time.

    Args:
        copy_s: How long the copies of one block take in one direction; a forward takes 1 s.
        num_inflight: How many tensors may be on their way; a block has four.
    """

    def __init__(
        self,
        copy_s: float,
        num_inflight: float,
        *,
        num_steps: int = 3,
        num_layers: int = NUM_LAYERS,
        latency_s: float = 0.0,
        **settings: Any,
    ) -> None:
        model = stack(NUM_BLOCKS, num_layers=num_layers, forward_s=FORWARD_S, backward_s=BACKWARD_S)
        x = torch.randn(64, 16)
        offload_blocks(model, max_inflight_bytes=int(num_inflight * x.nbytes) or 1, **settings)
        bandwidth = num_layers * x.nbytes / copy_s
        with SimulatedTransport(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s) as device:
            compute_on(model, device.compute)
            self.steps_s, self.waits_s, self.num_allocations = [], [], []
            for _ in range(num_steps):
                num_spans, start_s, waited_s = len(device.spans), device.now_s(), device.waited_s()
                step(model, x)
                self.steps_s.append(device.now_s() - start_s)
                self.waits_s.append(device.waited_s() - waited_s)
                self.num_allocations.append(device.num_pinned_allocations)
            self.spans = device.spans[num_spans:]
            self.stats = wrappers.offload_stats()["host"]
        self.step_s = self.steps_s[-1]
        self.out_s, self.back_s = self.seconds("D2H"), self.seconds("H2D")
        reset_offloading()

    def seconds(self, row: str) -> float:
        """How long a row of the timeline was busy."""
        return sum(span.end_s - span.start_s for span in self.spans if span.row == row)

    @property
    def bound_s(self) -> float:
        """What forward and backward take at least if each hides the shorter of its two rows."""
        forward_s, backward_s = NUM_BLOCKS * FORWARD_S, NUM_BLOCKS * BACKWARD_S
        return max(forward_s, self.out_s) + max(backward_s, self.back_s)


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("num_inflight", [4, 8, 64])
@pytest.mark.parametrize("copy_s", [2**-6, 0.25, 0.5, 1.0])
def test_prefetch_hides_the_copies_completely_where_bandwidth_suffices(
    copy_s, num_inflight, num_layers
):
    timed = Timed(copy_s, num_inflight, num_layers=num_layers)
    assert timed.steps_s[1:] == [COMPUTE_S] * 2
    assert timed.waits_s[1:] == [0.0] * 2
    # All but the last block left, and came back but for what had not quite left.
    assert timed.out_s == (NUM_BLOCKS - 1) * copy_s
    assert timed.back_s >= (NUM_BLOCKS - 2) * copy_s
    assert timed.seconds("compute") == COMPUTE_S


@pytest.mark.parametrize("latency_s", [0.0, 2**-4])
@pytest.mark.parametrize("num_inflight", [1, 4, 16, 64])
@pytest.mark.parametrize("copy_s", [0.9, 1.1, 1.5, 1.9, 2.1, 2.5, 4, 16, 100])
def test_a_step_takes_compute_or_copies_within_5_percent(copy_s, num_inflight, latency_s):
    timed = Timed(copy_s, num_inflight, latency_s=latency_s)
    assert timed.step_s <= 1.05 * timed.bound_s
    assert timed.step_s >= max(COMPUTE_S, timed.back_s)
    assert math.isclose(timed.step_s, COMPUTE_S + timed.waits_s[-1])


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("keep_last", [0, 1, 3])
@pytest.mark.parametrize("copy_s", [0.5, 1.5, 2.5, 20])
def test_the_same_for_other_settings(copy_s, keep_last, prefetch):
    timed = Timed(copy_s, 8, keep_last=keep_last, prefetch=prefetch)
    assert timed.step_s <= 1.05 * timed.bound_s
    assert timed.out_s == pytest.approx((NUM_BLOCKS - keep_last) * copy_s)


@pytest.mark.parametrize("copy_s", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_waiting_for_each_copy_is_slower(copy_s):
    timed = Timed(copy_s, 8)
    in_order = Timed(copy_s, 0, prefetch=0)
    assert in_order.step_s > 1.05 * timed.step_s
    # Nothing is ahead, so each copy back is waited for from its beginning to its end.
    assert in_order.stats.num_ahead == 0
    assert in_order.waits_s[-1] >= in_order.back_s > 0


@pytest.mark.parametrize("num_inflight", [1, 4, 64])
@pytest.mark.parametrize("copy_s", [0.25, 4.0])
def test_pinned_memory_is_not_allocated_after_the_second_step(copy_s, num_inflight):
    timed = Timed(copy_s, num_inflight, num_steps=6)
    first, second, *later = timed.num_allocations
    assert 1 <= first <= second
    assert later == [second] * 4
    assert timed.stats.num_allocations == second
    assert timed.stats.num_taken == timed.stats.num_out
    # Five of six steps find the buffers of the one before; what is copied late may need some more.
    assert timed.stats.reuse_rate >= 0.8


# --- An accelerator's streams ---------------------------------------------------------------------


class Event:
    """An event of a fake stream."""

    def __init__(self, name: str, at_s: float) -> None:
        self.name = name
        self.at_s = at_s
        self.is_over = True

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        raise AssertionError("the host is not to wait")

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at_s - self.at_s)


class Stream:
    """A fake stream that notes what is queued on it."""

    def __init__(self, accelerator: Accelerator, name: str) -> None:
        self.accelerator = accelerator
        self.name = name
        self.num_events = 0

    def wait_event(self, event: Event) -> None:
        self.accelerator.log.append(f"{self.name} waits for {event.name}")
        self.accelerator.now_s += 0.25


class Accelerator:
    """Stands in for the part of ``wrappers._device`` that knows streams; notes each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now_s = 0.0
        self.compute = Stream(self, "compute")
        self.num_streams = 0
        self.has_pinned = True
        self.are_events_over = True
        self.transport = AcceleratorTransport()
        for name in (
            "current_stream",
            "new_stream",
            "record_event",
            "copy_on_stream",
            "empty_on_stream",
            "use_on_stream",
            "empty_pinned",
        ):
            monkeypatch.setattr(_device, name, getattr(self, name))
        monkeypatch.setattr(_device, "is_on_accelerator", lambda tensor: tensor.is_cpu)
        monkeypatch.setattr(_device, "accelerator_tensors_exist", lambda: True)
        monkeypatch.setattr("wrappers.offload.transfer._accelerator", [])

    def take_log(self) -> list[str]:
        log, self.log = self.log, []
        return log

    def current_stream(self, device):
        return self.compute

    def new_stream(self, device):
        self.num_streams += 1
        return Stream(self, ["D2H", "H2D"][self.num_streams - 1])

    def record_event(self, stream, *, is_timed=False):
        if is_timed:
            return Event("a time", self.now_s)
        stream.num_events += 1
        event = Event(f"{stream.name}{stream.num_events}", self.now_s)
        event.is_over = self.are_events_over
        self.log.append(f"record {event.name}")
        return event

    def copy_on_stream(self, target, source, stream):
        self.log.append(f"copy {source.numel()} on {stream.name}")
        target.copy_(source)

    def empty_on_stream(self, nbytes, device, stream):
        self.log.append(f"empty {nbytes} on {stream.name}")
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def use_on_stream(self, tensor, stream):
        self.log.append(f"use {tensor.numel()} on {stream.name}")

    def empty_pinned(self, nbytes):
        if not self.has_pinned:
            raise RuntimeError("no pinned memory is left")
        return torch.full((nbytes,), 255, dtype=torch.uint8)


@pytest.fixture
def accelerator(monkeypatch):
    return Accelerator(monkeypatch)


def test_one_tensor_goes_and_comes_back_as_in_the_diagram(accelerator):
    tier = host_tier(accelerator.transport)
    sent = tier.send(full(5), PAGE)
    assert accelerator.take_log() == [
        f"use {PAGE} on compute",  # of no effect on the stream that made it
        "record compute1",
        "D2H waits for compute1",  # [1]
        f"copy {PAGE} on D2H",  # [2]
        "record D2H1",  # [3]
    ]
    landing = tier.fetch(sent)
    assert accelerator.take_log() == [
        f"empty {PAGE} on compute",  # [4]
        "H2D waits for D2H1",
        "record compute2",
        "H2D waits for compute2",
        f"copy {PAGE} on H2D",
        "record H2D1",  # [5]
    ]
    tier.land(landing, accelerator.compute)
    assert accelerator.take_log() == ["compute waits for H2D1"]  # [6]
    assert torch.equal(landing.target, full(5))
    assert accelerator.num_streams == 2


def test_the_next_tensor_in_a_slot_comes_after_its_fence(accelerator):
    tier = host_tier(accelerator.transport)
    sent = tier.send(full(5), PAGE)
    tier.discard(sent)
    again = tier.send(full(6), PAGE)
    assert again.slot is sent.slot
    assert accelerator.take_log()[5:] == [
        f"use {PAGE} on compute",
        "record compute2",
        "D2H waits for compute2",
        "D2H waits for D2H1",
        f"copy {PAGE} on D2H",
        "record D2H2",
    ]
    tier.fetch(again)
    accelerator.take_log()
    tier.discard(again)
    tier.send(full(7), PAGE)
    assert accelerator.take_log() == [
        f"use {PAGE} on compute",
        "record compute4",
        "D2H waits for compute4",
        "D2H waits for H2D1",
        f"copy {PAGE} on D2H",
        "record D2H3",
    ]


def test_the_compute_stream_is_asked_for_at_each_call(accelerator):
    tier = host_tier(accelerator.transport)
    first = tier.send(full(5), PAGE)
    accelerator.compute = Stream(accelerator, "side")
    second = tier.send(full(6), PAGE)
    assert accelerator.take_log()[5:8] == [
        f"use {PAGE} on side",
        "record side1",
        "D2H waits for side1",
    ]
    assert (first.stream.name, second.stream.name) == ("compute", "side")
    accelerator.compute = Stream(accelerator, "third")
    # Memory for what comes back is that of the stream that made it, whatever runs now.
    tier.fetch(second)
    assert accelerator.take_log() == [
        f"empty {PAGE} on side",
        "H2D waits for D2H2",
        "record side2",
        "H2D waits for side2",
        f"copy {PAGE} on H2D",
        "record H2D1",
    ]


def test_memory_is_used_on_another_stream_only_where_backward_has_one(accelerator):
    tier = host_tier(accelerator.transport)
    sent = tier.send(full(5), PAGE)
    same, other = tier.fetch(sent), tier.fetch(sent)
    accelerator.take_log()
    tier.land(same, accelerator.compute)
    assert accelerator.take_log() == ["compute waits for H2D1"]
    tier.land(other, Stream(accelerator, "side"))
    assert accelerator.take_log() == ["side waits for H2D2", f"use {PAGE} on side"]


def test_the_end_of_pinned_memory_is_a_memory_error(accelerator):
    accelerator.has_pinned = False
    with pytest.raises(MemoryError, match="no pinned memory is left") as caught:
        accelerator.transport.empty_host(PAGE, is_pinned=True)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert accelerator.transport.empty_host(PAGE, is_pinned=False).numel() == PAGE
    tier = host_tier(accelerator.transport, pageable_bytes=1 << 20)
    sent = tier.send(full(5), PAGE)
    assert sent.slot.slab.pool is tier.pageable
    assert tier.pinned.total_bytes == 0


def test_host_memory_is_no_inference_tensor(accelerator):
    with torch.inference_mode():
        assert not accelerator.transport.empty_host(PAGE, is_pinned=False).is_inference()


def test_the_waits_of_the_compute_are_measured_where_it_waits(accelerator):
    tier = host_tier(accelerator.transport)
    sent = tier.send(full(5), PAGE)
    landing = tier.fetch(sent)
    tier.land(landing, accelerator.compute)
    assert tier.waited_s() == 0.0  # The copy was over.
    landing.event.is_over = False
    tier.land(landing, accelerator.compute)
    assert tier.waited_s() == 0.25
    assert accelerator.take_log()[-2:] == ["compute waits for H2D1"] * 2


def test_a_full_pipe_lets_the_compute_stream_wait_and_not_the_host(accelerator):
    accelerator.are_events_over = False
    store = Store(host_tier(accelerator.transport), "host")
    settings = OffloadSettings(min_bytes=0, max_inflight_bytes=2 * PAGE)
    group = begin_group("a", "a", keep_last=0)
    away = [store.put(full(value), group, settings) for value in range(3)]
    log = accelerator.take_log()
    assert [line for line in log if line.startswith("compute")] == ["compute waits for D2H1"]
    assert log.index("compute waits for D2H1") == log.index("record compute3") - 2
    # The first has been let go of, though its copy is not over: its memory comes later on the
    # same stream.
    assert [claim.offloaded.sent.origin is None for claim in away] == [True, False, False]
    assert store.stats().inflight_bytes == 2 * PAGE


def test_a_model_on_fake_streams_is_right(accelerator):
    model, x = stack(5, num_layers=2), torch.randn(8, 16)
    expected = step(model, x)
    offload_blocks(model, keep_last=0)
    for _ in range(3):
        assert are_equal(step(model, x), expected)
    log = accelerator.take_log()
    kinds = Counter(line.split(" ")[0] for line in log)
    assert log.count(f"copy {x.nbytes} on D2H") == kinds["copy"] - kinds["empty"] == 3 * 10
    assert kinds["use"] == 3 * 10  # on the way out, and not on the way back
    assert wrappers.offload_stats()["host"].num_alive == 0
