"""The host and disk tiers on real streams; the same tests run on the simulated device.

On a GPU the compute is slowed down by ``torch.cuda._sleep``, so that the host runs far ahead of it,
and freed memory is written over at once, so that whatever is let go of too early shows in a
gradient. On the simulated device copies are late by themselves, and there is one compute stream.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wrappers
from wrappers import CheckpointImpl, InputChangedError, checkpoint_wrapper, offload_wrapper
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import finish_offloading, reset_offloading
from wrappers.policies import offload_larger_than

MIB = 1 << 20
#: Sides of the matrices that the programs compute with.
SIDE = 64
#: Clock ticks of ``torch.cuda._sleep`` in a second, about.
TICKS_PER_S = 1.5e9

#: Autograd tells of parameters that are used on another stream than they were before.
pytestmark = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class GPU:
    """The current CUDA device."""

    is_real = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def busy(self, seconds: float) -> None:
        """Let the current compute stream do nothing for a while; returns at once."""
        torch.cuda._sleep(int(seconds * TICKS_PER_S))

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Compute on a stream that comes after the current one, which then comes after it."""
        before = torch.cuda.current_stream(self.device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)

    def use(self, tensor: Tensor) -> None:
        """Say that a tensor is used on the current stream, whatever stream its memory is of."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait for all compute and all copies."""
        torch.cuda.synchronize(self.device)
        finish_offloading()

    def alive_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def num_pinned_allocations(self) -> int:
        return int(torch.cuda.host_memory_stats().get("num_host_alloc", 0))


class Simulated:
    """A simulated device: its compute is the calling thread, its memory what has been offloaded."""

    is_real = False

    def __init__(self, transport: SimulatedTransport) -> None:
        self.device = torch.device("cpu")
        self.transport = transport

    def busy(self, seconds: float) -> None:
        self.transport.compute(seconds)

    def new_stream(self) -> Any:
        return None

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        yield

    def use(self, tensor: Tensor) -> None:
        pass

    def finish(self) -> None:
        finish_offloading()

    def alive_bytes(self) -> int:
        return self.transport.device_bytes

    def num_pinned_allocations(self) -> int:
        return self.transport.num_pinned_allocations


Machine = GPU | Simulated


@pytest.fixture(params=[pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu]), "simulated"])
def machine(request, seeded) -> Iterator[Machine]:
    reset_offloading()
    if request.param == "gpu":
        device = GPU()
        yield device
        device.finish()
    else:
        with SimulatedTransport(bandwidth_bytes_per_s=1e9, latency_s=20e-6) as transport:
            yield Simulated(transport)
            finish_offloading()
    reset_offloading()
    gc.collect()


def host_stats() -> wrappers.TierStats:
    return wrappers.offload_stats()["host"]


# --- What disturbs


