"""Copies from the device to the host (D2H) and back (H2D), beside the compute.

::

    compute stream   ──produce t──●─────────────── … ──●──────────────────○──use t──
                                  │[1]                 │[4]               ▲
    D2H stream                    └─▶──copy──●         │                  │[6]
                                     [2]     │[3]      │                  │
    H2D stream                               └─────────┴─▶────copy────●───┘
                                                            [5]
    ● event   ○ wait

[1] The D2H stream waits for what the compute stream has queued: ``t`` is complete. The compute
    stream is asked for at each call, as users switch streams and backward has those of forward.
[2] Into a slot of the pool, after the slot's fence: the latest copy that used it.
[3] Until this event ``t`` is referenced from here: its memory is not reused. Where too many bytes
    wait, the compute stream waits for the oldest copy, and the reference is dropped at once: what
    takes the memory then comes later on the same stream. The host never waits.
[4] The target is allocated on the compute stream, so the caching allocator reuses its memory in
    that stream's order. The H2D stream waits for that moment, as the memory may be in use until
    then, and for [3].
[5] Ends with an event that becomes the slot's fence.
[6] The compute stream waits for it before the first use. A target that nobody wants any more is
    referenced until it, too.

``record_stream`` holds memory back for an unknown time. It is not needed but where a tensor changes
streams: one that was made on another stream than the region runs on, or that backward uses on
another stream than forward.

A *transport* is what streams, events and host memory are made of: an accelerator's, or the
simulated one of :mod:`wrappers.offload.simulated`. A *tier* is where bytes wait: the host tier
here, the disk tier in :mod:`wrappers.offload.disk`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from wrappers import _device, _knobs, _torch
from wrappers.offload.pool import Pool, Slot

__all__ = ["AcceleratorTransport", "HostTier", "Landing", "Sent", "Tier", "Transport"]


#: Waits of compute streams that are measured, before those that are over are summed up.
_MAX_WAITS = 1000


class TransferError(RuntimeError):
    """A copy between device, host and disk has failed."""


class Transport(Protocol):
    """Streams, events and host memory of one kind of device.

    Attributes:
        blocks: Whether a wait of the compute stream blocks the calling thread.
    """

    blocks: bool

    def is_on_device(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory that is to be saved."""
        ...

    def current_stream(self, device: torch.device) -> Any:
        """The stream on which the calling thread computes now."""
        ...

    def new_stream(self, device: torch.device, name: str) -> Any:
        """A stream for copies."""
        ...

    def record(self, stream: Any) -> Any:
        """An event after everything queued so far."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on a stream from now on begin after an event.

        Raises:
            TransferError: The stream is the compute stream, and what it waits for has failed.
        """
        ...

    def is_done(self, event: Any) -> bool:
        """Whether an event has happened; never blocks."""
        ...

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until an event has happened."""
        ...

    def failure(self, event: Any) -> Exception | None:
        """Why the copy before an event that has happened failed, if it did."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Queue a copy of bytes."""
        ...

    def empty(self, nbytes: int, device: torch.device, stream: Any) -> Tensor:
        """Bytes on the device, whose memory is reused in the order of a stream."""
        ...

    def use_on(self, tensor: Tensor, stream: Any) -> None:
        """Let a tensor be used on another stream than that of its memory."""
        ...

    def empty_host(self, nbytes: int, *, is_pinned: bool) -> Tensor:
        """Bytes on the host.

        Raises:
            MemoryError: There is none left.
        """
        ...

    def release_host(self) -> None:
        """Give host memory that has died back to the machine."""
        ...

    def waited_s(self) -> float:
        """How long compute streams have waited for copies so far, as far as it is known."""
        ...


