"""Who owns what is away: nothing outlives its graph, nobody gets hold of what is dying."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import wrappers
from tests.offload.helpers import are_equal, offload_blocks, stack, step
from wrappers import _device
from wrappers.offload import store as stores
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.offload.store import OffloadSettings, begin_group, finish_offloading, store_for
from wrappers.policy import CheckpointPolicy

SETTINGS = OffloadSettings(min_bytes=0)
AT_ONCE = {"bandwidth_bytes_per_s": float("inf"), "latency_s": 0.0}


def the_store() -> stores.Store:
    store = store_for(SETTINGS)
    assert store is not None
    return store


def test_the_store_remembers_nothing_that_is_gone():
    model, x = stack(4, num_layers=2), torch.randn(8, 16)
    offload_blocks(model, keep_last=0)
    with SimulatedTransport():
        for _ in range(5):
            step(model, x)
            assert not the_store()._away
        assert the_store().stats().num_alive == 0


def test_a_claim_that_is_dying_cannot_be_had():
    """Its storage is saved again while the note of its death is taken."""
    with SimulatedTransport() as device:
        store = the_store()
        group = begin_group("a", "a", keep_last=0)
        tensor = torch.randn(64)
        claim = store.put(tensor, group, SETTINGS)
        found = []
        work_off = store._work_off
        store._work_off = lambda: (found.append(claim_of(store)), work_off())  # type: ignore
        del claim
        assert found == [None]
        store._work_off = work_off
        again = store.put(tensor, group, SETTINGS)
        assert device.num_copies("D2H") == 2
        storage = store.take(again.offloaded, group, SETTINGS)
        assert are_equal([torch.empty(0).set_(storage)], [tensor])


def claim_of(store: stores.Store) -> object:
    (offloaded,) = store._away.values()
    return offloaded.claim()


def test_a_failed_send_gives_its_buffer_back(monkeypatch):
    with SimulatedTransport() as device:
        store = the_store()
        group = begin_group("a", "a", keep_last=0)

        def no_memory(*args):
            raise torch.OutOfMemoryError("no memory for a checksum")

        with monkeypatch.context() as broken:
            broken.setattr(device, "copy", no_memory)
            for _ in range(3):
                with pytest.raises(torch.OutOfMemoryError):
                    store.put(torch.randn(64), group, SETTINGS)
        assert store.stats().used_bytes == 0
        assert store.stats().num_alive == 0


@pytest.mark.parametrize("prefetch", [0, 1])
def test_what_is_ahead_makes_way_where_the_device_is_full(prefetch):
    """A step that fits without prefetching fits with it."""
    nbytes = 32 * 64 * 4
    regions = [stack(1, num_layers=1, dim=64) for _ in range(3)]
    inputs = [torch.randn(64, 64), torch.randn(32, 64), torch.randn(32, 64)]
    for region in regions:
        offload_blocks(region, keep_last=0, prefetch=prefetch, max_inflight_bytes=8 * nbytes)
    with SimulatedTransport(device_bytes=2 * nbytes, bandwidth_bytes_per_s=1e6) as device:
        graphs = [
            region(x.clone().requires_grad_() * 1.0).sum()
            for region, x in zip(regions, inputs, strict=True)
        ]
        device.compute(100.0)
        the_store().stats()  # What has left is let go of.
        # The second one is fetched ahead after the third, and is not wanted then.
        graphs.pop(2).backward()
        graphs.pop(0).backward()
        graphs.pop(0).backward()
        assert wrappers.offload_stats()["host"].num_back >= 3


def test_nested_regions_do_not_fetch_everything_again_and_again():
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList(stack(6, num_layers=2))

        def forward(self, x):
            for block in self.inner:
                x = block(x.sin()).cos()
            return x

    model, x = Outer(), torch.randn(8, 16)
    expected = step(model, x)
    for index, block in enumerate(model.inner):
        model.inner[index] = wrappers.offload_wrapper(block, min_bytes=0, keep_last=0)
    outer = wrappers.offload_wrapper(model, min_bytes=0, keep_last=0)
    with SimulatedTransport(**AT_ONCE):
        for _ in range(3):
            assert are_equal(step(outer, x), expected)
        stats = wrappers.offload_stats()["host"]
        # What two regions save comes back for each of them.
        assert stats.num_unmoved == 0
        assert stats.num_out <= stats.num_back < 1.2 * stats.num_out


def test_a_graph_that_is_kept_does_not_end_the_learning():
    model, x = stack(4, num_layers=2), torch.randn(8, 16)
    offload_blocks(model, keep_last=1)
    with SimulatedTransport():
        kept = model(x.requires_grad_())
        for _ in range(3):
            step(model, x)
        before = wrappers.offload_stats()["host"].num_out
        step(model, x)
        assert wrappers.offload_stats()["host"].num_out - before == 3 * 2  # the last one stays
        del kept


def test_random_numbers_that_do_not_come_back_are_not_drawn_again():
    """In a rerun the generator is elsewhere, so the numbers would be others."""
    draw = torch.ops.aten.bernoulli.default

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_CPU_OFFLOAD if op is draw else False

    class Noise(torch.nn.Module):
        def forward(self, x):
            first, second = torch.bernoulli(half), torch.bernoulli(half)
            return (x.sin() * first).sin() * second

    half = torch.full((64,), 0.5)
    x = torch.randn(64, requires_grad=True)
    region = wrappers.checkpoint_wrapper(
        Noise(), policy=policy, impl=wrappers.CheckpointImpl.NO_REENTRANT
    )
    with SimulatedTransport(**AT_ONCE, fault=lambda direction, number: _fail_back(direction)):
        loss = region(x).sum()
        with pytest.raises(wrappers.OffloadError):
            loss.backward()


def _fail_back(direction: str) -> Fault | None:
    return Fault("fail") if direction == "H2D" else None


def test_pinned_memory_can_be_released_on_every_build():
    _device.release_pinned()


def test_a_forked_process_drops_graphs_of_its_parent(tmp_path):
    """While a thread of the disk's holds its lock: the child has no such thread."""
    script = f"""
        import os, signal, sys, threading, torch, wrappers
        from torch import nn
        from wrappers.offload import store
        model = wrappers.offload_wrapper(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
            tier="disk", directory={str(tmp_path)!r}, min_bytes=0,
        )
        out = model(torch.randn(4, 8, requires_grad=True) * 1)
        (disk,) = store._stores.values()
        held, over = threading.Event(), threading.Event()
        def hold():
            with disk.tier._lock:
                held.set()
                over.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if not child:
            signal.alarm(60)
            del out
            os._exit(7)
        over.set()
        thread.join()
        _, status = os.waitpid(child, 0)
        out.sum().backward()
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 7


def test_a_garbage_collection_in_a_thread_of_the_disk_hangs_nothing(tmp_path, monkeypatch):
    model, x = stack(3, num_layers=2), torch.randn(8, 16)
    expected = step(model, x)
    offload_blocks(model, tier="disk", directory=str(tmp_path), keep_last=0)
    copy = SimulatedTransport.copy

    def collecting_copy(self, target, source, stream):
        if threading.current_thread().name.startswith("wrappers read"):
            gc.collect()
        copy(self, target, source, stream)

    monkeypatch.setattr(SimulatedTransport, "copy", collecting_copy)
    with SimulatedTransport():
        cycle = [model(x.requires_grad_())]
        cycle.append(cycle)
        gc.disable()
        try:
            del cycle
            worker = threading.Thread(target=lambda: results.append(step(model, x)), daemon=True)
            results: list[object] = []
            worker.start()
            worker.join(60)
        finally:
            gc.enable()
        assert results, "hangs"
        assert are_equal(results[0], expected)
        finish_offloading()
