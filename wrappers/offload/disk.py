"""The disk tier: bytes wait for backward in a file.

One file for a directory and process holds all of them, cut into slots by the same
:class:`~wrappers.offload.pool.Pool` as pinned memory: room is allocated ahead, so a full disk is
found before anything is written, and used again in the next step. The file has no name from the
start, or loses it at once where the file system knows no nameless files, so the kernel removes it
when the process ends, however it ends: nothing has to be cleaned up, after ``kill -9`` neither.

A few threads write, as many read. A tensor that lies in the process's memory is written from there
and read into new memory. One that lies on an accelerator goes through pinned memory, in both
directions, by the host tier::

    device ──D2H──> pinned slot ──write──> file ──read──> pinned slot ──H2D──> device

Each job waits for those that its slot has had before, which are older, so the oldest job of all
never waits and nothing locks up. A checksum (CRC-32) is written down at each write and compared
at each read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wrappers import _device
from wrappers.offload.pool import Pool, Slot
from wrappers.offload.transfer import HostTier, Landing, Sent, TransferError, bytes_of, digest

__all__ = ["DiskTier", "check_directory"]

#: The least room that a file grows by.
SLAB_BYTES = 64 * 1024 * 1024

#: The most room in a file. The disk is the limit.
_NO_LIMIT = 1 << 60


class CorruptedError(TransferError):
    """Bytes came back from a file that are not those that were written."""


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """Make a directory if it is not there, and write a file to it.

    Returns:
        Its absolute path, without links.

    Raises:
        OSError: It cannot be made, or no file can be written in it. Says so in words.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"activations cannot be offloaded to directory={str(directory)!r}: {error.strerror}. "
            "Pass a directory on a local disk in which this process may write files",
        ) from error
    return path.resolve()


class _Extent:
    """A part of a file. When it dies, its room is free."""

    __slots__ = ("_end", "_free", "offset")

    def __init__(self, offset: int, nbytes: int, free: list[tuple[int, int]]) -> None:
        self.offset = offset
        self._end = offset + nbytes
        self._free = free

    def __del__(self) -> None:
        self._free.append((self.offset, self._end))


