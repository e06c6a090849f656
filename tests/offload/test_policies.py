"""Policies that offload: an operator's output waits on the host instead of being recomputed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.helpers import IMPLS, NO_REENTRANT, Operators, assert_equal, leaf
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    TierStats,
    _knobs,
    checkpoint,
    checkpoint_wrapper,
    create_selective_checkpoint_contexts,
    is_recomputing,
    offload_stats,
    offload_wrapper,
)
from wrappers.errors import OffloadError
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.offload.store import finish_offloading, reset_offloading

REPLAY = CheckpointImpl.REPLAY
MUST, PREFER = CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD
aten = torch.ops.aten
each_impl = pytest.mark.parametrize("impl", [REPLAY, NO_REENTRANT], ids=lambda impl: impl.name)

WIDTH = 16
#: Bytes of one product.
N = WIDTH * WIDTH * 4


@pytest.fixture(autouse=True)
def _fresh(no_leaks, seeded, monkeypatch):
    """No figure and no order of an earlier test; regions are replayed as large ones are."""
    monkeypatch.setattr(_knobs, "REPLAY_AT_ONCE_BYTES", -1)
    monkeypatch.setattr(_knobs, "OFFLOAD_SLAB_BYTES", 4 * N)
    reset_offloading()
    yield
    reset_offloading()


def instant(**settings) -> SimulatedTransport:
    """A device whose copies take no time."""
    return SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0, **settings)


@pytest.fixture
def device(_fresh) -> Iterator[SimulatedTransport]:
    with instant() as device:
        yield device


def host() -> TierStats:
    return offload_stats()["host"]


def assert_nothing_is_away() -> None:
    """Whatever was offloaded has died with its graph, and its buffers are free."""
    finish_offloading()
    assert (host().num_alive, host().used_bytes) == (0, 0)


class Block(nn.Module):
    """Two products. Backward needs both, and what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.b = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.a).sin() @ self.b).sin()


def offload_products(answer: CheckpointPolicy = MUST) -> Callable[..., CheckpointPolicy]:
    def policy(ctx, op, *args, **kwargs):
        return answer if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


#: How a block becomes a region with a policy.
Way = Callable[..., Callable[[Tensor], Tensor]]


def as_wrapper(block: nn.Module, policy, *, impl: CheckpointImpl) -> Callable[[Tensor], Tensor]:
    return checkpoint_wrapper(block, impl=impl, policy=policy, verify="never")


def as_function(block: nn.Module, policy, *, impl: CheckpointImpl) -> Callable[[Tensor], Tensor]:
    return partial(checkpoint, block, impl=impl, policy=policy, verify="never")


def as_context_fn(block: nn.Module, policy) -> Callable[[Tensor], Tensor]:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, block, use_reentrant=False, context_fn=contexts)


WAYS = {
    "wrapper-REPLAY": partial(as_wrapper, impl=REPLAY),
    "wrapper-NO_REENTRANT": partial(as_wrapper, impl=NO_REENTRANT),
    "function-REPLAY": partial(as_function, impl=REPLAY),
    "function-NO_REENTRANT": partial(as_function, impl=NO_REENTRANT),
    "context_fn": as_context_fn,
}
each_way = pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))


def chained(functions) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


def new_blocks(num: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(num))


