"""What an offloaded module moves, what stays, what comes back, and when all of it dies.

There is no accelerator here: in the ``device`` fixture, whose copies are done at once, tensors of
the CPU lie on a simulated device. Figures are exact; a storage's size tells which one it is.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.helpers import assert_equal, copies, leaf, watch
from wrappers import CheckpointImpl, TierStats, _device, _knobs, offload_stats
from wrappers.apply import apply_activation_checkpointing
from wrappers.errors import InputChangedError, OffloadError
from wrappers.modules.checkpoint import CheckpointWrapper, checkpoint_wrapper
from wrappers.modules.offload import OffloadForward, OffloadWrapper, is_offloaded, offload_wrapper
from wrappers.offload import transfer
from wrappers.offload.hooks import OffloadHooks
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.offload.store import (
    OffloadSettings,
    finish_offloading,
    reset_offloading,
    store_for,
)

in_place = partial(offload_wrapper, inplace=True)
each_face = pytest.mark.parametrize("face", [offload_wrapper, in_place], ids=["wrapper", "inplace"])
each_impl = pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)

#: Bytes of one activation of a :class:`Block`.
N = 8 * 16 * 4


@pytest.fixture(autouse=True)
def _fresh():
    """No store, no figure and no order of an earlier test; and pinned memory in small pieces."""
    reset_offloading()
    with _knobs.override(OFFLOAD_SLAB_BYTES=4096):
        yield
    reset_offloading()


@pytest.fixture
def device(no_leaks):
    """A device whose copies take no time."""
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0) as device:
        yield device


def host() -> TierStats:
    """The figures of the host tier."""
    try:
        return offload_stats()["host"]
    except KeyError:
        return TierStats("host")


def moved(device: SimulatedTransport, row: str = "D2H") -> list[int]:
    """The bytes of each copy in a direction, in order."""
    return [span.nbytes for span in device.spans if span.row == row]


def assert_nothing_left() -> None:
    """No graph, no slot and no byte is left of what has been offloaded."""
    gc.collect()
    finish_offloading()
    assert (host().num_alive, host().used_bytes) == (0, 0)


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether something is so soon: a thread that copies may hold a tensor for a moment longer."""
    end_s = time.monotonic() + 30
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.001)
    return condition()


class Block(nn.Module):
    """Saves two activations: its input and the result of ``tanh``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Stack(nn.Module):
    """An embedding, which is not offloaded, and blocks, which are."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def stacks(face: Callable[..., nn.Module] = offload_wrapper, num_layers: int = 4, **settings):
    """A plain model and a copy of it with each block offloaded."""
    torch.manual_seed(0)
    plain = Stack(num_layers)
    wrapped = copy.deepcopy(plain)
    wrap = partial(face, **{"min_bytes": 0, "keep_last": 0, **settings})
    apply_activation_checkpointing(wrapped, wrap, is_block)
    return plain, wrapped


class Attention(nn.Module):
    """Saves x for three products, views, transposes, a square matrix and its transpose."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = x * 2
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q @ k.t()).softmax(-1)
        both = torch.cat([scores, scores.t()])
        left, right = both.chunk(2)
        return self.norm((left * right) @ v[:, ::1].exp())


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def offloaded(function: Callable[..., Tensor], **settings) -> nn.Module:
    """A function in an offloaded module from which everything goes that may go."""
    return offload_wrapper(Fn(function), **{"min_bytes": 0, "keep_last": 0, **settings})


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def grads_of(model: nn.Module) -> list[Tensor]:
    """The parameters' gradients, which are taken away."""
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients of a training step; those of before are forgotten."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *grads_of(model)]


# --- The same values ----------------------------------------------------------------------------


@each_face
def test_gradients_are_bitwise_equal(face, device):
    plain = Attention()
    wrapped = face(copy.deepcopy(plain), min_bytes=0, keep_last=0)
    x = torch.randn(6, 6)
    for _ in range(3):
        assert_equal(step(wrapped, x), step(plain, x))
    # x, q, k, v's view, scores, both, their product and the statistics of the norm
    assert host().num_out > 3 * 6
    assert host().num_back == host().num_out
    assert host().out_bytes == host().back_bytes == sum(moved(device))
    assert_nothing_left()


@each_face
def test_a_stack_of_regions(face, device):
    plain, wrapped = stacks(face, keep_last=1, prefetch=2)
    for seed in range(4):
        assert_equal(step(wrapped, batch(seed)), step(plain, batch(seed)))
    assert host().out_bytes == (8 + 3 * 6) * N
    assert host().back_bytes == host().out_bytes
    assert_nothing_left()


@each_face
def test_the_disk_tier(face, tmp_path):
    plain, wrapped = stacks(face, tier="disk", directory=tmp_path)
    for seed in range(3):
        assert_equal(step(wrapped, batch(seed)), step(plain, batch(seed)))
    assert offload_stats()["disk"].out_bytes == 3 * 8 * N
    gc.collect()
    finish_offloading()
    assert offload_stats()["disk"].num_alive == offload_stats()["disk"].used_bytes == 0
    assert list(tmp_path.iterdir()) == []
    reset_offloading()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("wrappers"):
            thread.join(60)
            assert not thread.is_alive()


