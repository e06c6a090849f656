"""Where the replay meets what it does not know: foreign operators, other hooks, other regions.

Custom operators, memory that a kernel changes unseen, hooks and checkpoints of others inside and
around a region, and what one call leaves for the next. Everything is compared with the plain
function, bit for bit. A region that may be replayed must not have fallen back; where it has to,
it says so once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

from tests.engine.helpers import Calls, assert_equal, copies, leaf, spy_on_frames, watch
from wrappers import CheckpointImpl, _knobs, checkpoint, checkpoint_wrapper
from wrappers.engine import api
from wrappers.engine.api import run_region
from wrappers.engine.region import Region
from wrappers.engine.replay import ReplayFrame
from wrappers.policies import save_attention, save_matmuls

REPLAY = CheckpointImpl.REPLAY
NO_REENTRANT = CheckpointImpl.NO_REENTRANT
REENTRANT = CheckpointImpl.REENTRANT

FALLS_BACK = "is rerun from now on instead of replayed"

aten = torch.ops.aten
verifying = pytest.mark.parametrize("verify", ["first", "never"])


@pytest.fixture(autouse=True, params=["at once", "piece by piece"])
def way(request, monkeypatch):
    """Small regions run all operators at the first unpack; here both ways are tried."""
    if request.param == "piece by piece":
        monkeypatch.setattr(_knobs, "REPLAY_AT_ONCE_BYTES", -1)
    return request.param


@pytest.fixture
def fresh_compiler():
    """Compile anew, and leave nothing compiled behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def ops():
    """Operators of a library that says no more about them than their schema."""

    def write_both(x, y):
        x.mul_(2)
        y.add_(1)

    library = torch.library.Library("borders", "FRAGMENT")
    for schema, kernel in [
        ("write_both(Tensor(a!) x, Tensor(b!) y) -> ()", write_both),
        ("view_and_new(Tensor(a) x) -> (Tensor(a), Tensor)", lambda x: (x.view(-1), x * 3)),
        (
            "noise(Tensor x, bool train) -> Tensor",
            lambda x, train: torch.rand_like(x) if train else torch.ones_like(x),
        ),
    ]:
        library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CPU")
    yield torch.ops.borders
    library._destroy()


@pytest.fixture
def frames(monkeypatch):
    """Weak references to the frames that the test makes, in order."""
    return spy_on_frames(monkeypatch, ReplayFrame)