class Disturbed(torch.autograd.Function):
    """Gives its input on, after the compute has slept and freed memory has been written over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, machine: Machine, seconds: float) -> Tensor:
        ctx.machine, ctx.seconds = machine, seconds
        disturb(x, machine, seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        disturb(grad, ctx.machine, ctx.seconds)
        return grad, None, None


def disturb(like: Tensor, machine: Machine, seconds: float) -> None:
    """Sleep, then take the memory that was freed last, and fill it with NaN."""
    machine.busy(seconds)
    taken = [torch.full_like(like, float("nan")) for _ in range(4)]
    del taken


# --- Programs


def _shift(h: Tensor, other: Tensor) -> Tensor:
    return torch.cat([h[:, 16:], other[:, :16].sin()], 1)


def _inner_rows(h: Tensor, other: Tensor) -> Tensor:
    return F.pad(h[1:-1] * other[1:-1], (0, 0, 1, 1))


def _every_other_row(h: Tensor, other: Tensor) -> Tensor:
    half = h[::2] * other[1::2]
    return torch.cat([half, half.t().reshape(SIDE // 2, SIDE)], 0)


def _in_place(h: Tensor, other: Tensor) -> Tensor:
    return h.clone().mul_(0.5).add_(other.sigmoid())


#: All give a matrix like theirs; most save views, some of them several of one storage.
OPERATIONS: Sequence[Callable[[Tensor, Tensor], Tensor]] = (
    lambda h, other: h.tanh(),
    lambda h, other: h.sin() * h.t(),
    lambda h, other: h.t().softmax(-1),
    lambda h, other: F.layer_norm(h, (SIDE,)).t(),
    lambda h, other: h * other,
    lambda h, other: h * other[:1].expand_as(h),
    lambda h, other: (h @ other.t() / SIDE).tanh(),
    lambda h, other: h.reshape(-1).view(SIDE, SIDE).t().square().t(),
    lambda h, other: h.chunk(2, 1)[0].repeat(1, 2) * other,
    lambda h, other: (
        torch.bmm(h.unflatten(0, (4, 16)), other.unflatten(0, (4, 16)).mT)
        .repeat(1, 1, 4)
        .flatten(0, 1)
    ),
    _shift,
    _inner_rows,
    _every_other_row,
    _in_place,
)


class Program(nn.Module):
    """Operations drawn at random; each takes two of the latest results."""

    def __init__(self, seed: int, machine: Machine, num_operations: int = 10) -> None:
        super().__init__()
        self.machine = machine
        drawn = random.Random(seed)
        self.weight = nn.Parameter(torch.randn(SIDE, SIDE, device=machine.device) / 8)
        self.operations = [drawn.choice(OPERATIONS) for _ in range(num_operations)]
        self.places = [(drawn.randrange(3), drawn.randrange(3)) for _ in range(num_operations)]
        self.sleeps_s = [drawn.choice((0.0, 0.0, 20e-6, 200e-6)) for _ in range(num_operations)]

    def forward(self, x: Tensor) -> Tensor:
        latest = [x, x @ self.weight, x.t()]
        for operation, places, seconds in zip(
            self.operations, self.places, self.sleeps_s, strict=True
        ):
            first, second = (latest[place] for place in places)
            result = operation(first, second)
            if seconds:
                result = Disturbed.apply(result, self.machine, seconds)
            latest = [*latest[1:], result]
        return sum(latest[1:], latest[0]).tanh()


def step_of(
    blocks: Sequence[nn.Module], x: Tensor, before_backward: Callable[[], Any] = lambda: None
) -> list[Tensor]:
    """Gradients of one training step: the input's, then the parameters'."""
    x = x.clone().requires_grad_()
    h = x * 1.0  # not a leaf, so that the first block offloads it
    for block in blocks:
        h = block(h)
    before_backward()
    h.sum().backward()
    parameters = [p for block in blocks for p in block.parameters()]
    gradients = [x.grad, *(p.grad for p in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return [grad for grad in gradients if grad is not None]


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    """Bitwise equal, and finite: NaN is what unfinished copies and written-over memory hold."""
    assert len(ours) == len(plain) > 0
    for our, expected in zip(ours, plain, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(our, expected)


class Sines(nn.Module):
    """Saves its input and all results but the last, ``num`` tensors of the input's size."""

    def __init__(self, num: int = 4, machine: Machine | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        self.num = num
        self.machine = machine
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.num):
            if self.machine is not None:
                x = Disturbed.apply(x, self.machine, self.seconds)
            x = x.sin()
        return x


