"""One place for offloaded storages: what goes there, what comes back early, what is let go of.

A *store* has a tier and its limits. What it gives out is a :class:`Claim` to one storage's bytes
that are away. The autograd graph owns it, through the saved tensors that lie in the storage; the
store knows it by weak references alone. So when a graph goes, after backward, after an exception,
or because nobody used its output, its buffers are free again. ::

    graph ──> saved tensor ──> Claim ──> Offloaded ──> Sent ──> slot of the pool
      │                          ▲           └───────> Landing ──> bytes back on the device
      └─────> Group ~ ~ ~ ~ ~ ~ ~┘ (weak)

A claim may die anywhere: in a garbage collection, in a thread of autograd's or of the disk's, while
this very code runs. So its death puts a note into a queue, which is worked off at once where nobody
holds the lock, and else by the next call. A claim has no finalizer, as other threads could still
get hold of one that is dying: it is the callback of the weak reference that takes the note.

One lock guards all stores, the pools and the schedule. Nothing that blocks for long happens under
it but waiting for room.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from wrappers import _device, _knobs, _torch
from wrappers.errors import InputChangedError, OffloadError
from wrappers.offload.disk import DiskTier, check_directory
from wrappers.offload.pool import available_host_bytes
from wrappers.offload.scheduler import Group, InFlight, Schedule
from wrappers.offload.stats import OffloadStats, TierStats
from wrappers.offload.transfer import (
    HostTier,
    Landing,
    Sent,
    Tier,
    Transport,
    call_at_uninstall,
    current_transport,
)

__all__ = ["OffloadSettings", "Offloaded", "Store", "begin_group", "offload_stats", "store_for"]

_lock = threading.Lock()


@dataclass(frozen=True)
class OffloadSettings:
    """How a region is offloaded; see :func:`wrappers.offload_wrapper`."""

    tier: str = "host"
    directory: str | None = None
    min_bytes: int | None = None
    keep_last: int = 1
    max_inflight_bytes: int | None = None
    prefetch: int = 1
    ratio: float = 1.0
    checksum: bool = False

    def __post_init__(self) -> None:
        if self.tier not in ("host", "disk"):
            raise ValueError(f"tier must be 'host' or 'disk', got {self.tier!r}")
        if self.tier == "disk":
            if self.directory is None:
                raise ValueError("tier='disk' needs directory=, where the file with activations is")
            object.__setattr__(self, "directory", str(check_directory(self.directory)))
        elif self.directory is not None:
            raise ValueError("directory= is for tier='disk'; the host tier has no files")
        for name in ("min_bytes", "keep_last", "max_inflight_bytes", "prefetch"):
            value = getattr(self, name)
            if value is None and name.endswith("_bytes"):
                continue
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if name == "max_inflight_bytes" and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")

    @property
    def least_bytes(self) -> int:
        """Tensors of fewer bytes stay."""
        return _knobs.OFFLOAD_MIN_BYTES if self.min_bytes is None else self.min_bytes


class Offloaded:
    """The bytes of one storage that are away from the device.

    Attributes:
        store: Where they are.
        claim: What the graph holds, until nobody wants them any more.
        sent: Their place.
        landing: Their copy on the device, or on its way there, while backward is in their group.
        origin: The tensor itself, where backward is about to want it before it has left.
        is_ahead: Whether they are back before anybody has wanted them.
        num_uses: How many saved tensors lie in the storage.
        num_taken: How many times one of them was unpacked.
        fqn: The region that saved it first.
    """

    __slots__ = (
        "claim",
        "fqn",
        "is_ahead",
        "key",
        "landing",
        "num_taken",
        "num_uses",
        "origin",
        "sent",
        "store",
    )

    def __init__(self, store: Store, sent: Sent, key: Hashable, fqn: str) -> None:
        self.store = store
        self.sent = sent
        self.key = key
        self.fqn = fqn
        self.landing: Landing | None = None
        self.origin: Tensor | None = None
        self.is_ahead = False
        self.num_uses = self.num_taken = 0
        self.claim: weakref.ref[Claim]


class Claim:
    """What the graph holds as long as it wants a storage that is away."""

    __slots__ = ("__weakref__", "offloaded")

    def __init__(self, offloaded: Offloaded) -> None:
        self.offloaded = offloaded
        note_death = functools.partial(offloaded.store.note_death, offloaded)
        offloaded.claim = weakref.ref(self, note_death)


class Store:
    """A tier, and what is in it.

    Args:
        tier: Where bytes are copied to and from.
        name: For the table.
    """

    def __init__(self, tier: HostTier | DiskTier, name: str) -> None:
        self.tier: Tier = tier
        self.name = name
        self._pools, self._host_pools = tier.pools, tier.host_pools
        self._waited_s = tier.waited_s
        self._out = InFlight(_knobs.OFFLOAD_INFLIGHT_COPIES)
        #: By storage and version: what of it is away.
        self._away: dict[Hashable, Offloaded] = {}
        self._ahead_bytes = self._peak_ahead_bytes = self._largest_bytes = 0
        #: Copies back that nobody waits for any more.
        self._dropped: deque[Landing] = deque()
        self._dead: deque[Offloaded] = deque()
        self._noted: set[str] = set()
        self._unsaid: deque[str] = deque()
        self._process_id = os.getpid()
        self._out_bytes = self._back_bytes = 0
        self._num_out = self._num_back = self._num_ahead = 0
        self._num_unmoved = self._num_kept = self._num_alive = 0

    def limit_bytes(self, settings: OffloadSettings) -> int:
        """Bytes that may be on their way in each direction."""
        if settings.max_inflight_bytes is not None:
            return settings.max_inflight_bytes
        return max(_knobs.OFFLOAD_INFLIGHT_BYTES, 2 * self._largest_bytes)

    # --- Forward

    def put(
        self, tensor: Tensor, group: Group, settings: OffloadSettings, *, must_move: bool = False
    ) -> Claim | None:
        """Begin to offload a tensor's storage, unless it is away already.

        Args:
            tensor: A dense tensor on the device.
            group: The forward call that saves it.
            settings: The region's.
            must_move: Whether it goes whatever ratio and schedule say.

        Returns:
            None if it is to stay.
        """
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        key = (StorageWeakRef(storage), tensor._version)
        with _lock:
            self._work_off()
            known = self._away.get(key)
            claim = known.claim() if known is not None else None
            if claim is None:
                if not nbytes or key in group.staying:
                    return None
                if not (group.should_move(nbytes, settings.ratio) or must_move):
                    group.staying.add(key)
                    return None
                claim = self._send(tensor, nbytes, key, group, settings)
            if claim is not None:
                claim.offloaded.num_uses += 1
                group.members.append(claim.offloaded.claim)
        self._say_notes()
        return claim

    def _send(
        self,
        tensor: Tensor,
        nbytes: int,
        key: Hashable,
        group: Group,
        settings: OffloadSettings,
    ) -> Claim | None:
        self._largest_bytes = max(self._largest_bytes, nbytes)
        self._out.make_room(nbytes, self.limit_bytes(settings))
        sent = self.tier.send(tensor, nbytes)
        if sent is None:
            self._num_kept += 1
            group.keep(key, nbytes)
            self.note(
                "kept",
                f"region `{group.fqn}`: there is no room left for offloaded activations in the "
                f"{self.name} tier, which holds {self._pool_bytes():,} bytes: from now on what "
                f"does not fit stays on the device. {_REMEDIES[self.tier.name]}",
            )
            return None
        self._out.add(sent)
        self._out.poll()
        self._out_bytes += nbytes
        self._num_out += 1
        self._num_alive += 1
        offloaded = Offloaded(self, sent, key, group.fqn)
        self._away[key] = offloaded
        return Claim(offloaded)

    # --- Backward

    def take(
        self, offloaded: Offloaded, group: Group, settings: OffloadSettings
    ) -> torch.UntypedStorage:
        """The storage, back on its device, for what the calling thread computes next.

        Raises:
            InputChangedError: It was changed in place since it was put here.
            OffloadError: It could not be read back, or is not what was written.
        """
        failure: Exception | None = None
        for _ in range(2):  # What has failed may have been one copy only.
            with _lock:
                self._work_off()
                enters = _enter(group)
                tensor = self._origin_of(offloaded)
                landing = offloaded.landing
                if tensor is None and landing is None:
                    landing = offloaded.landing = self._fetch_now(offloaded.sent)
                if offloaded.is_ahead:
                    self._no_longer_ahead(offloaded)
                if enters:
                    _plan_ahead(group, settings)
                _fetch_ahead(settings)
            if tensor is not None:
                storage = tensor.untyped_storage()
                break
            assert landing is not None
            sent = offloaded.sent
            stream = None if sent.stream is None else self.tier.current_stream(sent.device)
            try:
                self.tier.land(landing, stream)
            except Exception as error:
                failure = error
                with _lock:
                    if offloaded.landing is landing:
                        offloaded.landing = None
                continue
            storage = landing.target.untyped_storage()
            break
        else:
            try:
                raise self._error(offloaded, failure) from failure
            finally:
                failure = None
        failure = None  # Its traceback holds this call, and what is away.
        self._say_notes()
        with _lock:
            offloaded.num_taken += 1
            if offloaded.num_taken % offloaded.num_uses == 0:
                offloaded.landing = offloaded.origin = None
        return storage

    def _origin_of(self, offloaded: Offloaded) -> Tensor | None:
        """The tensor itself, if it has not left."""
        sent = offloaded.sent
        tensor = offloaded.origin
        if tensor is None:
            tensor = sent.origin
        if sent.is_changed:
            raise InputChangedError(
                f"region `{offloaded.fqn}`: a tensor of {sent.nbytes:,} bytes that backward needs "
                "was changed in place after it had been saved. Change a copy of it, or change it "
                "after backward.",
                fqn=offloaded.fqn,
                tensor=f"saved tensor of {sent.nbytes} bytes",
            )
        if tensor is None or offloaded.landing is not None:
            return None
        self._num_unmoved += 1
        if sent.is_done() and (failure := self.tier.failure(sent)) is not None:
            self.note(
                "failed",
                f"region `{offloaded.fqn}`: a copy to the {self.name} tier has failed: {failure}. "
                "The tensor has stayed on the device, so nothing is lost but its memory.",
            )
        return tensor

    def _fetch(self, sent: Sent) -> Landing:
        landing = self.tier.fetch(sent)
        self._back_bytes += sent.nbytes
        self._num_back += 1
        return landing

    def _fetch_now(self, sent: Sent) -> Landing:
        try:
            return self._fetch(sent)
        except torch.OutOfMemoryError:
            # What has been fetched ahead can wait.
            for other in self._away.values():
                if other.is_ahead:
                    self.drop(other)
            while self._dropped:
                self._dropped.popleft().finish()  # From here on in the order of the stream.
            self._out.finish_all()
            return self._fetch(sent)

    def fetch_ahead(self, offloaded: Offloaded, limit_bytes: int) -> bool:
        """Bring a storage back before it is wanted; False if there is no room for it now."""
        sent = offloaded.sent
        if offloaded.landing is not None or offloaded.origin is not None:
            return True
        if self._ahead_bytes + sent.nbytes > limit_bytes:
            # One that is larger than the limit is never fetched ahead.
            return sent.nbytes > limit_bytes
        origin = sent.origin
        if origin is not None:  # It has not left yet, and does not have to.
            offloaded.origin = origin
        else:
            try:
                offloaded.landing = self._fetch(sent)
            except RuntimeError:  # The device has no memory for it now.
                return True
            self._num_ahead += 1
        offloaded.is_ahead = True
        self._ahead_bytes += sent.nbytes
        self._peak_ahead_bytes = max(self._peak_ahead_bytes, self._ahead_bytes)
        return True

    def _no_longer_ahead(self, offloaded: Offloaded) -> None:
        offloaded.is_ahead = False
        self._ahead_bytes -= offloaded.sent.nbytes

    def drop(self, offloaded: Offloaded) -> None:
        """Let go of what is back on the device: backward is elsewhere."""
        if offloaded.is_ahead:
            self._no_longer_ahead(offloaded)
        landing, offloaded.landing, offloaded.origin = offloaded.landing, None, None
        self._drop_landing(landing)

    def _drop_landing(self, landing: Landing | None) -> None:
        if landing is not None and not landing.is_done():
            self._dropped.append(landing)  # The copy still writes to its memory.

    def _error(self, offloaded: Offloaded, failure: Exception | None) -> OffloadError:
        sent = offloaded.sent
        cause = (
            f"{sent.nbytes:,} bytes that backward needs did not come back from the {self.name} "
            f"tier, in two attempts: {failure}"
        )
        return OffloadError(
            f"region `{offloaded.fqn}`: {cause}. The step cannot be finished: run it again, "
            "without offloading this region if it goes on.",
            cause=cause,
            fqn=offloaded.fqn,
            tier=self.tier.name,
            num_bytes=sent.nbytes,
        )

    # --- Death

    def note_death(self, offloaded: Offloaded, claim: object) -> None:
        """Take note that nobody wants a storage any more. Called at any time, in any thread."""
        if os.getpid() != self._process_id:
            return  # A forked process has neither the threads nor the buffers.
        self._dead.append(offloaded)
        if _lock.acquire(blocking=False):
            try:
                self._work_off()
            finally:
                _lock.release()

    def _work_off(self) -> None:
        """Free what has died, and let go of what has left."""
        while self._dead:
            offloaded = self._dead.popleft()
            if self._away.get(offloaded.key) is offloaded:
                del self._away[offloaded.key]
            self.drop(offloaded)
            self._num_alive -= 1
            self.tier.discard(offloaded.sent)
            if not self._num_alive and not self.tier.blocks:
                self._out.finish_all()  # Nobody may come to poll for a long time.
        self._out.poll()
        while self._dropped and self._dropped[0].is_done():
            self._dropped.popleft()

    def finish(self) -> None:
        """Wait for all copies; what has died is free afterwards."""
        with _lock:
            self._work_off()
            self._out.finish_all()
            for landing in self._dropped:
                landing.finish()
            self._work_off()

    # --- What the user hears

    def note(self, key: str, text: str) -> None:
        """Say something once, as soon as no lock is held."""
        if key not in self._noted:
            self._noted.add(key)
            self._unsaid.append(text)

    def _say_notes(self) -> None:
        while self._unsaid:
            with contextlib.suppress(IndexError):  # Another thread was faster.
                warnings.warn(self._unsaid.popleft(), stacklevel=2)

    def _pool_bytes(self) -> int:
        return sum(pool.total_bytes for pool in self._pools)

    def stats(self) -> TierStats:
        """What the store has done."""
        with _lock:
            self._work_off()
            pools = self._pools
            return TierStats(
                name=self.name,
                out_bytes=self._out_bytes,
                back_bytes=self._back_bytes,
                num_out=self._num_out,
                num_back=self._num_back,
                num_ahead=self._num_ahead,
                num_unmoved=self._num_unmoved,
                num_kept=self._num_kept,
                num_taken=sum(pool.num_taken for pool in pools),
                num_reused=sum(pool.num_reused for pool in pools),
                num_allocations=sum(pool.num_allocations for pool in pools),
                waited_s=self._waited_s(),
                inflight_bytes=max(self._out.peak_bytes, self._peak_ahead_bytes),
                used_bytes=sum(pool.used_bytes for pool in pools),
                peak_bytes=sum(pool.peak_bytes for pool in pools),
                peak_host_bytes=sum(pool.peak_bytes for pool in self._host_pools),
                num_alive=self._num_alive,
            )


_REMEDIES = {
    "host": "Offload less (ratio=, min_bytes=), give the process more memory, or use tier='disk'.",
    "disk": "Free some of the disk, choose another directory=, or offload less (ratio=).",
}


# --- What all stores share

_schedule = Schedule()
_stores: dict[Hashable, Store] = {}


class _ThisThread(threading.local):
    def __init__(self) -> None:
        #: The group that this thread's backward is in.
        self.group: weakref.ref[Group] | None = None
        #: The groups that are fetched ahead.
        self.ahead: list[weakref.ref[Group]] = []
        #: What it is expected to want next.
        self.wanted: deque[weakref.ref[Claim]] = deque()


_this_thread = _ThisThread()


def begin_group(key: Hashable, fqn: str, *, keep_last: int) -> Group:
    """The group of a region's forward call; see :class:`~wrappers.offload.scheduler.Schedule`."""
    with _lock:
        return _schedule.begin(key, fqn, keep_last=keep_last)


