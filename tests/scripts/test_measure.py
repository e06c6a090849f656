"""What the measurements of a step count, on steps whose cost is known."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from scripts.measure import (
    count_flops,
    memory_timeline,
    peak_activation_bytes,
    peak_heap_bytes,
)

CPU = torch.device("cpu")
KIB = 2**10


def allocate(num_kib: int) -> torch.Tensor:
    return torch.empty(num_kib * KIB, dtype=torch.uint8)


def test_peak_counts_what_is_alive_at_once():
    before = allocate(64)

    def step() -> None:
        kept = allocate(4)
        del kept
        first, second = allocate(2), allocate(3)
        del first, second

    assert peak_activation_bytes(step, CPU) == 5 * KIB
    assert len(before) == 64 * KIB


def test_timeline_rises_and_falls_with_allocations():
    def step() -> None:
        first = allocate(1)
        second = allocate(2)
        del first
        del second

    timeline = memory_timeline(step, CPU)
    assert timeline.alive_bytes == [1 * KIB, 3 * KIB, 2 * KIB, 0]
    assert timeline.time_us[0] == 0
    assert timeline.time_us == sorted(timeline.time_us)


def test_a_release_by_another_thread_shows_when_the_address_is_used_again():
    size = 64 * 2**20  # mapped on its own, so that the address comes back at once

    def step() -> None:
        for _ in range(3):
            box = [torch.empty(size, dtype=torch.uint8)]
            thread = threading.Thread(target=box.clear)
            thread.start()
            thread.join()

    step()  # Where the addresses come from has settled.
    assert peak_activation_bytes(step, CPU) == size


def test_memory_from_before_the_step_does_not_count():
    box = [allocate(8)]

    def step() -> None:
        box.clear()
        allocate(2)

    assert peak_activation_bytes(step, CPU) == 2 * KIB


def test_a_step_without_allocations_has_no_peak():
    assert peak_activation_bytes(lambda: None, CPU) == 0


def test_memory_of_a_device_that_the_profiler_does_not_follow():
    with pytest.raises(ValueError, match="cpu and cuda, got meta"):
        memory_timeline(lambda: None, torch.device("meta"))


def test_flops_count_recomputed_products_again():
    weight = torch.ones(8, 16)

    def step() -> None:
        torch.ones(4, 8) @ weight
        torch.ones(4, 8) @ weight

    assert count_flops(step) == 2 * (2 * 4 * 8 * 16)


def test_the_heap_is_counted_for_all_threads():
    """A block lives for a while, and another one whose release comes from another thread."""
    nbytes = 64 * 2**20

    def step():
        for _ in range(2):
            held = [torch.ones(nbytes, dtype=torch.uint8)]
            time.sleep(0.02)
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
            time.sleep(0.02)

    assert nbytes <= peak_heap_bytes(step) < 1.1 * nbytes
