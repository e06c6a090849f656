"""Where a replay is not safe, the region is rerun instead: right gradients, and one warning.

Kernels that torch does not see are stood in for by custom autograd Functions that write through
numpy. Each test takes several steps: the one in which the region falls back and those after it have
the plain function's gradients, bit for bit, and only the first warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.helpers import Calls, Operators, assert_equal, copies, leaf
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    apply_activation_checkpointing,
    checkpoint,
)
from wrappers.engine.api import run_region
from wrappers.engine.region import Region

REPLAY = CheckpointImpl.REPLAY
NO_REENTRANT = CheckpointImpl.NO_REENTRANT
REENTRANT = CheckpointImpl.REENTRANT

BLANK = "reads memory that no operator has written"
CHANGED = "a tensor was changed in place by something that is no operator"
DIFFERS = "its first replay gave another result of"
COMPILED = "compiled code"

aten = torch.ops.aten


def keep_everything(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


policies = pytest.mark.parametrize(
    "policy", [None, [aten.mm], keep_everything], ids=["recompute", "mm", "save"]
)


class Run:
    """Runs functions in one region and collects the warnings of its fallback."""

    def __init__(self, **options: Any) -> None:
        self.region = Region(impl=options.pop("impl", REPLAY), fqn="layers.3.mlp", **options)
        self.warnings: list[str] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run_region(self.region, function, args, kwargs)

    def step(self, function: Callable[..., Any], *tensors: Tensor) -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = step(self, function, *tensors)
        self.warnings += [str(warning.message) for warning in caught]
        return result

    def assert_fallen_once(self, reason: str) -> None:
        assert self.region.experience.fallen_at is not None
        assert reason in self.region.experience.reason
        (message,) = self.warnings
        assert message.startswith(
            "region `layers.3.mlp` is rerun from now on instead of replayed: "
        )
        assert reason in message

    def assert_replayed(self) -> None:
        assert self.region.experience.fallen_at is None, self.region.experience.reason
        assert self.warnings == []


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def step(call: Callable[..., Any], function: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """Output, gradients and the random state after one forward and backward."""
    leaves = copies(tensors)
    out = call(function, *leaves)
    result = out.detach().clone()
    out.square().sum().backward()
    return [result, *(t.grad for t in leaves), torch.get_rng_state()]


def pair(seed: int = 0) -> list[Tensor]:
    return [leaf(4, 4, seed=seed), leaf(4, 4, seed=seed + 1)]


def assert_falls_back(
    function: Callable[..., Tensor],
    reason: str,
    *,
    num_steps: int = 4,
    functions: Callable[[], Callable[..., Tensor]] | None = None,
    **options: Any,
) -> Run:
    """Each step has the plain function's gradients, and all of them together warn once."""
    run = Run(**options)
    for seed in range(num_steps):
        torch.manual_seed(seed)
        expected = step(plain, functions() if functions else function, *pair(seed))
        torch.manual_seed(seed)
        assert_equal(run.step(functions() if functions else function, *pair(seed)), expected)
    run.assert_fallen_once(reason)
    return run


# --- Kernels that torch does not see


def as_array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


class IntoEmpty(torch.autograd.Function):
    """A kernel fills memory from ``empty_like``."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        as_array(out)[...] = as_array(x) * 3 + 1
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return grad * 3 + 0 * out


class IntoPartOfEmpty(torch.autograd.Function):
    """A kernel fills one half of memory from ``empty``, an operator the other."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(x.shape)
        out[:2] = x[:2] * 2
        as_array(out)[2:] = as_array(x)[2:] * 5
        return out

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[:2] * 2, grad[2:] * 5])


class IntoZeros(torch.autograd.Function):
    """A kernel adds to memory that an operator has made."""

    @staticmethod
    def forward(ctx, x):
        out = torch.zeros_like(x)
        as_array(out)[...] += as_array(x) * 3
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class IntoInput(torch.autograd.Function):
    """A kernel writes its input in place, and says so."""

    @staticmethod
    def forward(ctx, x):
        as_array(x)[...] *= 2
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def into_empty(x, w):
    return (IntoEmpty.apply(x @ w).sin() * w).exp()


def into_empty_of_input(x, w):
    return (IntoEmpty.apply(x) @ w).sin()


def two_into_empty(x, w):
    return (IntoEmpty.apply(IntoEmpty.apply(x @ w).sin()) * w).cos()