class _File:
    """A nameless file that grows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor = -1
        self._size = 0
        #: Beginnings and ends of what is not in use any more.
        self._free: list[tuple[int, int]] = []

    @property
    def descriptor(self) -> int:
        """The open file's; opens it when it is first wanted."""
        if self._descriptor < 0:
            file = tempfile.TemporaryFile(  # noqa: SIM115 - it lives as long as this object
                dir=self._directory, prefix="wrappers-", buffering=0
            )
            weakref.finalize(self, file.close)
            self._descriptor = file.fileno()
        return self._descriptor

    def grow(self, nbytes: int) -> _Extent:
        """Get more room.

        Raises:
            MemoryError: The disk is full.
        """
        offset = self._reuse(nbytes)
        if offset is None:
            offset = self._allocate(nbytes)
        return _Extent(offset, nbytes, self._free)

    def _reuse(self, nbytes: int) -> int | None:
        """Where enough room in one piece is free; the file never shrinks."""
        pieces: list[tuple[int, int]] = []
        while self._free:  # Others may die meanwhile.
            pieces.append(self._free.pop())
        found = None
        end_before = -1
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(pieces):
            merged.append((merged.pop()[0] if begin == end_before else begin, end))
            end_before = end
        for begin, end in merged:
            if found is None and end - begin >= nbytes:
                found, begin = begin, begin + nbytes
            if begin < end:
                self._free.append((begin, end))
        return found

    def _allocate(self, nbytes: int) -> int:
        offset = self._size
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, offset, nbytes)
            else:
                os.ftruncate(self.descriptor, offset + nbytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, offset)
            raise MemoryError(str(error)) from error
        self._size = offset + nbytes
        return offset

    def write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            num = os.pwrite(self.descriptor, data[done:], offset + done)
            if not num:
                raise OSError(errno.EIO, "nothing was written")
            done += num

    def read(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            num = os.preadv(self.descriptor, [data[done:]], offset + done)
            if not num:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            done += num


class _Job:
    """A write or read under way: the event of this tier.

    Attributes:
        future: The thread's work.
        staged: What has gone to pinned memory on its way to the file, and is there until it is
            written.
        event: The end of the H2D copy that follows a read.
        error: Why it has failed, if it has.
        has_begun: Whether a thread has come to it.
        is_unwanted: Whether nobody will want the bytes.
        is_kept: Whether the bytes stay in pinned memory, as they could not be written.
        num_readers: How many reads copy from there now.
    """

    __slots__ = (
        "error",
        "event",
        "future",
        "has_begun",
        "is_kept",
        "is_unwanted",
        "num_readers",
        "staged",
    )

    def __init__(self, staged: Sent | None = None) -> None:
        self.future: Future[None] = Future()
        self.staged = staged
        self.has_begun = self.is_unwanted = self.is_kept = False
        self.num_readers = 0
        self.event: Any = None
        self.error: Exception | None = None

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Do the work, in a thread."""
        try:
            function(*args)
        except Exception as error:
            self.error = _without_frames(error)

    def is_done(self) -> bool:
        """Whether the file has been written or read."""
        return self.future.done()

    def wait(self) -> None:
        """Block until it has been; raise nothing."""
        concurrent.futures.wait([self.future])


class DiskTier:
    """A file, and the threads that write and read it.

    Args:
        directory: Where the file is.
        num_threads: How many threads write, and how many read.
        staging: The host tier through which tensors of an accelerator go; None where there is no
            accelerator.
        note: Called with a key and a text for what the user is to be told once.
    """

    name = "disk"
    blocks = True

    def __init__(
        self,
        directory: Path,
        *,
        num_threads: int,
        staging: HostTier | None,
        note: Callable[[str, str], None],
    ) -> None:
        self.directory = directory
        self._staging = staging
        self._note = note
        self._file = _File(directory)
        self.pool = Pool(self._file.grow, budget_bytes=_NO_LIMIT, slab_bytes=SLAB_BYTES)
        self._writers = ThreadPoolExecutor(num_threads, "wrappers write")
        self._readers = ThreadPoolExecutor(num_threads, "wrappers read")
        self._waited_s = 0.0
        #: Writes, and reads, that hold pinned memory, oldest first.
        self._staged: deque[_Job] = deque()
        self._landing: deque[_Job] = deque()
        #: Pinned memory that the threads have done with.
        self._returned: deque[Slot] = deque()
        #: Held by a thread that changes what threads share. A garbage collection under it may come
        #: to discard.
        self._lock = threading.RLock()
        self._process_id = os.getpid()

    @property
    def pools(self) -> list[Pool]:
        """What the slots come from."""
        return [self.pool]

    @property
    def host_pools(self) -> list[Pool]:
        """Pinned memory on the way to the file and back."""
        return self._staging.pools if self._staging is not None else []

    def waited_s(self) -> float:
        """How long threads that compute have waited for the file."""
        return self._waited_s

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor has memory."""
        return _device.is_in_host_memory(tensor) or self._is_staged(tensor)

    def _is_staged(self, tensor: Tensor) -> bool:
        return self._staging is not None and self._staging.takes(tensor)

    def current_stream(self, device: torch.device) -> Any:
        """The compute stream of the calling thread; None for the host itself."""
        assert self._staging is not None
        return self._staging.current_stream(device)

    # --- Out

    def send(self, tensor: Tensor, nbytes: int) -> Sent | None:
        """Begin to write a tensor's storage; None if the disk is full."""
        slot = self.pool.take(nbytes)
        if slot is None:
            return None
        sent = None
        try:
            sent = self._send(tensor, nbytes, slot)
        finally:
            if sent is None:
                self.pool.give_back(slot)
        return sent

    def _send(self, tensor: Tensor, nbytes: int, slot: Slot) -> Sent | None:
        if not self._is_staged(tensor):
            sent = Sent(self, tensor, nbytes, None, slot)
            job = sent.event = _Job()
            job.future = self._writers.submit(job.run, self._write, sent, slot.fence)
        else:
            staged = self._stage(tensor, nbytes)
            if staged is None:
                return None
            sent = Sent(self, tensor, nbytes, staged.stream, slot)
            sent.device_digest = staged.digest
            # The other one holds the device memory, which is free once it has been copied.
            staged.origin = None
            job = sent.event = _Job(staged)
            _append(self._staged, job)
            arguments = sent.device, self._write_staged, sent, staged, slot.fence
            job.future = self._writers.submit(_on_device, job.run, *arguments)
        slot.fence = job
        return sent

    def _write(self, sent: Sent, before: _Job | None) -> None:
        if before is not None:
            before.wait()
        if not self._should_write(sent.event):
            return
        tensor = sent.origin
        assert tensor is not None
        data = _memory(bytes_of(tensor))
        self._put(sent, data)
        # At once, and not when the next tensor is offloaded: this may have been the last.
        sent.origin = None

    def _should_write(self, job: _Job) -> bool:
        """Whether somebody may still want the bytes. Asked after the jobs before have ended."""
        with self._lock:
            job.has_begun = True
            return not job.is_unwanted

    def _put(self, sent: Sent, data: memoryview) -> None:
        sent.digest = zlib.crc32(data)
        self._file.write(data, _offset(sent.slot))

    def _stage(self, tensor: Tensor, nbytes: int) -> Sent | None:
        """Begin to copy to pinned memory; wait for those that hold it if there is none left."""
        assert self._staging is not None
        while True:
            self._reclaim()
            staged = self._staging.send(tensor, nbytes)
            if staged is not None:
                return staged
            if not (self._wait_for_oldest(self._staged) or self._wait_for_oldest(self._landing)):
                return None

    def _wait_for_oldest(self, jobs: deque[_Job]) -> bool:
        """Wait for the oldest job that holds pinned memory; False if there is none."""
        while jobs and jobs[0].is_done():
            jobs.popleft()
        if not jobs:
            return bool(self._returned)
        start_s = time.perf_counter()
        jobs.popleft().wait()
        self._waited_s += time.perf_counter() - start_s
        return True

    def _reclaim(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            slot.slab.pool.give_back(slot)

    def _write_staged(self, sent: Sent, staged: Sent, before: _Job | None) -> None:
        assert self._staging is not None
        if before is not None:
            before.wait()
        transport = self._staging.transport
        transport.synchronize(staged.event)
        error = transport.failure(staged.event)
        if error is not None:  # The device has the bytes, and keeps them.
            self._unstage(sent.event)
            raise TransferError(str(error)) from error
        if not self._should_write(sent.event):
            self._unstage(sent.event)
            return
        try:
            self._put(sent, _memory(self._staging.view(staged.slot, staged.nbytes)))
        except Exception as error:
            with self._lock:
                sent.event.is_kept = not sent.event.is_unwanted
            if not sent.event.is_kept:
                self._unstage(sent.event)
            self._note(
                "unwritten",
                f"a write to the file in {self.directory} has failed: {error}. The activations "
                "have stayed in pinned memory, so nothing is lost but that.",
            )
            raise
        self._unstage(sent.event)

    def _unstage(self, job: _Job) -> None:
        """Give the pinned memory of a write back."""
        with self._lock:
            staged, job.staged = job.staged, None
        if staged is not None:
            self._returned.append(staged.slot)

    def _unstage_unwanted(self, job: _Job) -> None:
        """Give back what could not be written, when nobody wants it or reads it any more."""
        if job.is_unwanted and job.is_kept and not job.num_readers:
            self._unstage(job)

    # --- Back

    def fetch(self, sent: Sent) -> Landing:
        """Begin to read the bytes."""
        if os.getpid() != self._process_id:
            raise TransferError(
                "a forked process has no threads that read the file with its parent's activations: "
                "run forward and backward in the same process"
            )
        job, before = _Job(), sent.event
        if sent.stream is None:
            target = torch.empty(sent.nbytes, dtype=torch.uint8, device=sent.device)
            job.future = self._readers.submit(job.run, self._read, sent, target, before)
            sent.slot.fence = job
            return Landing(sent, target, job)
        assert self._staging is not None
        transport = self._staging.transport
        target = transport.empty(sent.nbytes, sent.device, sent.stream)
        free = transport.record(sent.stream)
        self._reclaim()
        slot = self._staging.take(sent.nbytes)
        while slot is None and self._wait_for_oldest(self._staged):
            self._reclaim()
            slot = self._staging.take(sent.nbytes)
        if slot is not None:
            _append(self._landing, job)
        arguments = sent, target, before, job, slot, free
        job.future = self._readers.submit(
            _on_device, job.run, sent.device, self._read_staged, *arguments
        )
        sent.slot.fence = job
        return Landing(sent, target, job)

    def _read(self, sent: Sent, target: Tensor, before: _Job) -> None:
        before.wait()
        self._get(sent, _memory(target))

    def _get(self, sent: Sent, data: memoryview) -> None:
        try:
            self._file.read(data, _offset(sent.slot))
        except OSError as error:
            raise TransferError(f"the file could not be read: {error}") from error
        if zlib.crc32(data) != sent.digest:
            raise CorruptedError("the bytes in the file are not those that were written")

    def _read_staged(
        self,
        sent: Sent,
        target: Tensor,
        before: _Job,
        job: _Job,
        slot: Slot | None,
        free: Any,
    ) -> None:
        assert self._staging is not None
        before.wait()
        transport = self._staging.transport
        with self._lock:
            staged = before.staged
            if staged is not None:
                before.num_readers += 1
        try:
            if staged is not None:  # The write has failed, or has not been needed.
                source = self._staging.view(staged.slot, staged.nbytes)
            else:
                if slot is None:
                    source = transport.empty_host(sent.nbytes, is_pinned=False)
                else:
                    if slot.fence is not None:
                        transport.synchronize(slot.fence.event)
                    source = self._staging.view(slot, sent.nbytes)
                self._get(sent, _memory(source))
            with self._lock:
                job.event = self._staging.copy_back(sent, target, source, free)
            fence = self._staging.fence(job.event)
            if staged is not None:
                staged.slot.fence = fence
            elif slot is not None:
                slot.fence = fence
            else:
                transport.synchronize(job.event)  # Nobody else keeps the source.
        finally:
            if slot is not None:
                self._returned.append(slot)
            if staged is not None:
                with self._lock:
                    before.num_readers -= 1
                    self._unstage_unwanted(before)

    def land(self, landing: Landing, stream: Any) -> None:
        """Wait for the read; let a compute stream wait for the copy after it."""
        job: _Job = landing.event
        start_s = time.perf_counter()
        job.wait()
        self._waited_s += time.perf_counter() - start_s
        if job.error is not None:
            raise TransferError(str(job.error)) from job.error
        if job.event is not None:
            assert self._staging is not None
            self._staging.wait_for(landing, job.event, stream)
        expected = landing.sent.device_digest
        if expected is not None and not torch.equal(digest(landing.target), expected):
            raise TransferError("the bytes that came back are not those that were sent")

    # --- Both

    def is_done(self, event: _Job) -> bool:
        """Whether device memory is no longer read, or not written to any more."""
        staged = event.staged
        if staged is not None:
            return staged.is_done()
        if not event.is_done():
            return False
        return event.event is None or (
            self._staging is not None and self._staging.is_done(event.event)
        )

    def finish(self, sent: Sent) -> None:
        """Wait for the write; for a staged one, let the compute stream wait for the D2H copy."""
        staged = sent.event.staged
        if staged is not None:
            staged.finish()
            return
        start_s = time.perf_counter()
        sent.event.wait()
        self._waited_s += time.perf_counter() - start_s

    def failure(self, sent: Sent) -> BaseException | None:
        """Why device memory still has to be there, if it has."""
        staged: Sent | None = sent.event.staged
        if staged is not None:
            return staged.tier.failure(staged)
        return _error_of(sent.event)

    def discard(self, sent: Sent) -> None:
        """Give the room back; a write that has not begun is not made."""
        job: _Job = sent.event
        with self._lock:
            job.is_unwanted = True
            if not job.has_begun and job.staged is None:
                sent.origin = None  # The thread that comes to it will not look at it.
            self._unstage_unwanted(job)
        self.pool.give_back(sent.slot)


def _append(jobs: deque[_Job], job: _Job) -> None:
    """Add a job, and forget those that are done."""
    while jobs and jobs[0].is_done():
        jobs.popleft()
    jobs.append(job)


def _on_device(run: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Do work in a thread whose current device is the one that it is about."""
    with _device.use_device(device):
        run(*arguments)


def _error_of(job: _Job) -> Exception | None:
    """Why a job that is done, or about to be, has failed."""
    job.wait()
    return job.error


def _without_frames(error: Exception) -> Exception:
    """The same error without its tracebacks: their frames would keep tensors alive."""
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return error


def _offset(slot: Slot) -> int:
    extent: _Extent = slot.slab.memory
    return extent.offset + slot.offset


def _memory(data: Tensor) -> memoryview:
    """The memory of bytes on the host. Does not keep it alive."""
    array = (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
    return memoryview(array).cast("B")
