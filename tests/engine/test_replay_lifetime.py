"""REPLAY: when recorded, kept and recomputed tensors die, and what many steps leave.

Everything here runs without the cyclic collector: memory must not wait for it.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.helpers import (
    NO_REENTRANT,
    REENTRANT,
    assert_equal,
    counts_of_training,
    gradients,
    leaf,
    live_objects,
    spy_on_frames,
    watch,
)
from wrappers import CheckpointError, CheckpointImpl, CheckpointPolicy, checkpoint
from wrappers.engine.replay import ReplayFrame
from wrappers.offload.simulated import SimulatedTransport
from wrappers.policies import save_every_other_matmul, save_matmuls

REPLAY = CheckpointImpl.REPLAY
aten = torch.ops.aten
replay = partial(checkpoint, impl=REPLAY, verify="never")
each_verify = pytest.mark.parametrize("verify", ["first", "never"])


@pytest.fixture(autouse=True, scope="module")
def _compiler():
    """The first mode imports the compiler, whose import leaves cycles."""
    with Results():
        torch.ones(1).sin()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _as_for_large_tensors(monkeypatch):
    """Tensors here are small, and a region of small ones is replayed all at once."""
    monkeypatch.setattr("wrappers._knobs.REPLAY_AT_ONCE_BYTES", -1)


@pytest.fixture
def frames(monkeypatch):
    """Weak references to the frames that the test makes, in order."""
    return spy_on_frames(monkeypatch, ReplayFrame)


class Results(TorchDispatchMode):
    """Watches the memory that each operator returns, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[tuple[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not _is_view(out, args):
            self.watched.append((func.overloadpacket.__name__, watch(out)))
        return out

    @property
    def live(self) -> list[str]:
        """Names of the operators whose results are alive, in order."""
        return [name for name, reference in self.watched if not reference.expired()]


def _is_view(tensor, args) -> bool:
    memory = tensor.untyped_storage()._cdata
    return any(isinstance(a, Tensor) and a.untyped_storage()._cdata == memory for a in args)


def chain(x, w):
    return ((x.sin() @ w).exp() @ w).cos()


def pair():
    return [leaf(8, 8), leaf(8, 8, seed=1)]


def states(references) -> list[bool]:
    return [reference.expired() for reference in references]


# --- Forward ------------------------------------------------------------------------------------


@each_verify
def test_recorded_values_are_dead_after_forward(verify):
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    x, w = pair()
    with Results() as results:
        out = checkpoint(region, x, w, impl=REPLAY, verify=verify)
    assert results.live == ["cos"]
    assert out.shape == (8, 8)
    del out
    assert results.live == []


def test_recorded_values_die_as_early_as_in_a_forward_without_grad():
    alive = []

    def region(x):
        for _ in range(4):
            x = x.exp()
            alive.append(results.live)
        return x

    x = leaf(8, 8)
    with Results() as results:
        replay(region, x)
    assert alive == [["exp"]] * 4


def test_kept_values_live_until_backward_has_used_them():
    x, w = pair()
    with Results() as results:
        out = replay(chain, x, w, policy=[aten.mm]).sum()
    assert results.live == ["mm", "mm", "sum"]
    out.backward()
    assert results.live == ["sum"]


def test_what_is_kept_for_nothing_is_freed_at_the_end_of_forward():
    def region(x, w):
        y = x.sin() @ w
        alive.append(results.live)
        return y + 1  # Backward of the sum does not read the product.

    alive = []
    x, w = pair()
    with Results() as results:
        out = replay(region, x, w, policy=[aten.sin, aten.mm])
    assert alive == [["sin", "mm"]]
    assert results.live == ["sin", "add"]
    assert out.shape == (8, 8)


def test_kept_outputs_that_no_slot_needs_any_more_are_freed_with_the_slots():
    """Kept, but whatever read it in the graph was dropped before the forward ended."""

    def region(x, w):
        (x @ w).sin()  # its graph is dropped at once
        return x.exp()

    x, w = pair()
    with Results() as results:
        out = replay(region, x, w, policy=[aten.mm])
    assert results.live == ["exp"]
    assert out.shape == (8, 8)


def test_an_offloaded_values_memory_on_the_device_is_freed_at_once():
    alive = []

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_CPU_OFFLOAD if op is aten.mm.default else False

    def region(x, w):
        y = (x @ w).sin()
        alive.append(results.live)
        return y.cos()

    x, w = pair()
    with (
        SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0),
        Results() as results,
    ):
        replay(region, x, w, policy=policy)
    assert alive == [["sin"]]
    assert [name for name, _ in results.watched] == ["mm", "sin", "cos"]


def test_an_input_lives_as_long_as_the_graph():
    y = leaf(8, 8) * 2
    watched = watch(y)
    out = replay(lambda y: y.sin().exp(), y)
    del y
    assert not watched.expired()
    out.sum().backward()
    assert watched.expired()
    assert out.shape == (8, 8)


def test_an_input_that_backward_does_not_need_dies_in_forward():
    """Where the policy keeps all that backward reads, the input is held for nothing."""

    def region(y, unused):
        return y.exp().sin() + unused

    y, unused = leaf(8, 8) * 2, leaf(8, 8) * 3
    watches = [watch(y), watch(unused)]
    out = replay(region, y, unused, policy=[aten.exp])
    del y, unused
    assert states(watches) == [True, True]
    out.sum().backward()


def test_a_tensor_from_a_closure_lives_as_long_as_the_graph():
    y = leaf(8, 8) * 2
    watched = watch(y)

    def make(y):
        return replay(lambda x: (x * y).sin(), leaf(8, 8))

    out = make(y)
    del y
    assert not watched.expired()
    out.sum().backward()
    assert watched.expired()


def test_the_output_is_not_kept_by_the_frame():
    out = replay(lambda x: {"a": x.sin(), "b": x.cos()}, leaf(8, 8))
    watched = watch(out["b"])
    a = out["a"]
    del out
    assert watched.expired()
    a.sum().backward()


# --- Backward -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "alive"),
    [
        # Backward of cos reads the second product, that of the product exp's result, and so on.
        (
            None,
            {"cos": [], "mm 2": ["exp", "sin"], "exp": ["exp", "sin"], "mm": ["sin"], "sin": []},
        ),
        # The products are there: sin's result comes back when backward gets there.
        ([aten.mm], {"cos": [], "mm 2": [], "exp": ["exp"], "mm": [], "sin": []}),
    ],
    ids=["nothing", "mm"],
)
def test_each_recomputed_value_dies_at_its_last_use(policy, alive):
    """The recomputed results that live when the gradient of each value is there."""
    seen = {}

    def region(x, w):
        def note(name, y):
            def hook(grad):
                seen[name] = sorted(op for op in results.live if op in {"sin", "exp"})

            y.register_hook(hook)
            return y

        a = note("sin", x.sin())
        b = note("mm", a @ w)
        c = note("exp", b.exp())
        d = note("mm 2", c @ w)
        return note("cos", d.cos())

    out = replay(region, *pair(), policy=policy).sum()
    results = Results()
    with results:
        out.backward()
    assert seen == alive


