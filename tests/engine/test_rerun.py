"""NO_REENTRANT, rule by rule. The rules stand in the note of ``wrappers.engine``."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.helpers import (
    IMPLS,
    NO_REENTRANT,
    REENTRANT,
    Calls,
    Operators,
    assert_equal,
    copies,
    count_backward,
    gradients,
    leaf,
    live_frames,
    live_slots,
    watch,
)
from wrappers import CheckpointError, checkpoint, is_recomputing, set_checkpoint_early_stop

MM_FLOPS = 2 * 4 * 4 * 4


def layer(x, w):
    return torch.tanh(x @ w).sin()


# --- Three levels of regions, every mix of implementations ------------------------------


class Nest:
    """Three regions in each other; each level has a matmul before and work after the inner."""

    def __init__(self, impls):
        self.impls = impls
        self.num_calls = [0, 0, 0]

    def __call__(self, x, *weights):
        return self._region(0, x, weights)

    def _region(self, level, x, weights):
        if self.impls is None:
            return self._run(level, x, *weights)
        run = lambda x, *ws: self._run(level, x, *ws)  # noqa: E731
        return checkpoint(run, x, *weights, impl=self.impls[level])

    def _run(self, level, x, weight, *weights):
        self.num_calls[level] += 1
        y = torch.tanh(x @ weight)
        if weights:
            y = y * self._region(level + 1, y, weights)
        return y.sin()


ALL_MIXES = pytest.mark.parametrize(
    "impls",
    list(itertools.product(IMPLS, repeat=3)),
    ids=lambda impls: "-".join(impl.name for impl in impls),
)


@ALL_MIXES
@pytest.mark.parametrize("early_stop", [True, False])
def test_three_levels_have_plain_gradients(impls, early_stop):
    tensors = [leaf(4, 4, seed=seed) for seed in range(4)]
    with set_checkpoint_early_stop(early_stop):
        assert_equal(gradients(Nest(impls), *tensors), gradients(Nest(None), *tensors))


@ALL_MIXES
def test_three_levels_run_each_level_once_more_per_surrounding_region(impls):
    nest = Nest(impls)
    gradients(nest, *[leaf(4, 4, seed=seed) for seed in range(4)])
    assert nest.num_calls == [2, 3, 4]


@ALL_MIXES
def test_three_levels_recompute_six_matmuls(impls):
    tensors = [leaf(4, 4, seed=seed) for seed in range(4)]
    with FlopCounterMode(display=False) as flops:
        gradients(Nest(impls), *tensors)
    forward, backward, recomputed = 3, 6, 1 + 2 + 3
    assert flops.get_total_flops() == (forward + backward + recomputed) * MM_FLOPS


@ALL_MIXES
def test_three_levels_twice_with_retain_graph(impls):
    tensors = [leaf(4, 4, seed=seed) for seed in range(4)]
    results = []
    for nest in (Nest(impls), Nest(None)):
        leaves = copies(tensors)
        loss = nest(*leaves).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([t.grad for t in leaves])
    assert_equal(*results)


@pytest.mark.parametrize("create_graph", [False, True])
def test_three_levels_with_autograd_grad(create_graph):
    tensors = [leaf(4, 4, seed=seed) for seed in range(4)]
    results = []
    for nest in (Nest([NO_REENTRANT] * 3), Nest(None)):
        leaves = copies(tensors)
        loss = nest(*leaves).square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
        if create_graph:
            grads += torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append(grads)
    assert_equal(*results)


# --- Rules 1 and 2: who owns a saved tensor ---------------------------------------------


def test_rule_1_a_surrounding_region_does_not_see_what_the_inner_one_saves():
    def inner(x):
        return x.sin().cos().tanh()  # saves 3

    def outer(w):
        x = w.exp()  # saves 1, its result
        return checkpoint(inner, x).sigmoid()  # 1: the input of inner; 1: sigmoid's result

    out = checkpoint(outer, leaf(3))
    slots = sorted(len(frame.slots) for frame in live_frames())
    assert slots == [3, 3]
    assert out.requires_grad


def test_rule_1_hooks_around_a_region_see_its_inputs_only():
    seen = []
    x, w = leaf(2, 3), leaf(3, 4)

    def pack(tensor):
        seen.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = checkpoint(layer, x, w=w)
    assert seen == [(2, 3), (3, 4)]
    out.sum().backward()
    assert seen == [(2, 3), (3, 4)]


def test_rule_1_nothing_inside_stays_alive_after_forward():
    watches = []

    def region(x):
        for _ in range(3):
            x = x.sin()
            watches.append(watch(x))
        return x * 2

    out = checkpoint(region, leaf(5))
    assert [w.expired() for w in watches] == [True] * 3
    out.sum().backward()
    assert [w.expired() for w in watches] == [True] * len(watches)


def test_rule_2_the_inputs_of_an_inner_region_are_freed():
    watches = []

    def outer(x):
        y, z = x.exp(), x.cos()
        watches.extend([watch(y), watch(z)])
        return checkpoint(lambda y, *, z: (y * z).sin(), y, z=z).cos()

    out = checkpoint(outer, leaf(5))
    assert [w.expired() for w in watches] == [True, True]
    del out


def test_rule_2_a_changed_input_is_found_by_its_version():
    x = leaf(5)
    y = x * 1
    out = checkpoint(lambda y: y.sin().cos(), y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(CheckpointError, match="argument 0 was changed in place"):
        out.sum().backward()


# --- Rule 3: a recompute starts as if no region were active -----------------------------


def test_rule_3_an_inner_region_met_in_a_recompute_hides_its_tensors_again():
    is_hidden = []

    def inner(x):
        y = x.sin()
        is_hidden.append(watch(y))
        return y.cos()

    def outer(x):
        y = checkpoint(inner, x.exp())
        is_hidden[-1] = is_hidden[-1].expired()
        return y.sigmoid() * y

    checkpoint(outer, leaf(5)).sum().backward()
    assert is_hidden[:2] == [True, True]


def test_rule_3_a_recompute_inside_a_forward_puts_nothing_into_the_surrounding_frame():
    def outer(x):
        z = x.detach().requires_grad_()
        y = checkpoint(lambda z: z.sin().cos(), z)
        y.sum().backward()  # The inner region reruns while the outer one runs forward.
        return x.exp() * z.grad

    x = leaf(5)
    out = checkpoint(outer, x)
    (frame,) = live_frames()
    # The inner region's input, dead by now; exp's result; z.grad, a factor of the product.
    assert (len(frame.slots), live_slots(frame)) == (3, 2)
    out.sum().backward()
    z = x.detach().requires_grad_()
    z.sin().cos().sum().backward()
    assert torch.equal(x.grad, x.detach().exp() * z.grad)


def test_rule_3_is_recomputing_is_true_in_the_rerun_only():
    seen = []

    def region(x):
        seen.append(is_recomputing())
        return x.sin()

    out = checkpoint(region, leaf(3))
    assert not is_recomputing()
    out.sum().backward()
    assert seen == [False, True]


# --- Rule 4: how long a recomputed tensor lives -----------------------------------------


@pytest.mark.parametrize("retain_graph", [False, True])
def test_rule_4_recomputed_tensors_die_in_backward(retain_graph):
    watches = []

    def region(x):
        y = x
        for _ in range(3):
            y = y.sin()
            watches.append(watch(y))
        return y.cos()

    out = checkpoint(region, leaf(5))
    out.sum().backward(retain_graph=retain_graph)
    assert [w.expired() for w in watches] == [True] * 6


def test_rule_4_a_recomputed_tensor_dies_when_it_has_been_unpacked():
    recomputed, at_hook = [], []

    def region(x):
        y = x.sin()
        if not is_recomputing():
            y.register_hook(lambda grad: at_hook.append([w.expired() for w in recomputed]))
        z = y.exp()
        if is_recomputing():
            recomputed.extend([watch(y), watch(z)])
        return z.cos() * 2

    checkpoint(region, leaf(5)).sum().backward()
    # When the gradient of y is ready, cos and exp have been differentiated.
    assert at_hook == [[True, True]]


def test_rule_4_a_second_backward_recomputes_again():
    region = Calls(lambda x: x.sin().exp().cos())
    x = leaf(5)
    out = checkpoint(region, x).sum()
    out.backward(retain_graph=True)
    assert region.num == 2
    out.backward(retain_graph=True)
    assert region.num == 3
    out.backward()
    assert region.num == 4
    y = x.detach().requires_grad_()
    plain = y.sin().exp().cos().sum()
    for _ in range(3):
        plain.backward(retain_graph=True)
    assert torch.equal(x.grad, y.grad)


def test_rule_4_backward_after_the_graph_was_freed_raises_as_plain():
    out = checkpoint(lambda x: x.sin().cos(), leaf(5)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_rule_4_partial_backward_frees_what_it_used():
    watches = {}

    def region(x):
        a, b = x.sin(), x.cos()
        if is_recomputing():
            watches["a"], watches["b"] = watch(a), watch(b)
        return a.exp().cos(), b.exp().sin()

    run = Calls(region)
    x = leaf(5)
    a, b = checkpoint(run, x)
    (frame,) = live_frames()
    # sin(x), exp(a), cos(exp): x, result, result; the same for b.
    assert (len(frame.slots), live_slots(frame)) == (6, 6)
    a.sum().backward()
    assert watches["a"].expired()
    assert live_slots(frame) == 3
    b.sum().backward()
    assert watches["b"].expired()
    assert live_slots(frame) == 0
    y = x.detach().requires_grad_()
    plain_a, plain_b = region(y)
    plain_a.sum().backward()
    plain_b.sum().backward()
    assert torch.equal(x.grad, y.grad)


# --- Rule 5: how far a recompute goes ---------------------------------------------------


def tail(x):
    """Saves its input, then does three operators that nobody's backward needs."""
    return (x * 2).sin() + 1 + 2 + 3


