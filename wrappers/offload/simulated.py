"""A transport without an accelerator: set its bandwidth, latency and capacity, and break it.

While it is installed, tensors in the process's own memory count as lying on a device, and buffers
that the transport makes as lying on the host. Two threads, one for each direction, do the copies,
late: a copy reads its source and writes its target at the very end of the time that it takes, and
until then the target holds garbage. So whatever reads too early, reuses too early or lets go too
early gets wrong values, which a test sees.

Time is virtual by default: it passes in :meth:`SimulatedTransport.compute` and where the compute
waits for a copy, and in nothing else. A run's times are then exact, and the same on every machine.
With ``clock="real"`` the copies and ``compute`` sleep.

The calling thread is the compute stream: what it has called is done. So a wait of the compute
stream blocks the thread.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wrappers import _device
from wrappers.offload.transfer import TransferError, install, uninstall

__all__ = ["Fault", "SimulatedTransport", "Span"]

#: No copy of a simulation takes this long. One that does hangs.
_HANG_S = 60.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one copy.

    Attributes:
        kind: ``"fail"`` (the copy ends with an error), ``"corrupt"`` (one byte changes) or
            ``"delay"``.
        delay_s: How much longer the copy takes.
    """

    kind: str
    delay_s: float = 0.0


@dataclass(frozen=True)
class Span:
    """What one row of the timeline did for a while.

    Attributes:
        row: ``"compute"``, ``"wait"`` (the compute waits for a copy), ``"D2H"`` or ``"H2D"``.
        start_s: When it began, in seconds since the transport was made.
        end_s: When it ended.
        nbytes: Bytes copied.
        name: What the caller of ``compute`` has called it.
    """

    row: str
    start_s: float
    end_s: float
    nbytes: int = 0
    name: str = ""


class _VirtualClock:
    """Time that stands still unless it is moved."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._is_closed = False
        self._changed = threading.Condition()

    def now_s(self) -> float:
        return self._now_s

    def pass_until(self, moment_s: float) -> None:
        with self._changed:
            self._now_s = max(self._now_s, moment_s)
            self._changed.notify_all()

    def await_moment(self, moment_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._now_s >= moment_s)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _RealClock:
    """The time of the machine."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def pass_until(self, moment_s: float) -> None:
        self.await_moment(moment_s)

    def await_moment(self, moment_s: float) -> None:
        left_s = moment_s - self.now_s()
        if left_s > 0:
            time.sleep(left_s)

    def close(self) -> None:
        pass


class _Event:
    """The end of a copy, or a moment of the compute."""

    __slots__ = ("done", "error", "moment_s")

    def __init__(self, moment_s: float) -> None:
        self.moment_s = moment_s
        self.done = threading.Event()
        self.error: Exception | None = None


@dataclass
class _Job:
    target: Tensor
    source: Tensor
    after: list[_Event]
    event: _Event
    fault: Fault | None