class AcceleratorTransport:
    """The streams of ``torch.accelerator``'s devices."""

    blocks = False

    def __init__(self) -> None:
        #: Before and after each wait of a compute stream.
        self._waits: deque[tuple[torch.Event, torch.Event]] = deque()
        self._waited_s = 0.0
        self._lock = threading.Lock()

    def is_on_device(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the accelerator's memory."""
        return _device.is_on_accelerator(tensor)

    def current_stream(self, device: torch.device) -> torch.Stream:
        """The stream on which the calling thread computes now."""
        return _device.current_stream(device)

    def new_stream(self, device: torch.device, name: str) -> torch.Stream:
        """A stream for copies."""
        return _device.new_stream(device)

    def record(self, stream: torch.Stream) -> torch.Event:
        """An event after everything queued so far."""
        return _device.record_event(stream)

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Let what is queued on a stream from now on begin after an event."""
        stream.wait_event(event)

    def wait_timed(self, stream: torch.Stream, event: torch.Event) -> None:
        """The same for a compute stream, whose waiting is measured."""
        if event.query():
            stream.wait_event(event)
            return
        before = _device.record_event(stream, is_timed=True)
        stream.wait_event(event)
        self._waits.append((before, _device.record_event(stream, is_timed=True)))
        if len(self._waits) > _MAX_WAITS:
            self._sum_waits()

    def is_done(self, event: torch.Event) -> bool:
        """Whether an event has happened; never blocks."""
        return event.query()

    def synchronize(self, event: torch.Event) -> None:
        """Block the calling thread until an event has happened."""
        event.synchronize()

    def failure(self, event: torch.Event) -> Exception | None:
        """None: a copy that fails takes the process's whole device context with it."""
        return None

    def copy(self, target: Tensor, source: Tensor, stream: torch.Stream) -> None:
        """Queue a copy of bytes."""
        _device.copy_on_stream(target, source, stream)

    def empty(self, nbytes: int, device: torch.device, stream: torch.Stream) -> Tensor:
        """Bytes on the device, whose memory is reused in the order of a stream."""
        return _device.empty_on_stream(nbytes, device, stream)

    def use_on(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Let a tensor be used on another stream than that of its memory."""
        _device.use_on_stream(tensor, stream)

    def empty_host(self, nbytes: int, *, is_pinned: bool) -> Tensor:
        """Bytes on the host; MemoryError if there is none left."""
        try:
            with torch.inference_mode(False):
                if is_pinned:
                    return _device.empty_pinned(nbytes)
                return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def release_host(self) -> None:
        """Give host memory that has died back to the machine."""
        _device.release_pinned()

    def waited_s(self) -> float:
        """How long compute streams have waited for copies, in waits that are over."""
        self._sum_waits()
        return self._waited_s

    def _sum_waits(self) -> None:
        with self._lock:
            while self._waits and self._waits[0][1].query():
                before, after = self._waits.popleft()
                self._waited_s += before.elapsed_time(after) / 1e3


class Sent:
    """The bytes of one storage that have left the device, or are leaving it.

    Attributes:
        nbytes: How many.
        device: Where they belong.
        stream: The compute stream that made them.
        origin: A tensor of the storage, until the copy is done; for good if it failed.
        slot: Where they wait.
        event: The end of the copy.
        digest: Their checksum, if the tier keeps one.
        tier: The tier that they wait in.
    """

    __slots__ = (
        "_counter",
        "_version",
        "device",
        "device_digest",
        "digest",
        "event",
        "nbytes",
        "origin",
        "slot",
        "stream",
        "tier",
    )

    def __init__(self, tier: Tier, origin: Tensor, nbytes: int, stream: Any, slot: Any) -> None:
        self.tier = tier
        self.nbytes = nbytes
        self.device = origin.device
        self.stream = stream
        self.origin: Tensor | None = origin
        self._version = origin._version
        self._counter = _torch.version_counter(origin)
        self.slot = slot
        self.event: Any = None
        self.digest: Any = None
        self.device_digest: Any = None

    @property
    def is_changed(self) -> bool:
        """Whether the tensor was changed in place since: maybe while it was copied."""
        return self._counter._version != self._version

    def is_done(self) -> bool:
        """Whether the bytes have arrived; never blocks."""
        return self.tier.is_done(self.event)

    def finish(self) -> None:
        """Let what comes next on the compute stream come after the copy."""
        self.tier.finish(self)

    def settle(self) -> None:
        """Let go of the device memory, unless the copy has failed."""
        if self.origin is not None and self.tier.failure(self) is None:
            self.origin = None


class Landing:
    """The bytes of one storage on their way back.

    Attributes:
        sent: Where they come from.
        target: Bytes on the device.
        event: The end of the copy.
    """

    __slots__ = ("event", "sent", "target")

    def __init__(self, sent: Sent, target: Tensor, event: Any) -> None:
        self.sent = sent
        self.target = target
        self.event = event

    def is_done(self) -> bool:
        """Whether the bytes have arrived; never blocks."""
        return self.sent.tier.is_done(self.event)

    def finish(self) -> None:
        """Let what comes next on the compute stream come after the copy."""
        try:
            self.sent.tier.land(self, self.sent.stream)
        except Exception:
            return  # Nobody wants the bytes; only the memory was waited for.


class Tier(Protocol):
    """A place where bytes wait for backward."""

    name: str
    #: Whether waiting for a copy blocks the thread that waits.
    blocks: bool

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor would be in another place then."""
        ...

    def send(self, tensor: Tensor, nbytes: int) -> Sent | None:
        """Begin to copy a tensor's storage; None if there is no room for it."""
        ...

    def fetch(self, sent: Sent) -> Landing:
        """Begin to copy the bytes back."""
        ...

    def land(self, landing: Landing, stream: Any) -> None:
        """Let what comes next on a compute stream find the bytes.

        Raises:
            TransferError: They have not come, or not as they were.
        """
        ...

    def is_done(self, event: Any) -> bool:
        """Whether an event has happened; never blocks."""
        ...

    def finish(self, sent: Sent) -> None:
        """Let what comes next on the compute stream come after the copy."""
        ...

    def failure(self, sent: Sent) -> BaseException | None:
        """Why a copy that is done has failed, if it has."""
        ...

    def current_stream(self, device: torch.device) -> Any:
        """The compute stream of the calling thread."""
        ...

    def discard(self, sent: Sent) -> None:
        """Give the slot back: nobody will want the bytes."""
        ...


class _Fence:
    """An event of a transport, as the pool wants it."""

    __slots__ = ("_transport", "event")

    def __init__(self, transport: Transport, event: Any) -> None:
        self._transport = transport
        self.event = event

    def is_done(self) -> bool:
        """Whether it has happened."""
        return self._transport.is_done(self.event)


class HostTier:
    """Host memory: pinned, and pageable where there is no more of that.

    Args:
        transport: Copies between the device and the host.
        checks: Whether to compare a checksum of what comes back; makes the host wait.
        pinned_bytes: Budget of pinned memory.
        pageable_bytes: Budget of pageable memory.
        note: Called with a key and a text for what the user is to be told once.
    """

    name = "host"

    def __init__(
        self,
        transport: Transport,
        *,
        checks: bool = False,
        pinned_bytes: int,
        pageable_bytes: int,
        note: Callable[[str, str], None],
    ) -> None:
        self.transport = transport
        self.blocks = transport.blocks
        self._checks = checks
        self.pinned = self._pool(pinned_bytes, is_pinned=True)
        self.pageable = self._pool(pageable_bytes, is_pinned=False)
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        self._note = note

    def _pool(self, budget_bytes: int, *, is_pinned: bool) -> Pool:
        return Pool(
            functools.partial(self.transport.empty_host, is_pinned=is_pinned),
            budget_bytes=budget_bytes,
            slab_bytes=_knobs.OFFLOAD_SLAB_BYTES,
            after_drop=self.transport.release_host,
        )

    @property
    def pools(self) -> list[Pool]:
        """What the slots come from."""
        return [self.pinned, self.pageable]

    @property
    def host_pools(self) -> list[Pool]:
        """The same: all of it is host memory."""
        return self.pools

    def waited_s(self) -> float:
        """How long compute streams have waited for copies, as far as it is known."""
        return self.transport.waited_s()

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        return self.transport.is_on_device(tensor)

    def current_stream(self, device: torch.device) -> Any:
        """The compute stream of the calling thread."""
        return self.transport.current_stream(device)

    def _streams_of(self, device: torch.device) -> tuple[Any, Any]:
        streams = self._streams.get(device)
        if streams is None:
            new = self.transport.new_stream
            streams = self._streams[device] = new(device, "D2H"), new(device, "H2D")
        return streams

    def take(self, nbytes: int) -> Slot | None:
        """A slot for so many bytes; None if there is no memory left."""
        slot = self.pinned.take(nbytes)
        if slot is None:
            slot = self.pageable.take(nbytes)
            if slot is not None:
                self._note(
                    "pageable",
                    f"{self.pinned.total_bytes:,} bytes of pinned memory are in use and there "
                    "is no more: pageable memory is used, from which copies are slower and block. "
                    "Give wrappers._knobs.OFFLOAD_PINNED_PERCENT a higher value if the machine has "
                    "more, or offload less (ratio=, min_bytes=).",
                )
        return slot

    def send(self, tensor: Tensor, nbytes: int) -> Sent | None:
        """Begin a D2H copy of a tensor's storage. See [1] to [3]."""
        slot = self.take(nbytes)
        if slot is None:
            return None
        try:
            return self._send(tensor, nbytes, slot)
        except BaseException:
            slot.slab.pool.give_back(slot)
            raise

    def _send(self, tensor: Tensor, nbytes: int, slot: Slot) -> Sent:
        transport = self.transport
        compute = transport.current_stream(tensor.device)
        stream = self._streams_of(tensor.device)[0]
        transport.use_on(tensor, compute)  # Of no effect on the stream that made it.
        sent = Sent(self, tensor, nbytes, compute, slot)
        source = bytes_of(tensor)
        if self._checks:
            sent.digest = digest(source)
        transport.wait(stream, transport.record(compute))
        if slot.fence is not None:
            transport.wait(stream, slot.fence.event)
        transport.copy(self.view(slot, nbytes), source, stream)
        sent.event = transport.record(stream)
        slot.fence = self.fence(sent.event)
        return sent

    def fetch(self, sent: Sent) -> Landing:
        """Begin an H2D copy. See [4] to [5]."""
        transport = self.transport
        target = transport.empty(sent.nbytes, sent.device, sent.stream)
        stream = self._streams_of(sent.device)[1]
        transport.wait(stream, sent.event)
        source = self.view(sent.slot, sent.nbytes)
        event = self.copy_back(sent, target, source, transport.record(sent.stream))
        sent.slot.fence = self.fence(event)
        return Landing(sent, target, event)

    def copy_back(self, sent: Sent, target: Tensor, source: Tensor, free: Any) -> Any:
        """Queue an H2D copy to a target that is free from an event on; give the copy's end."""
        transport = self.transport
        stream = self._streams_of(sent.device)[1]
        transport.wait(stream, free)
        transport.copy(target, source, stream)
        return transport.record(stream)

    def land(self, landing: Landing, stream: Any) -> None:
        """Let what comes next on a compute stream find the bytes. See [6]."""
        self.wait_for(landing, landing.event, stream)
        expected = landing.sent.digest
        if expected is not None and not torch.equal(digest(landing.target), expected):
            raise TransferError("the bytes that came back are not those that were sent")

    def wait_for(self, landing: Landing, event: Any, stream: Any) -> None:
        """Let a compute stream wait for a copy back."""
        _wait_timed(self.transport, stream, event)
        if stream != landing.sent.stream:
            self.transport.use_on(landing.target, stream)

    def view(self, slot: Slot, nbytes: int) -> Tensor:
        """A slot's first bytes."""
        view = slot.view
        if view is None or view.numel() != nbytes:
            view = slot.view = slot.slab.memory[slot.offset : slot.offset + nbytes]
        return view  # type: ignore[no-any-return]

    def fence(self, event: Any) -> _Fence:
        """An event as a slot's fence."""
        return _Fence(self.transport, event)

    def is_done(self, event: Any) -> bool:
        """Whether an event has happened; never blocks."""
        return self.transport.is_done(event)

    def finish(self, sent: Sent) -> None:
        """Let what comes next on the compute stream come after the copy. See [3]."""
        with contextlib.suppress(TransferError):  # It will be asked for.
            _wait_timed(self.transport, sent.stream, sent.event)

    def failure(self, sent: Sent) -> BaseException | None:
        """Why a copy that is done has failed, if it has."""
        return self.transport.failure(sent.event)

    def discard(self, sent: Sent) -> None:
        """Give the slot back: whoever takes it comes after its fence."""
        sent.slot.slab.pool.give_back(sent.slot)


def _wait_timed(transport: Transport, stream: Any, event: Any) -> None:
    """Let a compute stream wait, and measure it where the transport can."""
    getattr(transport, "wait_timed", transport.wait)(stream, event)


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's whole storage, as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def digest(data: Tensor) -> Tensor:
    """A checksum of bytes, where they are: sums of 64-bit words and of what is left over."""
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64).sum()
    return words ^ (data[whole:].sum(dtype=torch.int64) << 1)


#: The transport that is in use instead of the accelerator's, latest last.
_installed: list[Transport] = []
_accelerator: list[AcceleratorTransport] = []


def current_transport() -> Transport | None:
    """The transport in use; None where there is no device to offload from."""
    if _installed:
        return _installed[-1]
    if not _accelerator:
        if not _device.accelerator_tensors_exist():
            return None
        _accelerator.append(AcceleratorTransport())
    return _accelerator[0]


def install(transport: Transport) -> None:
    """Use a transport from now on."""
    _installed.append(transport)


def uninstall(transport: Transport) -> None:
    """End what :func:`install` has begun."""
    _installed.remove(transport)
    for function in _at_uninstall:
        function(transport)


_at_uninstall: list[Callable[[Transport], None]] = []


def call_at_uninstall(function: Callable[[Transport], None]) -> Callable[[Transport], None]:
    """Have a function called with each transport that is uninstalled."""
    _at_uninstall.append(function)
    return function