def test_rule_5_a_dead_tail_is_not_recomputed():
    operators = count_backward(checkpoint(tail, leaf(5)))
    assert (operators["add"], operators["sin"]) == (0, 0)


def test_rule_5_a_dead_matmul_at_the_end_costs_no_flops():
    x, w, frozen = leaf(4, 4), leaf(4, 4, seed=1), leaf(4, 4, seed=2).detach()
    out = checkpoint(lambda x: (x @ w).sin() @ frozen, x).sum()
    with FlopCounterMode(display=False) as flops:
        out.backward()
    # Recomputed: x @ w. Backward: both gradients of it, and one of the product with frozen.
    assert flops.get_total_flops() == (1 + 2 + 1) * MM_FLOPS


@pytest.mark.parametrize("seed", range(20))
def test_rule_5_the_stop_does_not_depend_on_recycled_object_ids(seed):
    filler = [torch.empty(0) for _ in range(seed)]
    del filler

    def region(x):
        for _ in range(seed):
            x = x * 2
        return (x * 2).sin() * 3

    assert count_backward(checkpoint(region, leaf(5)))["sin"] == 0


@pytest.mark.parametrize("how", ["per call", "globally"])
def test_rule_5_without_early_stop_the_tail_is_recomputed(how):
    if how == "per call":
        out = checkpoint(tail, leaf(5), early_stop=False)
    else:
        with set_checkpoint_early_stop(False):
            out = checkpoint(tail, leaf(5))
    operators = count_backward(out)
    assert (operators["add"], operators["sin"]) == (3, 1)


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("per_call", [True, False])
def test_rule_5_the_switch_overrides_the_call_and_counts_in_forward(switch, per_call):
    with set_checkpoint_early_stop(switch):
        out = checkpoint(tail, leaf(5), early_stop=per_call)
    with set_checkpoint_early_stop(not switch):
        assert count_backward(out)["sin"] == (0 if switch else 1)


