"""When frames, inputs and recomputed tensors die, and what a backward over and over leaves.

Everything here runs without the cyclic collector: memory must not wait for it.
"""

from __future__ import annotations

import gc
import pathlib
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import GraphExecGroup as TorchGraphExecGroup

from tests.engine.helpers import (
    IMPLS,
    NO_REENTRANT,
    REENTRANT,
    Calls,
    assert_equal,
    counts_of_training,
    gradients,
    leaf,
    live_frames,
    live_objects,
    live_slots,
    spy_on_frames,
    watch,
)
from wrappers import CheckpointError, GraphExecGroup, checkpoint, is_recomputing
from wrappers.engine.frame import Frame

both = pytest.mark.parametrize("impl", IMPLS)
each_stop = pytest.mark.parametrize("early_stop", [True, False])


@pytest.fixture(autouse=True)
def _without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def frames(monkeypatch):
    """Weak references to the frames that the test makes, in order."""
    return spy_on_frames(monkeypatch, Frame)


def region(x, w=None):
    y = x.sin() if w is None else x.sin() * w
    return y.exp().cos() + 1


# --- Frames -----------------------------------------------------------------------------


@both
@each_stop
def test_a_frame_dies_with_the_backward(impl, early_stop, frames):
    out = checkpoint(region, leaf(5), impl=impl, early_stop=early_stop)
    assert [ref() is None for ref in frames] == [False]
    out.sum().backward()
    del out
    assert [ref() is None for ref in frames] == [True]


def test_a_no_reentrant_frame_dies_though_the_output_lives(frames):
    out = checkpoint(region, leaf(5))
    out.sum().backward()
    assert [ref() is None for ref in frames] == [True]
    assert out.requires_grad


@both
def test_an_abandoned_forward_frees_frame_inputs_and_function_at_once(impl, frames):
    x = leaf(5)
    y, z = x * 2, x * 3
    function = Calls(region)
    watches = [watch(y), watch(z)]
    function_ref = weakref.ref(function)
    out = checkpoint(function, y, w=z, impl=impl)
    del y, z, function
    assert [w.expired() for w in watches] == [False, False]
    del out
    assert [w.expired() for w in watches] == [True, True]
    assert [ref() for ref in frames] == [None]
    assert function_ref() is None


@both
def test_an_abandoned_stack_of_regions_dies_whole(impl, frames):
    x = leaf(5)
    for _ in range(5):
        x = checkpoint(region, x, impl=impl)
    del x
    assert [ref() for ref in frames] == [None] * 5


@both
def test_inputs_are_freed_with_the_graph_not_with_the_output(impl):
    y = leaf(5) * 2
    watched = watch(y)
    out = checkpoint(region, y, impl=impl)
    del y
    out.sum().backward()
    assert watched.expired()
    assert out.shape == (5,)


@both
def test_outputs_are_not_kept_by_the_frame(impl):
    def nested(x):
        return {"a": [x.sin()], "b": (x.cos(), 3)}

    out = checkpoint(nested, leaf(5), impl=impl)
    watched = watch(out["b"][0])
    kept = out["a"][0]
    del out
    # REENTRANT: the node keeps nothing of its outputs; NO_REENTRANT: cos saves its input only.
    assert watched.expired()
    kept.sum().backward()


@both
def test_an_object_argument_dies_with_the_graph(impl):
    class Thing:
        pass

    thing = Thing()
    ref = weakref.ref(thing)
    out = checkpoint(lambda x, thing: x.sin().exp(), leaf(3), thing, impl=impl)
    del thing
    assert ref() is not None
    out.sum().backward()
    del out
    assert ref() is None


@both
def test_an_object_among_the_outputs_is_not_kept(impl):
    class Thing:
        pass

    def region(x):
        return {"y": x.sin(), "thing": Thing()}

    out = checkpoint(region, leaf(3), impl=impl)
    y, ref = out["y"], weakref.ref(out["thing"])
    del out
    assert ref() is None
    y.sum().backward()