def test_slow_copies_change_no_value(no_leaks):
    plain, wrapped = stacks(max_inflight_bytes=2 * N)
    with SimulatedTransport(bandwidth_bytes_per_s=1e6, latency_s=1e-6) as device:
        for layer in wrapped.layers:  # a copy takes 513 us
            layer.up.register_forward_hook(lambda *_: device.compute(1e-4))
        for seed in range(3):
            assert_equal(step(wrapped, batch(seed)), step(plain, batch(seed)))
        assert host().inflight_bytes == 2 * N
        assert host().num_unmoved > 0
        assert host().num_out == 3 * 8
        assert device.waited_s() == pytest.approx(host().waited_s)
        assert host().waited_s > 0
        assert_nothing_left()


# --- What moves, and what stays -----------------------------------------------------------------


def test_one_copy_for_a_tensor_that_three_products_save(device):
    linears = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    x = leaf(16, 8)

    def qkv(x):
        x = x * 2
        return sum(linear(x).sum() for linear in linears)

    out = offloaded(qkv)(x)
    assert moved(device) == [16 * 8 * 4]
    out.backward()
    assert moved(device, "H2D") == [16 * 8 * 4]
    ours, x.grad = x.grad, None
    qkv(x).backward()
    assert torch.equal(ours, x.grad)


def test_device_memory_is_dead_between_forward_and_backward(device):
    saved = []

    def function(x):
        hidden = x * 2
        saved.append(watch(hidden))
        return hidden.sin().sum()

    x = leaf(100)
    loss = offloaded(function)(x)
    assert becomes(saved[0].expired)
    loss.backward()
    assert torch.equal(x.grad, (x.detach() * 2).cos() * 2)


def test_parameters_their_views_and_buffers_stay(device):
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("scale", torch.randn(2, 8))
            self.register_buffer("table", torch.randn(3, 2, 4), persistent=False)

        def forward(self, x):
            x = x * 1
            y = (x @ self.weight.t()) * self.scale
            z = (x @ self.weight[:4].t()) * self.table[1] + x @ self.weight.detach()[:, :4]
            return y.sum() + z.sum()

    plain = Products()
    wrapped = offload_wrapper(copy.deepcopy(plain), min_bytes=0, keep_last=0)
    x = torch.randn(2, 8)
    ours = step(wrapped, x)
    # x; what the buffers are multiplied with needs no gradient of them, so it is not saved
    assert moved(device) == [2 * 8 * 4]
    assert_equal(ours, step(plain, x))


def test_arguments_without_a_graph_stay_whoever_saves_them(device):
    def function(x, mask, *, tables):
        return (x.sin() * mask * tables["cos"][1]).exp()

    mask, tables = torch.randn(3, 8, 16), {"cos": torch.randn(2, 8, 16)}
    regions = [Fn(function) for _ in range(3)]
    wrapped = [offload_wrapper(region, min_bytes=0, keep_last=0) for region in regions]

    def run(regions):
        x = leaf(8, 16)
        y = x * 1
        for region in regions:
            y = region(y, mask[1], tables=tables)
        y.sum().backward()
        return [x.grad]

    ours = run(wrapped)
    assert moved(device) == [N] * 4  # The input of each sin, and the result of the last exp.
    assert_equal(ours, run(regions))


def test_leaves_that_require_grad_stay(device):
    prompt, x = leaf(5, 16, seed=1), leaf(3, 16)

    def function(x):
        return (x * x.detach()).sum() + (x[:1] * prompt).sin().sum()

    offloaded(function)(x).backward()
    assert moved(device) == [5 * 16 * 4]  # sin's input
    ours = x.grad, prompt.grad
    x.grad = prompt.grad = None
    function(x).backward()
    assert_equal(ours, [x.grad, prompt.grad])


def test_a_tensor_with_a_graph_that_several_regions_save_goes_once(device):
    """The memory of cross-attention."""

    def function(x, memory):
        return x + (x @ memory.t()).softmax(-1) @ memory

    regions = [Fn(function) for _ in range(3)]
    wrapped = [offload_wrapper(region, min_bytes=0, keep_last=0) for region in regions]

    def run(regions):
        x, memory = leaf(8, 16), leaf(5, 16, seed=1)
        y, encoded = x * 1, memory * 3
        for region in regions:
            y = region(y, memory=encoded)
        y.square().sum().backward()
        return [x.grad, memory.grad]

    ours = run(wrapped)
    assert sorted(moved(device)) == sorted([5 * 16 * 4] + [N, 8 * 5 * 4] * 3)
    assert_equal(ours, run(regions))
    assert_nothing_left()


@pytest.mark.parametrize(("numel", "expected"), [(24, []), (25, [100]), (26, [104])])
def test_small_tensors_stay(numel, expected, device):
    offloaded(lambda x: (x * 1).sin(), min_bytes=100)(leaf(numel))
    assert moved(device) == expected


def test_of_a_small_view_the_memory_counts(device):
    offloaded(lambda x: (x * 1)[:3].sin(), min_bytes=100)(leaf(25))
    assert moved(device) == [100]