def test_rule_5_switches_nest():
    with set_checkpoint_early_stop(False):
        with set_checkpoint_early_stop(True):
            stops = checkpoint(tail, leaf(5))
        goes_on = checkpoint(tail, leaf(5))
    assert (count_backward(stops)["sin"], count_backward(goes_on)["sin"]) == (0, 1)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        tail,
        lambda x: x.sin().exp(),
        lambda x: x.exp().sin().relu(),
        lambda x: torch.softmax(x.sin(), -1) * x,
        lambda x: x.sin().reshape(-1, 1).t().contiguous() * 2,
    ],
)
def test_rule_5_runs_the_operators_that_torch_runs(function, early_stop):
    ours = checkpoint(function, leaf(5), early_stop=early_stop)
    theirs = torch_checkpoint(function, leaf(5), use_reentrant=False, early_stop=early_stop)
    assert count_backward(ours).counts == count_backward(theirs).counts


def test_rule_5_slots_whose_graph_is_gone_are_not_recomputed():
    def region(x):
        return x.sin(), (x * 2).exp().cos()

    a, b = checkpoint(region, leaf(5))
    del b
    operators = count_backward(a)
    # cos is the derivative of sin; nothing of the second output runs.
    assert operators["exp"] == 0
    assert operators["cos"] == 1
    assert operators["sin"] == 0