def test_values_between_two_kept_outputs_come_back_one_part_after_the_other():
    """Kept outputs cut the region: the first part is recomputed when backward gets there."""
    ran = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def region(x, w):
        y = x.exp() @ w
        y.register_hook(lambda grad: ran.append("the first product's gradient"))
        return (y.sigmoid() @ w).tanh()

    out = replay(region, *pair(), policy=[aten.mm]).sum()
    with Log():
        out.backward()
    middle = ran.index("the first product's gradient")
    assert [ran[:middle].count(name) for name in ("exp", "sigmoid", "tanh")] == [0, 1, 1]
    assert [ran[middle:].count(name) for name in ("exp", "sigmoid", "tanh")] == [1, 0, 0]


def test_the_peak_of_backward_in_a_chain_of_kept_outputs_is_one_part():
    """With all products kept, no two parts of the region are in memory together."""
    peaks = []

    class Peak(Results):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            peaks.append(sum(name in {"sin", "exp"} for name in self.live))
            return out

    def region(x, w):
        for _ in range(10):
            x = x.sin().exp() @ w
        return x

    out = replay(region, *pair(), policy=[aten.mm]).sum()
    with Peak():
        out.backward()
    assert 1 <= max(peaks) <= 2


def test_without_a_policy_values_are_dropped_on_the_way_that_nobody_waits_for():
    """A chain that saves nothing but its end: never more than two results at a time."""
    peaks = []

    class Peak(Results):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            peaks.append(len(self.live))
            return out

    def region(x):
        for _ in range(20):
            x = x + 1.0
        return x.sin()

    out = replay(region, leaf(8, 8))
    gradient = torch.ones(8, 8)
    with Peak():
        out.backward(gradient)
    # Of the additions never more than two, and the gradient's own products.
    assert max(peaks) <= 3