@both
@each_stop
def test_no_garbage_for_the_collector(impl, early_stop):
    def step():
        x, w = leaf(5), leaf(5, seed=1)
        y = checkpoint(region, x * 1, w=w, impl=impl, early_stop=early_stop)
        y = checkpoint(lambda y: checkpoint(region, y, impl=impl).sin(), y, impl=impl)
        y.sum().backward()

    step()
    gc.collect()
    step()
    assert gc.collect() == 0


@both
def test_no_garbage_from_modules(impl):
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU())

    def step():
        checkpoint(block, leaf(8, 4), impl=impl).sum().backward()

    for _ in range(3):
        step()
    gc.collect()
    step()
    assert gc.collect() == 0


# --- Row 13: an inner region's arguments ------------------------------------------------


@pytest.mark.parametrize("outer", IMPLS)
@pytest.mark.parametrize("inner", IMPLS)
@pytest.mark.parametrize("how", ["positional", "keyword", "in a dict", "in a list"])
def test_row_13_arguments_of_an_inner_region_are_freed_in_forward(outer, inner, how):
    watches = []

    def body(w, *args, **kwargs):
        (y,) = args or kwargs.values()
        if isinstance(y, dict):
            y = y["y"]
        elif isinstance(y, list):
            y = y[0]
        return (y * w).sin().exp()

    def outer_region(x, w):
        y = x.exp()
        watches.append(watch(y))
        if how == "positional":
            return checkpoint(body, w, y, impl=inner).cos()
        if how == "keyword":
            return checkpoint(body, w, y=y, impl=inner).cos()
        if how == "in a dict":
            return checkpoint(body, w, {"y": y}, impl=inner).cos()
        return checkpoint(body, w, y=[y], impl=inner).cos()

    def plain(x, w):
        return (x.exp() * w).sin().exp().cos()

    out = checkpoint(outer_region, leaf(5), leaf(5, seed=1), impl=outer)
    assert [w.expired() for w in watches] == [True]
    out.sum().backward()
    del out
    assert all(w.expired() for w in watches)
    tensors = leaf(5), leaf(5, seed=1)
    got = gradients(partial(checkpoint, outer_region, impl=outer), *tensors)
    assert_equal(got, gradients(plain, *tensors))


# --- Row 29: nothing grows --------------------------------------------------------------


@both
@each_stop
@pytest.mark.parametrize("depth", [1, 2])
def test_row_29_nothing_grows_over_20_steps(impl, early_stop, depth):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    data = leaf(8, 4).detach()

    def run(block, x):
        for _ in range(depth):
            block = partial(checkpoint, block, impl=impl, early_stop=early_stop)
        return block(x)

    counts = counts_of_training(model, run, data, 20)
    warm = counts[5:]
    assert [tensors for tensors, _ in warm] == [warm[0][0]] * len(warm)
    # The list of counts itself grows by one tuple a step.
    grown = warm[-1][1] - warm[0][1]
    assert grown <= len(warm)


def test_row_29_retained_graph_does_not_grow_with_each_backward():
    out = checkpoint(region, leaf(5)).sum()
    counts = []
    for _ in range(10):
        out.backward(retain_graph=True)
        counts.append(live_objects()[0])
    assert counts[1:] == [counts[1]] * 9


def test_closures_made_anew_for_each_call_are_not_kept():
    refs = []
    for scale in range(10):
        run = lambda x, scale=scale: (x * scale).sin()  # noqa: E731
        refs.append(weakref.ref(run))
        checkpoint(run, leaf(3)).sum().backward()
    del run
    assert [ref() is None for ref in refs] == [True] * 10


def test_modules_are_not_kept_by_what_the_engine_learns_about_them():
    module = nn.BatchNorm1d(4)
    ref = weakref.ref(module)
    checkpoint(module, leaf(8, 4)).sum().backward()
    del module
    assert ref() is None