def enter_group(group: Group, settings: OffloadSettings) -> None:
    """Note that backward has reached a group, of which nothing may be away."""
    with _lock:
        if _enter(group):
            _plan_ahead(group, settings)
        _fetch_ahead(settings)


def _enter(group: Group) -> bool:
    """Leave the group that backward was in; False if that is the same."""
    before = _this_thread.group() if _this_thread.group is not None else None
    if before is group:
        return False
    if before is not None and not (before.step is group.step and before.index < group.index):
        _drop_members(before, but=group)
    # Else backward has come to a region inside of the one before, and will be back there.
    _this_thread.group = weakref.ref(group)
    return True


def _drop_members(group: Group, *, but: Group) -> None:
    """Let go of what has come back for one group and is not wanted for another."""
    wanted = {id(member) for member in but.members}
    for member in group.members:
        claim = member()
        if claim is not None and id(member) not in wanted:
            claim.offloaded.store.drop(claim.offloaded)


def _plan_ahead(group: Group, settings: OffloadSettings) -> None:
    ahead = _schedule.enter(group, settings.prefetch)
    for reference in _this_thread.ahead:
        guess = reference()
        if guess is not None and guess is not group and guess not in ahead:
            _drop_members(guess, but=group)  # It was wrong.
    _this_thread.ahead = [weakref.ref(found) for found in ahead]
    wanted = _this_thread.wanted
    wanted.clear()
    for found in (group, *ahead):
        wanted.extend(reversed(found.members))