def into_empty_through_a_view(x, w):
    return (IntoEmpty.apply(x @ w).view(2, 8).t().sin() @ torch.ones(2, 4)).cos() * w[:1]


def into_part(x, w):
    return (IntoPartOfEmpty.apply(x @ w).sin() * w).cos()


def into_zeros(x, w):
    return (IntoZeros.apply(x @ w).sin() * w).cos()


def into_input(x, w):
    return (IntoInput.apply(x @ w).sin() * w).cos()


def into_input_saved_view(x, w):
    y = (x @ w) + 1
    z = y[1:]
    IntoInput.apply(y)
    return z.sin() * w[1:]


@policies
@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize(
    "function",
    [into_empty, into_empty_of_input, two_into_empty, into_empty_through_a_view],
    ids=lambda f: f.__name__,
)
def test_memory_that_no_operator_has_written(function, verify, policy):
    assert_falls_back(function, BLANK, policy=policy, verify=verify)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_memory_that_an_operator_has_written_in_part(verify):
    assert_falls_back(into_part, DIFFERS, verify=verify)


@pytest.mark.parametrize("policy", [None, [aten.mm]], ids=["recompute", "mm"])
@pytest.mark.parametrize("verify", ["first", "always"])
def test_memory_that_an_operator_has_made_and_a_kernel_changed_is_found_by_the_check(
    verify, policy
):
    run = assert_falls_back(into_zeros, DIFFERS, policy=policy, verify=verify)
    assert f"({__file__}:" in run.warnings[0]  # and where the operator was called


def test_without_the_check_the_same_kernel_is_not_found():
    run = Run(verify="never")
    ours, expected = run.step(into_zeros, *pair()), step(plain, into_zeros, *pair())
    run.assert_replayed()
    assert torch.equal(ours[0], expected[0])
    assert not torch.equal(ours[1], expected[1])


def test_the_result_of_a_kernel_is_right_without_the_check_if_the_policy_keeps_it():
    run = Run(verify="never", policy=[aten.zeros_like, aten.mm, aten.sin, aten.mul])
    assert_equal(run.step(into_zeros, *pair()), step(plain, into_zeros, *pair()))


@policies
@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize("function", [into_input, into_input_saved_view], ids=lambda f: f.__name__)
def test_a_tensor_marked_as_changed(function, verify, policy):
    assert_falls_back(function, CHANGED, policy=policy, verify=verify)


def test_the_first_check_that_differs_costs_one_rerun_and_each_later_step_one():
    calls = Calls(into_zeros)
    run = Run()
    for num in (2, 4, 6):
        run.step(calls, *pair())
        assert calls.num == num
    run.assert_fallen_once(DIFFERS)


def test_graphs_from_before_the_fallback_are_right_in_both_orders():
    for order in ((0, 1), (1, 0)):
        run = Run(verify="never")

        def both(call, order=order):
            x, w = pair()
            outs = [call(into_empty, x, w), call(into_empty, x + 1, w)]
            for number in order:
                outs[number].square().sum().backward()
            return [x.grad, w.grad]

        expected = both(plain)
        with pytest.warns(UserWarning, match=BLANK) as caught:
            assert_equal(both(run), expected)
        assert len(caught) == 1


def test_two_forwards_before_the_check_differs():
    def both(call):
        x, w = pair()
        outs = [call(into_zeros, x, w), call(into_zeros, x + 1, w)]
        for out in outs:
            out.square().sum().backward()
        return [x.grad, w.grad]

    run = Run()
    expected = both(plain)
    with pytest.warns(UserWarning, match=DIFFERS) as caught:
        assert_equal(both(run), expected)
    assert len(caught) == 1


def test_two_backwards_of_the_graph_whose_check_differs():
    def region(x, w):
        return (IntoZeros.apply(x.sin() @ w) * w).exp()

    def both(call):
        x, w = pair()
        out = call(region, x, w).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        return [x.grad, w.grad]

    run = Run()
    expected = both(plain)
    with pytest.warns(UserWarning, match=DIFFERS):
        assert_equal(both(run), expected)
    assert_equal(both(run), expected)


def test_the_fallback_is_a_rerun_without_the_policy():
    def region(x, w):
        return IntoEmpty.apply((x @ w).sin()).exp()

    run = assert_falls_back(region, BLANK, policy=[aten.mm], num_steps=2)
    loss = run(region, *pair()).sum()
    with Operators() as operators:
        loss.backward()
    assert operators["mm"] == 3  # two are backward's own
    assert operators["sin"] == 1