def step(
    blocks: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[list[Tensor | None], Operators]:
    """Output and gradients of one step, and the operators that its backward has run."""
    blocks.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = function(x)
    loss = out.square().sum()
    with Operators() as operators:
        loss.backward()
    return [out.detach(), x.grad, *(p.grad for p in blocks.parameters())], operators


def plain_step(blocks: nn.ModuleList, x: Tensor) -> tuple[list[Tensor | None], Operators]:
    return step(blocks, chained(blocks), x)


# --- Offloaded, not recomputed


@each_way
@pytest.mark.parametrize("answer", [MUST, PREFER], ids=["MUST", "PREFER"])
def test_each_product_goes_and_comes_back_once_and_is_not_run_again(device, way, answer):
    blocks, x = new_blocks(3), leaf(WIDTH, WIDTH)
    expected, plain = plain_step(blocks, x)
    function = chained([way(block, offload_products(answer)) for block in blocks])
    for number in (1, 2, 3):
        got, operators = step(blocks, function, x)
        assert_equal(got, expected)
        assert operators["mm"] == plain["mm"]
        stats = host()
        assert (stats.num_out, stats.out_bytes) == (6 * number, 6 * N * number)
        assert (stats.num_back, stats.back_bytes) == (6 * number, 6 * N * number)
        assert (stats.num_unmoved, stats.num_kept) == (0, 0)
        assert device.num_copies("D2H") == device.num_copies("H2D") == 6 * number
    assert_nothing_is_away()
    assert device.device_bytes == 0


@each_way
def test_what_is_not_offloaded_is_recomputed(device, way):
    blocks, x = new_blocks(1), leaf(WIDTH, WIDTH)

    def policy(ctx, op, *args, **kwargs):
        is_first = op is aten.mm.default and args[1].data_ptr() == blocks[0].a.data_ptr()
        return MUST if is_first else CheckpointPolicy.PREFER_RECOMPUTE

    expected, plain = plain_step(blocks, x)
    got, operators = step(blocks, way(blocks[0], policy), x)
    assert_equal(got, expected)
    assert operators["mm"] == plain["mm"] + 1
    assert (host().num_out, host().num_back) == (1, 1)


@each_impl
def test_all_outputs_of_an_operator_go_together(device, impl):
    """A layer norm gives its result, the mean and the deviation."""

    def policy(ctx, op, *args, **kwargs):
        return MUST if op is aten.native_layer_norm.default else CheckpointPolicy.PREFER_RECOMPUTE

    block, x = nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)), leaf(8, WIDTH)
    expected, _ = step(block, block, x)
    region = as_wrapper(block, policy, impl=impl)
    for number in (1, 2):
        got, operators = step(block, region, x)
        assert_equal(got, expected)
        assert operators["native_layer_norm"] == 0
        assert host().num_out == 3 * number
        assert host().out_bytes == number * (8 * WIDTH + 8 + 8) * 4
    assert_nothing_is_away()


@each_impl
def test_a_view_of_an_offloaded_output_is_that_view_again(device, impl):
    """What backward reads lies transposed, and from the second row on, in what was offloaded."""
    weight = leaf(WIDTH, WIDTH, seed=1)

    def region(x):
        return (x @ weight).t()[1:].sin()

    expected = torch.autograd.grad(region(x := leaf(WIDTH, WIDTH)).sum(), [x, weight])
    out = checkpoint(region, x, impl=impl, policy=offload_products(), verify="never")
    assert_equal(torch.autograd.grad(out.sum(), [x, weight]), expected)
    assert (host().num_out, host().num_back) == (1, 1)


def test_a_small_region_brings_each_output_back_once_and_lets_go_of_it(device):
    """Small regions are replayed at once, from their second call on."""
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, _ = plain_step(blocks, x)
    function = chained([as_wrapper(b, offload_products(), impl=REPLAY) for b in blocks])
    with _knobs.override(REPLAY_AT_ONCE_BYTES=1 << 30):
        for number in (1, 2, 3):
            assert_equal(step(blocks, function, x)[0], expected)
            assert (host().num_out, host().num_back) == (4 * number, 4 * number)
        out = function(x)
        out.sum().backward(retain_graph=True)
        finish_offloading()
        assert device.device_bytes == 0


# --- Ahead of backward


@each_way
def test_the_next_region_comes_back_while_backward_is_in_the_one_before(way):
    """Only the region that backward begins with is waited for.

    A copy takes a quarter of a second, a block's two copies half as long as its compute.
    """
    blocks, x = new_blocks(4), leaf(WIDTH, WIDTH)
    expected, _ = plain_step(blocks, x)
    with SimulatedTransport(bandwidth_bytes_per_s=4 * N, latency_s=0.0) as device:
        regions = [way(block, offload_products()) for block in blocks]

        def function(x: Tensor) -> Tensor:
            for region in regions:
                x.register_hook(lambda grad: device.compute(1.0, "backward"))
                x = region(x)
                device.compute(1.0, "forward")
            return x

        for number in (1, 2, 3):
            before_s = device.waited_s()
            start_s = device.now_s()
            assert_equal(step(blocks, function, x)[0], expected)
            # All of them but the first one that backward wants.
            assert host().num_ahead == 7 * number
            assert host().num_back == 8 * number
            assert device.waited_s() - before_s == 2 * 0.25
            assert device.now_s() - start_s == 4 * 1.0 + 2 * 0.25 + 4 * 1.0
        assert_nothing_is_away()