def test_the_default_of_min_bytes_is_a_knob(device):
    region = offloaded(lambda x: (x * 1).sin(), min_bytes=None)
    region(leaf(64 * 1024 // 4 - 1))
    assert moved(device) == []
    region(leaf(64 * 1024 // 4))
    assert moved(device) == [64 * 1024]
    with _knobs.override(OFFLOAD_MIN_BYTES=8):
        region(leaf(1))
        region(leaf(2))
    assert moved(device) == [64 * 1024, 8]


def test_meta_tensors_have_nothing_to_offload(device):
    module = offload_wrapper(nn.Linear(4, 4, device="meta"), min_bytes=0)
    x = torch.ones(2, 4, device="meta", requires_grad=True)
    module(x * 1).sin().sum().backward()
    assert x.grad.is_meta
    assert moved(device) == []


# --- Pack and unpack of single tensors ----------------------------------------------------------


def make_hooks(**settings) -> OffloadHooks:
    """Hooks that send everything away that may go."""
    settings = OffloadSettings(**{"min_bytes": 0, "keep_last": 0, **settings})
    store = store_for(settings)
    assert store is not None
    return OffloadHooks(store, settings)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[1:, 2:],
        lambda t: t[::2, ::3],
        lambda t: t.reshape(-1)[5],
        lambda t: t[0].expand(4, 6),
        lambda t: t.view(torch.int16),
        lambda t: t[3:3],
        lambda t: t.as_strided((3, 3), (1, 2), 4),
        lambda t: torch.view_as_complex(t.reshape(6, 3, 2)),
    ],
)
def test_views_come_back_as_they_were(view, device):
    hooks = make_hooks()
    base = torch.randn(6, 6)
    whole, part = hooks.pack(base), hooks.pack(view(base))
    assert moved(device) == [6 * 6 * 4]
    expected = view(base.clone())
    base.data.zero_()  # Not noticed by autograd: it shows that the copy comes back.
    for _ in range(2):
        got = hooks.unpack(part)
        assert got.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
        assert (got.shape, got.stride(), got.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
        assert got.storage_offset() == view(base).storage_offset()
        assert torch.equal(got, expected)
    assert torch.equal(view(hooks.unpack(whole)), expected)


def test_a_square_matrix_is_not_taken_for_its_transpose(device):
    hooks = make_hooks()
    matrix = torch.randn(6, 6)
    straight, turned = hooks.pack(matrix), hooks.pack(matrix.t())
    assert moved(device) == [6 * 6 * 4]
    assert torch.equal(hooks.unpack(straight), matrix)
    assert torch.equal(hooks.unpack(turned), matrix.t())


def test_recycled_memory_is_not_taken_for_the_old_one(device):
    hooks = make_hooks()
    packed = [hooks.pack(torch.full((64,), float(i))) for i in range(50)]
    assert moved(device) == [256] * 50
    assert [hooks.unpack(tensor)[0].item() for tensor in packed] == list(range(50))


def test_freed_slots_are_not_taken_for_others(device):
    hooks = make_hooks()
    kept = {}
    for i in range(60):
        packed = hooks.pack(torch.full((64,), float(i)))
        if i % 3 == 0:
            kept[i] = packed
        if i % 4 == 0:
            kept.pop(i // 2, None)
        del packed
    assert host().num_reused > 30
    assert {i: hooks.unpack(packed)[0].item() for i, packed in kept.items()} == {i: i for i in kept}


def test_after_a_change_in_place_there_is_a_new_copy(device):
    hooks = make_hooks()
    tensor = torch.zeros(4)
    before = hooks.pack(tensor)
    tensor.add_(1)
    after = hooks.pack(tensor)
    assert moved(device) == [16, 16]
    with pytest.raises(InputChangedError):
        hooks.unpack(before)
    assert hooks.unpack(after).sum() == 4
    assert hooks.unpack(after)._version == 1


def test_tensors_that_are_more_than_their_memory_stay(device):
    class Tagged(Tensor):
        pass

    hooks = make_hooks()
    number = torch.randn(4, dtype=torch.complex64)
    for tensor in (number.conj(), number.conj().imag, torch.randn(4).as_subclass(Tagged)):
        got = hooks.unpack(hooks.pack(tensor))
        assert type(got) is type(tensor)
        assert (got.is_conj(), got.is_neg()) == (tensor.is_conj(), tensor.is_neg())
        assert torch.equal(got, tensor)
    sparse = torch.eye(3).to_sparse()
    assert hooks.unpack(hooks.pack(sparse)) is sparse
    assert moved(device) == []


def test_an_empty_tensor_stays(device):
    hooks = make_hooks()
    got = hooks.unpack(hooks.pack(torch.empty(0, 3)))
    assert got.shape == (0, 3)
    assert moved(device) == []


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, "cpu"), ({"min_bytes": 1000}, "cpu"), ({"ratio": 0.0}, "cpu"), ({}, "meta")],
    ids=["moved", "small", "left", "elsewhere"],
)
def test_a_saved_result_does_not_keep_its_graph_alive(settings, kind, device):
    x = torch.ones(4, requires_grad=True, device=kind)
    region = offloaded(torch.exp, **settings)
    region(x)  # The first operator on meta tensors imports what leaves cycles.
    gc.collect()
    gc.disable()
    try:
        out = region(x)
        reference, memory = weakref.ref(out), watch(out)
        del out
        assert reference() is None
        assert becomes(memory.expired)
    finally:
        gc.enable()
    assert len(moved(device)) == (2 if not settings and kind == "cpu" else 0)


# --- How much moves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num_moved"), [(0, 0), (0.2, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)]
)
def test_ratio(ratio, num_moved, device):
    def function(x):
        return (x * 2).sin().cos().sin().cos()  # Each of the four saves its input.

    x = leaf(100)
    offloaded(function, ratio=ratio)(x).sum().backward()
    assert host().out_bytes == host().back_bytes == num_moved * 400
    ours, x.grad = x.grad, None
    function(x).sum().backward()
    assert torch.equal(ours, x.grad)