def input_of(machine: Machine, num_bytes: int = MIB) -> Tensor:
    """A tensor in a graph, so that it is offloaded, too."""
    leaf = torch.randn(num_bytes // 4, device=machine.device, requires_grad=True)
    return leaf * 1.0


# --- Values


@pytest.mark.parametrize("seed", range(24))
def test_gradients_of_random_programs_are_bitwise_the_same(machine, seed):
    drawn = random.Random(1000 + seed)
    torch.manual_seed(seed)
    programs = [Program(100 * seed + i, machine) for i in range(4)]
    # In half of the cases all copies end before backward begins; in the others, few tensors may be
    # on their way, so that their memory is used again while the compute is far behind the host.
    num_tensors = drawn.choice((0, 2, 4, 8))
    limit_bytes = max(1, num_tensors * SIDE * SIDE * 4)
    before_backward = machine.finish if seed % 2 else lambda: None
    offloaded = [
        offload_wrapper(
            program,
            min_bytes=0,
            max_inflight_bytes=limit_bytes,
            keep_last=drawn.choice((0, 0, 1)),
            prefetch=drawn.choice((0, 1, 2)),
            ratio=drawn.choice((1.0, 1.0, 0.5)),
        )
        for program in programs
    ]
    for _ in range(3):  # The second step knows the order of the first.
        x = torch.randn(SIDE, SIDE, device=machine.device)
        assert_same(step_of(offloaded, x, before_backward), step_of(programs, x))
    assert host_stats().num_out > 20
    assert host_stats().num_back > 10


@pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)
def test_gradients_on_top_of_checkpointing_are_bitwise_the_same(machine, impl):
    programs = [Program(i, machine) for i in range(4)]
    offloaded = [
        offload_wrapper(checkpoint_wrapper(program, impl=impl), min_bytes=0, keep_last=0)
        for program in programs
    ]
    for _ in range(3):
        x = torch.randn(SIDE, SIDE, device=machine.device)
        assert_same(step_of(offloaded, x, machine.finish), step_of(programs, x))
    # The first replay of a region is compared with a rerun, which wants its inputs, too.
    assert host_stats().num_back >= host_stats().num_out == 3 * len(programs)


def test_dropout_draws_the_same_numbers(machine):
    block = nn.Sequential(nn.Linear(SIDE, SIDE), nn.GELU(), nn.Dropout(0.3)).to(machine.device)
    offloaded = offload_wrapper(block, min_bytes=0, keep_last=0)
    x = torch.randn(SIDE, SIDE, device=machine.device)
    drawn = []
    for each in (block, offloaded):
        torch.manual_seed(3)
        gradients = step_of([each], x, machine.finish)
        drawn.append([*gradients, torch.rand(4, device=machine.device)])
    assert_same(*drawn)
    assert host_stats().num_back > 0


def test_a_graph_that_is_retained_gives_its_gradients_again(machine):
    block = Program(5, machine)
    x = torch.randn(SIDE, SIDE, device=machine.device)
    plain = step_of([block], x)
    offloaded = offload_wrapper(block, min_bytes=0, keep_last=0)
    leaf = x.clone().requires_grad_()
    out = offloaded(leaf * 1.0).sum()
    machine.finish()
    for retain in (True, True, False):
        gradients = torch.autograd.grad(out, [leaf, block.weight], retain_graph=retain)
        assert_same(list(gradients), plain)
    assert host_stats().num_back >= 2 * host_stats().num_out > 0
    del out
    machine.finish()
    assert host_stats().num_alive == 0


def test_what_a_policy_offloads_comes_back(machine):
    block = Program(7, machine)
    x = torch.randn(SIDE, SIDE, device=machine.device)
    wrapped = checkpoint_wrapper(block, policy=offload_larger_than(1024))
    plain = step_of([block], x)
    for _ in range(3):
        assert_same(step_of([wrapped], x, machine.finish), plain)
    assert host_stats().num_out >= host_stats().num_back >= 3 * 5
    machine.finish()
    assert host_stats().num_alive == 0


def test_a_tensor_changed_in_place_while_it_leaves_is_an_error(machine):
    block = offload_wrapper(Sines(1), keep_last=0)
    x = input_of(machine, 16 * MIB)
    machine.busy(0.01)
    out = block(x)
    x.mul_(2)
    with pytest.raises(InputChangedError, match="changed in place"):
        out.sum().backward()


