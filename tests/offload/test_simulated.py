"""The simulated transport itself: times, garbage, capacities, faults and its threads.

Bandwidths and latencies are powers of two, so all times are exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import wrappers
from tests.offload.helpers import Layer, are_equal, compute_on, stack, step, until, within
from wrappers import _knobs
from wrappers.offload.simulated import Fault, SimulatedTransport, Span
from wrappers.offload.store import finish_offloading, reset_offloading
from wrappers.offload.transfer import TransferError, current_transport

CPU = torch.device("cpu")
KIB = 1024
#: A copy of 1 KiB takes 0.5 + 1 seconds.
SLOW = {"bandwidth_bytes_per_s": 1024.0, "latency_s": 0.5}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_knobs, "OFFLOAD_SLAB_BYTES", 1 << 16)
    reset_offloading()
    yield
    reset_offloading()


def full(value: int, nbytes: int = KIB) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


# --- Times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bandwidth", "latency", "nbytes", "seconds"),
    [
        (1024.0, 0.5, 1024, 1.5),
        (1024.0, 0.0, 256, 0.25),
        (float("inf"), 0.25, 4096, 0.25),
        (float("inf"), 0.0, 4096, 0.0),
        (2.0**30, 0.0, 2**10, 2.0**-20),
    ],
)
@pytest.mark.parametrize("direction", ["D2H", "H2D"])
def test_a_copy_takes_its_latency_and_its_bytes_over_the_bandwidth(
    direction, bandwidth, latency, nbytes, seconds
):
    with SimulatedTransport(bandwidth_bytes_per_s=bandwidth, latency_s=latency) as device:
        stream = device.new_stream(CPU, direction)
        target = full(0, nbytes)
        device.copy(target, full(7, nbytes), stream)
        device.wait("compute", device.record(stream))
        assert device.now_s() == seconds
        assert device.waited_s() == seconds
        assert bool((target == 7).all())
        assert device.spans[0] == Span(direction, 0.0, seconds, nbytes)
        assert device.num_copies(direction) == 1


def test_copies_of_one_direction_follow_each_other():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        targets = [full(0) for _ in range(3)]
        events = []
        for value, target in enumerate(targets):
            device.copy(target, full(value + 1), stream)
            events.append(device.record(stream))
        ends = []
        for event in events:
            device.wait("compute", event)
            ends.append(device.now_s())
        assert ends == [1.5, 3.0, 4.5]
        assert [int(target[0]) for target in targets] == [1, 2, 3]
        copies = [span for span in device.spans if span.row == "D2H"]
        assert [(s.start_s, s.end_s) for s in copies] == [(0, 1.5), (1.5, 3), (3, 4.5)]


def test_both_directions_copy_at_once():
    with SimulatedTransport(**SLOW) as device:
        out, back = (device.new_stream(CPU, name) for name in ("D2H", "H2D"))
        device.copy(full(0), full(1), out)
        device.copy(full(0), full(1), back)
        for stream in (out, back):
            device.wait("compute", device.record(stream))
        assert device.now_s() == 1.5
        assert [(s.row, s.start_s, s.end_s) for s in device.spans if s.row != "wait"] == [
            ("D2H", 0, 1.5),
            ("H2D", 0, 1.5),
        ]


def test_a_stream_waits_for_another_ones_event():
    with SimulatedTransport(**SLOW) as device:
        out, back = (device.new_stream(CPU, name) for name in ("D2H", "H2D"))
        host, target = full(0), full(0)
        device.copy(host, full(9), out)
        device.wait(back, device.record(out))
        device.copy(target, host, back)
        assert device.now_s() == 0  # Streams wait, the compute does not.
        device.wait("compute", device.record(back))
        assert device.now_s() == 3
        assert bool((target == 9).all())


def test_a_copy_begins_when_it_is_called():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        device.compute(8.0)
        device.copy(full(0), full(1), stream)
        device.wait("compute", device.record(stream))
        assert device.now_s() == 9.5
        assert device.spans == [
            Span("compute", 0.0, 8.0),
            Span("D2H", 8.0, 9.5, KIB),
            Span("wait", 8.0, 9.5),
        ]


def test_compute_beside_a_copy_shortens_the_wait():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        device.copy(full(0), full(1), stream)
        event = device.record(stream)
        device.compute(1.0, "a matmul")
        assert not device.is_done(event)
        device.wait("compute", event)
        assert device.waited_s() == 0.5
        device.compute(1.0)
        device.wait("compute", event)  # It is over: no wait, no span.
        assert device.waited_s() == 0.5
        assert [(s.row, s.name) for s in device.spans] == [
            ("D2H", ""),
            ("compute", "a matmul"),
            ("wait", ""),
            ("compute", ""),
        ]


def test_time_stands_still_but_in_compute_and_waits():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        device.copy(full(0), full(1), stream)
        event = device.record(stream)
        assert not device.is_done(event)
        assert not event.done.wait(0.05)
        assert device.now_s() == 0
        device.synchronize(event)
        assert device.now_s() == 1.5
        assert device.waited_s() == 0  # The compute did not wait.


def test_the_time_of_a_run_can_be_read_after_it():
    with SimulatedTransport(**SLOW) as device:
        device.compute(2.0)
    assert device.now_s() == 2.0
    assert device.spans == [Span("compute", 0.0, 2.0)]


# --- What a test sees that reads or reuses too early ---------------------------------------------


def test_a_target_is_nan_until_the_event():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "H2D")
        source = torch.arange(256, dtype=torch.float32)
        target = device.empty(KIB, CPU, "compute")
        device.copy(target, source.view(torch.uint8), stream)
        device.compute(1.4)
        assert target.view(torch.float32).isnan().all()
        device.wait("compute", device.record(stream))
        assert torch.equal(target.view(torch.float32), source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_new_memory_is_nan_in_every_floating_point_type(dtype):
    with SimulatedTransport(**SLOW) as device:
        assert device.empty(KIB, CPU, "compute").view(dtype).isnan().all()
        assert device.empty_host(KIB, is_pinned=True).view(dtype).isnan().all()


def test_what_was_in_the_target_is_gone_at_once():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        target = full(5)
        device.copy(target, full(6), stream)
        until(lambda: bool((target == 255).all()))
        assert device.now_s() == 0
        device.wait("compute", device.record(stream))
        assert bool((target == 6).all())


def test_a_copy_reads_its_source_at_its_end():
    with SimulatedTransport(**SLOW) as device:
        stream = device.new_stream(CPU, "D2H")
        source, target = full(1), full(0)
        device.copy(target, source, stream)
        device.compute(1.25)
        source.fill_(2)
        device.wait("compute", device.record(stream))
        assert bool((target == 2).all())


# --- Capacities ---------------------------------------------------------------------------------


def test_pinned_memory_is_counted_in_powers_of_two_and_ends():
    with SimulatedTransport(host_bytes=8 * KIB) as device:
        kept = [device.empty_host(3 * KIB, is_pinned=True)]
        assert device.pinned_bytes == 4 * KIB
        with pytest.raises(MemoryError):
            device.empty_host(5 * KIB, is_pinned=True)
        kept.append(device.empty_host(4 * KIB, is_pinned=True))
        assert (device.pinned_bytes, device.num_pinned_allocations) == (8 * KIB, 2)
        with pytest.raises(MemoryError):
            device.empty_host(1, is_pinned=True)
        kept.append(device.empty_host(64 * KIB, is_pinned=False))
        assert [t.numel() for t in kept] == [3 * KIB, 4 * KIB, 64 * KIB]
        assert (device.pinned_bytes, device.num_pinned_allocations) == (8 * KIB, 2)


def test_device_memory_ends_and_comes_back_with_the_death_of_storages():
    with SimulatedTransport(device_bytes=4 * KIB) as device:
        a, b = device.empty(KIB, CPU, "compute"), device.empty(3 * KIB, CPU, "compute")
        assert device.device_bytes == 4 * KIB
        with pytest.raises(torch.OutOfMemoryError, match="4096 of 4096 bytes are in use, 1 more"):
            device.empty(1, CPU, "compute")
        view = b[10:]
        del b
        assert device.device_bytes == 4 * KIB  # The view keeps the storage.
        del view
        assert device.device_bytes == KIB
        c = device.empty(2 * KIB, CPU, "compute")
        assert (device.device_bytes, device.peak_device_bytes) == (3 * KIB, 4 * KIB)
        del a, c
        assert device.device_bytes == 0


def test_sources_count_as_device_memory_once_until_they_die():
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0) as device:
        stream = device.new_stream(CPU, "D2H")
        source = full(1)
        for _ in range(3):
            device.copy(full(0), source, stream)
        assert device.device_bytes == KIB
        device.wait("compute", device.record(stream))
        del source
        until(lambda: device.device_bytes == 0)  # The thread lets go of its last job.
        assert device.peak_device_bytes == KIB


# --- Faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["D2H", "H2D"])
def test_a_copy_that_fails(direction):
    fault = {(direction, 1): Fault("fail")}
    with SimulatedTransport(**SLOW, fault=lambda *copy: fault.get(copy)) as device:
        stream = device.new_stream(CPU, direction)
        targets, events = [full(0) for _ in range(3)], []
        for target in targets:
            device.copy(target, full(3), stream)
            events.append(device.record(stream))
        device.wait("compute", events[0])
        with pytest.raises(TransferError, match=f"simulated failure of a {direction} copy"):
            device.wait("compute", events[1])
        device.wait("compute", events[2])
        assert device.now_s() == 4.5
        assert [device.failure(event) is not None for event in events] == [False, True, False]
        assert [int(target[0]) for target in targets] == [3, 255, 3]
        assert device.is_done(events[1])


def test_a_copy_that_is_corrupted_differs_in_one_byte():
    with SimulatedTransport(**SLOW, fault=lambda *copy: Fault("corrupt")) as device:
        stream = device.new_stream(CPU, "H2D")
        target = full(0)
        device.copy(target, full(4), stream)
        device.wait("compute", device.record(stream))
        assert int((target != 4).sum()) == 1
        assert device.failure(device.record(stream)) is None


def test_a_copy_that_is_delayed_holds_the_next_one_up():
    faults = {("D2H", 0): Fault("delay", delay_s=10.0)}
    with SimulatedTransport(**SLOW, fault=lambda *copy: faults.get(copy)) as device:
        stream = device.new_stream(CPU, "D2H")
        for _ in range(2):
            device.copy(full(0), full(4), stream)
        device.wait("compute", device.record(stream))
        assert device.now_s() == 13.0


# --- Its surroundings ---------------------------------------------------------------------------


def test_it_is_in_use_inside_the_with_and_nowhere_else():
    before = current_transport()
    with SimulatedTransport() as outer:
        assert current_transport() is outer
        with SimulatedTransport() as inner:
            assert current_transport() is inner
        assert current_transport() is outer
        with pytest.raises(KeyError), SimulatedTransport():
            raise KeyError
        assert current_transport() is outer
    assert current_transport() is before


def test_a_model_offloads_inside_and_not_outside():
    model = stack(3)
    x = torch.linspace(-1, 1, 64).view(4, 16)
    expected = step(model, x)
    for index, block in enumerate(model):
        model[index] = wrappers.offload_wrapper(block, min_bytes=0)
    with SimulatedTransport() as device:
        assert are_equal(step(model, x), expected)
        assert device.num_copies("D2H") == 3
        finish_offloading()
        with SimulatedTransport() as other:
            assert are_equal(step(model, x), expected)
            assert (device.num_copies("D2H"), other.num_copies("D2H")) == (3, 2)  # One stays.
    assert are_equal(step(model, x), expected)
    assert (device.num_copies("D2H"), other.num_copies("D2H")) == (3, 2)


def test_its_threads_end_with_it(no_leaks):
    with SimulatedTransport(bandwidth_bytes_per_s=1e-3) as device:
        streams = [device.new_stream(CPU, name) for name in ("D2H", "H2D")]
        targets = [full(0) for _ in streams]
        for stream, target in zip(streams, targets, strict=True):
            device.copy(target, full(1), stream)  # takes days
        assert [stream.thread.is_alive() for stream in streams] == [True, True]
    assert [stream.thread.is_alive() for stream in streams] == [False, False]
    # What was under way is done: nothing is left half copied.
    assert [int(target.sum()) for target in targets] == [KIB, KIB]


def test_its_threads_end_after_an_exception(no_leaks):
    device = SimulatedTransport()
    with pytest.raises(KeyError), device:
        _copy_and_raise(device)
    assert not any(link.thread.is_alive() for link in device._links)


def _copy_and_raise(device):
    device.copy(full(0), full(1), device.new_stream(CPU, "D2H"))
    raise KeyError


def test_backward_after_its_end_is_right():
    model = wrappers.offload_wrapper(Layer(16), min_bytes=0, keep_last=0)
    x = torch.ones(4, 16, requires_grad=True)
    with SimulatedTransport() as device:
        for is_last in (False, True):
            model.zero_grad()
            out = model(x * 2.0)
            finish_offloading()
            if not is_last:
                out.sum().backward()
        assert (device.num_copies("D2H"), device.num_copies("H2D")) == (2, 1)
    within(lambda: out.sum().backward(), 5)
    assert torch.equal(model.weight.grad, torch.full((16,), 8.0))


def test_the_clock_has_two_kinds():
    with pytest.raises(ValueError, match="clock must be 'virtual' or 'real', got 'wall'"):
        SimulatedTransport(clock="wall")


def test_a_step_in_real_time(no_leaks):
    model = stack(4, forward_s=1e-4, backward_s=2e-4)
    x = torch.linspace(-1, 1, 64).view(4, 16)
    expected = step(model, x)
    for index, block in enumerate(model):
        model[index] = wrappers.offload_wrapper(block, min_bytes=0)
    with SimulatedTransport(bandwidth_bytes_per_s=1e6, latency_s=1e-4, clock="real") as device:
        compute_on(model, device.compute)
        for _ in range(3):
            assert are_equal(step(model, x), expected)
        finish_offloading()
        assert device.num_copies("D2H") == 4 + 3 + 3  # The last one stays.
        assert device.num_copies("H2D") > 0
        assert wrappers.offload_stats()["host"].num_alive == 0
        rows = [span.row for span in device.spans]
        assert rows.count("compute") == 3 * 8
        for row in ("D2H", "H2D"):
            spans = [span for span in device.spans if span.row == row]
            assert all(s.end_s - s.start_s >= 1e-4 for s in spans)
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))
    until(lambda: device.device_bytes == 0)