@each_impl
def test_an_order_of_backward_that_is_not_the_latest_first_is_learnt(device, impl):
    """Two micro-batches, whose backwards run in the order of their forwards."""
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    function = chained([as_wrapper(b, offload_products(), impl=impl) for b in blocks])
    ahead = []
    for _ in range(3):
        before = host().num_ahead if ahead else 0
        losses = [function(x).sum() for _ in range(2)]
        for number in range(2):
            losses[number].backward()
        del losses
        ahead.append(host().num_ahead - before)
    # The second micro-batch's last region is a surprise at first.
    assert ahead == [6, 7, 7]
    assert host().num_back == 3 * 8
    assert_nothing_is_away()


# --- Buffers, and what is left


@each_way
def test_from_the_second_step_on_buffers_are_used_again_and_none_is_allocated(device, way):
    blocks, x = new_blocks(3), leaf(WIDTH, WIDTH)
    function = chained([way(block, offload_products()) for block in blocks])
    step(blocks, function, x)
    first = host()
    assert (first.num_taken, first.num_reused) == (6, 0)
    for _ in range(4):
        step(blocks, function, x)
    stats = host()
    assert stats.num_allocations == first.num_allocations == device.num_pinned_allocations
    assert stats.num_taken - first.num_taken == stats.num_reused == 4 * 6
    assert stats.peak_bytes == first.peak_bytes


@each_way
def test_a_graph_that_dies_without_backward_takes_all_with_it(device, way):
    blocks, x = new_blocks(3), leaf(WIDTH, WIDTH)
    function = chained([way(block, offload_products()) for block in blocks])
    out = function(x)
    assert host().num_alive == 6
    gc.disable()
    try:
        del out
        assert_nothing_is_away()
    finally:
        gc.enable()
    assert host().num_back == 0
    step(blocks, function, x)
    assert_nothing_is_away()


@each_way
def test_an_error_of_the_forward_takes_all_with_it(device, way):
    def fails(x: Tensor) -> Tensor:
        block(x)
        raise ValueError("of the region")

    block = Block()
    region = way(Call(fails), offload_products())
    with pytest.raises(ValueError, match="of the region") as caught:
        region(leaf(WIDTH, WIDTH))
    del caught
    gc.collect()
    assert host().num_out == 2
    assert_nothing_is_away()


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@each_impl
def test_a_graph_that_is_retained_brings_all_back_again(device, impl):
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, plain = plain_step(blocks, x)
    function = chained([as_wrapper(b, offload_products(), impl=impl) for b in blocks])
    x = x.detach().clone().requires_grad_()
    out = function(x)
    loss = out.square().sum()
    for number in (1, 2, 3):
        blocks.zero_grad()
        x.grad = None
        with Operators() as operators:
            loss.backward(retain_graph=True)
        assert operators["mm"] == plain["mm"]
        assert_equal([out, x.grad, *(p.grad for p in blocks.parameters())], expected)
        assert (host().num_out, host().num_back) == (4, 4 * number)
        assert host().num_alive == 4
    del out, loss
    assert_nothing_is_away()


def test_no_copy_is_left_on_the_device_while_a_graph_is_retained(device):
    function = chained([as_wrapper(Block(), offload_products(), impl=REPLAY) for _ in range(2)])
    out = function(leaf(WIDTH, WIDTH))
    for _ in range(2):
        out.sum().backward(retain_graph=True)
        finish_offloading()
        assert device.device_bytes == 0
    assert out.shape == (WIDTH, WIDTH)


# --- Copies that fail


def failing(direction: str, numbers) -> Callable[[str, int], Fault | None]:
    """Let copies in a direction fail, by their numbers."""
    return lambda way, number: Fault("fail") if way == direction and number in numbers else None


