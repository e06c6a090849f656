"""What do a training step's time and memory come to when transformer blocks are offloaded?

A stack of blocks as large as those of a real model, each a region; no optimizer. One row a mode:

    mode                what
    plain               nothing
    checkpoint          checkpoint_wrapper(block)
    save_on_cpu         torch.autograd.graph.save_on_cpu(pin_memory=True) around the blocks
    host                offload_wrapper(block)
    host_on_checkpoint  offload_wrapper(checkpoint_wrapper(block))

    python -m scripts.bench.offload_blocks [--json FILE] [--device cuda] [--blocks 12]
        [--d-model 2048] [--seq-len 4096] [--batch 2] [--rounds 5] [--inflight-mib 64 128 256 512]

`--inflight-mib` gives `host` a row for each max_inflight_bytes, to choose the default by; the
first also holds for `host_on_checkpoint`. What is to be reached, of the two modes that are ours:

    column            what                                                            aim
    bound_ratio       step / max(step without offload, bytes moved / PCIe bandwidth)  <= 1.05
    speedup           step of save_on_cpu / step                                      >= 2
    peak_ratio        peak bytes of the device / those of save_on_cpu                 <= 1.03
    late_allocations  pinned allocations after the second step                        0

The step without offload is that of `plain`, or of `checkpoint`. The PCIe bandwidth is measured in
the same run, with pinned copies of 256 MiB in each direction alone, and in both at once. The modes
are timed in turns in one process. Peaks are what a step allocates beyond what was there before,
gradients included. `d2h_busy_ms` and `h2d_busy_ms` say how long a copy was running in one step:
the union of the copies' intervals in a profile; null where the profiler sees no copies.

Without a GPU, or with `--device simulated`, a small stack runs on a simulated device whose time is
virtual: operators take their FLOPs' time and copies their bytes'. That shows the schedule, the same
on every machine, and says nothing about a real device's overhead.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import wrappers as ours
from scripts import measure
from scripts.bench import blocks_table, harness
from scripts.bench.policy_blocks import run_step
from scripts.model import Block, GPTConfig
from wrappers import _knobs
from wrappers.offload.pool import Pool
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import finish_offloading, reset_offloading
from wrappers.offload.transfer import AcceleratorTransport, Transport

#: Steps after the second one in which pinned allocations are counted.
LATE_STEPS = 3

MIB = 1 << 20

#: How the profiler's names of copies begin. It adds what kind of memory the host's is.
_COPY_NAMES = {"D2H": "Memcpy DtoH", "H2D": "Memcpy HtoD"}

#: The simulated device computes and copies about as an H100 does with blocks of this width,
#: in float32 and without the time of attention.
_SIMULATED_AS_D_MODEL = 8192
_SIMULATED_FLOPS_PER_S = 500e12
_SIMULATED_BYTES_PER_S = 50e9

Interval = tuple[float, float]


@dataclass(frozen=True)
class Aim:
    """What a column is to be at most, or at least."""

    column: str
    limit: float
    is_upper: bool = True

    def is_reached(self, row: Mapping[str, Any]) -> bool:
        value = float(row[self.column])
        return value <= self.limit if self.is_upper else value >= self.limit

    def __str__(self) -> str:
        return f"{self.column} {'<=' if self.is_upper else '>='} {self.limit:g}"


AIMS = (
    Aim("bound_ratio", 1.05),
    Aim("speedup", 2.0, is_upper=False),
    Aim("peak_ratio", 1.03),
    Aim("late_allocations", 0),
)


@dataclass(frozen=True)
class Mode:
    """A way to run the blocks.

    Attributes:
        blocks: The blocks, wrapped where the mode is ours.
        around: Makes the context of the forward.
        baseline: For a mode that is ours: the one without offload.
        inflight_mib: For a mode that is ours: its max_inflight_bytes; None for the default.
    """

    blocks: nn.ModuleList
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    baseline: str = ""
    inflight_mib: float | None = None

    def step(self, x: Tensor) -> None:
        """One training step."""
        with self.around():
            run_step(self.blocks, x, lambda block, h: block(h))


class Rig(Protocol):
    """The device that the blocks run on, and its instruments."""

    device: torch.device

    @property
    def transport(self) -> Transport:
        """What copies."""
        ...

    def now_s(self) -> float:
        """A clock that copies and steps are timed by."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        ...

    def save_on_cpu(self) -> contextlib.AbstractContextManager[Any]:
        """What we are compared with."""
        ...

    def run(self, step: harness.Case) -> None:
        """Run one step."""
        ...

    def time_ms(self, steps: Mapping[str, harness.Case], rounds: int) -> dict[str, float]:
        """Median milliseconds of each step, timed in turns."""
        ...

    def peak_bytes(self, step: harness.Case) -> int:
        """The most device memory of one step."""
        ...

    def busy_ms(self, step: harness.Case) -> dict[str, float | None]:
        """By direction: for how long copies are running in one step."""
        ...

    def num_pinned_allocations(self) -> int:
        """How many times pinned memory has been allocated so far."""
        ...

    def pinned_bytes(self, step: harness.Case) -> int:
        """Pinned memory in use at the most in one step, beyond what was in use before."""
        ...


