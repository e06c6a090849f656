"""The time of an operator from its shapes: FLOPs, bytes, classes; and what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.model import Block, GPTConfig
from wrappers import _torch
from wrappers.plan import costs
from wrappers.plan.costs import Measured, Roofline, TimingMode, class_of, num_flops, signature
from wrappers.plan.hardware import PRESETS
from wrappers.plan.records import Hardware

aten = torch.ops.aten

#: One byte takes a microsecond, and so does one FLOP.
UNIT = Hardware("unit", {"float32": 1e6}, 1e6, launch_us=100.0)


class Calls(_torch.TorchDispatchMode):
    """Every call that reaches the dispatcher, with its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def flops(self):
        return sum(num_flops(*call) for call in self.calls)


def cost(hardware, function):
    """Microseconds of the operators that a function calls, views included."""
    with Calls() as seen:
        function()
    return sum(Roofline(hardware).time_us(*call) for call in seen.calls)


# --- FLOPs


def step(block, x):
    block(x).sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_a_block_are_those_of_torchs_counter(device):
    block = Block(GPTConfig(1, 32, 4, 16, dropout=0.1)).to(device)
    x = torch.randn(2, 16, 32, device=device, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # products that torch's counter knows
        with FlopCounterMode(display=False) as counter:
            step(block, x)
        with Calls() as seen:
            step(block, x)
    assert seen.flops() == counter.get_total_flops() > 0


def test_flops_of_fused_attention_on_a_cpu():
    batch, heads, length, width = 2, 4, 16, 8
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    with Calls() as seen:
        out = F.scaled_dot_product_attention(q, k, v)
    assert seen.flops() == 2 * product
    with Calls() as seen:
        out.sum().backward()
    assert seen.flops() == 5 * product


def test_flops_of_what_torch_has_no_formula_for():
    x, w = torch.randn(3, 4, 8), torch.randn(5, 8)
    with torch.inference_mode(), Calls() as seen:
        F.linear(x, w)
    assert seen.flops() == 2 * 3 * 4 * 8 * 5
    with Calls() as seen:
        torch.mv(w, x[0, 0])
        torch.dot(x[0, 0], x[0, 1])
        torch.addbmm(torch.zeros(4, 4), x, x.transpose(1, 2))
    assert seen.flops() == 2 * 5 * 8 + 2 * 8 + 2 * 3 * 4 * 8 * 4


def test_flops_of_a_convolution():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    conv = nn.Conv2d(3, 4, 3)
    with FlopCounterMode(display=False) as counter:
        step(conv, x)
    with Calls() as seen:
        step(conv, x)
    assert seen.flops() == counter.get_total_flops() > 0


def test_the_rest_has_none():
    x = torch.randn(4, 4)
    assert num_flops(aten.add.Tensor, (x, x), {}, x + x) == 0


# --- Bytes


def test_reads_and_writes():
    x = torch.randn(8, 4)  # 128 bytes
    assert cost(UNIT, lambda: x + torch.ones(())) == 100 + 4 + 100 + 128 + 4 + 128
    assert cost(UNIT, lambda: torch.add(x, x)) == 100 + 128 + 128  # read once
    assert cost(UNIT, lambda: x.mul_(2)) == 100 + 128 + 128


def test_views_are_free():
    x = torch.randn(8, 4, requires_grad=True)

    def views():
        x.view(4, 8).t()[1:].unsqueeze(0).expand(3, 7, 4).detach()
        x.chunk(2)

    assert cost(UNIT, views) == 0


def test_an_expanded_dimension_counts_once():
    row, x = torch.randn(1, 4), torch.randn(8, 4)
    assert cost(UNIT, lambda: x + row.expand(8, 4)) == 100 + 128 + 16 + 128
    assert cost(UNIT, lambda: x + row) == 100 + 128 + 16 + 128
    assert costs.distinct_bytes(row.expand(8, 4)) == 16
    assert costs.distinct_bytes(torch.empty(0, 4)) == 0


def test_what_is_overwritten_is_not_read():
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    assert cost(UNIT, lambda: x.copy_(y)) == 100 + 128 + 128
    assert cost(UNIT, lambda: x.zero_()) == 100 + 128


def test_memory_with_nothing_in_it_costs_a_launch():
    x = torch.randn(8, 4)
    assert cost(UNIT, lambda: torch.empty_like(x)) == 100


def test_of_a_table_the_rows_count_that_are_taken():
    table, tokens = torch.randn(1000, 4), torch.tensor([1, 5])
    assert cost(UNIT, lambda: F.embedding(tokens, table)) == 100 + 16 + 32 + 32


# --- Times


def test_the_slower_of_computing_and_moving_decides():
    a, b = torch.randn(4, 8), torch.randn(8, 2)
    moved, flops = 4 * (32 + 16 + 8), 2 * 4 * 8 * 2
    assert cost(UNIT, lambda: a @ b) == 100 + max(moved, flops) == 100 + moved
    slow = Hardware("slow", {"float32": 1e5}, 1e6)
    assert cost(slow, lambda: a @ b) == pytest.approx(10 * flops)


def test_a_short_side_slows_a_product():
    fast = {"memory_bytes_per_s": 1e30, "half_sides": {"matmul": 6.0}}
    hardware = Hardware("h", {"float32": 1e6}, **fast)
    flops = 2 * 4 * 8 * 2
    assert cost(hardware, lambda: torch.randn(4, 8) @ torch.randn(8, 2)) == pytest.approx(
        flops * (2 + 6) / 2
    )


def test_the_rate_is_that_of_the_data_type():
    hardware = Hardware("h", {"float32": 1e6, "bfloat16": 8e6, "tf32": 2e6}, 1e30)
    roofline = Roofline(hardware)
    a = torch.randn(4, 4)
    flops = 2 * 4**3

    def time(dtype):
        return cost(hardware, lambda: a.to(dtype) @ a.to(dtype))

    assert time(torch.float32) == pytest.approx(flops)
    assert time(torch.bfloat16) == pytest.approx(flops / 8)
    assert time(torch.float16) == pytest.approx(flops / 8)  # of the nearest that is known
    assert time(torch.float64) == pytest.approx(2 * flops)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert roofline._rate(torch.float32) == 2e6
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_causal_mask_saves_whole_blocks_of_keys():
    hardware = Hardware("h", {"float32": 1e6}, 1e30, attention_block=16)
    q = torch.randn(1, 2, 64, 8)

    def time(is_causal):
        return cost(hardware, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=is_causal))

    assert time(False) == pytest.approx(4 * 2 * 64 * 64 * 8)
    assert time(True) / time(False) == pytest.approx((1 + 16 / 64) / 2)