def test_what_ratio_leaves_stays_however_often_it_is_saved(device):
    weights = [leaf(16, 16, seed=seed) for seed in range(4)]

    def function(x):
        x = x * 2
        return sum((x @ weight).sum() for weight in weights)

    offloaded(function, ratio=0.5)(leaf(8, 16)).backward()
    assert moved(device) == []  # A copy would free nothing: the first product keeps x.


@pytest.mark.parametrize("keep_last", [0, 1, 2, 4, 9])
@each_face
def test_keep_last(face, keep_last, device):
    plain, wrapped = stacks(face, keep_last=keep_last)
    expected = 0
    for number in range(3):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
        num_away = 4 if number == 0 else max(0, 4 - keep_last)  # The first step shows the order.
        expected += num_away * 2 * N
        assert host().out_bytes == host().back_bytes == expected
    assert_nothing_left()


def test_keep_last_are_those_at_the_end_of_forward(device):
    plain, wrapped = stacks(keep_last=2)
    step(wrapped, batch())
    calls = []
    for layer in wrapped.layers:
        layer.register_forward_hook(lambda *_: calls.append(device.num_copies("D2H")))
    before = device.num_copies("D2H")
    assert_equal(step(wrapped, batch(1)), step(plain, batch(1)))
    assert [num - before for num in calls] == [2, 4, 4, 4]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch(prefetch, device):
    plain, wrapped = stacks(num_layers=5, prefetch=prefetch)
    arrivals = []

    def watch_backward(module, args, out):
        """Backward reaches a region: how many regions' activations are on their way by then?"""
        out.register_hook(lambda _: arrivals.append((device.num_copies("H2D") - before) / 2))

    for layer in wrapped.layers:
        layer.register_forward_hook(watch_backward)
    for number in range(2):
        before = device.num_copies("H2D")
        arrivals.clear()
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
        assert arrivals == [0, *(min(5, num + prefetch) for num in range(1, 5))]
    # Each region's second storage comes with its first, which is not ahead where nothing is.
    num_late = 5 if prefetch == 0 else 1
    assert host().num_ahead == 2 * (2 * 5 - num_late)
    assert_nothing_left()


def test_prefetch_hides_copies_behind_compute(no_leaks):
    """A copy takes 1 ms, a region's backward 4 ms: with a region ahead only the first one waits."""
    waited = {}
    for prefetch in (0, 1):
        _, wrapped = stacks(prefetch=prefetch)
        with SimulatedTransport(bandwidth_bytes_per_s=N / 1e-3, latency_s=0.0) as device:
            for layer in wrapped.layers:
                layer.register_full_backward_pre_hook(lambda *_: device.compute(4e-3))
            loss = loss_of(wrapped, batch())
            device.compute(1.0)
            finish_offloading()
            loss.backward()
            waited[prefetch] = device.waited_s()
    assert waited == {0: pytest.approx(4 * 2e-3), 1: pytest.approx(2e-3)}


def test_nothing_is_allocated_after_the_second_step(device):
    plain, wrapped = stacks(keep_last=1)
    allocations = []
    for number in range(5):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
        allocations.append((device.num_pinned_allocations, host().num_allocations))
    assert allocations[0][0] > 1
    assert allocations[1:] == [allocations[1]] * 4
    assert host().num_reused == host().num_taken - 8


# --- Graphs that are used in other ways ---------------------------------------------------------


def test_backward_twice(device):
    plain, wrapped = stacks()

    def run(model):
        x = batch().requires_grad_()
        loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        assert becomes(lambda: device.device_bytes == 0)  # Away again, though the graph lives.
        first = x.grad.clone()
        loss.backward()
        return [first, x.grad, *grads_of(model)]

    for _ in range(2):
        assert_equal(run(wrapped), run(plain))
    assert host().num_out == 2 * 8
    assert host().num_back > 2 * 8
    assert_nothing_left()


def test_gradients_of_some_inputs_only(device):
    plain, wrapped = stacks()

    def run(model):
        x = batch().requires_grad_()
        out = model(x)
        last = [*model.layers[3].parameters()]
        grads = torch.autograd.grad(out.sum(), last, retain_graph=True)
        return [
            *grads,
            *torch.autograd.grad(out.square().sum(), [x, *model.layers[1].parameters()]),
        ]

    for _ in range(2):
        assert_equal(run(wrapped), run(plain))
    assert_nothing_left()