# --- Slots ------------------------------------------------------------------------------


def test_slots_die_one_by_one_as_the_graph_is_dropped():
    def two(x):
        return x.sin(), x.exp()

    a, b = checkpoint(two, leaf(5))
    (frame,) = live_frames()
    assert (len(frame.slots), live_slots(frame)) == (2, 2)
    del a
    assert live_slots(frame) == 1
    del b
    assert live_slots(frame) == 0


def test_gradient_of_one_input_unpacks_only_what_it_needs():
    def product(x, w):
        return x.sin() * w.exp()

    run = Calls(product)
    x, w = leaf(5), leaf(5, seed=1)
    out = checkpoint(run, x, w).sum()
    (got,) = torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(got, w.detach().exp() * x.detach().cos())
    (got,) = torch.autograd.grad(out, w)
    assert torch.equal(got, x.detach().sin() * w.detach().exp())


def test_recomputed_tensors_that_backward_never_unpacks_die_with_the_graph():
    watches = []

    def product(x, w):
        a, b = x.sin(), w.exp()
        if is_recomputing():
            watches.extend([watch(a), watch(b)])
        return a * b

    x, w = leaf(5), leaf(5, seed=1)
    out = checkpoint(product, x, w).sum()
    torch.autograd.grad(out, x)
    del out
    assert [ref.expired() for ref in watches] == [True, True]


# --- Execution groups -------------------------------------------------------------------

each_group = pytest.mark.parametrize("group", [GraphExecGroup, TorchGraphExecGroup])


def halves(x):
    """Two outputs whose graphs have nothing in common."""
    return x.sin().exp(), x.cos().tanh()


@each_group
@pytest.mark.parametrize("retain_graph", [True, False])
def test_several_backwards_in_one_group_recompute_once(group, retain_graph):
    run = Calls(halves)
    y = leaf(5)
    a, b = checkpoint(run, y)
    with group():
        (first,) = torch.autograd.grad(a.sum(), y, retain_graph=retain_graph)
        assert run.num == 2
        (second,) = torch.autograd.grad(b.sum(), y, retain_graph=retain_graph)
    assert run.num == 2
    z = y.detach().requires_grad_()
    plain_a, plain_b = halves(z)
    expected = torch.autograd.grad(plain_a.sum(), z, retain_graph=True)
    expected += torch.autograd.grad(plain_b.sum(), z)
    assert_equal([first, second], expected)


@each_group
def test_a_group_covers_regions_nested_in_each_other(group):
    inner = Calls(halves)

    def outer(x):
        a, b = checkpoint(inner, x)
        return a.exp(), b.exp()

    run = Calls(outer)
    x = leaf(5)
    with group():
        a, b = checkpoint(run, x)
        a.sum().backward(retain_graph=True)
        b.sum().backward()
    assert (run.num, inner.num) == (2, 3)
    z = x.detach().requires_grad_()
    a, b = halves(z)
    a.exp().sum().backward(retain_graph=True)
    b.exp().sum().backward()
    assert torch.equal(x.grad, z.grad)


@each_group
def test_overlapping_backwards_in_one_group_raise(group):
    def shared(x):
        y = x.sin().exp()
        return y.cos(), y.tanh()

    a, b = checkpoint(shared, leaf(5))
    with group():
        a.sum().backward(retain_graph=True)
        with pytest.raises(CheckpointError, match="GraphExecGroup"):
            b.sum().backward()


@each_group
def test_overlapping_backwards_outside_a_group_recompute_again(group):
    run = Calls(halves)
    a, _ = checkpoint(run, leaf(5))
    a.sum().backward(retain_graph=True)
    with group():
        a.sum().backward(retain_graph=True)
    with group():
        a.sum().backward()
    assert run.num == 4