def with_warnings(function: Callable[[], list]) -> tuple[list, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in said]


def one_product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).sin()


#: Of backward's own.
OWN_PRODUCTS = 2


def faulty_step(impl, numbers, *, direction="H2D") -> tuple[int, list[str], TierStats]:
    """Products that were run again, warnings and figures of a step; its gradients are right."""
    weight, x = leaf(WIDTH, WIDTH, seed=1), leaf(WIDTH, WIDTH)
    expected = torch.autograd.grad(one_product(x, weight).sum(), [x, weight])

    def run() -> list:
        out = checkpoint(
            one_product, x, weight, impl=impl, policy=offload_products(), verify="never"
        )
        loss = out.sum()
        with Operators() as operators:
            grads = torch.autograd.grad(loss, [x, weight])
        return [grads, operators["mm"] - OWN_PRODUCTS]

    with instant(fault=failing(direction, numbers)):
        (grads, num_extra), said = with_warnings(run)
        assert_equal(grads, expected)
        assert_nothing_is_away()
        return num_extra, said, host()


@each_impl
def test_an_output_that_does_not_come_back_is_computed_again(impl):
    num_extra, said, stats = faulty_step(impl, {0, 1})
    assert num_extra == 1
    assert stats.num_back == 2
    (text,) = said
    assert "computed again" in text
    assert "simulated failure of a H2D copy" in text


@each_impl
def test_a_second_attempt_that_succeeds_says_nothing(impl):
    num_extra, said, stats = faulty_step(impl, {0})
    assert (num_extra, said, stats.num_back) == (0, [], 2)


@each_impl
def test_an_output_that_does_not_get_away_stays(impl):
    num_extra, said, stats = faulty_step(impl, {0}, direction="D2H")
    assert (num_extra, stats.num_back, stats.num_unmoved) == (0, 0, 1)
    (text,) = said
    assert "has failed" in text
    assert "stayed on the device" in text