@each_face
def test_double_backward(face, device):
    plain, wrapped = stacks(face)

    def run(model):
        x = batch().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        grad.square().sum().backward()
        return [grad.detach(), x.grad, *grads_of(model)]

    for _ in range(2):
        assert_equal(run(wrapped), run(plain))
    assert host().num_out == 2 * 8
    assert_nothing_left()


def test_gradient_accumulation(device):
    plain, wrapped = stacks(keep_last=1)

    def run(model):
        for seed in range(3):
            loss_of(model, batch(seed)).backward()
        return grads_of(model)

    for _ in range(2):
        assert_equal(run(wrapped), run(plain))
    assert host().out_bytes == (8 + 5 * 6) * N  # The first micro-batch shows the order.
    assert_nothing_left()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_graphs_at_a_time(order, device):
    plain, wrapped = stacks(keep_last=1)

    def run(model):
        inputs = [batch(seed).requires_grad_() for seed in range(2)]
        losses = [loss_of(model, x) for x in inputs]
        for index in order:
            losses[index].backward()
        return [*(x.grad for x in inputs), *grads_of(model)]

    for _ in range(3):
        assert_equal(run(wrapped), run(plain))
    # The last region of a graph stays where backward wants it first of all.
    assert host().out_bytes == (16 + 2 * (14 if order == (1, 0) else 16)) * N
    assert_nothing_left()


def test_one_forward_one_backward(device):
    """The order of a pipeline stage: two micro-batches ahead, then in turns."""
    plain, wrapped = stacks(num_layers=2, keep_last=1, prefetch=1)

    def run(model):
        losses = {seed: loss_of(model, batch(seed)) for seed in range(2)}
        for seed in range(4):
            losses.pop(seed).backward()
            if seed + 2 < 4:
                losses[seed + 2] = loss_of(model, batch(seed + 2))
        return grads_of(model)

    num_ahead = 0
    for number in range(3):
        assert_equal(run(wrapped), run(plain))
        # Only the first storage of a step is late, and before the order is known of a micro-batch.
        num_ahead += 16 - (4 if number == 0 else 1)
        assert host().num_ahead == num_ahead
        assert host().num_out == host().num_back == (number + 1) * 16  # None comes right back.
    assert_nothing_left()


def test_regions_within_regions(device):
    plain, wrapped = stacks(num_layers=2)
    wrapped = offload_wrapper(wrapped, min_bytes=0, keep_last=0)
    for layer in wrapped.layers:
        layer.up = offload_wrapper(layer.up, min_bytes=0, keep_last=0)
    for number in range(3):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    assert host().num_out == 3 * 4  # Each activation once, by the innermost; the batch stays.
    assert_nothing_left()


# --- What goes wrong, and what that leaves ------------------------------------------------------


def failing_stacks():
    """The models, and a switch: which forward and which backward of the third block raises."""
    plain, wrapped = stacks(keep_last=1)
    switch = {"forward": False, "backward": False}

    def fail(module, args, out):
        if switch["forward"]:
            raise KeyError("mine")

        def hook(grad):
            if switch["backward"]:
                raise KeyError("mine")

        out.register_hook(hook)

    wrapped.layers[2].up.register_forward_hook(fail)
    return plain, wrapped, switch


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("num_before", [0, 2])
def test_an_exception(when, num_before, device):
    plain, wrapped, switch = failing_stacks()
    for number in range(num_before):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    switch[when] = True
    with pytest.raises(KeyError, match="mine"):
        step(wrapped, batch())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert_nothing_left()
    switch[when] = False
    for number in range(3):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    assert_nothing_left()


@pytest.mark.parametrize("num_before", [0, 2])
def test_an_abandoned_graph(num_before, device):
    plain, wrapped = stacks(keep_last=1)
    for number in range(num_before):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    out = wrapped(batch().requires_grad_())
    assert host().num_alive == (8 if num_before == 0 else 6)
    del out
    assert_nothing_left()
    for number in range(2):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    assert_nothing_left()


def test_a_backward_that_is_not_finished(device):
    plain, wrapped = stacks()
    x = batch().requires_grad_()
    out = wrapped(x)
    # Backward ends after the last two regions; what is fetched ahead for others dies, too.
    torch.autograd.grad(out.sum(), [*wrapped.layers[2].parameters()])
    del out
    assert_nothing_left()
    assert host().num_back > 4
    assert_equal(step(wrapped, batch()), step(plain, batch()))


def test_what_backward_does_not_want_goes_when_it_leaves_the_region(device):
    def two_results(x):
        return x.sin(), (x * 3).cos()

    first, second = offloaded(torch.sin), offloaded(two_results)
    x = leaf(100)
    out, unused = second(first(x * 2))
    assert becomes(lambda: device.device_bytes == 0)
    out.sum().backward()
    assert host().num_back == 3  # One of them for the unused result, which still may be wanted.
    assert becomes(lambda: device.device_bytes == 0)
    assert host().num_alive == 1
    ours, x.grad = x.grad, None
    (x * 2).sin().sin().sum().backward()
    assert torch.equal(ours, x.grad)
    del unused
    assert_nothing_left()


