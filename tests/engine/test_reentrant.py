"""REENTRANT, its limits, and what both implementations take as arguments and outputs."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.helpers import (
    IMPLS,
    NO_REENTRANT,
    REENTRANT,
    Calls,
    assert_equal,
    count_backward,
    gradients,
    leaf,
    watch,
)
from wrappers import (
    CheckpointError,
    CheckpointFunction,
    check_backward_validity,
    checkpoint,
    detach_variable,
    is_recomputing,
)

both = pytest.mark.parametrize("impl", IMPLS)


# --- The node ---------------------------------------------------------------------------


def test_the_region_is_one_graph_node_over_its_inputs():
    x, w = leaf(4, 4), leaf(4, 4, seed=1)
    out = checkpoint(lambda x, w: (x @ w).sin(), x, w, impl=REENTRANT)
    leaves = [node.variable for node, _ in out.grad_fn.next_functions if node is not None]
    assert {id(t) for t in leaves} == {id(x), id(w)}


def test_the_forward_builds_no_graph():
    seen = []

    def region(x):
        y = x.sin()
        seen.append((torch.is_grad_enabled(), y.requires_grad, is_recomputing()))
        return y

    checkpoint(region, leaf(3), impl=REENTRANT).sum().backward()
    assert seen == [(False, False, False), (True, True, True)]


def test_nothing_inside_stays_alive_after_forward():
    watches = []

    def region(x):
        y = x.sin()
        watches.append(watch(y))
        return y.cos()

    out = checkpoint(region, leaf(5), impl=REENTRANT)
    assert watches[0].expired()
    out.sum().backward()
    assert watches[1].expired()


@pytest.mark.parametrize("retain_graph", [False, True])
def test_rule_4_every_backward_recomputes_once(retain_graph):
    region = Calls(lambda x: x.sin().exp())
    x = leaf(5)
    out = checkpoint(region, x, impl=REENTRANT).sum()
    for number in range(1, 3):
        out.backward(retain_graph=retain_graph or number == 1)
        assert region.num == 1 + number
    y = x.detach().requires_grad_()
    plain = y.sin().exp().sum()
    plain.backward(retain_graph=True)
    plain.backward()
    assert torch.equal(x.grad, y.grad)


def test_early_stop_does_not_concern_reentrant():
    out = checkpoint(lambda x: x.sin() + 1, leaf(5), impl=REENTRANT)
    assert count_backward(out)["sin"] == 1


def test_rule_3_hooks_around_the_backward_do_not_see_the_recompute():
    packed = []
    out = checkpoint(lambda x: x.sin().exp().cos(), leaf(5), impl=REENTRANT).sum()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        out.backward()
    assert packed == []


# --- What REENTRANT cannot do, it refuses -----------------------------------------------


def refused():
    x = leaf(5)
    return x, checkpoint(lambda x: x.sin(), x, impl=REENTRANT).sum()


def test_autograd_grad_is_refused():
    x, out = refused()
    with pytest.raises(CheckpointError, match=r"\.grad\(\) and \.backward\(inputs=.*NO_REENTRANT"):
        torch.autograd.grad(out, x)


def test_backward_inputs_is_refused():
    x, out = refused()
    with pytest.raises(CheckpointError, match=r"backward\(inputs=\.\.\.\) are not possible"):
        out.backward(inputs=[x])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_is_refused():
    _, out = refused()
    with pytest.raises(CheckpointError, match="create_graph=True is not possible"):
        out.backward(create_graph=True)


def test_a_refusal_names_the_region():
    def my_region(x):
        return x.sin()

    x = leaf(3)
    with pytest.raises(CheckpointError) as info:
        torch.autograd.grad(checkpoint(my_region, x, impl=REENTRANT).sum(), x)
    assert "my_region" in info.value.fqn
    assert "my_region" in str(info.value)


def test_after_a_refusal_a_plain_backward_works():
    x = leaf(5)
    out = checkpoint(lambda x: x.sin(), x, impl=REENTRANT).sum()
    with pytest.raises(CheckpointError):
        torch.autograd.grad(out, x, retain_graph=True)
    out.backward()
    assert torch.equal(x.grad, x.detach().cos())


def test_reentrant_inside_no_reentrant_refuses_autograd_grad_too():
    def outer(x):
        return checkpoint(lambda x: x.sin(), x.exp(), impl=REENTRANT).cos()

    x = leaf(5)
    out = checkpoint(outer, x, impl=NO_REENTRANT).sum()
    with pytest.raises(CheckpointError, match="NO_REENTRANT"):
        torch.autograd.grad(out, x)


def test_no_output_with_grad_raises():
    def region(x):
        return x.detach().sin()

    out = checkpoint(region, leaf(5), impl=REENTRANT)
    with pytest.raises(CheckpointError, match="requires grad"):
        out.sum().backward()


def test_one_output_with_grad_is_enough():
    results = []
    for is_region in (True, False):
        x = leaf(5)
        region = lambda x: (x.sin(), x.detach().cos())  # noqa: E731
        a, b = checkpoint(region, x, impl=REENTRANT) if is_region else region(x)
        (a + b).sum().backward()
        results.append([x.grad])
    assert_equal(*results)


def test_a_changed_input_raises_and_is_named():
    x = leaf(5)
    y, z = x * 1, x * 2
    out = checkpoint(lambda y, *, mask: (y * mask).sin(), y, mask=z, impl=REENTRANT)
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(CheckpointError, match="argument `mask` was changed in place"):
        out.sum().backward()


# --- Row 5: gradients never vanish silently ---------------------------------------------


@both
@pytest.mark.parametrize("has_input", [True, False])
def test_parameters_get_gradients_though_no_input_requires_grad(impl, has_input):
    module = nn.Linear(4, 4)
    data = leaf(2, 4, seed=5).detach()
    region = (lambda x: module(x).sin()) if has_input else (lambda: module(data).sin())
    args = [data] if has_input else []
    checkpoint(region, *args, impl=impl).sum().backward()
    got = [p.grad for p in module.parameters()]
    module.zero_grad()
    region(*args).sum().backward()
    assert_equal(got, [p.grad for p in module.parameters()])


@both
def test_no_gradients_anywhere_is_fine(impl):
    out = checkpoint(lambda x: x.sin(), leaf(3).detach(), impl=impl)
    assert not out.requires_grad


@both
def test_frozen_parameters_inside_and_input_with_grad(impl):
    module = nn.Linear(4, 4).requires_grad_(False)
    run = partial(checkpoint, module, impl=impl)
    assert_equal(gradients(run, leaf(2, 4)), gradients(module, leaf(2, 4)))
    assert module.weight.grad is None


@both
def test_first_region_of_a_model_with_data_as_input(impl):
    results = []
    for is_region in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        y = leaf(2, 4).detach()
        for block in model:
            y = checkpoint(block, y, impl=impl).sin() if is_region else block(y).sin()
        y.sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert_equal(*results)


@both
def test_row_8_a_shared_parameter_with_a_grad_gets_each_part_once(impl):
    results = []
    for is_region in (True, False):
        # Small whole numbers: sums are exact in any order.
        shared = nn.Linear(3, 3, bias=False)
        shared.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
        shared.weight.grad = torch.full_like(shared.weight, 7.0)
        x = torch.arange(6.0).reshape(2, 3).requires_grad_()
        y = x
        for _ in range(2):
            y = checkpoint(shared, y, impl=impl) if is_region else shared(y)
        y.sum().backward()
        results.append([x.grad, shared.weight.grad])
    assert_equal(*results)


# --- Arguments and outputs, for both implementations ------------------------------------


class Pair(collections.namedtuple("Pair", "first second")):
    __slots__ = ()


@dataclasses.dataclass
class Box:
    first: Any
    second: Any
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class FrozenBox:
    first: Any
    second: Any
    note: str = "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedBox:
    first: Any
    second: Any


@dataclasses.dataclass
class LateField:
    first: Any
    second: Any
    total: Any = dataclasses.field(init=False, default=None)


CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda c: c),
    "list": (lambda a, b: [a, b], lambda c: c),
    "dict": (lambda a, b: {"b": b, "a": a}, lambda c: (c["a"], c["b"])),
    "ordered dict": (
        lambda a, b: collections.OrderedDict(a=a, b=b),
        lambda c: (c["a"], c["b"]),
    ),
    "named tuple": (Pair, lambda c: (c.first, c.second)),
    "dataclass": (Box, lambda c: (c.first, c.second)),
    "frozen dataclass": (FrozenBox, lambda c: (c.first, c.second)),
    "slotted dataclass": (SlottedBox, lambda c: (c.first, c.second)),
    "late field": (LateField, lambda c: (c.first, c.second)),
    "nested": (
        lambda a, b: {"x": [(None, Box(a, "s"))], "y": (3, FrozenBox(1, [b]))},
        lambda c: (c["x"][0][1].first, c["y"][1].second[0]),
    ),
}
each_container = pytest.mark.parametrize("container", CONTAINERS)


@both
@each_container
@pytest.mark.parametrize("is_kwarg", [False, True])
def test_tensors_in_containers_as_inputs(impl, container, is_kwarg):
    wrap, unwrap = CONTAINERS[container]

    def region(box):
        x, w = unwrap(box)
        assert type(box) is type(wrap(x, w))
        return (x @ w).sin()

    def run(x, w):
        if is_kwarg:
            return checkpoint(region, box=wrap(x, w), impl=impl)
        return checkpoint(region, wrap(x, w), impl=impl)

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    assert_equal(gradients(run, *tensors), gradients(lambda x, w: (x @ w).sin(), *tensors))


@both
@each_container
def test_tensors_in_containers_as_outputs(impl, container):
    wrap, unwrap = CONTAINERS[container]

    def region(x, w):
        y = x @ w
        return wrap(y.sin(), y.exp())

    def loss(box):
        a, b = unwrap(box)
        assert type(box) is type(wrap(a, b))
        assert a.requires_grad
        assert b.requires_grad
        return a * b

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    got = gradients(lambda x, w: loss(checkpoint(region, x, w, impl=impl)), *tensors)
    assert_equal(got, gradients(lambda x, w: loss(region(x, w)), *tensors))


@both
@each_container
def test_an_unused_output_in_a_container_gives_no_gradient_of_its_own(impl, container):
    wrap, unwrap = CONTAINERS[container]

    def region(x, w):
        return wrap(x.sin(), w.exp())

    tensors = leaf(4), leaf(4, seed=1)
    got = gradients(lambda x, w: unwrap(checkpoint(region, x, w, impl=impl))[0], *tensors)
    assert_equal(got, gradients(lambda x, w: x.sin(), *tensors))


@both
def test_other_values_in_containers_are_the_same_objects(impl):
    marker, seen = object(), []

    def region(box):
        seen.append(box["marker"])
        return {"y": box["x"].sin().exp(), "marker": box["marker"]}

    out = checkpoint(region, {"x": leaf(3), "marker": marker}, impl=impl)
    assert out["marker"] is marker
    out["y"].sum().backward()
    assert seen == [marker, marker]


@both
def test_a_container_without_tensors_is_passed_as_it_is(impl):
    cache, seen = {"hits": []}, []

    def region(x, cache):
        seen.append(cache)
        return x.sin().exp()

    checkpoint(region, leaf(3), cache, impl=impl).sum().backward()
    assert seen[0] is cache
    assert seen[1] is cache


@both
def test_non_tensor_and_none_arguments(impl):
    def region(a, x, b, flag, *, name, missing=None, scale=1.0):
        assert (a, b, flag, name, missing) == (None, 3, True, "n", None)
        return (x * b * scale).sin()

    def run(x):
        return checkpoint(region, None, x, 3, True, name="n", scale=0.5, impl=impl)

    assert_equal(gradients(run, leaf(4)), gradients(lambda x: (x * 3 * 0.5).sin(), leaf(4)))


@both
def test_keyword_tensors_get_gradients(impl):
    def run(x, w):
        return checkpoint(lambda *, w, x: (x @ w).sin(), x=x, w=w, impl=impl)

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    assert_equal(gradients(run, *tensors), gradients(lambda x, w: (x @ w).sin(), *tensors))


@both
def test_the_same_tensor_passed_three_times(impl):
    def region(a, b, *, c):
        return a * b * 3 + c[0]

    x = torch.arange(4.0).requires_grad_()  # Whole numbers: sums are exact in any order.
    got = gradients(lambda x: checkpoint(region, x, x, c=[x], impl=impl), x)
    assert_equal(got, gradients(lambda x: region(x, x, c=[x]), x))


@both
@pytest.mark.parametrize("requires_grad", [True, False])
def test_outputs_that_are_inputs(impl, requires_grad):
    def region(x, w):
        return x, w, (x * w).sin()

    def net(run):
        def forward(x, w):
            a, b, c = run(x * 1, w)
            return a.exp() + c * b

        return forward

    tensors = leaf(4), leaf(4, seed=1).detach().requires_grad_(requires_grad)
    got = gradients(net(partial(checkpoint, region, impl=impl)), *tensors)
    assert_equal(got, gradients(net(region), *tensors))


@both
def test_an_identity_region(impl):
    got = gradients(lambda x: checkpoint(lambda x: x, x * 2, impl=impl).sin(), leaf(4))
    assert_equal(got, gradients(lambda x: (x * 2).sin(), leaf(4)))


@both
def test_one_tensor_returned_twice(impl):
    def region(x):
        y = x.sin()
        return y, y

    def net(run):
        def forward(x):
            a, b = run(x)
            return a * b

        return forward

    got = gradients(net(partial(checkpoint, region, impl=impl)), leaf(4))
    assert_equal(got, gradients(net(region), leaf(4)))


@both
def test_views_of_one_tensor_as_outputs(impl):
    def region(x):
        return (x * 2).sin().chunk(2)

    def net(run):
        def forward(x):
            a, b = run(x)
            return a * b.exp()

        return forward

    got = gradients(net(partial(checkpoint, region, impl=impl)), leaf(4))
    assert_equal(got, gradients(net(region), leaf(4)))


@both
def test_a_view_of_an_input_as_output(impl):
    got = gradients(lambda x: checkpoint(lambda x: x[1:], x * 1, impl=impl).exp(), leaf(4))
    assert_equal(got, gradients(lambda x: x[1:].exp(), leaf(4)))


@both
def test_integer_tensors_in_and_out(impl):
    def region(x, index):
        y = x.sin()[index]
        return y, y.argmax(), index + 1

    def net(run):
        def forward(x):
            y, best, moved = run(x, torch.tensor([2, 0, 0]))
            assert moved.tolist() == [3, 1, 1]
            assert not best.requires_grad
            assert not moved.requires_grad
            return y * (best + 1)

        return forward

    got = gradients(net(partial(checkpoint, region, impl=impl)), leaf(4))
    assert_equal(got, gradients(net(region), leaf(4)))


@both
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_zero_size_tensors(impl, shape):
    x = leaf(*shape)
    checkpoint(lambda x: x.sin().exp(), x, impl=impl).sum().backward()
    assert x.grad.shape == shape


@both
def test_zero_dimensional_tensors(impl):
    got = gradients(lambda x: checkpoint(lambda x: x.sin().exp(), x, impl=impl), leaf())
    assert_equal(got, gradients(lambda x: x.sin().exp(), leaf()))


@both
@pytest.mark.parametrize("value", [None, 5, "text", (), {"a": [1]}])
def test_no_tensor_output(impl, value):
    run = Calls(lambda x: value)
    assert checkpoint(run, leaf(3), impl=impl) is value
    assert run.num == 1


@both
def test_none_among_the_outputs(impl):
    def region(x):
        return None, x.sin(), None, 7

    def run(x):
        a, y, b, c = checkpoint(region, x, impl=impl)
        assert (a, b, c) == (None, None, 7)
        return y

    assert_equal(gradients(run, leaf(4)), gradients(lambda x: x.sin(), leaf(4)))


@both
def test_unused_outputs(impl):
    def region(x, w):
        return x.sin(), w.exp(), (x * w).cos()

    tensors = leaf(4), leaf(4, seed=1)
    got = gradients(lambda x, w: checkpoint(region, x, w, impl=impl)[0], *tensors)
    assert_equal(got, gradients(lambda x, w: region(x, w)[0], *tensors))
    assert got[1] is None


@both
def test_an_unused_input(impl):
    tensors = leaf(4), leaf(4, seed=1)
    got = gradients(lambda x, w: checkpoint(lambda x, w: x.sin(), x, w, impl=impl), *tensors)
    assert_equal(got[:1], gradients(lambda x, w: x.sin(), *tensors)[:1])
    assert got[1] is None


@both
def test_an_input_that_needs_no_grad_gets_none(impl):
    x, w = leaf(4), leaf(4, seed=1).detach()
    checkpoint(lambda x, w: (x * w).sin(), x, w, impl=impl).sum().backward()
    assert w.grad is None
    assert torch.equal(x.grad, (x.detach() * w).cos() * w)


@both
def test_requires_grad_of_the_inputs_is_the_same_in_the_recompute(impl):
    seen = []

    def region(x, w):
        seen.append((x.requires_grad, w.requires_grad))
        return (x * w).sin().exp()

    checkpoint(region, leaf(4), leaf(4, seed=1).detach(), impl=impl).sum().backward()
    assert seen == [(True, False)] * 2


@both
def test_non_contiguous_and_expanded_inputs(impl):
    def net(run):
        def forward(x, w):
            return run(x.t(), w.expand(4, 4))

        return forward

    def region(x, w):
        return (x @ w).sin()

    tensors = leaf(4, 4), leaf(1, 4, seed=1)
    got = gradients(net(partial(checkpoint, region, impl=impl)), *tensors)
    assert_equal(got, gradients(net(region), *tensors))


@both
def test_a_parameter_as_argument_and_in_the_closure(impl):
    results = []
    for is_region in (True, False):
        x, w = leaf(4), leaf(4, seed=1)
        region = lambda x, v: x.sin() * v * w  # noqa: B023, E731
        out = checkpoint(region, x, w, impl=impl) if is_region else region(x, w)
        out.sum().backward()
        results.append([x.grad, w.grad])
    assert_equal(*results)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes(impl, dtype):
    x = leaf(4, dtype=dtype) if dtype is not torch.bfloat16 else leaf(4).detach().bfloat16()
    x.requires_grad_()

    def net(run):
        return lambda x: torch.view_as_real(run(x)) if x.is_complex() else run(x)

    def region(x):
        return x.sin().exp()

    got = gradients(net(partial(checkpoint, region, impl=impl)), x)
    assert_equal(got, gradients(net(region), x))


@both
def test_sparse_gradients(impl):
    results = []
    for is_region in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        index = torch.tensor([1, 1, 4])
        x = leaf(3)
        region = lambda x, i: (table(i) * x).sin()  # noqa: B023, E731
        out = checkpoint(region, x, index, impl=impl) if is_region else region(x, index)
        out.sum().backward()
        assert table.weight.grad.is_sparse
        results.append([x.grad, table.weight.grad.to_dense()])
    assert_equal(*results)


@both
def test_a_parameter_subclass_stays_one_in_the_region(impl):
    seen = []

    def region(x, w):
        seen.append(x.shape)
        return nn.functional.linear(x, w).sin()

    x, w = leaf(2, 4), nn.Parameter(leaf(3, 4, seed=1).detach())
    checkpoint(region, x, w, impl=impl).sum().backward()
    assert seen == [(2, 4)] * 2
    assert w.grad.shape == (3, 4)


# --- torch's helpers of this implementation ---------------------------------------------


def test_check_backward_validity_warns_only_without_grad():
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        check_backward_validity([leaf(2).detach(), 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_backward_validity([None, leaf(2)])


def test_detach_variable():
    x, w = leaf(2) * 2, leaf(3).detach()
    a, b, c = detach_variable((x, w, "s"))
    assert (a.requires_grad, b.requires_grad, c) == (True, False, "s")
    assert a.is_leaf
    assert a.data_ptr() == x.data_ptr()
    with pytest.raises(TypeError, match="tuple"):
        detach_variable([x])


@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_checkpoint_function_is_a_drop_in(preserve_rng_state):
    def region(x, scale, w):
        return (x * scale).sin(), (x @ w).exp()

    def loss(outs):
        return outs[0] * outs[1]

    def run(x, w):
        return loss(CheckpointFunction.apply(region, preserve_rng_state, x, 2, w))

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    assert_equal(gradients(run, *tensors), gradients(lambda x, w: loss(region(x, 2, w)), *tensors))


def test_checkpoint_function_with_one_output():
    got = gradients(lambda x: CheckpointFunction.apply(torch.sin, True, x), leaf(4))
    assert_equal(got, gradients(torch.sin, leaf(4)))


def test_deep_chains_of_regions_do_not_overflow_the_stack():
    x = leaf(3)
    y = x
    for _ in range(200):
        y = checkpoint(torch.sin, y, impl=REENTRANT)
    y.sum().backward()
    z = x.detach().requires_grad_()
    plain = z
    for _ in range(200):
        plain = plain.sin()
    plain.sum().backward()
    assert torch.equal(x.grad, z.grad)


@both
def test_deep_nesting(impl):
    def nest(depth, x):
        if depth == 0:
            return x.sin()
        return checkpoint(nest, depth - 1, x, impl=impl).cos()

    def plain(x):
        y = x.sin()
        for _ in range(8):
            y = y.cos()
        return y

    assert_equal(gradients(partial(nest, 8), leaf(4)), gradients(plain, leaf(4)))
