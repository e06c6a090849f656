"""Measure the device at hand, so that times that are derived from shapes come out as they are here.

Each figure is the median over some rounds of a kernel whose size is typical for a training step, as
a processor's rates depend on it: caches, threads, and the least side of a product. Times are those
of :func:`wrappers.plan.costs.host_clock`, or of the wall between two waits for an accelerator.

A rate that falls with the shortest side ``s`` of a product is fitted from two sides: the time of a
FLOP is ``(1 + half / s) / rate``, a line in ``1 / s``.

What the engine costs is seen in regions whose kernels cost next to nothing, a short one and a long
one, with a plan that keeps nothing. Their forwards and backwards take longer than without a region:

    forward  = rest + recorded operators * record
    backward = rest + replayed operators * (replay + operator)

and the rests are what a region costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wrappers import _device, policies
from wrappers.modules.checkpoint import checkpoint_wrapper
from wrappers.plan import hardware as store
from wrappers.plan.budget import capacity_bytes
from wrappers.plan.costs import Stopwatch
from wrappers.plan.records import Hardware
from wrappers.policy import CheckpointImpl
from wrappers.report import region_report

__all__ = ["Effort", "calibrate"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Times that each figure is measured; the median counts.
        round_us: A round repeats what takes less than this.
        side: Side of square matrices; others are made of it.
        rows: Elements of what is not a product, in rows of ``row`` each.
        row: Length of a row: what a norm or a softmax runs over.
        pool_bytes: Memory that streaming goes through before it comes back, beyond any cache.
        copy_bytes: Size of a copy to the host or back, and of memory that is touched first.
        short: Blocks of operators in the short region of the engine's cost.
        long: The same for the long one.
        engine_rounds: Steps of such a region.
    """

    rounds: int = 9
    round_us: float = 2000.0
    side: int = 512
    rows: int = 8192
    row: int = 256
    pool_bytes: int = 128 * 1024**2
    copy_bytes: int = 64 * 1024**2
    short: int = 1
    long: int = 6
    engine_rounds: int = 60


#: What keeps a core busy for long enough, and an accelerator.
HOST = Effort()
ACCELERATOR = Effort(side=4096, rows=16384, row=2048, pool_bytes=1024**3)

#: Data types whose products are measured, where the device has them.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Stopwatch(Stopwatch):
    """Times functions as often as it takes."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        super().__init__(device)
        self.effort = effort

    def us(self, function: Callable[[], object]) -> float:
        """Microseconds of a call, as the median over the rounds."""
        self.time_us(function)
        guess = self.time_us(function)
        times = max(1, min(1000, int(self.effort.round_us / max(guess, 0.1))))
        return median(self.time_us(function, times) for _ in range(self.effort.rounds))


def calibrate(
    device: torch.device | str | None = None, *, save: bool = True, effort: Effort | None = None
) -> Hardware:
    """Measure what a device of this machine can do, and what the engine costs here.

    Takes some seconds, in which nothing else should run on it. For a CPU the figures hold for the
    number of threads that torch has now.

    Args:
        device: The default is the accelerator, or the CPU where there is none.
        save: Whether to store the result for :func:`wrappers.plan.hardware.find_hardware`.
        effort: How much to measure; the default depends on the device.

    Returns:
        The description, with ``is_calibrated``.

    Raises:
        OSError: The result cannot be stored.
    """
    device = _device.default_device() if device is None else torch.device(device)
    if effort is None:
        effort = HOST if _device.is_host_type(device) else ACCELERATOR
    watch = _Stopwatch(device, effort)
    with _device.random_state_kept(device), torch.enable_grad():
        hardware = _measure(watch)
    if save:
        store.save(hardware, device)
    return hardware


def _measure(watch: _Stopwatch) -> Hardware:
    device = watch.device
    with torch.no_grad():
        rates = dict(_matmul_rates(watch))
        launch_us = _launch_us(watch)
        bandwidth = _bandwidth(watch)
        fits = {"matmul": _fit_matmul(watch, rates), "bmm": _fit_bmm(watch, rates)}
        elements = _element_costs(watch, launch_us)
        fresh = _fresh_bytes_per_s(watch)
        h2d, d2h = _link(watch)
    fits["attention"], fits["attention_backward"], block = _fit_attention(watch, rates)
    region_us, record_us, replay_us = _engine_costs(watch)
    return Hardware(
        store.device_key(device),
        rates,
        bandwidth,
        h2d_bytes_per_s=h2d,
        d2h_bytes_per_s=d2h,
        launch_us=launch_us,
        region_us=region_us,
        record_us=record_us,
        replay_us=replay_us,
        memory_bytes=capacity_bytes(device) or 0,
        is_calibrated=True,
        efficiency={kind: share for kind, (share, _) in fits.items()},
        half_sides={kind: half for kind, (_, half) in fits.items()},
        attention_block=block,
        element_ns=elements,
        fresh_bytes_per_s=fresh,
        fresh_min_bytes=FRESH_MIN_BYTES if fresh else 0,
    )


# --- Products

#: A product whose data type has no kernel of its own takes long: one size of it must do.
_SLOW_US = 50_000.0


def _matmul_rates(watch: _Stopwatch) -> Iterable[tuple[str, float]]:
    """FLOPs a second over products as a transformer has them, by data type."""
    side = watch.effort.side
    shapes = [(side, side, side), (4 * side, side // 2, 2 * side), (2 * side, 2 * side, side // 2)]
    for dtype in _DTYPES:
        flops = taken_us = 0.0
        for m, k, n in shapes:
            try:
                a = torch.randn(m, k, device=watch.device).to(dtype)
                b = torch.randn(k, n, device=watch.device).to(dtype)
                first_us = watch.time_us(partial(torch.matmul, a, b))
            except (RuntimeError, TypeError):  # The device has no such product, or no such type.
                break
            is_slow = first_us > _SLOW_US
            taken_us += first_us if is_slow else watch.us(partial(torch.matmul, a, b))
            flops += 2.0 * m * k * n
            if is_slow:
                break
        if taken_us:
            yield str(dtype).removeprefix("torch."), 1e6 * flops / taken_us


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Efficiency and half side from two ``(side, share of the rate)``."""
    (s1, r1), (s2, r2) = points
    slope = (1 / r1 - 1 / r2) / (1 / s1 - 1 / s2)
    slope = max(slope, 0.0)
    base = max(1 / r2 - slope / s2, 0.1)
    return 1 / base, slope / base