def test_an_eval_forward_with_grad_between_two_steps(device):
    plain, wrapped = stacks(keep_last=1)
    for number in range(2):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    wrapped.eval()
    assert torch.equal(wrapped(batch(7)), plain(batch(7)))
    wrapped.train()
    assert_nothing_left()
    before = host().out_bytes
    assert_equal(step(wrapped, batch(2)), step(plain, batch(2)))
    assert host().out_bytes - before == 6 * N  # The order of the steps is still known.
    assert_nothing_left()


def test_an_eval_forward_whose_output_is_kept(device):
    plain, wrapped = stacks(keep_last=1)
    assert_equal(step(wrapped, batch()), step(plain, batch()))
    out = wrapped(batch(7))
    for number in range(3):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    assert torch.equal(out, plain(batch(7)))
    del out
    assert_nothing_left()


def test_slow_copies_of_a_graph_that_dies(no_leaks):
    plain, wrapped = stacks()
    with SimulatedTransport(bandwidth_bytes_per_s=1e6) as device:
        out = wrapped(batch())
        del out
        assert host().used_bytes == 0  # Whoever takes a slot comes after its copy.
        assert_equal(step(wrapped, batch()), step(plain, batch()))
        assert_nothing_left()
        assert device.waited_s() > 0


@pytest.mark.parametrize("changed_after_s", [0.0, 0.5e-3, 1.0], ids=["before", "during", "after"])
@pytest.mark.parametrize("arrives_s", [0.0, 1.0], ids=["unmoved", "moved"])
def test_a_tensor_changed_in_place_is_found(changed_after_s, arrives_s, no_leaks):
    """As without offloading, whether its copy has begun, is under way or is over."""
    plain, wrapped = stacks(num_layers=2)
    with SimulatedTransport(bandwidth_bytes_per_s=N / 1e-3, latency_s=0.0) as device:
        for model in (plain, wrapped):
            hidden = model.embed(batch().requires_grad_())
            out = model.layers[1](hidden)
            device.compute(changed_after_s)
            with torch.no_grad():
                hidden.add_(1)
            device.compute(arrives_s)
            with pytest.raises(RuntimeError, match=r"changed in place|an inplace op") as caught:
                out.sum().backward()
        assert type(caught.value) is InputChangedError
        assert caught.value.fqn == "layers.1"
        assert caught.value.tensor == f"saved tensor of {N} bytes"
        del out, hidden, caught
        assert_equal(step(wrapped, batch()), step(plain, batch()))
        assert_nothing_left()


@pytest.mark.parametrize("settings", [{"min_bytes": 1000}, {"ratio": 0.0}])
def test_a_kept_tensor_changed_in_place_is_found(settings, device):
    linear = nn.Linear(4, 4)
    hidden = leaf(2, 4) * 1
    region = offload_wrapper(linear, **{"min_bytes": 0, **settings})
    for changed in (linear.weight, hidden):
        loss = region(hidden).sum()
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(InputChangedError, match=r"version \d, expected \d") as caught:
            loss.backward()
        assert caught.value.tensor == f"saved tensor {tuple(changed.shape)}"
    assert moved(device) == []


def test_a_checksum_finds_a_changed_byte(no_leaks):
    def corrupt(direction: str, number: int) -> Fault | None:
        return Fault("corrupt") if direction == "D2H" and number == 4 else None

    _, wrapped = stacks(checksum=True)
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), fault=corrupt, latency_s=0):
        with pytest.raises(OffloadError, match=r"region `layers\.2`") as caught:
            step(wrapped, batch())
        assert (caught.value.fqn, caught.value.tier, caught.value.num_bytes) == (
            "layers.2",
            "host",
            N,
        )
        del caught
        assert_nothing_left()


# --- With activation checkpointing --------------------------------------------------------------


