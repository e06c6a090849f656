"""Rule 7: region, recompute and backward may each raise, and nothing stays behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.conftest import surroundings
from tests.engine.helpers import (
    IMPLS,
    REENTRANT,
    Calls,
    assert_equal,
    gradients,
    leaf,
    live_frames,
    watch,
)
from wrappers import checkpoint, is_recomputing, register_ambient
from wrappers.engine.frame import Frame


class Boom(Exception):
    pass


class Loud(BaseException):
    pass


class Picky(Exception):
    """Cannot be built from a text alone, so nobody can rebuild it from one."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


# Made anew for each test: an instance keeps the traceback of its last raise.
ERRORS = {
    "Boom": lambda: Boom("boom"),
    "Picky": lambda: Picky(1, 2),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
    "Loud": Loud,
    "StopIteration": lambda: StopIteration(1),
    "GeneratorExit": GeneratorExit,
    "MemoryError": MemoryError,
    "RuntimeError": lambda: RuntimeError("an inplace operation of the user's own"),
}
each_error = pytest.mark.parametrize("name", ERRORS)
both = pytest.mark.parametrize("impl", IMPLS)
each_stop = pytest.mark.parametrize("early_stop", [True, False])


class Fault:
    """Raises an error where it is called, once."""

    def __init__(self, error, where):
        self.error = error
        self.where = where
        self.is_armed = True

    def at(self, where):
        if where == self.where and self.is_armed:
            self.is_armed = False
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # Or the traceback would keep what keeps the traceback.