# --- Random operators and statistics keep their promises after a fallback


@pytest.mark.parametrize("verify", ["first", "never"])
def test_dropout_after_a_fallback(verify):
    def region(x, w):
        y = nn.functional.dropout(IntoEmpty.apply(x @ w), 0.5)
        return nn.functional.dropout(y.sin(), 0.5) * w

    assert_falls_back(region, BLANK, verify=verify)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return IntoZeros.apply(self.norm(self.linear(x))).sin().exp()


def test_batch_norm_statistics_across_a_fallback():
    module, other = Normalized(), Normalized()
    run = Run()
    for seed in range(4):
        x = leaf(6, 4, seed=seed)
        assert_equal(run.step(module, x), step(plain, other, x))
        assert_equal(module.state_dict().values(), other.state_dict().values())
    assert module.norm.num_batches_tracked.item() == 4
    assert_equal([p.grad for p in module.parameters()], [p.grad for p in other.parameters()])
    run.assert_fallen_once(DIFFERS)


def test_a_wrapped_module_is_named_in_the_warning():
    model, other = (nn.Sequential(nn.Linear(4, 4), Normalized()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Normalized), impl=REPLAY)

    def train():
        for seed in range(3):
            x = leaf(6, 4, seed=seed)
            assert_equal(step(plain, model, x), step(plain, other, x))

    with pytest.warns(UserWarning, match=DIFFERS) as caught:
        train()
    (warning,) = caught
    assert str(warning.message).startswith("region `1` is rerun from now on")


def test_regions_of_one_function_fall_back_together_and_others_do_not():
    def bad(x):
        return IntoEmpty.apply(x.sin()).exp()

    def good(x):
        return x.sin().exp()

    def train():
        for _ in range(3):
            checkpoint(bad, leaf(4), impl=REPLAY).sum().backward()
            checkpoint(good, leaf(4), impl=REPLAY).sum().backward()

    with pytest.warns(UserWarning, match=BLANK) as caught:
        train()
    assert len(caught) == 1
    assert "bad" in str(caught[0].message)


# --- Code that is compiled


@pytest.fixture(scope="module")
def _warm_compiler():
    """The compiler starts a thread of its own when it is used for the first time."""
    torch.compile(torch.sin, backend="aot_eager")(leaf(4)).sum().backward()


@pytest.fixture
def _fresh_compiler(_warm_compiler):
    torch.compiler.reset()
    yield
    torch.compiler.reset()


compiling = pytest.mark.usefixtures("_fresh_compiler")
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return self.inner(x.sin()).exp()


def compile_attribute(block, backend):
    block.inner = torch.compile(block.inner, backend=backend)


def compile_in_place(block, backend):
    block.inner.compile(backend=backend)


@compiling
@backends
@pytest.mark.parametrize("compile_it", [compile_attribute, compile_in_place])
def test_a_compiled_module_inside(compile_it, backend):
    block, other = Block(), Block()
    compile_it(block, backend)
    run = Run()
    for seed in range(3):
        x = leaf(3, 4, seed=seed)
        assert_equal(run.step(block, x), step(plain, other, x))
    assert_equal([p.grad for p in block.parameters()], [p.grad for p in other.parameters()])
    run.assert_fallen_once(COMPILED)


@compiling
@backends
@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_compiled_function_inside(verify, backend):
    def function(x, w):
        return (x @ w).sin().exp()

    inner = torch.compile(function, backend=backend)
    run = Run(verify=verify)
    for seed in range(3):
        expected = step(plain, lambda x, w: function(x, w) * w, *pair(seed))
        assert_equal(run.step(lambda x, w: inner(x, w) * w, *pair(seed)), expected)
    # torch runs it as it is under a dispatch mode, so it may be replayed. But nothing may make the
    # compiler trace the recorder or the hooks, which it then warns about.
    others = [w for w in run.warnings if not w.startswith("region `layers.3.mlp` is rerun")]
    assert others == []
    assert len(run.warnings) <= 1


# --- Operators that cannot be recorded


def test_set():
    def region(x, w):
        y = torch.empty(0)
        y.set_((x @ w).detach().clone())
        return (y * x).sin() * w

    assert_falls_back(region, "aten.set_.source_Tensor gives a tensor other memory")


def test_memory_exchanged_behind_a_tensor():
    def region(x, w):
        y = (x @ w).detach()
        y.data = w.detach() * 2  # no operator, and the version stays
        return (y * x).sin() * w

    assert_falls_back(region, DIFFERS)