class Run:
    """Runs functions in one region; ``assert_replayed`` tells that it has not fallen back."""

    def __init__(self, *, impl: CheckpointImpl = REPLAY, **options: Any) -> None:
        self.region = Region(impl=impl, fqn="region", **options)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return run_region(self.region, function, args, {})

    def assert_replayed(self) -> None:
        assert self.region.experience.fallen_at is None, self.region.experience.reason


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def step(call: Callable[..., Any], function: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """Output, gradients and what was written to the tensors, after a forward and backward."""
    leaves = copies(tensors)
    out = call(function, *leaves)
    result = out.detach().clone()
    out.square().sum().backward()
    return [result, *(t.grad for t in leaves), *leaves]


def assert_like_plain(
    function: Callable[..., Tensor], *tensors: Tensor, num_steps: int = 2, **options: Any
) -> None:
    """Several steps of a region equal those of the plain function, and each is replayed."""
    run = Run(**options)
    for _ in range(num_steps):
        assert_equal(step(run, function, *tensors), step(plain, function, *tensors))
        run.assert_replayed()


class Block(nn.Module):
    """Two products and four sines."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(leaf(3, 3, seed=1)), nn.Parameter(leaf(3, 3, seed=2))

    def forward(self, x):
        return ((x @ self.w).sin() @ self.v).sin()


def module_step(function: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Any]:
    """Output and gradients of the input and all parameters."""
    module.zero_grad()
    (x,) = copies([x])
    out = function(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


# --- Operators of others


@verifying
def test_an_operator_that_writes_to_the_regions_tensor_and_to_an_outside_one(ops, verify):
    def function(x, buffer):
        y = x * 2
        with torch.no_grad():
            ops.write_both(y.detach(), buffer)
        return y * x.sin()

    assert_like_plain(function, leaf(3), torch.zeros(3), verify=verify)


@verifying
def test_a_foreach_operator_that_writes_to_both(verify):
    def function(x, buffer):
        y = x * 2
        with torch.no_grad():
            torch._foreach_add_([y, buffer], 1.0)
        return y.sin()

    assert_like_plain(function, leaf(3), torch.zeros(3), verify=verify)


@verifying
def test_an_operator_that_returns_a_view_and_new_memory_that_is_written(ops, verify):
    def function(x, m):
        y = m + 1
        with torch.no_grad():
            _, new = ops.view_and_new(m)
            new.mul_(5)
        return (y * x).sin() + new * x

    assert_like_plain(function, leaf(3), torch.ones(3), verify=verify)


def test_an_operator_that_draws_only_in_training_after_a_check_in_eval(ops):
    class Noise(nn.Module):
        def forward(self, x):
            return (ops.noise(x.detach(), self.training) * x).sin()

    block = Noise()
    wrapped = checkpoint_wrapper(block, checkpoint_impl=REPLAY)
    for mode in (False, True, True):
        block.train(mode)
        torch.manual_seed(0)
        expected = step(plain, block, leaf(3))
        torch.manual_seed(0)
        assert_equal(step(plain, wrapped, leaf(3)), expected)


@verifying
def test_a_generator_that_is_passed_by_position(verify):
    generator = torch.Generator()

    def function(x):
        generator.manual_seed(0)
        return torch.rrelu(x * 1.0, 0.1, 0.9, True, generator).sin()

    assert_like_plain(function, leaf(8), verify=verify)


@verifying
def test_a_kept_output_in_inference_mode(verify):
    def function(x):
        with torch.inference_mode():
            factor = float(x.detach().sin().sum())
        return (x * factor).sin()

    assert_like_plain(function, leaf(3), policy=[aten.sin], verify=verify)


# --- Memory that is written after it was read


def test_a_sparse_tensor_is_read_and_then_written_through_its_values():
    def function(sparse, w):
        y = sparse * 2
        with torch.no_grad():
            sparse._values().mul_(5)
        return torch.sparse.mm(y, w).sin()

    def one(call):
        sparse, w = torch.eye(3).to_sparse().coalesce(), leaf(3, 3)
        out = call(function, sparse, w)
        out.square().sum().backward()
        return [out.detach(), w.grad, sparse.to_dense()]

    run = Run()
    for _ in range(2):
        assert_equal(one(run), one(plain))
        run.assert_replayed()


def test_a_tensor_subclass_is_read_and_then_written_through_a_view():
    def function(x, w):
        y = x + 1
        with torch.no_grad():
            x[0].mul_(5)
        return (y * w).sin()

    def one(call):
        x, w = TwoTensor(torch.ones(2, 3), torch.ones(2, 3)), leaf(2, 3)
        out = call(function, x, w)
        out.sum().backward()
        return [t.a if isinstance(t, TwoTensor) else t for t in (out.detach(), w.grad, x)]

    run = Run()
    for _ in range(2):
        assert_equal(one(run), one(plain))
        run.assert_replayed()


@verifying
def test_a_read_tensor_that_is_written_after_the_recording_has_stopped(verify):
    def function(x, buffer):
        y = x + buffer
        torch.empty(0).resize_(3)
        with torch.no_grad():
            buffer.add_(1)
        return y.sin() * 1.0

    run = Run(verify=verify)
    expected = step(plain, function, leaf(3), torch.ones(3))
    with pytest.warns(UserWarning, match=FALLS_BACK):
        assert_equal(step(run, function, leaf(3), torch.ones(3)), expected)


def test_empty_memory_that_is_filled_part_by_part_through_a_view_that_is_gone():
    def function(x):
        empty = torch.empty(4, 3)
        empty.view(-1)[:6].copy_((x * 2).detach().view(-1)[:6])
        empty[2:].fill_(1.0)
        return (empty.view(-1) * x.view(-1)).sin()

    assert_like_plain(function, leaf(4, 3))


# --- Hooks, checkpoints and regions of others, inside and around


def _inside_region(impl):
    return lambda function, x: checkpoint(function, x, impl=impl)


def _inside_torchs(function, x):
    return torchs_checkpoint(function, x, use_reentrant=False)


def _inside_hooks(function, x):
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def _around_hooks(function, x):
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return function(x)


@pytest.mark.parametrize(
    "inside",
    [_inside_region(NO_REENTRANT), _inside_region(REENTRANT), _inside_torchs, _inside_hooks],
    ids=["NO_REENTRANT", "REENTRANT", "torch", "hooks"],
)
@pytest.mark.parametrize(
    "around",
    [_inside_region(NO_REENTRANT), _inside_region(REPLAY), _around_hooks],
    ids=["NO_REENTRANT", "REPLAY", "hooks"],
)
@verifying
def test_a_replayed_region_between_other_checkpoints(inside, around, verify):
    block, run = Block(), Run(verify=verify)

    def whole(around, replayed, inside):
        def middle(x):
            return inside(block, x.sin()).cos() * 1.5

        return lambda x: around(lambda x: replayed(middle, x).sin(), x)

    expected = module_step(whole(plain, plain, plain), block, leaf(3, 3))
    for _ in range(2):
        assert_equal(module_step(whole(around, run, inside), block, leaf(3, 3)), expected)
        run.assert_replayed()


def test_the_users_hooks_inside_see_all_that_is_saved():
    pack = Calls(lambda t: t)
    block = Block()

    def function(x):
        with saved_tensors_hooks(pack, lambda t: t):
            return block(x).cos().sin()

    function(leaf(3, 3))
    expected, pack.num = pack.num, 0
    run = Run(verify="never")
    checkpoint(lambda x: run(function, x).sin(), leaf(3, 3), impl=NO_REENTRANT)
    assert pack.num == expected > 0


class IntoEmpty(torch.autograd.Function):
    """A kernel that torch does not see fills empty memory."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        out.detach().numpy()[...] = x.detach().numpy() * 3
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class IntoResult(torch.autograd.Function):
    """A kernel that torch does not see changes the result of an operator."""

    @staticmethod
    def forward(ctx, x):
        out = x * 1.0
        out.detach().numpy()[...] *= 3
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Opaque(nn.Module):
    def __init__(self, kernel) -> None:
        super().__init__()
        self.kernel, self.w = kernel, nn.Parameter(leaf(3, 3, seed=1))

    def forward(self, x):
        return (self.kernel.apply(x) @ self.w).sin()


@pytest.mark.parametrize("outer", [NO_REENTRANT, REPLAY])
def test_a_region_that_is_called_twice_and_falls_back_in_the_first_call(outer):
    block = Opaque(IntoEmpty)
    wrapped = checkpoint_wrapper(copy.deepcopy(block), checkpoint_impl=REPLAY)

    def twice(module):
        return lambda x: (module(module(x.cos())).cos() @ x).sin()

    expected = module_step(twice(block), block, leaf(3, 3))
    run = Run(impl=outer)
    with pytest.warns(UserWarning, match=FALLS_BACK):
        first = module_step(lambda x: run(twice(wrapped), x), wrapped, leaf(3, 3))
    assert_equal(first, expected)
    second = module_step(lambda x: run(twice(wrapped), x), wrapped, leaf(3, 3))
    assert_equal(second, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("outer", [NO_REENTRANT, REENTRANT, REPLAY])
@pytest.mark.parametrize("num_rows", [3, 5])
def test_a_compiled_module_in_an_inner_region(outer, num_rows):
    block, compiled, run, inner = Block(), Block(), Run(impl=outer), Run()
    compiled.compile(backend="eager")

    def whole(around, inside, module):
        def function(x):
            return (inside(module, x.sin()).cos() @ module.w).sin()

        return lambda x: around(function, x)

    x = leaf(num_rows, 3)
    expected = module_step(whole(plain, plain, block), block, x)
    with pytest.warns(UserWarning, match="compiled code"):
        assert_equal(module_step(whole(run, inner, compiled), compiled, x), expected)
    assert_equal(module_step(whole(run, inner, compiled), compiled, x), expected)


# --- What one call leaves for the next


def test_modules_of_one_class_do_not_share_what_was_learnt():
    harmless = nn.Sequential(nn.Tanh(), nn.Tanh())
    opaque = nn.Sequential(Opaque(IntoResult), nn.Tanh())
    checkpoint(harmless, leaf(3, 3), impl=REPLAY).sum().backward()  # a check that finds nothing
    expected = module_step(opaque, opaque, leaf(3, 3))
    with pytest.warns(UserWarning, match=FALLS_BACK):
        got = module_step(lambda x: checkpoint(opaque, x, impl=REPLAY), opaque, leaf(3, 3))
    assert_equal(got, expected)


def test_a_combined_policy_that_is_made_for_each_call_is_checked_once(monkeypatch):
    monkeypatch.setattr(api, "_regions", {})  # nothing is known from an earlier test
    function = Calls(lambda x: (x @ x).sin().cos())

    def region(x):
        return function(x)

    for _ in range(5):
        policy = save_matmuls() | save_attention()
        checkpoint(region, leaf(3, 3), policy=policy).sum().backward()
    assert function.num == 5 + 1


class Peak(TorchDispatchMode):
    """The largest number of recomputed activations that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[Any] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (aten.sigmoid.default, aten.tanh.default):
            self.watched.append(watch(out))
        self.peak = max(self.peak, sum(not memory.expired() for memory in self.watched))
        return out


def test_large_calls_after_a_small_one_are_replayed_part_by_part():
    def function(x):
        for _ in range(6):
            x = (x @ x).sigmoid().tanh()
        return x

    run = Run(policy=[aten.mm], verify="never")
    run(function, leaf(4, 4)).sum().backward()
    for _ in range(2):
        out = run(function, leaf(256, 256)).sum()
        with Peak() as peak:
            out.backward()
        assert 1 <= peak.peak <= 4
    run.assert_replayed()


# --- Lifetimes


def test_kept_outputs_of_a_chain_that_keeps_all_die_one_after_the_other():
    alive, memory = [], []

    def function(x, w, note=False):
        for _ in range(4):
            x = x @ w
            if note:
                memory.append(watch(x))
                x.register_hook(lambda grad: alive.append(sum(not m.expired() for m in memory[:3])))
        return x

    run = Run(policy=[aten.mm], verify="never")
    x, w = leaf(8, 8), leaf(8, 8, seed=1)
    assert_like_plain(function, x, w, policy=[aten.mm], verify="never")
    out = run(function, x, w, True)
    out.sum().backward()
    # At the gradient of each product: none has died too early, and the last ones not too late.
    assert alive[0] == 3
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 1


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("policy", [[aten.sin], [aten.sin, aten.cos]], ids=["sin", "sin cos"])
@verifying
def test_a_write_after_a_kept_output_was_read_and_one_output_dropped(dropped, policy, verify):
    def function(x):
        kept = x.sin()
        y = x.detach().cos()
        first = (y + kept).cos()
        with torch.no_grad():
            y.mul_(2)
        return first, (y * x).sin()

    def one_output(call):
        def one(function, x):
            outs = list(call(function, x))
            del outs[dropped]
            return outs[0]

        return one

    run = Run(policy=policy, verify=verify)
    for _ in range(2):
        got = step(one_output(run), function, leaf(3))
        assert_equal(got, step(one_output(plain), function, leaf(3)))
        run.assert_replayed()


@verifying
def test_no_frame_is_left_where_an_argument_was_written_and_the_output_dropped(frames, verify):
    def function(x, w):
        x.addcmul_(w.sin(), w.cos())
        return (x * 2).sin()

    run = Run(verify=verify)
    for _ in range(3):
        argument = torch.zeros(3)
        out = run(function, argument, leaf(3))
        del argument, out
    assert len(frames) >= 3
    assert [frame() for frame in frames] == [None] * len(frames)