@each_verify
def test_nothing_survives_the_backward(verify, frames):
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    x, w = pair()
    out = checkpoint(region, x, w, impl=REPLAY, verify=verify)
    loss = out.sum()
    with Results() as results:
        loss.backward()
    gradients_alive = [watch(x.grad), watch(w.grad)]
    assert [frame() for frame in frames] == [None]
    del x.grad, w.grad
    assert states(gradients_alive) == [True, True]
    assert results.live == []
    assert out.requires_grad


@pytest.mark.parametrize("policy", [None, [aten.mm], [aten.mm, aten.sin]])
@each_verify
def test_an_abandoned_graph_frees_everything_at_once(policy, verify, frames):
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    y = leaf(8, 8) * 2
    watched = watch(y)
    with Results() as results:
        out = checkpoint(region, y, leaf(8, 8), impl=REPLAY, verify=verify, policy=policy)
    del y
    assert not watched.expired()
    del out
    assert watched.expired()
    assert results.live == []
    assert [frame() for frame in frames] == [None]


def test_an_abandoned_half_of_the_graph_frees_what_only_it_needed():
    def region(x, w):
        return (x @ w).sin(), (w @ x).cos()

    x, w = pair()
    with Results() as results:
        first, second = replay(region, x, w, policy=[aten.mm])
        first, second = first.sum(), second.sum()
    assert results.live == ["mm", "mm", "sum", "sum"]
    del second
    first.backward()
    assert results.live == ["sum"]


def test_with_retain_graph_recomputed_values_are_dropped_after_each_backward():
    x, w = pair()
    out = replay(chain, x, w).sum()
    for _ in range(3):
        with Results() as results:
            out.backward(retain_graph=True)
        x.grad = w.grad = None
        assert results.live == []


def test_a_partial_backward_leaves_what_waits_for_the_rest_and_no_more():
    def region(x):
        y = x.sin()
        return y.exp().cos(), y.cosh().tanh()

    x = leaf(8, 8)
    first, second = replay(region, x)
    first, second = first.sum(), second.sum()
    with Results() as results:
        (grad,) = torch.autograd.grad(first, x, retain_graph=True)
    del grad
    assert "cosh" not in [name for name, _ in results.watched]  # its slots were not asked for
    assert set(results.live) <= {"sin"}  # the second output's slot may wait for it
    del first
    second.backward()
    x.grad = None
    assert results.live == []


# --- Exceptions ---------------------------------------------------------------------------------


class OwnError(Exception):
    pass


@each_verify
@pytest.mark.parametrize("policy", [None, [aten.mm]], ids=["nothing", "mm"])
def test_nothing_survives_a_forward_that_raises(policy, verify, frames):
    def region(x, w):
        (x.sin() @ w).exp()
        raise OwnError

    y = leaf(8, 8) * 2
    watched = watch(y)
    with Results() as results:
        try:
            checkpoint(region, y, leaf(8, 8), impl=REPLAY, verify=verify, policy=policy)
        except OwnError as error:
            error.__traceback__ = None
    del y
    assert watched.expired()
    assert results.live == []
    assert [frame() for frame in frames] == [None]