class GPU:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.transport = AcceleratorTransport()

    def now_s(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def save_on_cpu(self) -> contextlib.AbstractContextManager[Any]:
        return save_on_cpu(pin_memory=True)

    def run(self, step: harness.Case) -> None:
        step()

    def time_ms(self, steps: Mapping[str, harness.Case], rounds: int) -> dict[str, float]:
        return blocks_table.time_on_gpu(steps, rounds)

    def peak_bytes(self, step: harness.Case) -> int:
        return measure.peak_activation_bytes(step, self.device)

    def busy_ms(self, step: harness.Case) -> dict[str, float | None]:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            step()
            self.synchronize()
        intervals = copy_intervals(profiler.events() or [])
        if not any(intervals.values()):  # There are none, or the profiler may not see them.
            return dict.fromkeys(intervals)
        return {direction: union_us(found) / 1e3 for direction, found in intervals.items()}

    def num_pinned_allocations(self) -> int:
        return int(torch.cuda.host_memory_stats().get("num_host_alloc", 0))

    def pinned_bytes(self, step: harness.Case) -> int:
        self.synchronize()
        torch.cuda.reset_peak_host_memory_stats()
        before = torch.cuda.host_memory_stats().get("active_bytes.current", 0)
        step()
        self.synchronize()
        return int(torch.cuda.host_memory_stats().get("active_bytes.peak", 0) - before)


class Simulated:
    """A device whose time is virtual; see :mod:`wrappers.offload.simulated`."""

    def __init__(self, transport: SimulatedTransport, flops_per_s: float) -> None:
        self.device = torch.device("cpu")
        self.transport = transport
        self._compute = _ModelledCompute(transport, flops_per_s)
        self._save_on_cpu = _SaveOnSimulatedHost(transport)

    def now_s(self) -> float:
        return self.transport.now_s()

    def synchronize(self) -> None:
        """Let the copies' threads finish."""
        finish_offloading()

    def save_on_cpu(self) -> contextlib.AbstractContextManager[Any]:
        return saved_tensors_hooks(self._save_on_cpu.pack, self._save_on_cpu.unpack)

    def run(self, step: harness.Case) -> None:
        with self._compute:
            step()

    def time_ms(self, steps: Mapping[str, harness.Case], rounds: int) -> dict[str, float]:
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(2 + rounds):
            for name, step in steps.items():
                start_s = self.now_s()
                self.run(step)
                samples[name].append((self.now_s() - start_s) * 1e3)
                self.synchronize()
        return {name: statistics.median(values[2:]) for name, values in samples.items()}

    def peak_bytes(self, step: harness.Case) -> int:
        self.synchronize()
        return measure.peak_activation_bytes(partial(self.run, step), self.device)

    def busy_ms(self, step: harness.Case) -> dict[str, float | None]:
        num_before = len(self.transport.spans)
        self.run(step)
        spans = self.transport.spans[num_before:]
        return {
            row: union_us((s.start_s * 1e6, s.end_s * 1e6) for s in spans if s.row == row) / 1e3
            for row in _COPY_NAMES
        }

    def num_pinned_allocations(self) -> int:
        return self.transport.num_pinned_allocations

    def pinned_bytes(self, step: harness.Case) -> int:
        self._save_on_cpu.start_again()
        self.run(step)
        return self._save_on_cpu.peak_bytes


class _ModelledCompute(TorchDispatchMode):
    """Lets each operator that has a formula of FLOPs take their time on a simulated device."""

    def __init__(self, transport: SimulatedTransport, flops_per_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._transport = transport
        self._flops_per_s = flops_per_s

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=out)
            self._transport.compute(flops / self._flops_per_s, str(func))
        return out


class _HostCopy:
    """A saved tensor's copy on the simulated host."""

    def __init__(self, like: Tensor, memory: Tensor) -> None:
        self.dtype = like.dtype
        self.shape = like.shape
        self.memory = memory


class _SaveOnSimulatedHost:
    """What save_on_cpu(pin_memory=True) does, on a simulated device.

    Each saved tensor is copied on its own, whatever it shares its memory with, and the compute
    waits for the copy. Buffers are used again, as those of torch's allocator are.
    """

    def __init__(self, transport: SimulatedTransport) -> None:
        cpu = torch.device("cpu")
        self._transport = transport
        self._compute = transport.current_stream(cpu)
        self._out, self._back = (transport.new_stream(cpu, name) for name in _COPY_NAMES)
        self._pool = Pool(
            partial(transport.empty_host, is_pinned=True), budget_bytes=1 << 42, slab_bytes=MIB
        )
        self.peak_bytes = 0

    def start_again(self) -> None:
        """Forget the peak."""
        self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> _HostCopy:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        slot = self._pool.take(data.numel())
        assert slot is not None
        self.peak_bytes = max(self.peak_bytes, self._pool.used_bytes)
        start = slot.offset
        packed = _HostCopy(tensor, slot.slab.memory[start : start + data.numel()])
        weakref.finalize(packed, self._pool.give_back, slot)
        self._copy(packed.memory, data, self._out)
        return packed

    def unpack(self, packed: _HostCopy) -> Tensor:
        memory = packed.memory
        target = self._transport.empty(memory.numel(), memory.device, self._compute)
        self._copy(target, memory, self._back)
        return target.view(packed.dtype).view(packed.shape)

    def _copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        self._transport.wait(stream, self._transport.record(self._compute))
        self._transport.copy(target, source, stream)
        self._transport.wait(self._compute, self._transport.record(stream))


@contextlib.contextmanager
def simulated(d_model: int) -> Iterator[Simulated]:
    """A simulated device on which compute and copies relate as with wider blocks on an H100."""
    flops_per_s = _SIMULATED_FLOPS_PER_S * d_model / _SIMULATED_AS_D_MODEL
    with (
        _knobs.override(OFFLOAD_SLAB_BYTES=MIB),
        SimulatedTransport(
            bandwidth_bytes_per_s=_SIMULATED_BYTES_PER_S, latency_s=0.0
        ) as transport,
    ):
        yield Simulated(transport, flops_per_s)


def copy_intervals(events: Iterable[Any]) -> dict[str, list[Interval]]:
    """By direction: when the profiler's events say that the device was copying, in microseconds."""
    found: dict[str, list[Interval]] = {direction: [] for direction in _COPY_NAMES}
    for event in events:
        for direction, name in _COPY_NAMES.items():
            if event.name.startswith(name):
                found[direction].append((event.time_range.start, event.time_range.end))
    return found


def union_us(intervals: Iterable[Interval]) -> float:
    """How long at least one of some intervals lasts."""
    total = 0.0
    until = float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def bandwidth_gb_per_s(rig: Rig, nbytes: int = 256 * MIB, num_copies: int = 8) -> dict[str, float]:
    """Bandwidth of pinned copies: out alone, back alone, and each of them while both run."""
    transport, device = rig.transport, rig.device
    compute = transport.current_stream(device)
    streams = {name: transport.new_stream(device, name) for name in _COPY_NAMES}
    pairs = {}
    for name in streams:
        pair = (
            transport.empty_host(nbytes, is_pinned=True),
            transport.empty(nbytes, device, compute),
        )
        pairs[name] = pair if name == "D2H" else pair[::-1]

    def copy(names: Iterable[str], times: int) -> float:
        names = list(names)
        rig.synchronize()
        start_s = rig.now_s()
        for _ in range(times):
            for name in names:
                transport.copy(*pairs[name], streams[name])
        for name in names:
            transport.synchronize(transport.record(streams[name]))
        return times * nbytes / (rig.now_s() - start_s) / 1e9

    copy(streams, 1)  # the first copy maps the memory
    return {
        "d2h_gb_per_s": copy(["D2H"], num_copies),
        "h2d_gb_per_s": copy(["H2D"], num_copies),
        "each_of_both_gb_per_s": copy(streams, num_copies),
    }


def modes_of(
    blocks: nn.ModuleList, rig: Rig, inflight_mib: Iterable[float | None]
) -> dict[str, Mode]:
    """By name: the modes. All of them have the same blocks inside."""

    def offloaded(inner: Iterable[nn.Module], mib: float | None) -> nn.ModuleList:
        limit_bytes = None if mib is None else int(mib * MIB)
        return nn.ModuleList(
            ours.offload_wrapper(block, max_inflight_bytes=limit_bytes) for block in inner
        )

    limits = list(inflight_mib)
    checkpointed = nn.ModuleList(ours.checkpoint_wrapper(block) for block in blocks)
    modes = {
        "plain": Mode(blocks),
        "checkpoint": Mode(checkpointed),
        "save_on_cpu": Mode(blocks, around=rig.save_on_cpu),
    }
    for mib in limits:
        name = "host" if len(limits) == 1 else f"host, {mib:g} MiB"
        modes[name] = Mode(offloaded(blocks, mib), baseline="plain", inflight_mib=mib)
    on_checkpoint = offloaded(checkpointed, limits[0])
    modes["host_on_checkpoint"] = Mode(on_checkpoint, baseline="checkpoint", inflight_mib=limits[0])
    return modes


def _host_stats() -> ours.TierStats:
    try:
        return ours.offload_stats()["host"]
    except KeyError:  # Nothing has been offloaded.
        return ours.TierStats("host")


def figures_of(mode: Mode, x: Tensor, rig: Rig) -> dict[str, Any]:
    """Everything about a mode but its time: bytes, copies, allocations."""
    reset_offloading()
    gc.collect()  # The pool of the mode before goes.
    step = partial(mode.step, x)
    for _ in range(2):
        rig.run(step)
    rig.synchronize()
    before, num_before = _host_stats(), rig.num_pinned_allocations()
    for _ in range(LATE_STEPS):
        rig.run(step)
    rig.synchronize()
    after, num_after = _host_stats(), rig.num_pinned_allocations()
    num_late = max(after.num_allocations - before.num_allocations, num_after - num_before)
    # The other modes' buffers are counted by nobody else.
    host_bytes = after.peak_bytes if mode.baseline else rig.pinned_bytes(step)
    busy = rig.busy_ms(step)
    return {
        "peak_bytes": rig.peak_bytes(step),
        "host_bytes": host_bytes,
        "out_bytes": (after.out_bytes - before.out_bytes) // LATE_STEPS,
        "back_bytes": (after.back_bytes - before.back_bytes) // LATE_STEPS,
        "waited_ms": (after.waited_s - before.waited_s) / LATE_STEPS * 1e3
        if mode.baseline
        else None,
        "d2h_busy_ms": busy["D2H"],
        "h2d_busy_ms": busy["H2D"],
        "late_allocations": num_late,
    }


def _compared(
    name: str, modes: Mapping[str, Mode], times: Mapping[str, float], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The columns of a mode that is ours which compare it with the others."""
    own, theirs = figures[name], figures["save_on_cpu"]
    bound_ms = max(times[modes[name].baseline], own["transfer_ms"])
    row = {
        "bound_ratio": times[name] / bound_ms,
        "speedup": times["save_on_cpu"] / times[name],
        "peak_ratio": own["peak_bytes"] / theirs["peak_bytes"],
        "late_allocations": own["late_allocations"],
    }
    missed = [str(aim) for aim in AIMS if not aim.is_reached(row)]
    return {**row, "missed": missed}


def measure_modes(options: argparse.Namespace, rig: Rig) -> list[dict[str, Any]]:
    """A row for each mode."""
    torch.manual_seed(0)
    config = GPTConfig(
        d_model=options.d_model, num_heads=options.heads, seq_len=options.seq_len, dropout=0.0
    )
    dtype = getattr(torch, options.dtype)
    with rig.device:
        blocks = nn.ModuleList(Block(config).to(dtype) for _ in range(options.blocks))
        x = torch.randn(options.batch, options.seq_len, options.d_model, dtype=dtype)
    x.requires_grad_()
    modes = modes_of(blocks, rig, options.inflight_mib)

    bandwidth = bandwidth_gb_per_s(rig, options.copy_mib * MIB)
    figures = {name: figures_of(mode, x, rig) for name, mode in modes.items()}
    for own in figures.values():
        out_s = own["out_bytes"] / bandwidth["d2h_gb_per_s"] / 1e9
        back_s = own["back_bytes"] / bandwidth["h2d_gb_per_s"] / 1e9
        own["transfer_ms"] = (out_s + back_s) * 1e3
    reset_offloading()
    gc.collect()
    times = rig.time_ms(
        {name: partial(mode.step, x) for name, mode in modes.items()}, options.rounds
    )
    rows = []
    for name, mode in modes.items():
        row = {
            "benchmark": "offload_blocks",
            "mode": name,
            "inflight_mib": mode.inflight_mib,
            "step_ms": times[name],
            "time_ratio": times[name] / times["plain"],
            **figures[name],
            **bandwidth,
        }
        if mode.baseline:
            row.update(_compared(name, modes, times, figures))
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for size in ("dtype", "blocks", "d_model", "seq_len", "batch"):
            row[size] = getattr(options, size)
        rows.append({**row, "is_simulated": options.device == "simulated"})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, and for each mode that is ours what it has reached."""
    titles = ("mode", "step ms", "device MiB", "host MiB", "D2H busy", "H2D busy", "waited ms")
    lines = [titles]
    for row in rows:
        busy = (row["d2h_busy_ms"], row["h2d_busy_ms"])
        lines.append(
            (
                row["mode"],
                f"{row['step_ms']:.3f}",
                f"{row['peak_bytes'] / MIB:.1f}",
                f"{row['host_bytes'] / MIB:.1f}",
                *("-" if ms is None else f"{ms:.3f}" for ms in (*busy, row["waited_ms"])),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    text.append(
        "PCIe: {d2h_gb_per_s:.1f} GB/s out, {h2d_gb_per_s:.1f} GB/s back, "
        "{each_of_both_gb_per_s:.1f} GB/s each of both at once".format(**rows[0])
    )
    for row in rows:
        for aim in AIMS if "missed" in row else ():
            verdict = "reached" if str(aim) not in row["missed"] else "MISSED"
            text.append(f"{row['mode']}: {aim}: {row[aim.column]:.3f} {verdict}")
    return "\n".join(text)


#: Sizes for the simulated device, where they are not given.
_SMALL = {"blocks": 6, "d_model": 128, "heads": 4, "seq_len": 128, "batch": 2, "copy_mib": 1}
_LARGE = {"blocks": 12, "d_model": 2048, "heads": 16, "seq_len": 4096, "batch": 2, "copy_mib": 256}
_SMALL_INFLIGHT_MIB = 1.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of the device that is there."""
    parser = harness.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "simulated"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    for name in _LARGE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inflight-mib", type=float, nargs="+")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "simulated"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: pass --device simulated")
    is_simulated = options.device == "simulated"
    for name, value in (_SMALL if is_simulated else _LARGE).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.dtype is None:
        options.dtype = "float32" if is_simulated else "bfloat16"
    if options.inflight_mib is None:
        options.inflight_mib = [_SMALL_INFLIGHT_MIB if is_simulated else None]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "simulated":
        torch.set_num_threads(1)
        with simulated(options.d_model) as rig:
            rows = measure_modes(options, rig)
        harness.report(rows, options.json)
    else:
        rows = measure_modes(options, GPU())
        harness.report(rows, options.json, options.device)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
