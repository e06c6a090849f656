"""The disk tier: a nameless file whose room is used again, and disks that are full or broken.

Most tests run twice: with tensors of the process's own memory, and with a simulated device, whose
tensors reach the file through pinned memory.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import wrappers
from wrappers import OffloadError, _knobs, offload_wrapper
from wrappers.offload import disk, store
from wrappers.offload.disk import DiskTier, _File, _Job
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import OffloadSettings, finish_offloading, store_for
from wrappers.offload.transfer import HostTier, TransferError

ROOT = Path(__file__).parents[2]
#: Nothing here takes so long; what does hangs.
HANG_S = 60.0
WIDTH = 64
#: Bytes of one activation: larger than a page, so that its slot has its size.
NBYTES = WIDTH * WIDTH * 4
NUM_BLOCKS = 4
#: A block's two products save their inputs, its two functions their results. The latter are the
#: inputs of the next products, and the first input of all has no graph and stays.
NUM_STORAGES = 2 * NUM_BLOCKS
NUM_TENSORS = 4 * NUM_BLOCKS - 1


@pytest.fixture(autouse=True)
def _fresh():
    store.reset_offloading()
    yield
    store.reset_offloading()
    gc.collect()


@pytest.fixture(params=["memory", "device"])
def place(request):
    """Where the tensors are that go to the file: in the process's memory, or on a device."""
    device = SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0)
    with device if request.param == "device" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def gate(monkeypatch):
    """Writes wait for this event."""
    event = threading.Event()
    write = _File.write

    def write_late(self, data, offset):
        assert event.wait(HANG_S)
        write(self, data, offset)

    monkeypatch.setattr(_File, "write", write_late)
    yield event
    event.set()
    finish_offloading()


def block(in_width: int = WIDTH, out_width: int = WIDTH) -> nn.Module:
    return nn.Sequential(
        nn.Linear(in_width, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out_width), nn.Sigmoid()
    )


def models(directory, num_blocks: int = NUM_BLOCKS, **settings) -> tuple[nn.Module, nn.Module]:
    """A stack of blocks, and the same with each block's activations going to a file."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(block() for _ in range(num_blocks)))
    settings = {"min_bytes": 1, "keep_last": 0, **settings}
    offloaded = copy.deepcopy(plain)
    for index, inner in enumerate(offloaded):
        wrapper = offload_wrapper(inner, tier="disk", directory=directory, **settings)
        wrapper.region_fqn = f"blocks.{index}"
        offloaded[index] = wrapper
    return plain, offloaded


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(WIDTH, WIDTH).requires_grad_()


def gradients(model: nn.Module, x: Tensor, *, meanwhile=lambda: None) -> list[Tensor]:
    """Those of one step; ``meanwhile`` is called between forward and backward."""
    model.zero_grad()
    x.grad = None
    loss = model(x).square().sum()
    meanwhile()
    loss.backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def stats():
    return wrappers.offload_stats()["disk"]


def tier_of(directory) -> DiskTier:
    tier = store_for(OffloadSettings(tier="disk", directory=str(directory))).tier
    assert isinstance(tier, DiskTier)
    return tier


def new_tier(directory, staging: HostTier | None = None) -> DiskTier:
    """A tier with one thread for each direction."""
    return DiskTier(directory, num_threads=1, staging=staging, note=lambda key, text: None)


def close(tier: DiskTier) -> None:
    """Wait for a tier's threads, and end them."""
    tier._writers.shutdown()
    tier._readers.shutdown()