# --- Streams


def test_forward_and_backward_on_a_side_stream(machine):
    programs = [Program(i, machine) for i in range(3)]
    offloaded = [
        offload_wrapper(program, min_bytes=0, keep_last=0, max_inflight_bytes=1)
        for program in programs
    ]
    x = torch.randn(SIDE, SIDE, device=machine.device)
    plain = step_of(programs, x)
    for _ in range(3):
        stream = machine.new_stream()  # Another one each time: it is asked for at each call.
        with machine.on(stream):
            machine.busy(0.005)
            gradients = step_of(offloaded, x)
        assert_same(gradients, plain)


def test_each_region_on_a_stream_of_its_own(machine):
    programs = [Program(i, machine) for i in range(4)]
    offloaded = [
        offload_wrapper(program, min_bytes=0, keep_last=0, max_inflight_bytes=1)
        for program in programs
    ]
    streams = [machine.new_stream() for _ in programs]

    def on_its_stream(block: nn.Module, stream: Any) -> nn.Module:
        return OnStream(block, machine, stream)

    x = torch.randn(SIDE, SIDE, device=machine.device)
    plain = step_of(programs, x)
    for _ in range(3):
        moved = [on_its_stream(*pair) for pair in zip(offloaded, streams, strict=True)]
        assert_same(step_of(moved, x), plain)


class OnStream(nn.Module):
    """Calls a block on a stream, after the current stream and before what follows on it."""

    def __init__(self, block: nn.Module, machine: Machine, stream: Any) -> None:
        super().__init__()
        self.block = block
        self.machine = machine
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        with self.machine.on(self.stream):
            self.machine.use(x)
            self.machine.busy(0.001)
            out: Tensor = self.block(x)
        self.machine.use(out)
        return out