class Node(torch.autograd.Function):
    """An operator of the user's that may raise in its backward."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.save_for_backward(x)
        ctx.fault = fault
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        ctx.fault.at("backward")
        return grad * 2 * x, None


def region(x, fault):
    y = torch.nn.functional.dropout(x.exp(), 0.5)
    fault.at("recompute" if is_recomputing() else "forward")
    z = Node.apply(y.sin(), fault)

    def pack(tensor):
        fault.at("pack in recompute" if is_recomputing() else "pack")
        return tensor

    def unpack(tensor):
        fault.at("unpack")
        return tensor

    # Operators that save their input: hooks that keep an output as it is leak it in torch.
    with saved_tensors_hooks(pack, unpack):
        z = z.cos().sin()
    return z.sigmoid() + 1


PLACES = ["forward", "recompute", "backward", "pack", "pack in recompute", "unpack"]
each_place = pytest.mark.parametrize(
    ("place", "impl"),
    # REENTRANT builds no graph in forward, so nothing is packed there.
    [(p, i) for p in PLACES for i in IMPLS if (p, i) != ("pack", REENTRANT)],
)


def step(x, fault, **options):
    out = checkpoint(region, x, fault, **options)
    out.sum().backward()
    return x.grad


def expected_gradient():
    torch.manual_seed(5)
    x = leaf(16)
    region(x, Fault(Boom(), "nowhere")).sum().backward()
    return x.grad


@each_error
@each_place
def test_rule_7_the_error_reaches_the_user_and_the_next_step_is_right(name, place, impl):
    error = ERRORS[name]()
    fault = Fault(error, place)
    before = surroundings()
    with pytest.raises(type(error)) as info:
        step(leaf(16), fault, impl=impl)
    assert not fault.is_armed
    assert info.value is error
    assert surroundings() == before
    torch.manual_seed(5)
    assert torch.equal(step(leaf(16), fault, impl=impl), expected_gradient())


@each_place
@each_stop
def test_rule_7_random_state_autocast_and_providers_are_as_before(place, impl, early_stop):
    tracker = {"state": 0}
    handle = register_ambient(lambda: tracker["state"], lambda s: tracker.update(state=s))
    x, fault, watched = leaf(16), Fault(Boom(), place), {}

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = checkpoint(region, x, fault, impl=impl, early_stop=early_stop)
        tracker["state"] = 1
        torch.rand(3)
        watched["rng"] = torch.get_rng_state()
        out.sum().backward()

    try:
        with pytest.raises(Boom):
            run()
        assert not torch.is_autocast_enabled("cpu")
        assert bool(watched) is (place not in ("forward", "pack"))
        if watched:
            assert torch.equal(torch.get_rng_state(), watched["rng"])
            assert tracker["state"] == 1
    finally:
        handle.remove()


@pytest.mark.parametrize("impls", list(itertools.product(IMPLS, repeat=2)))
@pytest.mark.parametrize("where", ["forward", "recompute"])
def test_rule_7_an_error_of_a_nested_region(impls, where):
    error = Boom()
    fault = Fault(error, where)

    def inner(x):
        y = x.sin().exp()
        fault.at("recompute" if is_recomputing() else "forward")
        return y.cos()

    def outer(x):
        return checkpoint(inner, x.exp(), impl=impls[1]).tanh() * x

    def run(x):
        return checkpoint(outer, x, impl=impls[0])

    before = surroundings()
    with pytest.raises(Boom) as info:
        gradients(run, leaf(5))
    assert info.value is error
    assert surroundings() == before
    assert_equal(gradients(run, leaf(5)), gradients(outer, leaf(5)))


@both
def test_rule_7_the_same_graph_can_be_used_after_a_failed_recompute(impl):
    x, fault = leaf(16), Fault(Boom(), "recompute")
    torch.manual_seed(5)
    out = checkpoint(region, x, fault, impl=impl).sum()
    with pytest.raises(Boom):
        out.backward(retain_graph=True)
    out.backward()
    assert torch.equal(x.grad, expected_gradient())


def test_rule_7_an_error_between_slots_leaves_no_half_filled_frame():
    watches, fault = [], Fault(Boom(), "recompute")

    def half(x):
        y = x.sin().exp()
        watches.append(watch(y))
        fault.at("recompute" if is_recomputing() else "forward")
        return y.cos().exp()

    x = leaf(5)
    out = checkpoint(half, x).sum()
    with pytest.raises(Boom) as info:
        out.backward(retain_graph=True)
    del info
    out.backward()
    y = x.detach().requires_grad_()
    y.sin().exp().cos().exp().sum().backward()
    assert torch.equal(x.grad, y.grad)
    del out
    assert all(w.expired() for w in watches)


@each_stop
def test_rule_7_context_fn_is_left_after_an_error(early_stop):
    log = []

    class Context:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            log.append(f"enter {self.name}")

        def __exit__(self, kind, error, traceback):
            log.append(f"exit {self.name} {kind.__name__ if kind else None}")

    def contexts():
        return Context("forward"), Context("recompute")

    fault = Fault(Boom(), "recompute")
    with pytest.raises(Boom):
        step(leaf(16), fault, context_fn=contexts, early_stop=early_stop)
    assert log == ["enter forward", "exit forward None", "enter recompute", "exit recompute Boom"]


def test_rule_7_early_stop_leaves_context_fn_without_an_error():
    seen = []

    class Context:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, traceback):
            seen.append(kind)

    out = checkpoint(
        lambda x: x.exp().sin() + 1, leaf(3), context_fn=lambda: (Context(), Context())
    )
    out.sum().backward()
    assert seen == [None, None]


@pytest.mark.parametrize("where", ["enter", "exit"])
@pytest.mark.parametrize("which", [0, 1])
def test_rule_7_a_context_of_context_fn_that_raises(where, which):
    class Bad:
        def __enter__(self):
            if where == "enter":
                raise Boom

        def __exit__(self, *args):
            if where == "exit":
                raise Boom

    class Good:
        def __enter__(self):
            pass

        def __exit__(self, *args):
            pass

    pair = (Bad(), Good()) if which == 0 else (Good(), Bad())
    before = surroundings()
    with pytest.raises(Boom):
        checkpoint(lambda x: x.sin().cos(), leaf(3), context_fn=lambda: pair).sum().backward()
    assert surroundings() == before


def test_rule_7_a_context_fn_that_raises():
    def bad():
        raise Boom

    run = Calls(torch.sin)
    before = surroundings()
    with pytest.raises(Boom):
        checkpoint(run, leaf(3), context_fn=bad)
    assert run.num == 0
    assert surroundings() == before


@both
@pytest.mark.parametrize("which", ["capture", "restore"])
def test_rule_7_an_ambient_provider_that_raises(impl, which):
    is_bad = [True]

    def capture():
        if which == "capture" and is_bad:
            raise Boom

    def restore(state):
        if which == "restore" and is_bad:
            is_bad.clear()
            raise Boom

    handle = register_ambient(capture, restore)
    try:
        before = surroundings()
        rng = torch.get_rng_state()
        with pytest.raises(Boom):
            gradients(lambda x: checkpoint(torch.sin, x, impl=impl), leaf(3))
        assert surroundings() == before
        assert torch.equal(torch.get_rng_state(), rng)
        is_bad.clear()
        got = gradients(lambda x: checkpoint(torch.sin, x, impl=impl), leaf(3))
        assert_equal(got, gradients(torch.sin, leaf(3)))
    finally:
        handle.remove()


@both
def test_rule_7_an_error_in_a_tensor_hook_of_the_user(impl):
    error = Boom()

    def hook(grad):
        raise error

    x = leaf(5)
    y = x.exp()
    handle = y.register_hook(hook)
    out = checkpoint(lambda y: y.sin().cos(), y, impl=impl).sum()
    with pytest.raises(Boom) as info:
        out.backward(retain_graph=True)
    assert info.value is error
    handle.remove()
    out.backward()
    assert torch.equal(x.grad, gradients_of_exp_sin_cos(x))


def gradients_of_exp_sin_cos(x):
    z = x.detach().requires_grad_()
    z.exp().sin().cos().sum().backward()
    return z.grad


@each_place
def test_frames_die_with_a_failed_step(impl, place):
    """Without the cyclic collector: no cycle may hold a frame or a tensor."""
    refs = []

    def spy(x, fault):
        y = x * 2
        refs.append(watch(y))
        return region(y, fault)

    def run():
        x = leaf(16)
        refs.append(watch(x))
        try:
            checkpoint(spy, x, Fault(Boom(), place), impl=impl).sum().backward()
        except Boom:
            pass
        else:
            raise AssertionError("did not raise")

    gc.collect()
    gc.disable()
    try:
        run()
        assert [ref.expired() for ref in refs] == [True] * len(refs)
    finally:
        gc.enable()
    assert live_frames() == []


def test_an_error_carries_a_traceback_to_the_users_line():
    def region(x):
        y = x.sin()
        if is_recomputing():
            raise Boom
        return y.cos()

    with pytest.raises(Boom) as info:
        checkpoint(region, leaf(3)).sum().backward()
    assert info.traceback[-1].path.name == "test_exceptions.py"
    assert info.traceback[-1].name == "region"


def test_an_error_in_the_forward_of_a_region_keeps_no_frame():
    frames = []
    original = Frame.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        frames.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        Frame.__init__ = spy
        with contextlib.suppress(Boom):
            checkpoint(region, leaf(3), Fault(Boom(), "forward"))
        assert [ref() for ref in frames] == [None]
    finally:
        Frame.__init__ = original
        gc.enable()