class Cross(nn.Module):
    """Keeps two arguments as the inputs of a region; saves more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, *, memory=None):
        y = self.linear(x).tanh().sin().cos()
        return y if memory is None else y + (y @ memory.t()).softmax(-1) @ memory


def cross_step(region: nn.Module) -> list[Tensor]:
    x, memory = leaf(8, 16), leaf(5, 16, seed=1)
    region(x * 2, memory=memory * 3).square().sum().backward()
    return [x.grad, memory.grad, *grads_of(region)]


def of_impl(impl: CheckpointImpl) -> dict[str, object]:
    """Settings under which a region reads its inputs once a step: a verification reads them too."""
    return {"impl": impl, **({"verify": "never"} if impl is CheckpointImpl.REPLAY else {})}


@each_impl
@each_face
def test_around_a_checkpointed_module_its_inputs_move(face, impl, device):
    plain = Cross()
    is_in_place = face is in_place
    inner = checkpoint_wrapper(copy.deepcopy(plain), inplace=is_in_place, **of_impl(impl))
    wrapped = face(inner, min_bytes=0, keep_last=0)
    for number in range(1, 4):
        assert_equal(cross_step(wrapped), cross_step(plain))
        # The region's inputs, and nothing in the recompute.
        assert sorted(moved(device)) == sorted([5 * 16 * 4, N] * number)
        assert sorted(moved(device, "H2D")) == sorted([5 * 16 * 4, N] * number)
    assert_nothing_left()


@each_impl
def test_around_checkpointed_modules_of_a_stack(impl, device):
    torch.manual_seed(0)
    plain = Stack()
    wrapped = copy.deepcopy(plain)
    apply_activation_checkpointing(wrapped, check_fn=is_block, **of_impl(impl))
    offload = partial(offload_wrapper, min_bytes=0, keep_last=1)
    apply_activation_checkpointing(wrapped, offload, is_block)
    for number in range(3):
        assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    assert host().out_bytes == host().back_bytes == (4 + 3 + 3) * N
    assert_nothing_left()


@each_impl
@each_face
def test_inside_a_checkpointed_module_nothing_moves(face, impl, device):
    plain, wrapped = stacks(face, num_layers=2)
    apply_activation_checkpointing(wrapped, check_fn=is_block, impl=impl, inplace=face is in_place)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            assert_equal(step(wrapped, batch(number)), step(plain, batch(number)))
    texts = sorted(str(w.message) for w in caught)
    assert [text.split(" lies ")[0] for text in texts] == ["region `layers.0`", "region `layers.1`"]
    assert "offload_wrapper(checkpoint_wrapper(module))" in texts[0]
    assert moved(device) == []


def test_inside_a_checkpointed_module_without_a_name(device):
    region = CheckpointWrapper(offload_wrapper(Block(), min_bytes=0))
    with pytest.warns(UserWarning, match="region that is offloaded lies inside a checkpointed one"):
        region(leaf(8, 16)).sum().backward()
    assert moved(device) == []


# --- No hooks at all ----------------------------------------------------------------------------


def hooks_seen(model: nn.Module) -> list[object]:
    """The saved-tensor hooks that each linear layer runs under."""
    seen: list[object] = []

    def look(*_):
        seen.append(torch._C._autograd._top_saved_tensors_default_hooks(True))

    linears = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [linear.register_forward_pre_hook(look) for linear in linears]
    model(batch().requires_grad_())
    for handle in handles:
        handle.remove()
    return seen


@each_face
def test_without_a_device_there_are_no_hooks(face, monkeypatch):
    monkeypatch.setattr(_device, "accelerator_tensors_exist", lambda: False)
    monkeypatch.setattr(transfer, "_accelerator", [])
    plain, wrapped = stacks(face)
    assert hooks_seen(wrapped) == [None] * 9
    monkeypatch.setattr("wrappers.modules.offload.OffloadHooks", None)
    assert_equal(step(wrapped, batch()), step(plain, batch()))
    assert offload_stats().tiers == ()


@each_face
def test_without_grad_mode_there_are_no_hooks(face, device):
    _, wrapped = stacks(face)
    with torch.no_grad():
        assert hooks_seen(wrapped) == [None] * 9
    with torch.inference_mode():
        wrapped(batch())
    assert offload_stats().tiers == ()
    assert [hooks is None for hooks in hooks_seen(wrapped)] == [True] + [False] * 8


def test_hooks_are_popped_when_forward_raises(device):
    def function(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        offloaded(function)(leaf(3))
    (leaf(3) * 1).sin()
    assert moved(device) == []


@each_face
def test_compiled_without_a_graph_break(face):
    torch._dynamo.reset()
    plain = Attention()
    module = face(copy.deepcopy(plain), min_bytes=0)
    x = torch.randn(6, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with SimulatedTransport() as device:
        assert_equal(step(compiled, x), step(plain, x))
        assert moved(device) == []


@each_face
def test_in_a_transform_of_functions(face, device):
    plain, wrapped = stacks(face, num_layers=1)
    x = batch()
    ours, expected = (torch.func.grad(partial(loss_of, model))(x) for model in (wrapped, plain))
    assert torch.equal(ours, expected)
    assert moved(device) == []


# --- Settings, copies, names --------------------------------------------------------------------


@each_face
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tier": "ram"}, "tier must be 'host' or 'disk', got 'ram'"),
        ({"tier": "disk"}, "tier='disk' needs directory="),
        ({"directory": "/tmp"}, "directory= is for tier='disk'"),
        ({"min_bytes": -1}, "min_bytes must not be negative, got -1"),
        ({"keep_last": -1}, "keep_last must not be negative, got -1"),
        ({"prefetch": -2}, "prefetch must not be negative, got -2"),
        ({"prefetch": 2.0}, "prefetch must be an int, got 2.0"),
        ({"keep_last": None}, "keep_last must be an int, got None"),
        ({"min_bytes": float("nan")}, "min_bytes must be an int, got nan"),
        ({"max_inflight_bytes": 0}, "max_inflight_bytes must be positive, got 0"),
        ({"max_inflight_bytes": -5}, "max_inflight_bytes must be positive, got -5"),
        ({"ratio": -0.1}, "ratio must lie between 0 and 1, got -0.1"),
        ({"ratio": 1.5}, "ratio must lie between 0 and 1, got 1.5"),
        ({"ratio": float("nan")}, "ratio must lie between 0 and 1, got nan"),
    ],
)
def test_wrong_settings(face, settings, text):
    module = Block()
    error = TypeError if "must be an int" in text else ValueError
    with pytest.raises(error, match="^" + text.replace("(", r"\(")):
        face(module, **settings)
    assert not is_offloaded(module)
    with pytest.raises(error):
        OffloadWrapper(module, **settings)


@each_face
def test_unknown_settings_and_no_module(face):
    with pytest.raises(TypeError, match="speed"):
        face(Block(), speed=1)
    with pytest.raises(TypeError, match="speed"):
        OffloadWrapper(Block(), speed=1)
    with pytest.raises(TypeError, match="function"):
        face(lambda x: x)


@each_face
def test_a_directory_in_which_no_file_can_be_written(face, tmp_path):
    (tmp_path / "file").write_text("")
    module = Block()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/wrappers")):
        with pytest.raises(
            OSError, match="activations cannot be offloaded to directory="
        ) as caught:
            face(module, tier="disk", directory=path)
        assert repr(str(path)) in str(caught.value)
        assert "Pass a directory on a local disk" in str(caught.value)
        assert caught.value.errno is not None
        assert not is_offloaded(module)


@each_face
def test_a_missing_directory_is_made(face, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, path in [
        (tmp_path / "a" / "b", tmp_path / "a" / "b"),
        (str(tmp_path / "c"), tmp_path / "c"),
        ("d/e", tmp_path / "d" / "e"),
        ("~/f", tmp_path / "home" / "f"),
    ]:
        module = face(Block(), tier="disk", directory=given)
        owner = module.forward if face is in_place else module
        assert owner.offload_settings.directory == str(path.resolve())
        assert list(path.iterdir()) == []


@each_face
def test_settings_reach_the_region(face):
    settings = {
        "min_bytes": 7,
        "keep_last": 2,
        "max_inflight_bytes": 9,
        "prefetch": 3,
        "ratio": 0.5,
        "checksum": True,
    }
    module = face(Block(), **settings)
    owner = module.forward if face is in_place else module
    assert owner.offload_settings == OffloadSettings(**settings)
    default = face(Block())
    owner = default.forward if face is in_place else default
    assert owner.offload_settings == OffloadSettings(
        tier="host",
        directory=None,
        min_bytes=None,
        keep_last=1,
        max_inflight_bytes=None,
        prefetch=1,
        ratio=1.0,
        checksum=False,
    )


def test_settings_are_the_wrappers_own():
    block = Block()
    inner = checkpoint_wrapper(block)
    inner.region_fqn = "inner"
    outer = offload_wrapper(inner)
    outer.region_fqn = "outer"
    assert (inner.region_fqn, outer.region_fqn) == ("inner", "outer")
    assert {"region_fqn", "offload_settings", "_warning"}.isdisjoint(vars(block))


def test_repr_says_what_is_not_the_default():
    inner = "Linear(in_features=2, out_features=2, bias=True)"
    linear = nn.Linear(2, 2)
    assert repr(offload_wrapper(linear)) == f"OffloadWrapper[tier='host']({inner})"
    wrapper = offload_wrapper(linear, ratio=0.5, keep_last=0)
    assert repr(wrapper) == f"OffloadWrapper[keep_last=0, ratio=0.5]({inner})"


@each_face
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_offloaded_as_their_originals(copied, face, device):
    plain, wrapped = stacks(face, keep_last=1)
    assert_equal(step(wrapped, batch()), step(plain, batch()))
    other = copied(wrapped)
    kind = OffloadForward if face is in_place else OffloadWrapper
    for ours, theirs in zip(wrapped.layers, other.layers, strict=True):
        ours, theirs = (m.forward if face is in_place else m for m in (ours, theirs))
        assert isinstance(theirs, kind)
        assert theirs is not ours
        assert theirs.offload_settings == ours.offload_settings
        assert theirs.region_fqn == ours.region_fqn != ""
    before = host().out_bytes
    expected = step(plain, batch(1))
    assert_equal(step(other, batch(1)), expected)
    assert host().out_bytes - before == 8 * N  # Nobody knows its order yet.
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    assert_equal(step(other, batch(1)), expected)
    assert host().out_bytes - before == 14 * N
    assert_nothing_left()


@each_face
@pytest.mark.parametrize("again", [offload_wrapper, in_place])
def test_wrapping_twice_warns(again, face):
    module = face(Block())
    assert is_offloaded(module)
    with pytest.warns(UserWarning, match="a Block is offloaded already"):
        assert again(module) is module


def test_of_wrappers_in_place_the_module_is_the_same():
    module = Block()
    assert in_place(module) is module
    assert isinstance(module.forward, OffloadForward)
    wrapper = offload_wrapper(module := Block())
    assert type(wrapper) is not OffloadWrapper  # of a class of its own, for isinstance
    assert isinstance(wrapper, OffloadWrapper)
    assert isinstance(wrapper, Block)
    assert not is_offloaded(module)


# --- On an accelerator --------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_face
def test_on_a_gpu(face):
    plain = Attention(256).cuda()
    wrapped = face(copy.deepcopy(plain), min_bytes=0, keep_last=0)
    x = torch.randn(256, 256, device="cuda")
    for _ in range(3):
        assert_equal(step(wrapped, x), step(plain, x))
    used = []
    for module in (plain, wrapped):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = module(*copies([x]))
        finish_offloading()
        used.append(torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes())
        del out
    assert used[1] < used[0] / 4
    assert_nothing_left()