class TwoStreams(nn.Module):
    """Saves one tensor on the current stream and, again, on another."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.side = machine.new_stream()

    def forward(self, x: Tensor) -> Tensor:
        h = x.exp()  # saved here
        h = Disturbed.apply(h, self.machine, 0.001)
        first = h.cos()  # and h here
        with self.machine.on(self.side):
            self.machine.use(h)
            second = Disturbed.apply(h.sin(), self.machine, 0.001)  # h once more
        self.machine.use(second)
        return first * second


def test_a_tensor_that_backward_uses_on_two_streams(machine):
    blocks = [TwoStreams(machine) for _ in range(3)]
    offloaded = [
        offload_wrapper(block, min_bytes=0, keep_last=0, max_inflight_bytes=1) for block in blocks
    ]
    x = torch.randn(SIDE, SIDE, device=machine.device) / 8
    plain = step_of(blocks, x)
    for _ in range(3):
        assert_same(step_of(offloaded, x), plain)
    stats = host_stats()
    assert stats.num_out == 3 * 3 * 4  # exp's result, its copy, and the two factors


def test_memory_of_one_stream_that_is_saved_on_another(machine):
    """What is made on the main stream is let go of while the side stream has not read it yet."""
    side = machine.new_stream()
    block = offload_wrapper(Sines(1), min_bytes=0, keep_last=0, max_inflight_bytes=1)
    inputs = [torch.randn(MIB // 4, device=machine.device) for _ in range(6)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    outs = []
    for leaf in leaves:
        h = leaf * 1.0
        if machine.is_real:  # Without the way back: the main stream goes on at once.
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if machine.is_real else contextlib.nullcontext():
            machine.busy(0.005)
            outs.append(block(h))
        del h
        # The graph alone had h. Plain autograd would have kept it until backward.
        taken = [torch.full_like(leaf, float("nan")) for _ in range(4)]
        del taken
    machine.finish()
    torch.stack(outs).sum().backward()
    for x, leaf, out in zip(inputs, leaves, outs, strict=True):
        assert torch.equal(out, x.sin())
        assert torch.equal(leaf.grad, x.cos())


def test_a_slow_device_and_a_pool_used_again(machine):
    """The host is a step ahead: a slot is taken again before its copies have begun."""
    blocks = [Sines(4, machine, seconds=0.002) for _ in range(5)]
    offloaded = [offload_wrapper(block, keep_last=0, max_inflight_bytes=MIB) for block in blocks]
    inputs = [torch.randn(MIB // 8, device=machine.device) for _ in range(3)]
    plain = [step_of(blocks, x) for x in inputs]
    ours, allocations = [], []
    for x in inputs:  # Nothing here waits for the device.
        ours.append(step_of(offloaded, x))
        allocations.append((machine.num_pinned_allocations(), host_stats().num_allocations))
    for found, expected in zip(ours, plain, strict=True):
        assert_same(found, expected)
    assert allocations[1] == allocations[2]
    assert host_stats().num_back > 3 * 10
    stats = host_stats()
    assert stats.num_reused >= stats.num_taken // 2 > 0


# --- Memory


def test_device_memory_is_free_after_the_forward(machine):
    blocks = [Sines(4) for _ in range(6)]
    offloaded = [offload_wrapper(block, keep_last=0) for block in blocks]
    x = input_of(machine)
    machine.finish()
    before = machine.alive_bytes()
    h = x
    for block in offloaded:
        h = block(h)
    assert host_stats().out_bytes == 24 * MIB
    machine.finish()
    if machine.is_real:
        # The result alone, as the caller still has the input.
        assert machine.alive_bytes() - before == MIB
    else:
        # The input, which has been copied; the result has not been saved.
        assert machine.alive_bytes() == MIB
    h.sum().backward()
    machine.finish()
    if machine.is_real:
        assert machine.alive_bytes() - before == MIB + MIB  # the leaf's gradient
    del h, x
    machine.finish()
    assert host_stats().num_alive == host_stats().used_bytes == 0


def test_a_limit_holds_while_the_device_is_slow(machine):
    limit_bytes = 4 * MIB
    blocks = [Sines(4, machine, seconds=0.0005) for _ in range(6)]
    offloaded = [
        offload_wrapper(block, keep_last=0, max_inflight_bytes=limit_bytes) for block in blocks
    ]
    for _ in range(2):
        h = input_of(machine)
        for block in offloaded:
            h = block(h)
        h.sum().backward()
    assert 0 < host_stats().inflight_bytes <= limit_bytes


def test_nothing_is_pinned_after_the_second_step(machine):
    blocks = [Program(i, machine) for i in range(4)]
    offloaded = [offload_wrapper(block, min_bytes=0) for block in blocks]
    counts = []
    for _ in range(6):
        step_of(offloaded, torch.randn(SIDE, SIDE, device=machine.device))
        counts.append((machine.num_pinned_allocations(), host_stats().num_allocations))
    assert counts[1][1] >= 1
    assert counts[1:] == [counts[1]] * 5


def test_waits_for_copies_are_measured(machine):
    """One tensor at a time may leave, and nothing is computed meanwhile."""
    offloaded = [offload_wrapper(Sines(4), keep_last=0, max_inflight_bytes=1) for _ in range(3)]
    h = input_of(machine, 8 * MIB)
    for block in offloaded:
        h = block(h)
    h.sum().backward()
    machine.finish()
    assert 0 < host_stats().waited_s < 60


def leave_graph(block: nn.Module, x: Tensor) -> None:
    block(x)


def leave_part_of_backward(block: nn.Module, x: Tensor) -> None:
    out = block(x)
    handle = x.register_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    handle.remove()


def _fail(grad: Tensor) -> None:
    raise ZeroDivisionError


def leave_forward(block: nn.Module, x: Tensor) -> None:
    with pytest.raises(ZeroDivisionError):
        block(x, fails=True)


def evaluate(block: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        block(x)
    with torch.inference_mode():
        block(x)


def train(block: nn.Module, x: Tensor) -> None:
    block(x).sum().backward()


class MayFail(nn.Module):
    """Saves its input and the results of sin and exp, and then may raise."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        x = Disturbed.apply(x.sin().cos().exp(), self.machine, 0.002)
        if fails:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize(
    ("use", "num_out"),
    [
        (leave_graph, 3),
        (leave_part_of_backward, 3),
        (leave_forward, 3),
        (evaluate, 0),
        (train, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nothing_is_left(machine, use, num_out):
    block = offload_wrapper(MayFail(machine), keep_last=0)
    for _ in range(3):
        x = input_of(machine)
        machine.finish()
        before = machine.alive_bytes()
        use(block, x)
        machine.finish()
        gc.collect()  # Tracebacks hold frames in cycles.
        stats = wrappers.offload_stats()
        if num_out:
            assert (stats["host"].num_alive, stats["host"].used_bytes) == (0, 0)
        if machine.is_real and use is not train:
            assert machine.alive_bytes() == before
    if num_out:
        assert host_stats().num_out == 3 * num_out
    else:
        assert not [tier for tier in wrappers.offload_stats().tiers if tier.num_out]


# --- The disk tier


def test_the_disk_tier_through_pinned_memory(machine, tmp_path):
    programs = [Program(i, machine) for i in range(3)]
    offloaded = [
        offload_wrapper(program, tier="disk", directory=tmp_path, min_bytes=0, keep_last=0)
        for program in programs
    ]
    counts = []
    for _ in range(3):
        x = torch.randn(SIDE, SIDE, device=machine.device)
        assert_same(step_of(offloaded, x, machine.finish), step_of(programs, x))
        counts.append(machine.num_pinned_allocations())
    assert counts[0] > 0 or machine.is_real  # torch's allocator may have had some
    assert counts[1] == counts[2]
    machine.finish()
    stats = wrappers.offload_stats()["disk"]
    assert stats.num_out > 30
    assert stats.num_back > 0
    assert stats.peak_host_bytes > 0  # It went through pinned memory.
    assert stats.num_alive == stats.used_bytes == 0


def test_device_memory_is_free_when_it_has_gone_to_the_disk(machine, tmp_path):
    block = offload_wrapper(Sines(6), tier="disk", directory=tmp_path, keep_last=0)
    x = input_of(machine)
    machine.finish()
    before = machine.alive_bytes()
    out = block(x)
    machine.finish()
    assert machine.alive_bytes() - before == MIB  # the result; or the input, as it is offloaded
    assert wrappers.offload_stats()["disk"].num_alive == 6
    out.sum().backward()
    expected = x.detach().clone().requires_grad_()
    Sines(6)(expected).sum().backward()
    (leaf,) = (function[0].variable for function in x.grad_fn.next_functions if function[0])
    assert torch.equal(leaf.grad, expected.grad)


# --- Several devices


class Elsewhere(nn.Module):
    """Computes on another device than its input's."""

    def __init__(self, other: torch.device) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(int(0.002 * TICKS_PER_S))
        there = x.sin().to(self.other).exp()
        return (there * there.t()).to(x.device).cos()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_storages_go_back_to_the_devices_that_they_came_from(current, seeded):
    reset_offloading()
    with torch.cuda.device(current):
        blocks = [Elsewhere(torch.device("cuda", 1)) for _ in range(3)]
        offloaded = [offload_wrapper(block, min_bytes=0, keep_last=0) for block in blocks]
        for _ in range(3):
            x = torch.randn(SIDE, SIDE, device="cuda:0")
            assert_same(step_of(offloaded, x), step_of(blocks, x))
        assert torch.cuda.current_device() == current
    assert host_stats().num_out > 3 * 3 * 2
    reset_offloading()