def _fetch_ahead(settings: OffloadSettings) -> None:
    """Bring back what is wanted next, as far as the limit allows."""
    wanted = _this_thread.wanted
    while wanted:
        claim = wanted[0]()
        if claim is not None:
            of = claim.offloaded.store
            if not of.fetch_ahead(claim.offloaded, of.limit_bytes(settings)):
                return
        wanted.popleft()


def store_for(settings: OffloadSettings) -> Store | None:
    """The store that a region's settings name.

    None where there is no device to offload from, and where nothing can be offloaded now: the
    transforms of torch.func know no hooks, and a CUDA graph may not ask for events.
    """
    if _torch.is_functorch_active() or _device.is_capturing():
        return None
    transport = current_transport()
    if settings.tier == "host" and transport is None:
        return None
    key = (transport, settings.tier, settings.directory, settings.checksum)
    store = _stores.get(key)
    if store is None:
        with _lock:
            store = _stores.get(key)
            if store is None:
                store = _stores[key] = _make_store(settings, transport)
    return store


def _make_store(settings: OffloadSettings, transport: Transport | None) -> Store:
    available = available_host_bytes()
    stores: list[weakref.ref[Store]] = []

    def note(key: str, text: str) -> None:
        store = stores[0]()
        if store is not None:
            store.note(key, text)

    def host_tier(pinned_bytes: int, pageable_bytes: int) -> HostTier:
        assert transport is not None
        return HostTier(
            transport,
            checks=settings.checksum,
            pinned_bytes=pinned_bytes,
            pageable_bytes=pageable_bytes,
            note=note,
        )

    if settings.tier == "host":
        tier: HostTier | DiskTier = host_tier(
            min(_knobs.OFFLOAD_PINNED_BYTES, available * _knobs.OFFLOAD_PINNED_PERCENT // 100),
            min(_knobs.OFFLOAD_PAGEABLE_BYTES, available * _knobs.OFFLOAD_PAGEABLE_PERCENT // 100),
        )
        store = Store(tier, "host")
    else:
        assert settings.directory is not None
        staging = None
        if transport is not None:
            staging = host_tier(min(_knobs.OFFLOAD_STAGING_BYTES, available // 4), 0)
        tier = DiskTier(
            Path(settings.directory),
            num_threads=_knobs.OFFLOAD_DISK_THREADS,
            staging=staging,
            note=note,
        )
        store = Store(tier, f"disk {settings.directory}")
    stores.append(weakref.ref(store))
    return store


def offload_stats() -> OffloadStats:
    """What offloading has done in this process so far.

    Returns:
        Bytes and copies out and back, how often buffers were reused, how long the compute has
        waited, and the memory in use, for each tier. ``print`` shows a table.
    """
    return OffloadStats(tuple(store.stats() for store in list(_stores.values())))


def finish_offloading() -> None:
    """Let what comes next on the compute streams come after all copies that are under way.

    On a host without streams, wait for them. What has died is free afterwards.
    """
    for store in list(_stores.values()):
        store.finish()


def reset_offloading() -> None:
    """Forget all stores, their figures and the order of steps; what is away can still come back."""
    global _schedule
    with _lock:
        _stores.clear()
        _schedule = Schedule()


@call_at_uninstall
def _forget_stores_of(transport: Transport) -> None:
    with _lock:
        for key in [key for key in _stores if key[0] is transport]:  # type: ignore[index]
            del _stores[key]


def _begin_again_in_child() -> None:
    """A forked process has neither the threads nor the right to the files of its parent."""
    global _lock
    _lock = threading.Lock()
    _stores.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_again_in_child)
