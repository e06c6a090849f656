"""What one training step costs: bytes over time, peak bytes, FLOPs.

Activation memory is what a step allocates beyond what was alive when it began. A CUDA device counts
that itself; a CPU does not, but the profiler reports every allocation and release of the threads
that it follows. It does not follow gloo's, which may hold a buffer of a collective last, so a
release can be missing. The next block at the same address proves it, and is when the first one
is taken out. What remains is an error of a few buffers under FSDP, and none in one process.

A step should begin without gradients (`zero_grad(set_to_none=True)` at the end of the one before),
so that it owns all that it releases; and one step should run before the first that is measured,
so that lazily built state (an optimizer's, a communicator's buffers) is not charged to it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# The profiler would announce every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

#: A training step, or a part of one.
Step = Callable[[], object]

# Device types as the profiler's trace numbers them.
_TRACE_DEVICE_TYPE = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes alive beyond those at the start of a step, after each allocation or release.

    `time_us[i]` counts from the first event, and `alive_bytes[i]` holds until `time_us[i + 1]`.
    """

    time_us: list[float]
    alive_bytes: list[int]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.alive_bytes, default=0)


def memory_timeline(step: Step, device: torch.device) -> MemoryTimeline:
    """Run `step` once under the profiler and follow the allocator of `device`.

    Raises:
        ValueError: for a device whose allocations the profiler does not number.
    """
    if device.type not in _TRACE_DEVICE_TYPE:
        raise ValueError(f"memory can be followed on cpu and cuda, got {device}")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [
        (event["ts"], event["args"])
        for event in events
        if event["name"] == "[memory]"
        and event["args"]["Device Type"] == _TRACE_DEVICE_TYPE[device.type]
    ]
    if not memory:
        return MemoryTimeline([], [])
    memory.sort(key=lambda event: event[0])  # the trace lists one thread after the other
    timeline = MemoryTimeline([], [])
    size_at: dict[int, int] = {}
    alive_bytes = 0
    for time_us, args in memory:
        # A block that is not in the table was alive before the step, and does not count.
        alive_bytes -= size_at.pop(args["Addr"], 0)
        if args["Bytes"] > 0:
            size_at[args["Addr"]] = args["Bytes"]
            alive_bytes += args["Bytes"]
        timeline.time_us.append(time_us - memory[0][0])
        timeline.alive_bytes.append(alive_bytes)
    return timeline


def peak_activation_bytes(step: Step, device: torch.device) -> int:
    """Run `step` once and return the most bytes alive beyond those at its start."""
    if device.type != "cuda":
        return memory_timeline(step, device).peak_bytes
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start_bytes = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - start_bytes)


class _Mallinfo2(ctypes.Structure):
    """What glibc's allocator says about itself."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def peak_heap_bytes(step: Step, interval_s: float = 0.0005) -> int:
    """The most bytes of host memory in use during `step` beyond those at its start.

    What glibc's allocator counts for all threads, so also what threads release that the profiler
    does not follow. Sampled by a thread, so peaks shorter than `interval_s` are missed.

    Raises:
        OSError: the C library is not glibc 2.33 or newer.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        raise OSError("heap bytes are counted by glibc 2.33 or newer, which this process lacks")
    libc.mallinfo2.restype = _Mallinfo2

    def in_use() -> int:
        info = libc.mallinfo2()
        return int(info.uordblks + info.hblkhd)

    gc.collect()
    start = peak = in_use()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(interval_s):
            peak = max(peak, in_use())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        step()
    finally:
        is_over.set()
        thread.join()
    return peak - start


def count_flops(step: Step) -> int:
    """Run `step` once and return the floating-point operations of its matrix products.

    Recomputed ones count each time. Fused attention on a CPU has no formula in torch's counter;
    with dropout it is computed from plain products and counts in full.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