def files_in(directory, pid: str | int = "self") -> list[str]:
    """What a process has open in a directory, with or without a name."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            link = os.readlink(entry)
            if link.startswith(f"{Path(directory).resolve()}/"):
                found.append(link)
    return found


# --- What a user sees


def test_gradients_are_those_of_the_plain_model(place, tmp_path):
    plain, offloaded = models(tmp_path)
    for _ in range(3):
        x = batch()
        assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
    assert stats().num_out == stats().num_back == 3 * NUM_STORAGES
    assert stats().out_bytes == stats().back_bytes == 3 * NUM_STORAGES * NBYTES
    assert stats().num_kept == stats().num_unmoved == stats().num_alive == 0


def test_gradients_are_right_while_writes_and_reads_overlap(place, tmp_path):
    plain, offloaded = models(tmp_path, max_inflight_bytes=2 * NBYTES, keep_last=1)
    for _ in range(5):
        x = batch()
        assert_same(gradients(offloaded, x), gradients(plain, x))
    finish_offloading()
    assert stats().num_alive == stats().used_bytes == 0


def test_views_and_types_come_back_as_they_were(place, tmp_path):
    def region(x):
        y = x.to(torch.bfloat16).t()[3:, ::2]
        return (y * y.exp()).float().sum() + x.sin().square().sum()

    class Region(nn.Module):
        def forward(self, x):
            return region(x * 1)

    wrapped = offload_wrapper(Region(), tier="disk", directory=tmp_path, min_bytes=1)
    x = batch()
    (expected,) = torch.autograd.grad(region(x * 1), x)
    loss = wrapped(x)
    finish_offloading()
    (actual,) = torch.autograd.grad(loss, x)
    assert torch.equal(actual, expected)
    assert stats().num_back > 0


def test_on_top_of_a_checkpointed_block_its_input_goes_to_the_file(place, tmp_path):
    plain, _ = models(tmp_path)
    both = copy.deepcopy(plain)
    for index, inner in enumerate(both):
        both[index] = offload_wrapper(
            wrappers.checkpoint_wrapper(inner), tier="disk", directory=tmp_path, min_bytes=1
        )
    x = batch()
    assert_same(gradients(both, x, meanwhile=finish_offloading), gradients(plain, x))
    assert stats().num_out == stats().num_back == NUM_BLOCKS - 1


def test_backward_twice_reads_twice(place, tmp_path):
    plain, offloaded = models(tmp_path)
    x = batch()
    expected = gradients(plain, x)
    offloaded.zero_grad()
    x.grad = None
    loss = offloaded(x).square().sum()
    finish_offloading()
    loss.backward(retain_graph=True)
    num_back = stats().num_back
    x.grad = None
    offloaded.zero_grad()
    loss.backward()
    assert stats().num_back - num_back == NUM_STORAGES
    assert_same([x.grad, *(p.grad for p in offloaded.parameters())], expected)


def test_memory_of_what_is_written_is_dead_after_forward(place, tmp_path):
    _, offloaded = models(tmp_path)
    watched = []

    def watch(module, args, output):
        watched.append(StorageWeakRef(output.untyped_storage()))

    for module in offloaded.modules():
        if isinstance(module, nn.Tanh | nn.Sigmoid):
            module.register_forward_hook(watch)
    out = offloaded(batch())
    finish_offloading()
    assert len(watched) == 2 * NUM_BLOCKS
    *inner, last = [reference.expired() for reference in watched]
    assert all(inner)
    assert not last
    assert out.shape == (WIDTH, WIDTH)


# --- The file


def test_directory_is_empty_at_any_time(place, tmp_path):
    _, offloaded = models(tmp_path)
    seen = []

    def look(*_):
        seen.append((os.listdir(tmp_path), len(files_in(tmp_path))))

    for module in offloaded:
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    gradients(offloaded, batch(), meanwhile=look)
    finish_offloading()
    look()
    assert len(seen) == 2 * NUM_BLOCKS + 2
    assert all(names == [] for names, _ in seen)
    assert [num for _, num in seen] == [1] * len(seen)


def test_nothing_is_left_after_an_exception(place, tmp_path):
    _, offloaded = models(tmp_path)
    handle = offloaded[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        offloaded(batch())
    handle.remove()
    finish_offloading()
    assert os.listdir(tmp_path) == []
    assert stats().num_out > 0
    assert stats().num_alive == stats().used_bytes == 0


SCRIPT = """
import os, sys
import torch
from torch import nn
from wrappers import offload_wrapper
from wrappers.offload.store import finish_offloading

def build():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Sigmoid())
    return inner, offload_wrapper(inner, tier="disk", directory=sys.argv[1], min_bytes=1)