class _Link:
    """A copy stream: one thread that copies in the order of the calls."""

    def __init__(self, name: str, clock: _VirtualClock | _RealClock) -> None:
        self.name = name
        self.free_at_s = 0.0
        self.after: list[_Event] = []
        self.last = _Event(0.0)
        self.last.done.set()
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"simulated {name}", daemon=True)
        self.thread.start()

    def put(self, job: _Job | None) -> None:
        if job is not None and not self.thread.is_alive():  # The transport has ended.
            self._do(job)
            return
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job  # It would keep its tensors alive while the thread waits for the next one.

    def _do(self, job: _Job) -> None:
        for event in job.after:
            event.done.wait()
        kind = job.fault.kind if job.fault else ""
        try:
            job.target.fill_(255)  # NaN in every floating-point type
            self._clock.await_moment(job.event.moment_s)
            if kind == "fail":
                raise TransferError(f"simulated failure of a {self.name} copy")
            job.target.copy_(job.source)
            if kind == "corrupt":
                job.target[job.target.numel() // 2] ^= 1
        except Exception as error:
            job.event.error = error
        finally:
            event = job.event
            job.target = job.source = None  # type: ignore[assignment]
            job.after.clear()
            del job
            event.done.set()


class SimulatedTransport:
    """Install it with ``with``: inside, offloaded modules offload tensors of the CPU.

    ::

        with SimulatedTransport(bandwidth_bytes_per_s=10e9) as device:
            loss = model(batch).sum()  # modules inside may call device.compute(seconds)
            loss.backward()
        print(device.now_s(), device.spans)

    Args:
        bandwidth_bytes_per_s: Of each direction.
        latency_s: What every copy takes besides.
        host_bytes: How much pinned host memory there is.
        device_bytes: How much device memory offloaded tensors may take, on their way out, and
            back again.
        clock: ``"virtual"`` or ``"real"``.
        fault: Called for each copy with direction and number; may return a :class:`Fault`.

    Attributes:
        spans: What happened when.
        num_pinned_allocations: How many times pinned memory was allocated.
        pinned_bytes: How much, rounded up to powers of two as torch's allocator does.
        device_bytes: Bytes of storages that are being offloaded or have been brought back and
            are alive.
        peak_device_bytes: The most that these have been.
    """

    blocks = True

    def __init__(
        self,
        *,
        bandwidth_bytes_per_s: float = 25e9,
        latency_s: float = 10e-6,
        host_bytes: int | None = None,
        device_bytes: int | None = None,
        clock: str = "virtual",
        fault: Callable[[str, int], Fault | None] | None = None,
    ) -> None:
        if clock not in ("virtual", "real"):
            raise ValueError(f"clock must be 'virtual' or 'real', got {clock!r}")
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self.fault = fault
        self.spans: list[Span] = []
        self.num_pinned_allocations = 0
        self.pinned_bytes = 0
        self.device_bytes = self.peak_device_bytes = 0
        self._host_bytes = host_bytes
        self._max_device_bytes = device_bytes
        self._clock = _VirtualClock() if clock == "virtual" else _RealClock()
        self._links: list[_Link] = []
        self._num_copies = {"D2H": 0, "H2D": 0}
        self._waited_s = 0.0
        self._on_device: dict[int, weakref.ref[Any]] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> SimulatedTransport:
        install(self)
        return self

    def __exit__(self, *error: object) -> None:
        uninstall(self)
        for link in self._links:
            link.put(None)
        self._clock.close()
        for link in self._links:
            link.thread.join(_HANG_S)

    # --- For users

    def now_s(self) -> float:
        """Seconds since the transport was made."""
        return self._clock.now_s()

    def compute(self, duration_s: float, name: str = "") -> None:
        """Let the compute stream be busy for a while."""
        start_s = self.now_s()
        self._clock.pass_until(start_s + duration_s)
        self.spans.append(Span("compute", start_s, start_s + duration_s, name=name))

    def num_copies(self, direction: str) -> int:
        """How many copies have begun in a direction, ``"D2H"`` or ``"H2D"``."""
        return self._num_copies[direction]

    # --- A transport; see wrappers.offload.transfer

    def is_on_device(self, tensor: Tensor) -> bool:
        """All memory of the process counts as the device's."""
        return _device.is_in_host_memory(tensor)

    def current_stream(self, device: torch.device) -> str:
        """The calling thread."""
        return "compute"

    def new_stream(self, device: torch.device, name: str) -> _Link:
        """A stream for copies."""
        link = _Link(name, self._clock)
        self._links.append(link)
        return link

    def record(self, stream: Any) -> _Event:
        """An event after everything queued so far."""
        if isinstance(stream, _Link):
            return stream.last
        event = _Event(self.now_s())
        event.done.set()
        return event

    def wait(self, stream: Any, event: _Event) -> None:
        """Let what is queued on a stream from now on begin after an event."""
        if isinstance(stream, _Link):
            stream.after.append(event)
            stream.free_at_s = max(stream.free_at_s, event.moment_s)
            return
        start_s = self.now_s()
        self._clock.pass_until(event.moment_s)
        self._join(event)
        end_s = self.now_s()
        if end_s > start_s:
            self._waited_s += end_s - start_s
            self.spans.append(Span("wait", start_s, end_s))
        if event.error is not None:
            raise TransferError(str(event.error)) from event.error

    def is_done(self, event: _Event) -> bool:
        """Whether an event has happened."""
        if self.now_s() < event.moment_s:
            return False
        self._join(event)
        return True

    def synchronize(self, event: _Event) -> None:
        """Block the calling thread, which is not the compute's, until an event has happened."""
        # Nobody else may be there to let time pass.
        self._clock.pass_until(event.moment_s)
        self._join(event)

    def failure(self, event: _Event) -> Exception | None:
        """Why the copy before an event failed, if it did."""
        return event.error

    def copy(self, target: Tensor, source: Tensor, stream: _Link) -> None:
        """Queue a copy of bytes."""
        if stream.name == "D2H":
            self._count(source)
        number = self._num_copies[stream.name]
        self._num_copies[stream.name] = number + 1
        fault = self.fault(stream.name, number) if self.fault is not None else None
        start_s = max(self.now_s(), stream.free_at_s)
        end_s = start_s + self.latency_s + source.numel() / self.bandwidth_bytes_per_s
        if fault is not None:
            end_s += fault.delay_s
        stream.free_at_s = end_s
        self.spans.append(Span(stream.name, start_s, end_s, source.numel()))
        stream.last = _Event(end_s)
        after, stream.after = stream.after, []
        stream.put(_Job(target, source, after, stream.last, fault))

    def empty(self, nbytes: int, device: torch.device, stream: Any) -> Tensor:
        """Bytes on the device, of garbage."""
        with self._lock:
            limit = self._max_device_bytes
            if limit is not None and self.device_bytes + nbytes > limit:
                raise torch.OutOfMemoryError(
                    f"simulated device: {self.device_bytes} of {limit} bytes are in use, "
                    f"{nbytes} more are wanted"
                )
        target = torch.full((nbytes,), 255, dtype=torch.uint8, device=device)
        self._count(target)
        return target

    def use_on(self, tensor: Tensor, stream: Any) -> None:
        """There is one compute stream only."""

    def empty_host(self, nbytes: int, *, is_pinned: bool) -> Tensor:
        """Bytes on the host."""
        if is_pinned:
            rounded = 1 << (nbytes - 1).bit_length()
            if self._host_bytes is not None and self.pinned_bytes + rounded > self._host_bytes:
                raise MemoryError("simulated host: no pinned memory is left")
            self.pinned_bytes += rounded
            self.num_pinned_allocations += 1
        with torch.inference_mode(False):
            return torch.full((nbytes,), 255, dtype=torch.uint8, device="cpu")

    def release_host(self) -> None:
        """Host memory is given back as it dies."""

    def waited_s(self) -> float:
        """How long the compute has waited for copies."""
        return self._waited_s

    def _join(self, event: _Event) -> None:
        if not event.done.wait(_HANG_S):
            raise TransferError(f"a simulated copy hangs for {_HANG_S:.0f} s")

    def _count(self, tensor: Tensor) -> None:
        """Count a storage as device memory until its death."""
        storage = tensor.untyped_storage()
        key = id(storage)
        with self._lock:
            known = self._on_device.get(key)
            if known is not None and known() is storage:
                return
            nbytes = storage.nbytes()
            self._on_device[key] = weakref.ref(storage)
            weakref.finalize(storage, self._forget, key, nbytes)
            self.device_bytes += nbytes
            self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def _forget(self, key: int, nbytes: int) -> None:
        with self._lock:
            self._on_device.pop(key, None)
            self.device_bytes -= nbytes