def test_rule_5_an_inner_region_that_nobody_needs_is_not_rerun():
    inner = Calls(lambda x: x.sin().cos())

    def outer(x):
        return x.exp().sin() + checkpoint(inner, x).detach()

    checkpoint(outer, leaf(5)).sum().backward()
    # exp's result is the last saved tensor that anybody needs.
    assert inner.num == 1


def test_rule_5_stop_passes_through_try_except_of_the_user():
    caught = []

    def region(x):
        y = x.exp()
        try:
            z = y.sin()
        except Exception as error:
            caught.append(error)
            raise
        return z + 1

    assert_equal(gradients(lambda x: checkpoint(region, x), leaf(5)), gradients(region, leaf(5)))
    assert caught == []


def test_rule_5_stop_runs_finally_and_context_managers():
    log = []

    def region(x):
        try:
            with torch.autocast("cpu"):
                return x.exp().sin() + 1
        finally:
            log.append(torch.is_autocast_enabled("cpu"))

    checkpoint(region, leaf(5)).sum().backward()
    assert log == [False, False]
    assert not torch.is_autocast_enabled("cpu")


# --- Rule 6: backward inside a region ---------------------------------------------------


def penalty(x, w, retain_graph=None):
    """Uses its own inner gradient: a backward in forward and in every recompute."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (inner,) = torch.autograd.grad(
            (y * w.detach()).sin().exp().sum(), y, retain_graph=retain_graph
        )
    return (x * w).sin() * inner


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_rule_6_backward_inside(impl, retain_graph, early_stop):
    tensors = leaf(5), leaf(5, seed=1)
    got = gradients(
        lambda x, w: checkpoint(
            penalty, x, w, retain_graph=retain_graph, impl=impl, early_stop=early_stop
        ),
        *tensors,
    )
    assert_equal(got, gradients(penalty, *tensors))


def test_rule_6_double_backward_inside():
    def region(x, w):
        y = x.detach().requires_grad_()
        (first,) = torch.autograd.grad((y * w).sin().sum(), y, create_graph=True)
        return (x * w).cos() * first

    tensors = leaf(5), leaf(5, seed=1)
    got = gradients(lambda x, w: checkpoint(region, x, w), *tensors)
    assert_equal(got, gradients(region, *tensors))


def test_rule_6_backward_between_two_halves_of_a_region():
    def region(x, w):
        a = (x * w).sin()
        b = a.detach().requires_grad_()
        b.exp().sum().backward()
        c = a * b.grad
        d = c.detach().requires_grad_()
        d.cos().exp().sum().backward()
        return (c * d.grad).tanh()

    tensors = leaf(5), leaf(5, seed=1)
    for early_stop in (True, False):
        got = gradients(lambda x, w: checkpoint(region, x, w, early_stop=early_stop), *tensors)  # noqa: B023
        assert_equal(got, gradients(region, *tensors))


class Auxiliary(nn.Module):
    """Trains a part of itself in its own forward: ``.backward()`` adds to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(leaf(5, seed=1).detach())
        self.probe = nn.Parameter(leaf(5, seed=2).detach())

    def forward(self, x):
        with torch.enable_grad():
            (x.detach() * self.probe).sum().backward()
        return (x * self.weight).sin().exp() + 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("grad_before", [False, True])