@each_group
def test_groups_cannot_be_nested(group):
    with group(), pytest.raises(RuntimeError, match="cannot be nested"), GraphExecGroup():
        pass


def test_torchs_group_inside_ours_is_refused_too():
    with GraphExecGroup(), pytest.raises(RuntimeError), TorchGraphExecGroup():
        pass


def test_a_group_ends_with_an_exception():
    with pytest.raises(KeyError), GraphExecGroup():
        raise KeyError
    with GraphExecGroup() as group:
        assert isinstance(group, GraphExecGroup)


def test_a_group_object_can_be_entered_again():
    group = GraphExecGroup()
    x = leaf(5)
    for _ in range(2):
        with group:
            checkpoint(region, x).sum().backward()
    z = x.detach().requires_grad_()
    region(z).sum().backward()
    assert torch.equal(x.grad, 2 * z.grad)


def test_a_group_is_not_kept_by_a_frame():
    group = GraphExecGroup()
    ref = weakref.ref(group)
    a, b = checkpoint(halves, leaf(5))
    with group:
        a.sum().backward(retain_graph=True)
    del group
    assert ref() is None
    b.sum().backward()


@each_group
def test_reentrant_ignores_a_group(group):
    x = leaf(5)
    with group():
        out = checkpoint(region, x, impl=IMPLS[0]).sum()
        out.backward(retain_graph=True)
        out.backward()
    z = x.detach().requires_grad_()
    region(z).sum().backward()
    assert torch.equal(x.grad, 2 * z.grad)


def test_partial_backward_in_a_group_frees_what_it_used():
    watches = {}

    def two(x):
        a, b = x.sin(), x.cos()
        if is_recomputing():
            watches["a"], watches["b"] = watch(a), watch(b)
        return a.exp().cos(), b.exp().sin()

    a, b = checkpoint(two, leaf(5), impl=NO_REENTRANT)
    with GraphExecGroup():
        a.sum().backward()
        assert watches["a"].expired()
        b.sum().backward()
        assert watches["b"].expired()


def test_a_reentrant_rerun_under_hooks_frees_the_branches_that_backward_does_not_take():
    watches = []

    def two(x):
        y = x * 2
        watches.append(watch(y))
        return y.cos(), y.sin().tanh()

    out, _ = checkpoint(two, leaf(5), impl=REENTRANT)
    with saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        out.sum().backward()
    assert [w.expired() for w in watches] == [True, True]


# --- The graph of a rerun, which the recomputed tensors keep until they are unpacked ------------


def test_a_mismatch_leaves_no_cycle_through_the_reruns_graph(frames):
    def region(x):
        return (x.double() if is_recomputing() else x).sin().exp().float()

    with pytest.raises(CheckpointError, match="recomputed"):
        checkpoint(region, leaf(4)).sum().backward()
    gc.collect()  # The exception and its traceback are an ordinary cycle.
    assert [frame() for frame in frames] == [None]


def test_anomaly_mode_leaves_no_cycle_through_the_reruns_graph(frames):
    """In this mode a node keeps the node during whose backward it was made."""

    def region(x, w):
        return x.sin().cos(), w.exp().cos()

    x, w = leaf(4), leaf(4, seed=1)
    with torch.autograd.set_detect_anomaly(True):
        first, second = checkpoint(region, x, w)
        first.sum().backward()  # The recompute fills the second output's slots too.
    assert x.grad is not None
    del first, second
    gc.collect()
    assert [frame() for frame in frames] == [None]


def test_a_recomputed_tensor_does_not_keep_those_that_its_graph_came_from():
    watched = []

    def region(x):
        trunk = x.exp()
        if is_recomputing():
            watched.append(watch(trunk))
        branch = trunk * 1.0
        return branch.sin().cos(), branch.exp()

    x = leaf(1000)
    first, second = checkpoint(region, x)
    first.sum().backward(retain_graph=True)  # Takes the trunk; the second branch's slot is filled.
    assert [storage.expired() for storage in watched] == [True]
    second.sum().backward()
    assert len(watched) == 2