@policies
@pytest.mark.parametrize("verify", ["first", "never"])
def test_resize(verify, policy):
    def region(x, w):
        h = (x @ w).sin()
        buffer = torch.zeros(2, 4)
        buffer.resize_(4, 4)
        buffer.copy_(w.detach())
        return (h * buffer).exp() * h

    assert_falls_back(region, "aten.resize_.default gives a", policy=policy, verify=verify)


def test_a_higher_order_operator():
    def region(x, w):
        # Not torch.cond: it breaks in backward under any dispatch mode.
        (y,) = torch.ops.higher_order.cond(
            torch.tensor(True), lambda a, b: ((a @ b).sin(),), lambda a, b: (a - b,), (x, w)
        )
        return y.exp() * w

    assert_falls_back(region, "it calls the higher-order operator cond", verify="never")


# --- Nested regions


def nest(outer, inner, function):
    def whole(x, w):
        return outer(lambda x, w: inner(function, (x.cos() @ w).tanh(), w.exp()).sin(), x, w)

    return whole


@pytest.mark.parametrize("outer_impl", [NO_REENTRANT, REENTRANT, REPLAY])
@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize(
    ("function", "reason"),
    [(into_empty, BLANK), (into_zeros, DIFFERS), (into_input, CHANGED)],
    ids=["empty", "zeros", "dirty"],
)
def test_an_inner_region_falls_back(function, reason, verify, outer_impl):
    if function is into_zeros and verify == "never":
        pytest.skip("nothing finds it then")
    inner, outer = Run(verify=verify), Run(impl=outer_impl)
    whole = nest(outer, inner, function)
    caught: list[str] = []
    for seed in range(3):
        expected = step(plain, nest(plain, plain, function), *pair(seed))
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            assert_equal(step(plain, whole, *pair(seed)), expected)
        caught += [str(record.message) for record in records]
    assert inner.region.experience.fallen_at is not None
    assert reason in inner.region.experience.reason
    assert len(caught) <= (2 if outer_impl is REPLAY else 1)


def test_an_inner_region_falls_back_between_the_outer_forward_and_backward():
    inner, outer = Run(verify="never"), Run(impl=NO_REENTRANT)
    whole = nest(outer, inner, lambda x, w: (x @ w).sin().exp())
    x, w = pair()
    out = whole(x, w)
    assert inner.region.experience.fallen_at is None
    inner.step(into_empty, *pair())  # the same region, elsewhere
    inner.assert_fallen_once(BLANK)
    out.square().sum().backward()  # its rerun is a replay still
    y, v = pair()
    nest(plain, plain, lambda x, w: (x @ w).sin().exp())(y, v).square().sum().backward()
    assert_equal([x.grad, w.grad], [y.grad, v.grad])
    assert_equal(
        step(plain, whole, *pair()),
        step(plain, nest(plain, plain, lambda x, w: (x @ w).sin().exp()), *pair()),
    )


def test_two_outer_frames_one_from_before_and_one_from_after_the_fallback():
    def good(x, w):
        return (x @ w).sin().exp()

    for order in ((0, 1), (1, 0)):
        inner, outer = Run(verify="never"), Run(impl=NO_REENTRANT)

        def both(outer_call, inner_call, between, order=order):
            x, w = pair()
            outs = [nest(outer_call, inner_call, good)(x, w)]
            between()
            outs.append(nest(outer_call, inner_call, good)(x + 1, w))
            for number in order:
                outs[number].square().sum().backward()
            return [x.grad, w.grad]

        expected = both(plain, plain, lambda: None)
        assert_equal(
            both(outer, inner, lambda inner=inner: inner.step(into_empty, *pair())), expected
        )
        inner.assert_fallen_once(BLANK)


def test_an_outer_region_falls_back_and_the_inner_one_does_not():
    def inside(x, w):
        return (x @ w).sin().exp()

    def make(outer_call, inner_call):
        def region(x, w):
            return inner_call(inside, IntoEmpty.apply(x.cos()), w).tanh()

        return lambda x, w: outer_call(region, x, w)

    inner, outer = Run(), Run()
    for seed in range(3):
        expected = step(plain, make(plain, plain), *pair(seed))
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            assert_equal(step(plain, make(outer, inner), *pair(seed)), expected)
        outer.warnings += [str(record.message) for record in records]
    outer.assert_fallen_once(BLANK)
    inner.assert_replayed()