def test_rule_6_gradients_of_an_inner_backward_are_added_once(impl, early_stop, grad_before):
    results = []
    for is_region in (True, False):
        module, x = Auxiliary(), leaf(5)
        if grad_before:
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 7.0)
        run = partial(checkpoint, module, impl=impl, early_stop=early_stop)
        out = run(x) if is_region else module(x)
        assert torch.equal(module.probe.grad, x.detach() + 7 * grad_before)
        out.sum().backward()
        results.append([x.grad, module.weight.grad, module.probe.grad])
    assert_equal(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_rule_6_gradients_of_an_inner_backward_reach_an_argument_once(impl):
    def region(x, probe):
        with torch.enable_grad():
            (x.detach() * probe).sin().sum().backward()
        return x.sin().exp() + 1

    results = []
    for is_region in (True, False):
        x, probe = leaf(5), leaf(5, seed=1)
        out = checkpoint(region, x, probe, impl=impl) if is_region else region(x, probe)
        out.sum().backward()
        results.append([x.grad, probe.grad])
    assert_equal(*results)


def test_rule_6_a_backward_in_the_recompute_alone():
    """Slots that are alive serve it; what the graph outside does not need is gone."""
    found = []

    def region(x, w):
        y = (x * w).sin()
        if is_recomputing():
            found.extend(torch.autograd.grad(y.sum(), [w], retain_graph=True))
        return y.exp()

    results = []
    for run in (checkpoint, lambda function, *args: function(*args)):
        x, w = leaf(5), leaf(5, seed=1)
        run(region, x, w).sum().backward()
        results.append([x.grad, w.grad])
    assert_equal(*results)
    with torch.no_grad():
        assert torch.equal(found[0], x * (x * w).cos())

    def unneeded(x, w):
        y = (x * w).sin()
        if is_recomputing():
            y.sum().backward()
        return x.cos().exp()

    with pytest.raises(CheckpointError, match=r"is_recomputing"):
        checkpoint(unneeded, leaf(5), leaf(5, seed=1)).sum().backward()


# --- Every way to call backward ---------------------------------------------------------


def test_autograd_grad():
    x, w = leaf(4, 4), leaf(4, 4, seed=1)
    got = torch.autograd.grad(checkpoint(layer, x, w).sum(), [x, w])
    assert_equal(got, torch.autograd.grad(layer(x, w).sum(), [x, w]))
    assert x.grad is None


def test_backward_inputs():
    x, w = leaf(4, 4), leaf(4, 4, seed=1)
    checkpoint(layer, x, w).sum().backward(inputs=[w])
    assert x.grad is None
    assert_equal([w.grad], torch.autograd.grad(layer(x, w).sum(), [w]))


def test_double_backward():
    results = []
    for run in (lambda x, w: checkpoint(layer, x, w), layer):
        x, w = leaf(4, 4, dtype=torch.float64), leaf(4, 4, seed=1, dtype=torch.float64)
        first = torch.autograd.grad(run(x, w).square().sum(), [x, w], create_graph=True)
        second = torch.autograd.grad(sum(g.exp().sum() for g in first), [x, w])
        results.append([*first, *second])
    assert_equal(*results)


def test_gradgradcheck():
    x, w = leaf(2, 2, dtype=torch.float64), leaf(2, 2, seed=1, dtype=torch.float64)
    run = lambda x, w: checkpoint(layer, x, w)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, w))
    assert torch.autograd.gradgradcheck(run, (x, w))