class Recomputes(TorchDispatchMode):
    """Whether each product runs as a part of a recompute."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.mm.default:
            self.products.append(is_recomputing())
        return func(*args, **(kwargs or {}))


@each_impl
def test_computing_a_lost_output_again_is_a_recompute(impl):
    weight, x = leaf(WIDTH, WIDTH, seed=1), leaf(WIDTH, WIDTH)
    with instant(fault=failing("H2D", range(1000))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = checkpoint(
            one_product, x, weight, impl=impl, policy=offload_products(), verify="never"
        )
        loss = out.sum()
        with Recomputes() as mode:
            loss.backward()
    assert mode.products == [True, *[False] * OWN_PRODUCTS]
    assert not is_recomputing()


@each_way
def test_where_nothing_comes_back_all_is_computed_again(way):
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, plain = plain_step(blocks, x)
    with instant(fault=failing("H2D", range(1000))):
        function = chained([way(block, offload_products()) for block in blocks])
        (got, operators), said = with_warnings(lambda: step(blocks, function, x))
        assert_equal(got, expected)
        # Both products of each block; the second one from the first one, which is lost too.
        assert operators["mm"] >= plain["mm"] + 4
        assert said
        assert all("computed again" in text for text in said)
        assert_nothing_is_away()


def test_a_replayed_region_says_once_that_outputs_do_not_come_back():
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, _ = plain_step(blocks, x)
    with instant(fault=failing("H2D", range(1000))):
        function = chained([as_wrapper(b, offload_products(), impl=REPLAY) for b in blocks])
        for num_said in (2, 0, 0):  # one for each region
            (got, _), said = with_warnings(lambda: step(blocks, function, x))
            assert_equal(got, expected)
            assert len(said) == num_said


def test_one_lost_output_of_several_is_computed_from_one_that_came_back():
    """Numbers of copies back: the second product, the first one ahead, the second one again."""
    blocks, x = new_blocks(1), leaf(WIDTH, WIDTH)
    expected, plain = plain_step(blocks, x)
    with instant(fault=failing("H2D", {0, 2})):
        region = as_wrapper(blocks[0], offload_products(), impl=REPLAY)
        (got, operators), said = with_warnings(lambda: step(blocks, region, x))
        assert_equal(got, expected)
        assert operators["mm"] == plain["mm"] + 1
        assert len(said) == 1


def test_an_output_that_was_drawn_is_drawn_again_as_it_was():
    """The recompute of a lost output uses the random numbers of the forward."""

    def policy(ctx, op, *args, **kwargs):
        return MUST if op is aten.exp.default else CheckpointPolicy.PREFER_RECOMPUTE

    def region(x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.5, True)[0].exp().sin()

    x = leaf(WIDTH, WIDTH)
    torch.manual_seed(7)
    (expected,) = torch.autograd.grad(region(x).sum(), [x])
    torch.manual_seed(7)
    with instant(fault=failing("H2D", range(1000))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = checkpoint(region, x, impl=REPLAY, policy=policy, verify="never")
        before = torch.get_rng_state()
        assert_equal(torch.autograd.grad(out.sum(), [x]), [expected])
        assert_equal([torch.get_rng_state()], [before])
        assert host().num_out == 1


def test_a_lost_output_that_cannot_be_computed_again_is_an_error():
    """Where the region writes in place, an operator alone cannot be run again."""
    weight = leaf(WIDTH, WIDTH, seed=1)

    def region(x: Tensor) -> Tensor:
        x = (x * 2).add_(1)
        return (x @ weight).sin()

    with instant(fault=failing("H2D", range(1000))):
        out = checkpoint(
            region, leaf(WIDTH, WIDTH), impl=REPLAY, policy=offload_products(), verify="never"
        )
        with pytest.raises(OffloadError, match=r"did not come back .* in two attempts") as caught:
            out.sum().backward()
        error = caught.value
        assert (error.tier, error.num_bytes) == ("host", N)
        assert "region" in error.fqn


# --- Nested


@each_impl
def test_inside_of_an_offloaded_module_each_storage_goes_once(device, impl):
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, plain = plain_step(blocks, x)
    regions = [
        offload_wrapper(as_wrapper(block, offload_products(), impl=impl), min_bytes=0, keep_last=0)
        for block in blocks
    ]
    function = chained(regions)
    for number in (1, 2, 3):
        got, operators = step(blocks, function, x)
        assert_equal(got, expected)
        assert operators["mm"] == plain["mm"]
        # Four products, and the second region's input; the first one's is the caller's.
        assert host().num_out == 5 * number
    assert_nothing_is_away()
    assert device.device_bytes == 0


@each_impl
@pytest.mark.parametrize("outer", [*IMPLS, REPLAY], ids=lambda impl: impl.name)
def test_inside_of_a_region_that_recomputes_it(device, impl, outer):
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, _ = plain_step(blocks, x)
    inner = chained([as_wrapper(b, offload_products(), impl=impl) for b in blocks])
    region = checkpoint_wrapper(Call(inner), impl=outer, verify="never")
    for number in (1, 2, 3):
        assert_equal(step(blocks, region, x)[0], expected)
        if outer is CheckpointImpl.REENTRANT:  # whose rerun is a forward like any other
            assert (host().num_out, host().num_back) == (4 * number, 4 * number)
        elif impl is REPLAY:  # Nothing is worth moving that the region around recomputes.
            assert offload_stats().tiers == ()
        else:
            assert host().num_out >= host().num_back == 4 * number
    finish_offloading()
    for tier in offload_stats().tiers:
        assert (tier.num_alive, tier.used_bytes) == (0, 0)
    assert device.device_bytes == 0


@each_impl
def test_a_policy_of_the_region_around_sees_the_operators_inside(device, impl):
    blocks, x = new_blocks(2), leaf(WIDTH, WIDTH)
    expected, _ = plain_step(blocks, x)
    inner = chained([checkpoint_wrapper(b, impl=NO_REENTRANT) for b in blocks])
    region = as_wrapper(Call(inner), offload_products(), impl=impl)
    for number in (1, 2):
        assert_equal(step(blocks, region, x)[0], expected)
        assert host().num_out == 4 * number
    assert_nothing_is_away()