plain, model = build()
x = torch.randn(64, 64).requires_grad_()
loss = model(x).sum()
finish_offloading()
"""


def run_script(directory, rest: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + rest, str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_nothing(tmp_path, number):
    with run_script(tmp_path, "print('away', flush=True)\nsys.stdin.read()") as process:
        assert process.stdout.readline() == "away\n"
        assert len(files_in(tmp_path, process.pid)) == 1
        assert os.listdir(tmp_path) == []
        process.send_signal(number)
        assert process.wait(HANG_S) == -number
    assert os.listdir(tmp_path) == []


def test_a_process_that_ends_in_mid_step_leaves_nothing(tmp_path):
    with run_script(tmp_path, "sys.exit(3)") as process:
        assert process.wait(HANG_S) == 3
    assert os.listdir(tmp_path) == []


def test_room_is_used_again_from_the_second_step_on(place, tmp_path):
    _, offloaded = models(tmp_path, keep_last=1)
    sizes, fresh = [], []
    for _ in range(5):
        gradients(offloaded, batch(), meanwhile=finish_offloading)
        finish_offloading()
        now = stats()
        assert now.used_bytes == 0
        sizes.append(os.fstat(tier_of(tmp_path)._file.descriptor).st_size)
        fresh.append(now.num_taken - now.num_reused)
        assert now.peak_bytes == sizes[-1] == disk.SLAB_BYTES
        assert now.num_allocations == 1
    assert fresh == [NUM_STORAGES] * 5
    assert stats().reuse_rate > 0.7


def test_wrappers_with_one_directory_share_a_file(place, tmp_path):
    link = tmp_path / "link"
    real = tmp_path / "real"
    real.mkdir()
    link.symlink_to(real)
    model = nn.Sequential(
        offload_wrapper(block(), tier="disk", directory=real, min_bytes=1),
        offload_wrapper(block(), tier="disk", directory=str(link), min_bytes=1),
    )
    gradients(model, batch())
    assert [tier.name for tier in wrappers.offload_stats().tiers] == [f"disk {real.resolve()}"]
    assert len(files_in(tmp_path)) == 1


def test_two_directories_have_two_files(tmp_path):
    model = nn.Sequential(
        *(
            offload_wrapper(block(), tier="disk", directory=tmp_path / name, min_bytes=1)
            for name in ("a", "b")
        )
    )
    gradients(model, batch())
    assert len(wrappers.offload_stats().tiers) == 2
    assert len(files_in(tmp_path / "a")) == len(files_in(tmp_path / "b")) == 1


def threads_of_tiers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("wrappers ")]


def test_threads_and_file_end_with_the_tier(place, tmp_path):
    _, offloaded = models(tmp_path)
    gradients(offloaded, batch(), meanwhile=finish_offloading)
    assert 2 <= len(threads_of_tiers()) <= 2 * _knobs.OFFLOAD_DISK_THREADS
    assert len(files_in(tmp_path)) == 1
    threads = [t for t in threading.enumerate() if t.name.startswith("wrappers ")]
    finish_offloading()
    store.reset_offloading()
    gc.collect()
    for thread in threads:
        thread.join(HANG_S)
    assert threads_of_tiers() == []
    assert files_in(tmp_path) == []


def test_threads_finish_what_is_queued_before_they_end(gate, tmp_path):
    tier = new_tier(tmp_path)
    sent = [tier.send(batch().detach(), NBYTES) for _ in range(3)]
    threading.Timer(0.05, gate.set).start()
    close(tier)
    assert all(s.is_done() and s.origin is None for s in sent)
    assert threads_of_tiers() == []


# --- What is on its way is bounded


@pytest.fixture
def gate_until_first_wait(monkeypatch):
    """Nothing is written until somebody waits for a write, and then all."""
    event = threading.Event()
    write, wait = _File.write, _Job.wait

    def write_late(self, data, offset):
        assert event.wait(HANG_S)
        write(self, data, offset)

    def wait_now(self):
        event.set()
        wait(self)

    monkeypatch.setattr(_File, "write", write_late)
    monkeypatch.setattr(_Job, "wait", wait_now)
    return event


@pytest.mark.parametrize("num_copies", [1, 3])
def test_limit_of_bytes_bounds_the_memory_that_waits_for_the_disk(
    gate_until_first_wait, tmp_path, num_copies
):
    _, offloaded = models(tmp_path, max_inflight_bytes=num_copies * NBYTES)
    loss = offloaded(batch()).sum()
    assert gate_until_first_wait.is_set()
    assert stats().inflight_bytes == num_copies * NBYTES
    loss.backward()
    assert stats().inflight_bytes == num_copies * NBYTES


def test_limit_of_copies_bounds_the_queue(gate_until_first_wait, tmp_path):
    with _knobs.override(OFFLOAD_INFLIGHT_COPIES=2):
        _, offloaded = models(tmp_path)
        out = offloaded(batch())
    assert gate_until_first_wait.is_set()
    assert stats().inflight_bytes == 2 * NBYTES
    del out


def test_what_has_not_left_yet_is_not_read_back(gate, tmp_path):
    plain, offloaded = models(tmp_path)
    x = batch()
    assert_same(gradients(offloaded, x), gradients(plain, x))
    assert stats().num_back == 0
    assert stats().num_out == NUM_STORAGES
    assert stats().num_unmoved == NUM_TENSORS


def test_device_memory_is_free_before_the_file_is_written(gate, tmp_path):
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0):
        plain, offloaded = models(tmp_path)
        watched = []
        offloaded[0].register_forward_hook(
            lambda module, args, output: watched.append(StorageWeakRef(output.untyped_storage()))
        )
        x = batch()
        expected = gradients(plain, x)
        x.grad = None
        loss = offloaded(x).square().sum()
        finish_offloading()  # Waits for the copies from the device.
        assert watched[0].expired()
        gate.set()
        loss.backward()
        assert_same([x.grad, *(p.grad for p in offloaded.parameters())], expected)


def test_reads_are_ahead_in_the_order_of_backward(place, tmp_path, monkeypatch):
    widths = [64, 96, 128, 160, 192]
    fetched = []
    fetch = DiskTier.fetch
    monkeypatch.setattr(
        DiskTier, "fetch", lambda self, sent: fetched.append(sent.nbytes) or fetch(self, sent)
    )
    model = nn.Sequential(
        *(
            offload_wrapper(
                nn.Sequential(nn.Linear(before, after), nn.Sigmoid()),
                tier="disk",
                directory=tmp_path,
                min_bytes=1,
                keep_last=0,
            )
            for before, after in itertools.pairwise(widths)
        )
    )
    gradients(model, batch(), meanwhile=finish_offloading)
    # The result of a block is saved by itself and by the block after it, and moves once.
    assert fetched == [WIDTH * width * 4 for width in reversed(widths[1:])]
    assert stats().num_ahead == len(fetched) - 1


# --- What is not wanted any more


def test_abandoned_writes_are_not_made(gate, tmp_path):
    with _knobs.override(OFFLOAD_DISK_THREADS=1):
        _, offloaded = models(tmp_path)
        watched = []
        for inner in offloaded:
            inner.register_forward_hook(
                lambda module, args, output: watched.append(
                    StorageWeakRef(output.untyped_storage())
                )
            )
        tier, written = tier_of(tmp_path), []
        put = tier._put
        tier._put = lambda sent, data: written.append(sent) or put(sent, data)
        out = offloaded(batch())
        num_out = stats().num_out
        assert num_out == NUM_STORAGES
        del out
        # The first one may have begun; all others let go of their memory at once.
        assert stats().num_alive == stats().used_bytes == 0
        assert all(reference.expired() for reference in watched)
        gate.set()
        finish_offloading()
        close(tier)
    assert len(written) <= 1


def test_pinned_memory_of_abandoned_writes_is_used_again(gate, tmp_path):
    settings = {"OFFLOAD_STAGING_BYTES": 4 * NBYTES, "OFFLOAD_SLAB_BYTES": NBYTES}
    with (
        _knobs.override(**settings, OFFLOAD_DISK_THREADS=1),
        SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0),
    ):
        plain, offloaded = models(tmp_path, num_blocks=1)
        x = batch()
        out = offloaded(x)
        del out
        gate.set()
        for _ in range(3):
            assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
        finish_offloading()
        tier = tier_of(tmp_path)
        close(tier)
        tier._reclaim()
        assert [pool.used_bytes for pool in tier.host_pools] == [0, 0]
        assert stats().num_kept == 0


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_little_staging_memory_is_enough(tmp_path, num_slots):
    settings = {"OFFLOAD_STAGING_BYTES": num_slots * NBYTES, "OFFLOAD_SLAB_BYTES": NBYTES}
    with (
        _knobs.override(**settings),
        SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0),
    ):
        plain, offloaded = models(tmp_path)
        for _ in range(3):
            x = batch()
            assert_same(gradients(offloaded, x), gradients(plain, x))
        finish_offloading()
        assert stats().num_kept == 0
        assert stats().peak_host_bytes == num_slots * NBYTES
        tier = tier_of(tmp_path)
        close(tier)
        tier._reclaim()
        assert [pool.used_bytes for pool in tier.host_pools] == [0, 0]


# --- Disks that are full or broken


@pytest.fixture
def disk_of(monkeypatch):
    """Give the disk a size."""

    def limit(num_bytes: int) -> None:
        def allocate(descriptor, offset, nbytes):
            if offset + nbytes > num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.truncate(descriptor, offset + nbytes)

        monkeypatch.setattr(os, "posix_fallocate", allocate)
        monkeypatch.setattr(disk, "SLAB_BYTES", NBYTES)

    return limit


@pytest.mark.parametrize("num_slots", [0, 4])
def test_what_does_not_fit_on_the_disk_stays_and_is_said_once(place, tmp_path, disk_of, num_slots):
    disk_of(num_slots * NBYTES)
    plain, offloaded = models(tmp_path)
    x = batch()
    expected = gradients(plain, x)
    with pytest.warns(UserWarning, match="no room left") as caught:
        steps = [gradients(offloaded, x, meanwhile=finish_offloading) for _ in range(3)]
    for actual in steps:
        assert_same(actual, expected)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"in the disk {tmp_path.resolve()} tier, which holds {num_slots * NBYTES:,}" in text
    assert "Free some of the disk, choose another directory=" in text
    # Storages, each once a block; one that two blocks save needs room only once.
    assert stats().num_kept == 3 * {0: 11, 4: 5}[num_slots]
    assert stats().num_out == stats().num_back == 3 * num_slots


def test_room_on_a_full_disk_serves_other_sizes_later(tmp_path, disk_of):
    disk_of(8 * NBYTES)
    tier = new_tier(tmp_path)
    tensor = torch.ones(2 * NBYTES, dtype=torch.uint8)

    def fill(nbytes: int) -> int:
        """How many tensors of a size fit; they are discarded again."""
        sent = []
        while (one := tier.send(tensor[:nbytes].clone(), nbytes)) is not None:
            sent.append(one)
        for one in sent:
            one.finish()
            tier.discard(one)
        return len(sent)

    assert [fill(NBYTES), fill(2 * NBYTES), fill(NBYTES), fill(2 * NBYTES)] == [8, 4, 8, 4]
    assert os.fstat(tier._file.descriptor).st_size == 8 * NBYTES
    close(tier)


def test_freed_room_in_a_file_is_joined_and_cut(tmp_path):
    file = _File(tmp_path)
    first, second, third = (file.grow(4096) for _ in range(3))
    assert [extent.offset for extent in (first, second, third)] == [0, 4096, 8192]
    del second
    del first
    whole = file.grow(8192)
    assert whole.offset == 0
    del whole
    small = file.grow(4096)
    assert small.offset == 0
    assert file.grow(8192).offset == 12288
    assert file.grow(4096).offset == 4096
    assert third.offset == 8192


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(OSError, match=r"activations cannot be offloaded to directory=.*/file/x'"):
        offload_wrapper(block(), tier="disk", directory=path / "x")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied\. Pass a directory on a local"):
        offload_wrapper(block(), tier="disk", directory=tmp_path)


def test_a_directory_that_is_missing_is_made(tmp_path):
    model = offload_wrapper(block(), tier="disk", directory=tmp_path / "a" / "b", min_bytes=1)
    gradients(model, batch())
    assert stats().name == f"disk {(tmp_path / 'a' / 'b').resolve()}"


def test_a_disk_that_is_gone_when_the_file_is_made_keeps_the_tensors(tmp_path):
    directory = tmp_path / "a"
    plain, offloaded = models(directory)
    directory.rmdir()
    x = batch()
    with pytest.warns(UserWarning, match="no room left"):
        actual = gradients(offloaded, x)
    assert_same(actual, gradients(plain, x))
    assert stats().num_out == 0


def _io_error(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_write_that_fails_keeps_the_tensor_and_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", _io_error)
    plain, offloaded = models(tmp_path)
    x = batch()
    with pytest.warns(UserWarning, match="has failed: .*Input/output error") as caught:
        steps = [gradients(offloaded, x, meanwhile=finish_offloading) for _ in range(2)]
    for actual in steps:
        assert_same(actual, gradients(plain, x))
    assert len(caught) == 1
    assert str(caught[0].message).startswith("region `blocks.3`: a copy to the disk")
    assert stats().num_back == 0
    finish_offloading()
    assert stats().used_bytes == 0


def test_a_write_that_fails_keeps_the_bytes_in_pinned_memory(tmp_path, monkeypatch):
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0):
        monkeypatch.setattr(os, "pwrite", _io_error)
        reads = []
        monkeypatch.setattr(_File, "read", lambda *args: reads.append(args))
        plain, offloaded = models(tmp_path)
        x = batch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                assert_same(
                    gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x)
                )
        assert reads == []
        assert stats().num_back == stats().num_out == 2 * NUM_STORAGES
        finish_offloading()
        tier = tier_of(tmp_path)
        close(tier)
        tier._reclaim()
        assert [pool.used_bytes for pool in tier.host_pools] == [0, 0]
        assert stats().used_bytes == 0


def test_a_read_that_fails_once_is_repeated(place, tmp_path, monkeypatch):
    read, places = os.preadv, []

    def preadv(descriptor, data, offset):
        places.append(offset)
        if places.count(offset) == 1:
            _io_error()
        return read(descriptor, data, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    plain, offloaded = models(tmp_path)
    x = batch()
    assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
    assert len(set(places)) == NUM_STORAGES
    assert min(places.count(offset) for offset in places) == 2


@pytest.mark.parametrize(
    ("result", "words"),
    [(_io_error, "Input/output error"), (lambda *_: 0, "shorter than what was written")],
)
def test_a_read_that_fails_twice_is_an_error(place, tmp_path, monkeypatch, result, words):
    plain, offloaded = models(tmp_path)
    x = batch()
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", result)
        with pytest.raises(OffloadError, match=words) as caught:
            gradients(offloaded, x, meanwhile=finish_offloading)
        finish_offloading()
    text = str(caught.value)
    assert text.startswith(f"region `blocks.3`: {NBYTES:,} bytes that backward needs did not come")
    assert f"from the disk {tmp_path.resolve()} tier, in two attempts" in text
    assert (caught.value.fqn, caught.value.tier) == ("blocks.3", "disk")
    assert caught.value.num_bytes == NBYTES
    # The disk is well again, and nothing was lost.
    del caught
    gc.collect()
    assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
    finish_offloading()
    assert stats().num_alive == stats().used_bytes == 0


def test_parts_that_are_written_and_read_short_are_put_together(place, tmp_path, monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:5000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, data, at: read(fd, [data[0][:3000]], at))
    plain, offloaded = models(tmp_path)
    x = batch()
    assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
    assert stats().num_back == NUM_STORAGES


@pytest.mark.parametrize("at", [0, NBYTES - 1])
def test_changed_bytes_in_the_file_are_an_error_and_no_gradient(place, tmp_path, at):
    _, offloaded = models(tmp_path, num_blocks=1)
    x = batch()
    loss = offloaded(x).square().sum()
    finish_offloading()
    for job in tier_of(tmp_path)._staged:  # What has left the device may not be written yet.
        job.wait()
    descriptor = tier_of(tmp_path)._file.descriptor
    (byte,) = os.pread(descriptor, 1, at)
    assert os.pwrite(descriptor, bytes([byte ^ 16]), at) == 1
    with pytest.raises(OffloadError, match="bytes in the file are not those that were written"):
        loss.backward()
    assert x.grad is None


def test_bytes_that_come_back_wrong_once_are_read_again(place, tmp_path, monkeypatch):
    read, numbers = _File.read, []

    def read_wrong(self, data, offset):
        read(self, data, offset)
        numbers.append(offset)
        if len(numbers) == 1:
            data[7] ^= 1

    monkeypatch.setattr(_File, "read", read_wrong)
    plain, offloaded = models(tmp_path)
    x = batch()
    assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
    assert len(set(numbers)) == NUM_STORAGES
    assert numbers.count(numbers[0]) == 2


# --- What failed jobs leave


def test_a_failed_write_does_not_keep_the_tensor_when_its_graph_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", _io_error)
    tier = new_tier(tmp_path)
    tensor = batch().detach()
    sent = tier.send(tensor, NBYTES)
    sent.finish()
    sent.settle()
    assert str(tier.failure(sent)) == "[Errno 5] Input/output error"
    memory = StorageWeakRef(tensor.untyped_storage())
    slot = sent.slot  # The pool keeps it for the next one.
    del tensor
    assert not memory.expired()
    tier.discard(sent)
    del sent
    assert memory.expired()
    assert slot.fence.is_done()
    close(tier)


def test_a_failed_read_does_not_keep_its_target(tmp_path, monkeypatch):
    tier = new_tier(tmp_path)
    sent = tier.send(batch().detach(), NBYTES)
    sent.finish()
    monkeypatch.setattr(os, "preadv", _io_error)
    landing = tier.fetch(sent)
    memory = StorageWeakRef(landing.target.untyped_storage())
    with pytest.raises(TransferError, match="could not be read") as caught:
        tier.land(landing, None)
    del landing, caught
    assert memory.expired()
    close(tier)


@contextlib.contextmanager
def staged_tier(directory, *, num_slots: int, bandwidth_bytes_per_s=float("inf")):
    """A disk tier whose pinned memory has room for so many activations."""
    with (
        _knobs.override(OFFLOAD_SLAB_BYTES=NBYTES),
        SimulatedTransport(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=0.0) as device,
    ):
        staging = HostTier(
            device, pinned_bytes=num_slots * NBYTES, pageable_bytes=0, note=lambda *_: None
        )
        tier = new_tier(directory, staging)
        try:
            yield tier, device
        finally:
            close(tier)


def test_pinned_memory_comes_back_from_a_write_that_fails_while_it_is_discarded(
    tmp_path, monkeypatch
):
    """Between the failure and the end of the job, neither side may count on the other."""
    monkeypatch.setattr(os, "pwrite", _io_error)
    has_failed, may_end = threading.Event(), threading.Event()

    def late(method):
        def end(self, *args):
            if threading.current_thread().name.startswith("wrappers write"):
                has_failed.set()
                assert may_end.wait(HANG_S)
            method(self, *args)

        return end

    for name in ("set_result", "set_exception"):
        monkeypatch.setattr(Future, name, late(getattr(Future, name)))
    with staged_tier(tmp_path, num_slots=2) as (tier, _):
        sent = tier.send(batch().detach(), NBYTES)
        assert has_failed.wait(HANG_S)
        assert tier.host_pools[0].used_bytes == NBYTES
        tier.discard(sent)
        may_end.set()
        sent.event.wait()
        tier._reclaim()
        assert tier.host_pools[0].used_bytes == 0


@pytest.mark.parametrize("num_slots", [1, 2])
def test_pinned_memory_of_a_failed_write_is_not_used_again_before_it_has_been_copied_back(
    tmp_path, monkeypatch, num_slots
):
    monkeypatch.setattr(os, "pwrite", _io_error)
    with staged_tier(tmp_path, num_slots=num_slots, bandwidth_bytes_per_s=1e6) as (tier, _):
        sent = tier.send(batch().detach(), NBYTES)
        sent.event.wait()
        slot = sent.event.staged.slot
        landing = tier.fetch(sent)
        landing.event.wait()
        # In virtual time, the copy to the device has only begun.
        assert not landing.is_done()
        assert not slot.fence.is_done()
        tier.land(landing, "compute")
        assert slot.fence.is_done()
        assert torch.equal(landing.target.view(torch.float32).view(WIDTH, WIDTH), batch())


def test_a_tensor_waits_for_pinned_memory_that_reads_hold(tmp_path, monkeypatch):
    begun, gate = threading.Event(), threading.Event()
    read = _File.read

    def read_late(self, data, offset):
        begun.set()
        assert gate.wait(HANG_S)
        read(self, data, offset)

    monkeypatch.setattr(_File, "read", read_late)
    with staged_tier(tmp_path, num_slots=1) as (tier, _):
        first = tier.send(batch().detach(), NBYTES)
        first.event.wait()
        landing = tier.fetch(first)
        assert begun.wait(HANG_S)
        timer = threading.Timer(0.05, gate.set)
        timer.start()
        second = tier.send(batch().detach(), NBYTES)
        assert second is not None
        second.event.wait()
        tier.land(landing, "compute")
        timer.join()


# --- Surroundings


def test_a_default_device_does_not_reach_the_bytes(tmp_path):
    plain, offloaded = models(tmp_path)
    x = batch()
    expected = gradients(plain, x)
    x.grad = None
    loss = offloaded(x).square().sum()
    finish_offloading()
    with torch.device("meta"):
        loss.backward()
    assert_same([x.grad, *(p.grad for p in offloaded.parameters())], expected)


def test_tensors_of_the_host_go_to_the_file_beside_an_accelerator(tmp_path):
    class Elsewhere(SimulatedTransport):
        """An accelerator on which nothing lies."""

        def is_on_device(self, tensor):
            return False

        def current_stream(self, device):
            raise ValueError(f"{device} is no accelerator")

    with Elsewhere():
        plain, offloaded = models(tmp_path)
        x = batch()
        assert_same(gradients(offloaded, x, meanwhile=finish_offloading), gradients(plain, x))
        assert stats().num_back == NUM_STORAGES
        assert stats().peak_host_bytes == 0


def test_a_forked_process_does_not_disturb_its_parent(tmp_path):
    rest = """