def test_attention_backward_has_its_own_efficiency():
    hardware = Hardware("h", {"float32": 1e6}, 1e30, efficiency={"attention_backward": 0.5})
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    out = F.scaled_dot_product_attention(q, q.clone(), q.clone())
    flops = 10 * 2 * 16 * 16 * 8
    grad = torch.ones_like(out)
    taken = cost(hardware, lambda: torch.autograd.grad(out, q, grad))
    assert taken == pytest.approx(2 * flops)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.gelu, "transcendental"),
        (torch.tanh, "transcendental"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: F.layer_norm(x, [4]), "norm"),
        (lambda x: x.sum(0), "reduction"),
        (torch.bernoulli, "random"),
        (lambda x: x @ x, "matmul"),
        (lambda x: torch.bmm(x[None], x[None]), "bmm"),
        (lambda x: x + 1, "pointwise"),
        (lambda x: F.embedding(torch.zeros(2, dtype=torch.long), x), "gather"),
        (lambda x: F.conv1d(x[None], x[None]), "convolution"),
        (torch.clone, "copy"),
    ],
)
def test_classes_and_their_costs(function, kind):
    x = torch.rand(4, 4)
    with Calls() as seen:
        function(x)
    kinds = [class_of(func) for func, *_ in seen.calls]
    assert kind in kinds


def test_kernels_of_attention_have_classes_of_their_own():
    name = "_scaled_dot_product_flash_attention"
    for suffix in ("", "_for_cpu"):
        assert class_of(getattr(aten, f"{name}{suffix}").default) == "attention"
        assert class_of(getattr(aten, f"{name}{suffix}_backward").default) == "attention_backward"


def test_an_element_may_cost_more_than_its_bytes():
    x = torch.randn(8, 4)
    dear = {"transcendental": 1e6, "aten.tanh": 2e6}
    hardware = Hardware("h", {"float32": 1.0}, 1e30, element_ns=dear)
    assert cost(hardware, lambda: F.gelu(x)) == pytest.approx(32 * 1000)
    assert cost(hardware, lambda: torch.tanh(x)) == pytest.approx(32 * 2000)
    assert cost(hardware, lambda: x + 1) == pytest.approx(0)


def test_copies_by_what_they_read():
    x = torch.randn(2, 4, 4)
    hardware = Hardware("h", {}, 1e30, element_ns={"copy": 1e3, "transpose": 1e6})
    assert cost(hardware, lambda: x.clone()) == pytest.approx(0)
    rows_apart = x.transpose(0, 1)
    assert cost(hardware, lambda: rows_apart.contiguous()) == pytest.approx(32)
    assert cost(hardware, lambda: x.mT.contiguous()) == pytest.approx(32_000)
    assert cost(hardware, lambda: torch.stack([x, x.mT])) == pytest.approx(32_000)