def test_jacobian_and_hessian_of_torch_autograd():
    x = leaf(3, dtype=torch.float64).detach()
    run = lambda x: checkpoint(lambda x: x.sin().exp().sum(), x)  # noqa: E731
    plain = lambda x: x.sin().exp().sum()  # noqa: E731
    assert_equal(
        [torch.autograd.functional.hessian(run, x)],
        [torch.autograd.functional.hessian(plain, x)],
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_accumulation_with_backwards_in_any_order(order, impl):
    results = []
    for is_region in (True, False):
        w = leaf(4, 4, seed=9)
        losses = []
        for step in range(3):
            x = leaf(4, 4, seed=step)
            out = checkpoint(layer, x, w, impl=impl) if is_region else layer(x, w)
            losses.append(out.sum())
        for step in order:
            losses[step].backward()
        results.append([w.grad])
    assert_equal(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_backward_over_several_calls_of_a_region(impl):
    def net(run):
        def forward(x, w):
            for _ in range(4):
                x = run(x, w) + x
            return x

        return forward

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    got = gradients(net(lambda x, w: checkpoint(layer, x, w, impl=impl)), *tensors)
    assert_equal(got[:1], gradients(net(layer), *tensors)[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_and_backward_in_several_threads(impl):
    w = leaf(16, 16, seed=99).detach()
    expected = [gradients(lambda x: layer(x, w), leaf(16, 16, seed=s)) for s in range(8)]
    got = [None] * 8
    barrier = threading.Barrier(8)

    def work(seed):
        barrier.wait()
        for _ in range(20):
            got[seed] = gradients(
                lambda x: checkpoint(layer, x, w, impl=impl), leaf(16, 16, seed=seed)
            )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_in_another_thread_than_forward(impl):
    x = leaf(4, 4)
    loss = checkpoint(layer, x, leaf(4, 4, seed=1), impl=impl).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    y = leaf(4, 4)
    layer(y, leaf(4, 4, seed=1)).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_threads_that_run_backward_through_one_graph(impl):
    x = leaf(8, 8)
    y = checkpoint(layer, x, leaf(8, 8, seed=1).detach(), impl=impl)
    losses = [y.sum() * 1 for _ in range(4)]
    threads = [
        threading.Thread(target=loss.backward, kwargs={"retain_graph": True}) for loss in losses
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    z = leaf(8, 8)
    plain = layer(z, leaf(8, 8, seed=1).detach()).sum()
    for _ in range(4):
        plain.backward(retain_graph=True)
    assert torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_meta_device(impl):
    x = torch.empty(4, 4, device="meta", requires_grad=True)
    w = torch.empty(4, 4, device="meta", requires_grad=True)
    run = Calls(layer)
    checkpoint(run, x, w, impl=impl).sum().backward()
    assert run.num == 2
    assert (x.grad.shape, x.grad.device.type) == ((4, 4), "meta")
    assert (w.grad.shape, w.grad.device.type) == ((4, 4), "meta")


# --- What a user puts inside and around a region ----------------------------------------


class Cube(torch.autograd.Function):
    reads = 1

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x * x)
        return x * x * x

    @staticmethod
    def backward(ctx, grad):
        for _ in range(Cube.reads - 1):
            ctx.saved_tensors
        _, square = ctx.saved_tensors
        return grad * 3 * square


@pytest.mark.parametrize("impl", IMPLS)
def test_custom_function_inside(impl):
    def region(x, w):
        return Cube.apply((x @ w).sin()).exp()

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    got = gradients(lambda x, w: checkpoint(region, x, w, impl=impl), *tensors)
    assert_equal(got, gradients(region, *tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_custom_backward_that_reads_saved_tensors_twice(impl, monkeypatch):
    monkeypatch.setattr(Cube, "reads", 2)

    def region(x):
        return Cube.apply(x.sin()).exp()

    got = gradients(lambda x: checkpoint(region, x, impl=impl), leaf(4))
    assert_equal(got, gradients(region, leaf(4)))


def test_saved_tensors_of_a_node_can_be_read_like_plain():
    x = leaf(4)
    out = checkpoint(lambda x: (x * 2).exp(), x)
    for _ in range(3):
        assert torch.equal(out.grad_fn._saved_result, (x * 2).exp())
    out.sum().backward()
    assert torch.equal(x.grad, (x.detach() * 2).exp() * 2)


def test_users_hooks_inside_own_what_is_saved_under_them():
    packed = []

    def region(x):
        y = x.exp()
        with saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
            z = y.sin().cos()
        return z.tanh()

    out = checkpoint(region, leaf(5))
    (frame,) = live_frames()
    assert len(packed) == 2
    assert len(frame.slots) == 2
    del out, frame
    assert_equal(gradients(lambda x: checkpoint(region, x), leaf(5)), gradients(region, leaf(5)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", ["inside", "around", "both"])
def test_save_on_cpu(impl, where):
    def region(x, w):
        if where == "around":
            return layer(x, w)
        with save_on_cpu():
            return layer(x, w).exp()

    def run(x, w):
        if where == "inside":
            return checkpoint(region, x, w, impl=impl)
        with save_on_cpu():
            return checkpoint(region, x * 2, w, impl=impl)

    def plain(x, w):
        return region(x if where == "inside" else x * 2, w)

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    assert_equal(gradients(run, *tensors), gradients(plain, *tensors))


def test_disabled_saved_tensors_hooks_say_so():
    disabled = torch.autograd.graph.disable_saved_tensors_hooks("not here")
    with disabled, pytest.raises(RuntimeError, match="not here"):
        checkpoint(lambda x: x.sin(), leaf(3))


def test_tensor_hooks_inside_run_once():
    calls = []

    def region(x):
        y = x.exp()
        y.register_hook(lambda grad: calls.append(1) or grad * 2)
        return y.sin()

    got = gradients(lambda x: checkpoint(region, x), leaf(5))
    assert len(calls) == 1
    assert_equal(got, gradients(region, leaf(5)))


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_hooks_on_inputs_and_outputs(impl):
    def net(run):
        def forward(x):
            y = x * 2
            y.register_hook(lambda grad: grad * 3)
            z = run(y)
            z.register_hook(lambda grad: grad + 1)
            return z

        return forward

    def region(y):
        return y.sin().exp()

    got = gradients(net(lambda y: checkpoint(region, y, impl=impl)), leaf(5))
    assert_equal(got, gradients(net(region), leaf(5)))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_equals_plain_and_leaves_the_random_state_as_plain(impl):
    def region(x):
        return torch.nn.functional.dropout(x.sin(), 0.5).exp()

    results = []
    for is_region in (True, False):
        torch.manual_seed(3)
        x = leaf(64)
        out = checkpoint(region, x, impl=impl) if is_region else region(x)
        torch.rand(7)  # What is drawn in between does not matter.
        out.sum().backward()
        results.append([x.grad, torch.rand(3)])
    assert_equal(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_operators_inside(impl):
    def region(x, w):
        y = (x @ w).sin()
        y = y * 2
        y.add_(1)
        y[0] = 0
        y.relu_()
        return y.exp()

    tensors = leaf(4, 4), leaf(4, 4, seed=1)
    got = gradients(lambda x, w: checkpoint(region, x, w, impl=impl), *tensors)
    assert_equal(got, gradients(region, *tensors))


def test_without_grad_mode_nothing_is_recorded():
    run = Calls(lambda x: x.sin())
    with torch.no_grad():
        out = checkpoint(run, leaf(3))
    assert not out.requires_grad
    assert live_frames() == []
    with torch.inference_mode():
        assert checkpoint(run, leaf(3)).is_inference()
    assert run.num == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_inside(impl):
    def region(x):
        with torch.no_grad():
            scale = x.exp().sum()
        return (x * scale).sin()

    got = gradients(lambda x: checkpoint(region, x, impl=impl), leaf(5))
    assert_equal(got, gradients(region, leaf(5)))


def test_a_frame_holds_one_slot_for_each_saved_tensor():
    counted = []
    with saved_tensors_hooks(lambda t: counted.append(1) or t, lambda t: t):
        layer(leaf(4, 4), leaf(4, 4, seed=1))
    out = checkpoint(layer, leaf(4, 4), leaf(4, 4, seed=1))
    (frame,) = live_frames()
    assert len(frame.slots) == len(counted)
    del out


def test_operators_in_a_backward_are_those_of_plain_plus_the_rerun():
    def tensors():
        return leaf(4, 4), leaf(4, 4, seed=1)

    plain = count_backward(layer(*tensors()).exp())
    ours = count_backward(checkpoint(lambda x, w: layer(x, w).exp(), *tensors()))
    inputs = [t.detach() for t in tensors()]
    with Operators() as forward:
        layer(*inputs).exp()
    assert ours.counts - plain.counts == forward.counts


@pytest.mark.parametrize("outer", IMPLS)
def test_reentrant_inside_and_backward_once_each(outer):
    inner = Calls(lambda x: x.sin().exp())

    def region(x):
        return checkpoint(inner, x.cos(), impl=REENTRANT).tanh()

    got = gradients(lambda x: checkpoint(region, x, impl=outer), leaf(5))
    assert inner.num == 3
    assert_equal(got, gradients(lambda x: x.cos().sin().exp().tanh(), leaf(5)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_set", [False, True])
def test_rule_6_a_gradient_that_another_thread_adds_during_a_recompute_is_kept(impl, is_set):
    module = nn.Linear(3, 3, bias=False)
    module.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
    if is_set:
        module.weight.grad = torch.full((3, 3), 5.0)

    def add_from_another_thread(module, args):
        if is_recomputing():
            thread = threading.Thread(target=(module.weight * 2).sum().backward)
            thread.start()
            thread.join()

    module.register_forward_pre_hook(add_from_another_thread)
    x = torch.ones(1, 3)
    checkpoint(module, x.requires_grad_(), impl=impl, early_stop=False).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((3, 3), 3.0 + 5.0 * is_set))


@pytest.mark.parametrize("impl", IMPLS)
def test_threads_that_train_one_module_at_once(impl):
    """What one thread's backward does must not look like a backward inside another's region."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    module.double()  # Their gradients come in any order.
    num_threads, num_steps = 4, 50
    barrier = threading.Barrier(num_threads)

    def work(seed):
        barrier.wait()
        for _ in range(num_steps):
            x = leaf(8, 16, seed=seed, dtype=torch.float64)
            checkpoint(module, x, impl=impl).square().sum().backward()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    for seed in range(num_threads):
        for _ in range(num_steps):
            x = leaf(8, 16, seed=seed, dtype=torch.float64)
            module(x).square().sum().backward()
    torch.testing.assert_close(got, [parameter.grad for parameter in module.parameters()])


class Around(nn.Module):
    """A region around a module that runs a backward of its own."""

    def __init__(self, call) -> None:
        super().__init__()
        self.inner = Auxiliary()
        self.call = call

    def forward(self, x):
        return self.call(self.inner, x.cos()).tanh()


@pytest.mark.parametrize("outer", IMPLS)
@pytest.mark.parametrize("inner", IMPLS)
@pytest.mark.parametrize("early_stop", [True, False])
def test_rule_6_gradients_of_a_backward_in_a_nested_region_are_added_once(outer, inner, early_stop):
    results = []
    for is_region in (True, False):
        call = partial(checkpoint, impl=inner, early_stop=early_stop)
        module, x = Around(call if is_region else lambda f, x: f(x)), leaf(5)
        run = partial(checkpoint, module, impl=outer, early_stop=early_stop)
        (run(x) if is_region else module(x)).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert_equal(*results)


# --- Rule 5: what follows the last saved tensor, where that is an operator's output -------


def with_tail(x, w, reached=None):
    """Saves exp's output last, then works under no_grad."""
    y = x.exp()
    with torch.no_grad():
        y @ w
    if reached is not None:
        reached.append(is_recomputing())
    return y


def test_rule_5_a_clean_up_after_the_last_operator_is_done_in_the_recompute_too():
    linear = nn.Linear(3, 3)

    def region(x):
        linear.requires_grad_(False)
        try:
            return torch.tanh(linear(x))
        finally:
            linear.requires_grad_(True)

    x = leaf(2, 3)
    checkpoint(region, x).sum().backward()
    assert [parameter.requires_grad for parameter in linear.parameters()] == [True, True]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rule_5_a_function_mode_around_backward_leaves_gradients_right(device):
    w, reached = leaf(4, 4, seed=1).detach(), []
    x, z = leaf(4, 4), leaf(4, 4)
    loss = checkpoint(with_tail, x, w, reached).sum()
    with torch.device(device):
        loss.backward()
        assert torch.empty(0).device.type == device
    z.exp().sum().backward()
    assert torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_rule_6_a_gradient_that_another_thread_adds_during_a_forward_is_no_backward_inside(impl):
    """It was taken for one, and what the thread added during the recompute was then lost."""
    module = nn.Linear(3, 3, bias=False)
    module.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))

    def add():
        (module.weight * 2).sum().backward()

    def add_in_another_thread(module, args):
        thread = threading.Thread(target=add)
        thread.start()
        thread.join()

    module.register_forward_pre_hook(add_in_another_thread)
    x = torch.ones(1, 3, requires_grad=True)
    checkpoint(module, x, impl=impl, early_stop=False).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((3, 3), 2.0 + 2.0 + 1.0))