# --- Tensors of a region that the user keeps --------------------------------------------


class Auxiliary(nn.Module):
    """Keeps a tensor of its forward, as models with an auxiliary loss do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.aux = self.linear(x).sin()
        return self.aux.exp().cos()


@both
@each_stop
def test_a_module_that_stores_a_tensor_of_its_forward_keeps_nothing_else(impl, early_stop, frames):
    module, y = Auxiliary(), leaf(2, 4) * 2
    module_ref, watched = weakref.ref(module), watch(y)
    checkpoint(module, y, impl=impl, early_stop=early_stop).sum().backward()
    del y
    gc.collect()
    assert watched.expired()
    assert [ref() for ref in frames] == [None]
    assert module.aux.shape == (2, 4)
    del module
    gc.collect()
    assert module_ref() is None


@both
@each_stop
def test_a_list_that_a_region_appends_to_keeps_only_what_it_holds(impl, early_stop, frames):
    kept = []

    def appending(x):
        h = x.sin()
        kept.append(h)
        return h.exp().cos()

    y = leaf(5) * 2
    watched = watch(y)
    checkpoint(appending, y, impl=impl, early_stop=early_stop).sum().backward()
    del y
    gc.collect()
    assert len(kept) == 2
    # REENTRANT: the recompute's own graph, which the user keeps, begins at the input.
    assert watched.expired() == (impl is NO_REENTRANT)
    assert [ref() for ref in frames] == [None]


@both
def test_a_callable_class_made_anew_for_each_call_is_not_kept(impl):
    refs = []
    for _ in range(3):

        class Local:
            def __call__(self, x):
                return x.sin()

        refs.append(weakref.ref(Local))
        checkpoint(Local(), leaf(3), impl=impl).sum().backward()
    del Local
    gc.collect()  # A class is a cycle of its own.
    assert [ref() for ref in refs] == [None] * 3


CHAIN = """
import threading
import torch
from wrappers import CheckpointImpl, checkpoint

def run():
    x = y = torch.ones(2, requires_grad=True)
    for _ in range(20_000):
        y = checkpoint(torch.sin, y, impl=CheckpointImpl.{impl})
    del y

threading.stack_size(512 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print("dropped")
"""


@both
def test_a_chain_of_20000_regions_can_be_dropped(impl):
    """Nodes whose ``grad_fn`` Python has seen die inside each other: the stack may overflow."""
    result = subprocess.run(
        [sys.executable, "-c", CHAIN.format(impl=impl.name)],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "dropped\n"), result.stderr


# --- Execution groups and failures ------------------------------------------------------


@each_group
def test_a_recompute_that_raised_in_a_group_can_be_tried_again(group):
    failures = []

    def failing_once(x):
        if is_recomputing() and not failures:
            failures.append(1)
            raise KeyError("once")
        return region(x)

    x, z = leaf(5), leaf(5)
    out = checkpoint(failing_once, x).sum()
    with group():
        with pytest.raises(KeyError, match="once"):
            out.backward(retain_graph=True)
        out.backward()
    region(z).sum().backward()
    assert torch.equal(x.grad, z.grad)


@each_group
@both
def test_a_backward_inside_a_region_inside_a_group(group, impl):
    def penalised(x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (inner,) = torch.autograd.grad(y.sin().exp().sum(), y)
        return (x * inner).sin()

    with group():
        got = gradients(partial(checkpoint, penalised, impl=impl), leaf(5))
    assert_equal(got, gradients(penalised, leaf(5)))


@each_group
def test_a_backward_through_the_regions_own_graph_inside_a_group(group):
    def penalised(x):
        y = x.sin().exp()
        (inner,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y.exp() * inner

    with group():
        got = gradients(partial(checkpoint, penalised), leaf(5))
    assert_equal(got, gradients(penalised, leaf(5)))