def test_large_results_touch_new_memory():
    x = torch.randn(8, 4)
    hardware = Hardware("h", {}, 1e30, fresh_bytes_per_s=1e6, fresh_min_bytes=128)
    assert cost(hardware, lambda: x + 1) == pytest.approx(128)
    assert cost(hardware, lambda: x[:4] + 1) == pytest.approx(0)
    assert cost(hardware, lambda: x.add_(1)) == pytest.approx(0)


def calls_of_step(device):
    with torch.device(device):
        block = Block(GPTConfig(1, 32, 4, 16))
    x = torch.randn(2, 16, 32, device=device, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), Calls() as seen:
        step(block, x)
    return seen.calls


def test_nothing_but_shapes_is_needed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    roofline = Roofline(PRESETS["CPU"])

    def times(calls):
        by_name = {}
        for call in calls:
            by_name.setdefault(str(call[0]), []).append(roofline.time_us(*call))
        return {name: sorted(t) for name, t in by_name.items() if any(t)}

    real = times(calls_of_step("cpu"))
    with FakeTensorMode():
        assert times(calls_of_step("cpu")) == real
    meta = times(calls_of_step("meta"))
    assert {n: meta[n] for n in real if "mm" in n} == {n: real[n] for n in real if "mm" in n}


# --- What was measured


def test_signatures_tell_apart_what_differs():
    x = torch.randn(4, 4)
    same = signature(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float32})
    assert same == signature(aten.sum.dim_IntList, (x + 1, [0]), {"dtype": torch.float32})
    others = [
        signature(aten.sum.default, (x, [0]), {"dtype": torch.float32}),
        signature(aten.sum.dim_IntList, (x, [1]), {"dtype": torch.float32}),
        signature(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64}),
        signature(aten.sum.dim_IntList, (x, [0]), {}),
        signature(aten.sum.dim_IntList, (x.t(), [0]), {"dtype": torch.float32}),
        signature(aten.sum.dim_IntList, (x[:2], [0]), {"dtype": torch.float32}),
        signature(aten.sum.dim_IntList, (x.double(), [0]), {"dtype": torch.float32}),
    ]
    assert len({same, *others}) == 8
    a, b = (signature(aten.stack.default, ([x, y],), {}) for y in (x, x[:, :2]))
    assert a != b


def test_the_median_of_what_was_measured_and_a_roofline_else():
    x = torch.randn(8, 4)
    measured = Measured(Roofline(UNIT))
    call = (aten.neg.default, (x,), {}, -x)
    assert measured.time_us(*call) == 100 + 128 + 128
    for time_us in (5.0, 90.0, 7.0):
        measured.add(signature(*call[:3]), time_us)
    assert measured.time_us(*call) == 7.0
    measured.add(signature(*call[:3]), 1.0)
    assert measured.time_us(*call) == 6.0
    assert measured.hardware is UNIT
    product = (aten.mm.default, (x, x.t()), {}, x @ x.t())
    assert measured.flops(*product) == Roofline(UNIT).flops(*product) == 2 * 8 * 4 * 8


def test_the_mode_times_each_operator_of_a_step(monkeypatch):
    ticks = iter(range(0, 10**9, 3000))
    monkeypatch.setattr(costs, "host_clock", lambda: lambda: next(ticks))
    block = Block(GPTConfig(1, 32, 4, 16))
    x = torch.randn(2, 16, 32, requires_grad=True)
    measured = Measured(Roofline(UNIT))
    with Calls() as seen, TimingMode(measured, torch.device("cpu")):
        step(block, x)
    timed = [call for call in seen.calls if not costs.facts_of(call[0]).is_view]
    times = [time for found in measured.times_us.values() for time in found]
    assert times == [3.0] * len(timed)
    assert all(measured.time_us(*call) == 3.0 for call in timed if not _changes(call))
    names = {key[0] for key in measured.times_us}
    assert "aten.native_layer_norm_backward.default" in names
    assert "aten.addmm.default" in names
    assert "aten.view.default" not in names


def _changes(call):
    return bool(costs.facts_of(call[0]).writes)


def test_the_clock_is_the_threads_own_on_one_thread(monkeypatch):
    import time

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert costs.host_clock() is time.thread_time_ns
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert costs.host_clock() is time.perf_counter_ns


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_mode_times_by_events_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    measured = Measured(Roofline(UNIT))
    x = torch.randn(256, 256, device=device, requires_grad=True)
    with TimingMode(measured):
        (x @ x).sum().backward()
    assert measured.times_us
    assert all(time > 0 for found in measured.times_us.values() for time in found)