def test_nothing_survives_a_backward_that_raises(frames):
    y = leaf(8, 8) * 2
    watched = watch(y)
    w = leaf(8, 8)
    out = replay(chain, y, w).sum()
    with torch.no_grad():
        w.add_(1)
    with Results() as results:
        try:
            out.backward()
        except CheckpointError as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None
    del y, out
    assert watched.expired()
    assert results.live == []
    assert [frame() for frame in frames] == [None]


def test_nothing_survives_a_hook_that_raises_in_the_middle_of_backward(frames):
    def region(x, w):
        def fail(grad):
            raise OwnError

        y = x.sin() @ w
        y.register_hook(fail)
        return (y.exp() @ w).cos()

    out = replay(region, *pair()).sum()
    with Results() as results:
        try:
            out.backward()
        except OwnError as error:
            error.__traceback__ = None
    del out
    assert results.live == []
    assert [frame() for frame in frames] == [None]


# --- Frames -------------------------------------------------------------------------------------


@each_verify
def test_a_frame_dies_with_the_backward_though_the_output_lives(verify, frames):
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    out = checkpoint(region, *pair(), impl=REPLAY, verify=verify)
    assert [frame() is None for frame in frames] == [False]
    out.sum().backward()
    assert [frame() for frame in frames] == [None]
    assert out.requires_grad


def test_the_function_and_its_objects_die_after_forward_if_no_check_needs_them():
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing)
    out = replay(lambda x, thing: x.sin().exp(), leaf(3), thing)
    del thing
    assert reference() is None  # A replay calls no function again.
    out.sum().backward()


def test_a_checked_forward_keeps_the_function_until_its_backward():
    class Thing:
        pass

    def region(x, thing):
        return x.sin().exp()

    thing = Thing()
    reference = weakref.ref(thing)
    out = checkpoint(region, leaf(3), thing, impl=REPLAY, verify="always")
    del thing
    assert reference() is not None
    out.sum().backward()
    assert reference() is None


@pytest.mark.parametrize("outer", [REPLAY, NO_REENTRANT, REENTRANT])
@pytest.mark.parametrize("inner", [REPLAY, NO_REENTRANT, REENTRANT])
def test_frames_of_nested_regions_die_with_the_backward(outer, inner, frames):
    def body(x, w):
        return (x @ w).sin()

    def region(x, w):
        return checkpoint(body, x.exp(), w, impl=inner, verify="never").cos()

    options = {} if outer is REENTRANT else {"verify": "never"}
    out = checkpoint(region, *pair(), impl=outer, **options)
    loss = out.sum()
    loss.backward()
    del out, loss
    assert [frame() for frame in frames] == [None] * len(frames)
    if REPLAY in (outer, inner):
        assert frames


@pytest.mark.parametrize("inner", [REPLAY, NO_REENTRANT])
@pytest.mark.parametrize("outer", [REPLAY, NO_REENTRANT])
@pytest.mark.parametrize("policy", [None, [aten.mm]], ids=["nothing", "mm"])
def test_inputs_and_kept_outputs_of_an_inner_region_die_in_the_outer_forward(outer, inner, policy):
    """To the outer region they are saved tensors like any other: recomputed, not kept."""
    if policy is not None and outer is NO_REENTRANT and inner is NO_REENTRANT:
        policy = None  # The contexts of a policy keep their outputs whatever is around.
    watches = []

    def body(y, w):
        z = y @ w
        watches.append(watch(z))
        return z.sin()

    def region(x, w):
        y = x.exp()
        watches.append(watch(y))
        chosen = policy if inner is REPLAY else None
        return checkpoint(body, y, w, impl=inner, policy=chosen, verify="never").cos()

    x, w = pair()
    out = checkpoint(region, x, w, impl=outer, verify="never")
    assert states(watches) == [True, True]
    out.sum().backward()
    assert all(states(watches))

    def plain(x, w):
        return (x.exp() @ w).sin().cos()

    got = gradients(partial(checkpoint, region, impl=outer, verify="never"), x, w)
    assert_equal(got, gradients(plain, x, w))