pid = os.fork()
if pid == 0:
    del loss  # Its copy of the graph, and of the books.
    for _ in range(3):
        y = torch.randn(64, 64).requires_grad_()
        model(y).sum().backward()
    os._exit(0 if y.grad is not None else 1)
assert os.waitpid(pid, 0)[1] == 0
loss.backward()
gradient, x.grad = x.grad, None
plain(x).sum().backward()
assert torch.equal(gradient, x.grad)
print("equal")
"""
    with run_script(tmp_path, rest) as process:
        assert process.stdout.read() == "equal\n"
        assert process.wait(HANG_S) == 0
    assert os.listdir(tmp_path) == []


def test_backward_in_a_forked_process_ends_in_an_error_and_not_in_a_hang(tmp_path):
    rest = """
pid = os.fork()
if pid == 0:
    try:
        loss.backward()
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
loss.backward()
"""
    with run_script(tmp_path, rest) as process:
        assert process.stdout.read().startswith("a forked process has no threads that read")
        assert process.wait(HANG_S) == 0


def test_a_forked_process_may_end_like_any_other(tmp_path):
    with run_script(tmp_path, "pid = os.fork()\nif pid: sys.exit(os.waitpid(pid, 0)[1])") as p:
        assert p.wait(HANG_S) == 0


def test_a_graph_outlives_the_tier_in_the_books(place, tmp_path):
    plain, offloaded = models(tmp_path)
    x = batch()
    expected = gradients(plain, x)
    x.grad = None
    loss = offloaded(x).square().sum()
    finish_offloading()
    tier = weakref.ref(tier_of(tmp_path))
    store.reset_offloading()
    gc.collect()
    loss.backward()
    assert_same([x.grad, *(p.grad for p in offloaded.parameters())], expected)
    del loss
    gc.collect()
    assert tier() is None


def test_a_write_that_is_not_made_does_not_let_a_newer_one_overtake_an_older(monkeypatch, tmp_path):
    """Two writes run, two more of their slots are abandoned before they begin, two are wanted."""
    tier = DiskTier(tmp_path, num_threads=2, staging=None, note=lambda key, text: None)
    gates = [threading.Event(), threading.Event()]
    has_started = threading.Semaphore(0)
    numbers = itertools.count()
    write = _File.write

    def slow_write(self, data, offset):
        number = next(numbers)
        if number < len(gates):
            has_started.release()
            assert gates[number].wait(HANG_S)
        write(self, data, offset)

    monkeypatch.setattr(_File, "write", slow_write)

    def send(value: float):
        return tier.send(torch.full((64,), value), 256)

    running = []
    for value in (1.0, 2.0):
        running.append(send(value))
        assert has_started.acquire(timeout=HANG_S)
    for sent in running:
        tier.discard(sent)
    for sent in [send(3.0), send(4.0)]:
        tier.discard(sent)
    wanted = [send(5.0), send(6.0)]
    (late,) = [sent for sent in wanted if sent.slot is running[1].slot]
    gates[0].set()  # The other write still runs.
    time.sleep(0.05)
    assert not late.is_done()
    gates[1].set()
    for sent, value in zip(wanted, (5.0, 6.0), strict=True):
        landing = tier.fetch(sent)
        tier.land(landing, None)
        assert landing.target.view(torch.float32).tolist() == [value] * 64
    close(tier)