def _sides(watch: _Stopwatch) -> tuple[int, int]:
    return watch.effort.side // 16, watch.effort.side // 4


def _fit_matmul(watch: _Stopwatch, rates: dict[str, float]) -> tuple[float, float]:
    """Half side of matrix products, and the efficiency by which the rates are of their sides."""
    side, halves = watch.effort.side, []
    for s in _sides(watch):
        a = torch.randn(4 * side, side, device=watch.device)
        b = torch.randn(side, s, device=watch.device)
        taken = watch.us(partial(torch.matmul, a, b))
        halves.append(max(0.0, s * (taken * rates["float32"] / (8e6 * side * side * s) - 1)))
    half = min(halves)
    return 1 + half / (side // 2), half


def _fit_bmm(watch: _Stopwatch, rates: dict[str, float]) -> tuple[float, float]:
    """Efficiency and half side of the batched products of attention."""
    length, points = watch.effort.side // 2, []
    for s in _sides(watch):
        wide = torch.randn(16, length, length, device=watch.device)
        thin = torch.randn(16, length, s, device=watch.device)
        flat = thin.transpose(1, 2).contiguous()
        taken = watch.us(partial(torch.matmul, wide, thin)) + watch.us(
            partial(torch.matmul, thin, flat)
        )
        points.append((s, 2e6 * 2 * 16 * length * length * s / taken / rates["float32"]))
    return _line(points)


def _fit_attention(
    watch: _Stopwatch, rates: dict[str, float]
) -> tuple[tuple[float, float], tuple[float, float], int]:
    """Efficiency and half side of fused attention, forward and backward, and its block of keys."""
    dtype = torch.float32 if _device.is_host_type(watch.device) else torch.bfloat16
    rate = rates.get(str(dtype).removeprefix("torch."), rates["float32"])
    length, forward, backward = watch.effort.side // 2, [], []
    for s in _sides(watch):
        q, k, v = _queries(watch, 16, length, s, dtype)
        with torch.no_grad():
            taken = watch.us(partial(F.scaled_dot_product_attention, q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        grad = torch.randn_like(out)

        def pull(out: Tensor = out, inputs: Any = (q, k, v), grad: Tensor = grad) -> object:
            return torch.autograd.grad(out, inputs, grad, retain_graph=True)

        flops = 4e6 * 16 * length * length * s
        forward.append((s, flops / taken / rate))
        backward.append((s, 2.5 * flops / watch.us(pull) / rate))
    return _line(forward), _line(backward), _attention_block(watch, dtype)


def _attention_block(watch: _Stopwatch, dtype: torch.dtype) -> int:
    """Keys in a block, from what a causal mask saves; see ``Hardware.attention_block``."""
    length = 2 * watch.effort.side
    q, k, v = _queries(watch, 1, length, watch.effort.side // 8, dtype)
    with torch.no_grad():
        full, causal = (
            watch.us(partial(F.scaled_dot_product_attention, q, k, v, is_causal=is_causal))
            for is_causal in (False, True)
        )
    share = min(1.0, max(0.5, causal / full))
    return max(1, round((2 * share - 1) * length / 64) * 64)


def _queries(
    watch: _Stopwatch, heads: int, length: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    shape = (1, heads, length, width)
    return [torch.randn(shape, device=watch.device, dtype=dtype).requires_grad_() for _ in range(3)]


# --- Memory


def _launch_us(watch: _Stopwatch) -> float:
    a = torch.zeros(8, device=watch.device)
    return watch.us(lambda: a + a)


def _bandwidth(watch: _Stopwatch) -> float:
    """Bytes a second of an addition of tensors that lie in memory, its result included."""
    numel = watch.effort.rows * watch.effort.row
    count = max(2, watch.effort.pool_bytes // (4 * numel))
    pool = [torch.randn(numel, device=watch.device) for _ in range(count)]

    def sweep() -> None:
        for a, b in itertools.pairwise(pool):
            torch.add(a, b)

    return 12e6 * numel * (count - 1) / watch.us(sweep)


#: From glibc's largest threshold on, each allocation is memory that the process has never touched.
FRESH_MIN_BYTES = 32 * 1024**2


def _fresh_bytes_per_s(watch: _Stopwatch) -> float:
    """Rate at which new memory can be touched, on top of writing it; 0 where that is free."""
    if not _device.is_host_type(watch.device):
        return 0.0
    size = watch.effort.copy_bytes
    kept = torch.zeros(size, dtype=torch.uint8)
    used = watch.us(lambda: kept.fill_(1))
    fresh = watch.us(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))
    return 1e6 * size / (fresh - used) if fresh > 1.2 * used else 0.0


def _link(watch: _Stopwatch) -> tuple[float, float]:
    """Bytes a second to the device and back, through pinned memory; 0 on the host."""
    if _device.is_host_type(watch.device):
        return 0.0, 0.0
    size = watch.effort.copy_bytes
    host = _device.empty_pinned(size)
    there = torch.empty(size, dtype=torch.uint8, device=watch.device)
    to_device = watch.us(lambda: there.copy_(host, non_blocking=True))
    to_host = watch.us(lambda: host.copy_(there, non_blocking=True))
    return 1e6 * size / to_device, 1e6 * size / to_host


# --- Elements


def _element_costs(watch: _Stopwatch, launch_us: float) -> dict[str, float]:
    """Nanoseconds an element, by operator and, from its operators, by class."""
    rows, row = watch.effort.rows, watch.effort.row
    costs: dict[str, float] = {}
    for kind, cases in _element_cases(watch).items():
        found = []
        for name, function in cases.items():
            taken = watch.us(function) - launch_us
            found.append(max(0.0, 1e3 * taken / (rows * row)))
            if name:
                costs[f"aten.{name}"] = found[-1]
        costs[kind] = median(found)
    return costs


def _element_cases(watch: _Stopwatch) -> dict[str, dict[str, Callable[[], object]]]:
    """By class: operators on ``rows`` times ``row`` elements, whose costs are their own too."""
    rows, row, device = watch.effort.rows, watch.effort.row, watch.device
    x = torch.randn(rows, row, device=device)
    g = torch.randn(rows, row, device=device)
    y = x.sigmoid()
    table = torch.randn(256, row, device=device)
    tokens = torch.randint(256, (rows,), device=device)
    weight = torch.ones(row, device=device)
    _, mean, rstd = aten.native_layer_norm(x, [row], weight, weight, 1e-5)
    wide = x.view(rows // 4, 4 * row)
    heads = x.view(8, rows // 8, 8, row // 8).transpose(1, 2)
    keys = heads.transpose(2, 3)
    noise = torch.empty(rows, row, device=device)
    return {
        "transcendental": {
            "gelu": lambda: aten.gelu(x),
            "gelu_backward": lambda: aten.gelu_backward(g, x),
            "silu": lambda: aten.silu(x),
            "silu_backward": lambda: aten.silu_backward(g, x),
            "sigmoid": lambda: aten.sigmoid(x),
            "tanh": lambda: aten.tanh(x),
            "exp": lambda: aten.exp(x),
            "sin": lambda: aten.sin(x),
        },
        "softmax": {
            "_softmax": lambda: aten._softmax(x, -1, False),
            "_log_softmax": lambda: aten._log_softmax(x, -1, False),
            "_safe_softmax": lambda: aten._safe_softmax(x, -1),
            "_softmax_backward_data": lambda: aten._softmax_backward_data(g, y, -1, x.dtype),
        },
        "norm": {
            "native_layer_norm": lambda: aten.native_layer_norm(x, [row], weight, weight, 1e-5),
            "native_layer_norm_backward": lambda: aten.native_layer_norm_backward(
                g, x, [row], mean, rstd, weight, weight, [True, True, True]
            ),
        },
        # Across rows, as the gradient of a bias is summed.
        "reduction": {"": lambda: wide.sum(0)},
        "copy": {"": lambda: heads.contiguous()},
        "transpose": {"": lambda: keys.contiguous()},
        "random": {
            "bernoulli_": lambda: noise.bernoulli_(0.9),
            "normal_": lambda: noise.normal_(),
        },
        "gather": {
            "embedding": lambda: aten.embedding(table, tokens),
            "embedding_dense_backward": lambda: aten.embedding_dense_backward(
                g, tokens, 256, -1, False
            ),
        },
    }


# --- The engine


class _Block(nn.Module):
    """Some operators of a transformer block, on next to no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Residual, norm and two products."""
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x).view(4, 8))).view(2, 2, 8))
        return out


@dataclass(frozen=True)
class _EngineTimes:
    """Of a region of some blocks, against the same code without one.

    Attributes:
        forward_us: How much longer its forward takes.
        backward_us: How much longer its backward takes.
        operator_us: How long one of its operators takes.
        num_recorded: Operators of its forward.
        num_replayed: Operators that its backward runs again.
    """

    forward_us: float
    backward_us: float
    operator_us: float
    num_recorded: int
    num_replayed: int


def _engine_costs(watch: _Stopwatch) -> tuple[float, float, float]:
    """Microseconds of a region, of an operator that is recorded, of one that is replayed."""
    short, long = (_engine_times(watch, n) for n in (watch.effort.short, watch.effort.long))
    record_us = (long.forward_us - short.forward_us) / (long.num_recorded - short.num_recorded)
    again_us = (long.backward_us - short.backward_us) / (long.num_replayed - short.num_replayed)
    rest_us = short.forward_us - record_us * short.num_recorded
    rest_us += short.backward_us - again_us * short.num_replayed
    return max(0.0, rest_us), max(0.0, record_us), max(0.0, again_us - long.operator_us)


def _run_into(outs: list[Tensor], model: nn.Module, x: Tensor) -> None:
    outs.append(model(x).sum())


def _engine_times(watch: _Stopwatch, num_blocks: int) -> _EngineTimes:
    def build() -> nn.Module:
        return nn.Sequential(*(_Block() for _ in range(num_blocks))).to(watch.device)

    plain = build()
    region = checkpoint_wrapper(build(), impl=CheckpointImpl.REPLAY, policy=policies.planned({}))
    x = torch.randn(2, 2, 8, device=watch.device, requires_grad=True)

    def without_graph() -> None:
        with torch.no_grad():
            plain(x)

    def times_us() -> list[float]:
        found = [watch.time_us(without_graph)]
        for model in (plain, region):
            outs: list[Tensor] = []
            found.append(watch.time_us(partial(_run_into, outs, model, x)))
            found.append(watch.time_us(outs.pop().backward))
        return found

    for _ in range(3):  # The first calls are checked, and make what later ones reuse.
        times_us()
    rounds = [times_us() for _ in range(watch.effort.engine_rounds)]
    alone, *plain_us, forward_us, backward_us = map(median, zip(*rounds, strict=True))
    row = region_report(region).rows[0]
    assert row.num_operators is not None, "a region of plain operators is not replayed"
    assert row.num_replayed is not None, "a region of plain operators is not replayed"
    return _EngineTimes(
        forward_us - plain_us[0],
        backward_us - plain_us[1],
        alone / row.num_operators,
        row.num_operators,
        row.num_replayed,
    )