def test_a_tensor_of_the_region_that_the_user_keeps_does_not_keep_the_rest(frames):
    stolen = []

    def region(x, w):
        y = x.sin() @ w
        stolen.append(y)
        return y.exp().cos()

    y = leaf(8, 8) * 2
    watched = watch(y)
    replay(region, y, leaf(8, 8)).sum().backward()
    del y
    assert watched.expired()
    assert [frame() for frame in frames] == [None]
    assert len(stolen) == 1  # The function has run once.


def test_no_garbage_for_the_collector():
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    def inner(x, w):
        return checkpoint(region, x, w, impl=REPLAY, policy=[aten.mm])

    def step():
        x, w = pair()
        y = checkpoint(region, x * 1, w, impl=REPLAY)
        y = checkpoint(region, y, w, impl=REPLAY, policy=save_every_other_matmul())
        y = checkpoint(lambda y: inner(y, w).sin(), y, impl=REPLAY)
        y.sum().backward()

    step()
    gc.collect()
    step()
    assert gc.collect() == 0


# --- Nothing grows ------------------------------------------------------------------------------


def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8))
        for _ in range(3)
    )


OPTIONS = {
    "nothing": {},
    "list": {"policy": [aten.addmm.default]},
    "every other": {"policy": save_every_other_matmul()},
    "function": {"policy": lambda ctx, op, *args, **kwargs: op is aten.addmm.default},
    "checked always": {"verify": "always"},
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_grows_over_50_steps(name, depth):
    blocks = model()
    data = leaf(4, 8).detach()
    options = {"impl": REPLAY, **OPTIONS[name]}

    def run(block, x):
        for _ in range(depth):
            block = partial(checkpoint, block, **options)
        return block(x)

    counts = counts_of_training(blocks, run, data, 50)
    warm = counts[10:]
    assert [tensors for tensors, _ in warm] == [warm[0][0]] * len(warm)
    # The list of counts itself grows by one tuple a step.
    assert warm[-1][1] - warm[0][1] <= len(warm)


@pytest.mark.parametrize("policy", [None, [aten.mm], save_matmuls()])
def test_nothing_grows_with_abandoned_graphs(policy):
    counts = []
    for _ in range(50):
        replay(chain, *pair(), policy=policy)
        counts.append(live_objects())
    warm = counts[10:]
    assert [tensors for tensors, _ in warm] == [warm[0][0]] * len(warm)
    assert warm[-1][1] - warm[0][1] <= len(warm)


@pytest.mark.parametrize("policy", [None, [aten.mm]], ids=["nothing", "mm"])
@each_verify
def test_a_retained_graph_does_not_grow_with_each_backward(policy, verify):
    def region(x, w):
        return ((x.sin() @ w).exp() @ w).cos()

    out = checkpoint(region, *pair(), impl=REPLAY, policy=policy, verify=verify).sum()
    counts = []
    for _ in range(50):
        out.backward(retain_graph=True)
        counts.append(live_objects())
    warm = counts[10:]
    assert [tensors for tensors, _ in warm] == [warm[0][0]] * len(warm)
    assert warm[-1][1] - warm[0][1] <= len(warm)


def test_closures_made_anew_for_each_call_are_not_kept():
    references = []
    for scale in range(10):
        run = lambda x, scale=scale: (x * scale).sin()  # noqa: E731
        references.append(weakref.ref(run))
        checkpoint(run, leaf(3), impl=REPLAY).sum().backward()
    del run
    assert [reference() for reference in references] == [None] * 10


def test_policies_made_anew_for_each_call_are_not_kept():
    references = []
    for _ in range(10):
        policy = save_matmuls() | save_every_other_matmul()
        references.append(weakref.ref(policy))
        checkpoint(chain, *pair(), policy=policy, verify="never").sum().backward()
        del policy
    # The region remembers the policy that it was made with, perhaps the first of these.
    assert [reference() for reference in references[1:]] == [None] * 9


def test_a_module_dies_though_its_region_was_replayed():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    reference = weakref.ref(module)
    checkpoint(module, leaf(8, 4), impl=REPLAY).sum().backward()
    del module
    assert reference() is None
