"""Stories of bugs that users of such tools have met, each told with the test that ends it.

Only those that concern recomputation; the numbers are public issues. Where a story says "seen",
the bug was seen in ``torch.utils.checkpoint`` of torch 2.13 on a CPU.
"""

from __future__ import annotations

import gc
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wrappers import (
    CheckpointError,
    CheckpointImpl,
    InputChangedError,
    RecomputeMismatchError,
    _device,
    checkpoint,
    create_selective_checkpoint_contexts,
    is_recomputing,
    set_checkpoint_early_stop,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

REENTRANT, NO_REENTRANT = CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT
both_impls = pytest.mark.parametrize(
    "impl", [REENTRANT, NO_REENTRANT], ids=["REENTRANT", "NO_REENTRANT"]
)

aten = torch.ops.aten


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def assert_same(ours, expected) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# --- Silent wrong results


@both_impls
@pytest.mark.parametrize("early_stop", [True, False])
def test_batch_norm_statistics_updated_twice(impl, early_stop):
    """pytorch#96136: the recompute ran batch norm a second time in training mode.

    Seen: ``num_batches_tracked`` is 2 after one step, and running averages have moved twice.
    """

    def buffers(call):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            with set_checkpoint_early_stop(early_stop):
                call(model, leaf(2, 2, 5, 5, seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*model.buffers(), *model.parameters()]

    ours = buffers(lambda m, x: checkpoint(m, x, impl=impl))
    assert_same(ours, buffers(lambda m, x: m(x)))
    assert ours[2].item() == 3


@both_impls
def test_a_counter_in_the_module_doubles(impl):
    """NeMo Automodel#3247: a module counted its calls and chose its operators by the count.

    The recompute found the count one higher and went another way.
    """

    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4)
            self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.num_calls += 1
            x = self.linear(x)
            return x.tanh() if self.num_calls <= 1 else x.exp().sin()

    def run(call, **options):
        module, results = Warmup(), []
        for step in range(3):
            x = leaf(2, 4, seed=step)
            call(module, x, **options).sum().backward()
            results.append(x.grad)
        return [*results, *(p.grad for p in module.parameters()), module.num_calls]

    expected = run(lambda m, x: m(x))
    assert_same(run(partial(checkpoint, impl=impl)), expected)
    assert expected[-1].item() == 3


def test_a_counter_in_the_module_under_a_policy():
    """The same module under a policy: the cache missed, as the recompute asked for others."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4)
            self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.num_calls += 1
            for _ in range(int(self.num_calls)):
                x = self.linear(x).tanh()
            return x

    module, plain = Counting(), Counting()
    context_fn = partial(create_selective_checkpoint_contexts, [aten.addmm])
    for step in range(3):
        x, plain_x = leaf(2, 4, seed=step), leaf(2, 4, seed=step)
        checkpoint(module, x, context_fn=context_fn).sum().backward()
        plain(plain_x).sum().backward()
        assert torch.equal(x.grad, plain_x.grad)
    assert_same([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()])
    assert module.num_calls.item() == 3


@both_impls
def test_random_states_off_with_live_dropout(impl):
    """OLMo-core#828: with ``preserve_rng_state=False`` a loss of 2.195 became 2.495.

    Random states are kept by default; who opts out while a random operator runs is told once.
    """
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    x, plain_x = leaf(8, 4), leaf(8, 4)
    torch.manual_seed(0)
    checkpoint(module, x, impl=impl).sum().backward()
    torch.manual_seed(0)
    module(plain_x).sum().backward()
    assert torch.equal(x.grad, plain_x.grad)

    with pytest.warns(UserWarning, match="region `Sequential` draws random numbers") as caught:
        out = checkpoint(module, x, impl=impl, preserve_rng_state=False)
    assert len(caught) == 1
    out.sum().backward()


class Accelerator:
    """A device whose random state is a number."""

    def __init__(self) -> None:
        self.state = 10

    def get_rng_state(self, device):
        return torch.tensor([self.state])

    def set_rng_state(self, state, device):
        self.state = int(state)


@both_impls
@pytest.mark.parametrize("kind", ["cuda", "xpu", "mtia", "hpu", "privateuseone"])
@pytest.mark.parametrize("place", ["argument", "kwarg", "nested"])
def test_the_random_state_of_an_accelerator_is_lost(monkeypatch, impl, kind, place):
    """pytorch#194478: only CUDA's state was kept. Seen: nothing at all for kwargs (row of its own).

    Any device type with get/set of its random state works, wherever the tensor comes from.
    """
    accelerator = Accelerator()
    device = torch.device(kind, 0)
    there = torch.ones(4)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: accelerator)
    monkeypatch.setattr(
        _device, "rng_devices", lambda ts: [device] if any(t is there for t in ts) else []
    )
    drawn = []

    def region(x, *args, **kwargs):
        accelerator.state += 1
        drawn.append(accelerator.state)
        return x.sin().cos()

    args, kwargs = {
        "argument": ((there,), {}),
        "kwarg": ((), {"mask": there}),
        "nested": (([{"deep": (there,)}],), {}),
    }[place]
    out = checkpoint(region, leaf(4), *args, impl=impl, **kwargs)
    accelerator.state = 50
    out.sum().backward()
    assert drawn == [11, 11]
    assert accelerator.state == 50


@pytest.mark.parametrize("as_dict", [False, True])
def test_frozen_inputs_and_reentrant_give_no_gradients(as_dict):
    """transformers#26221: a frozen embedding before a REENTRANT region: adapters got no gradient.

    Seen too for a region that returns a dict. Torch says so in a warning at best.
    """

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x).sin()
            return {"hidden": y} if as_dict else y

    def run(call):
        module, x = Adapter(), leaf(2, 4).detach()
        out = call(module, x)
        (out["hidden"] if as_dict else out).square().sum().backward()
        return [p.grad for p in module.parameters()]

    expected = run(lambda m, x: m(x))
    assert None not in expected
    assert_same(run(partial(checkpoint, impl=REENTRANT)), expected)


def test_dict_outputs_under_reentrant():
    """Seen: a REENTRANT region that returns a dict has no gradients at all."""

    def region(x, w):
        return {"a": (x * w).sin(), "more": [x.cos(), 3]}

    def run(call):
        x, w = leaf(4), leaf(4, seed=1)
        out = call(region, x, w)
        assert out["more"][1] == 3
        (out["a"].sum() + out["more"][0].square().sum()).backward()
        return [x.grad, w.grad]

    expected = run(lambda f, *args: f(*args))
    assert_same(run(partial(checkpoint, impl=REENTRANT)), expected)


def _store_in_dict(x, places):
    places["y"] = x.sin()
    return places["y"] * 3


def _store_in_list(x, places):
    places.append(x.sin())
    return places[-1] * 3


@pytest.mark.parametrize(("region", "kind"), [(_store_in_dict, dict), (_store_in_list, list)])
def test_a_tensor_stored_in_an_argument_has_no_graph(region, kind):
    """Seen in models whose layers share keys and values: REENTRANT loses their gradients."""
    with pytest.warns(UserWarning, match="no gradient flows through that tensor. Return it"):
        checkpoint(region, leaf(4), kind(), impl=REENTRANT)


def test_a_packet_in_the_save_list_never_matches():
    """pytorch#176065: ``aten.mm`` in place of ``aten.mm.default`` was taken and never matched."""

    def region(x, w):
        return (x @ w).sin()

    def flops(saved):
        context_fn = partial(create_selective_checkpoint_contexts, saved)
        out = checkpoint(region, leaf(8, 8), leaf(8, 8), context_fn=context_fn, early_stop=False)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return counter.get_total_flops()

    one_mm = 2 * 8**3
    assert flops([aten.mm]) == flops([aten.mm.default]) == 2 * one_mm
    assert flops([]) == 3 * one_mm


@both_impls
def test_a_shared_parameter_gets_its_gradient_twice(impl):
    """unsloth-zoo#892: tied weights, with a gradient that is there already, were added twice."""

    def run(call):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 4)
        head = nn.Linear(4, 5, bias=False)
        head.weight = embedding.weight
        body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), head)
        for _ in range(2):  # The second step adds to the gradient of the first.
            logits = call(body, embedding(torch.tensor([0, 3, 1])))
            nn.functional.cross_entropy(logits, torch.tensor([3, 1, 0])).backward()
        return [embedding.weight.grad, *(p.grad for p in body.parameters())]

    expected = run(lambda f, x: f(x))
    ours = run(partial(checkpoint, impl=impl))
    torch.testing.assert_close(ours, expected)


@both_impls
def test_functional_call_through_a_region(impl):
    """Seen: the forward used the functional weights, the recompute the module's own.

    Outputs were equal, gradients wrong, and nobody said a word.
    """

    class Outer(nn.Module):
        def __init__(self, call) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.call = nn.Linear(4, 4), call

        def forward(self, x):
            return self.call(self.inner, x).sin()

    def run(call):
        model, x = Outer(call), leaf(2, 4)
        weights = {n: leaf(*p.shape, seed=7) for n, p in model.named_parameters()}
        functional_call(model, weights, (x,)).square().sum().backward()
        assert [p.grad for p in model.parameters()] == [None, None]
        return [x.grad, *(w.grad for w in weights.values())]

    assert_same(run(partial(checkpoint, impl=impl)), run(lambda f, x: f(x)))


@both_impls
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_changed_between_forward_and_backward(impl, name):
    """Seen: an optimizer step in between raises in the plain model and is silent in a region."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    out = checkpoint(model, leaf(2, 4), impl=impl)
    with torch.no_grad():
        getattr(model[2], name).sub_(0.1)
    with pytest.raises(InputChangedError, match=rf"parameter `2\.{name}` was changed in place"):
        out.sum().backward()


@both_impls
@pytest.mark.parametrize("place", ["positional", "keyword"])
def test_an_input_mutated_in_place(impl, place):
    """Seen: mutating a positional tensor raises, mutating a keyword tensor is silent."""

    def region(x, mask):
        return (x * mask).sin()

    mask = torch.ones(4)
    args, kwargs = ((mask,), {}) if place == "positional" else ((), {"mask": mask})
    out = checkpoint(region, leaf(4), *args, impl=impl, **kwargs)
    mask.mul_(2)
    named = "argument 1" if place == "positional" else "argument `mask`"
    with pytest.raises(InputChangedError, match=f"{named} was changed in place"):
        out.sum().backward()


@both_impls
def test_eval_between_forward_and_backward(impl):
    """Seen: evaluation code called ``.eval()`` before backward: gradient 1.08 in place of -0.83."""

    def run(call):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        x = leaf(6, 4)
        out = call(model, x)
        model.eval()
        out.sum().backward()
        assert not any(m.training for m in model.modules())
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    assert_same(run(partial(checkpoint, impl=impl)), run(lambda f, x: f(x)))


@pytest.mark.parametrize("inner_impl", [REENTRANT, NO_REENTRANT])
@pytest.mark.parametrize("as_kwarg", [False, True])
def test_an_inner_regions_keyword_inputs_stay_alive(inner_impl, as_kwarg):
    """Seen: what an outer region hands to an inner one by keyword was kept from forward on."""
    seen = []

    def inner(x, *, scale=None, args=()):
        return (x * scale).sin()

    def inner_positional(x, scale):
        return (x * scale).sin()

    def outer(x):
        scale = x.exp()
        if not is_recomputing():
            seen.append(StorageWeakRef(scale.untyped_storage()))
        if as_kwarg:
            return checkpoint(inner, x, scale=scale, impl=inner_impl).cos()
        return checkpoint(inner_positional, x, scale, impl=inner_impl).cos()

    x, plain = leaf(4), leaf(4)
    out = checkpoint(outer, x)
    assert seen[0].expired()
    out.sum().backward()
    (plain * plain.exp()).sin().cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


class Read:
    """A region that writes down what it sees."""

    def __init__(self, read):
        self.read, self.seen = read, []

    def __call__(self, x):
        self.seen.append(self.read())
        return x.sin().cos()


@both_impls
def test_sdpa_kernel_lost_in_the_recompute(impl):
    """Seen: the recompute ran under all SDPA kernels, whichever one the forward had chosen."""
    region = Read(
        lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    )
    with sdpa_kernel(SDPBackend.MATH):
        out = checkpoint(region, leaf(4), impl=impl)
    out.sum().backward()
    assert region.seen == [(False, True), (False, True)]


@both_impls
def test_python_random_lost_in_the_recompute(impl):
    """Seen: layer drop by Python's ``random`` dropped other layers in the recompute."""
    region = Read(random.random)
    out = checkpoint(region, leaf(4), impl=impl)
    out.sum().backward()
    assert region.seen[0] == region.seen[1]


@both_impls
def test_default_dtype_lost_in_the_recompute(impl):
    """Seen: factory functions gave float32 in the recompute of a float64 forward."""
    region = Read(lambda: torch.ones(1).dtype)
    torch.set_default_dtype(torch.float64)
    try:
        out = checkpoint(region, leaf(4), impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    out.sum().backward()
    assert region.seen == [torch.float64, torch.float64]


@both_impls
def test_deterministic_flag_lost_in_the_recompute(impl):
    """Seen: deterministic kernels in the forward, others in the recompute."""
    region = Read(torch.are_deterministic_algorithms_enabled)
    torch.use_deterministic_algorithms(True)
    try:
        out = checkpoint(region, leaf(4), impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert region.seen == [True, True]


# --- Mismatch, memory, debugging


class Watched(nn.Module):
    """Blocks whose activations are counted while they live."""

    def __init__(self, impl: CheckpointImpl, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.impl, self.options = impl, options

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, impl=self.impl, **self.options)
        return x


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@both_impls
@pytest.mark.parametrize("early_stop", [True, False])
def test_memory_grows_step_by_step(impl, early_stop):
    """titan#1467, #1580: 0.82 GiB became 2.38 GiB in four steps with early stop.

    The exception that stops a rerun kept the rerun's frames, and with them its tensors.
    """
    model = Watched(impl, early_stop=early_stop)
    counts = []
    for step in range(20):
        model(leaf(4, 8, seed=step)).square().mean().backward()
        model.zero_grad(set_to_none=False)
        counts.append(live_tensors())
    assert counts[2:] == [counts[2]] * 18


def test_early_stop_keeps_nothing_without_the_collector():
    """The same, and no garbage collector is needed to free a rerun's tensors."""
    seen = []

    def region(x):
        y = x.sin()
        seen.append(StorageWeakRef(y.untyped_storage()))
        return y.cos().exp()

    gc.disable()
    try:
        for step in range(3):
            checkpoint(region, leaf(4, seed=step)).sum().backward()
            assert [ref.expired() for ref in seen] == [True] * len(seen)
    finally:
        gc.enable()
    assert len(seen) == 6


def test_early_stop_is_a_regions_own_setting():
    """titan turned early stop off for the whole process; each region may choose here."""
    calls = []

    def region(name, x):
        x = x.sin().cos()
        calls.append(name)
        return x.view(-1)

    def flops(early_stop):
        calls.clear()
        checkpoint(region, early_stop, leaf(4), early_stop=early_stop).sum().backward()
        return len(calls)

    assert (flops(True), flops(False)) == (1, 2)


def test_the_last_operators_are_recomputed_for_nothing():
    """titan#2763, pytorch#102600: the last matmul's output is saved by nobody in the region.

    Early stop ends the rerun before it, so its product is not computed again.
    """

    def region(x, a, b):
        return (x @ a).sin() @ b

    tensors = [leaf(8, 8, seed=s) for s in range(3)]
    out = checkpoint(region, *tensors).sum()
    with FlopCounterMode(display=False) as counter:
        out.backward()
    one_mm = 2 * 8**3
    assert counter.get_total_flops() == (4 + 1) * one_mm
    plain = [t.detach().clone().requires_grad_() for t in tensors]
    region(*plain).sum().backward()
    assert_same([t.grad for t in tensors], [t.grad for t in plain])


def test_recomputed_size_does_not_match_gives_no_hint():
    """transformers#34928, #28499: an error with two lists of sizes and nothing else.

    Ours names the region, the saved tensor, the operator and the user's line.
    """

    class Cache(nn.Module):
        """A key-value cache that grows at each call, as with ``use_cache=True``."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.cache: list[torch.Tensor] = []

        def forward(self, x):
            self.cache.append(self.linear(x).detach())
            keys = torch.cat(self.cache)
            return (x @ keys.t()).softmax(-1)  # the user's line

    with open(__file__) as file:
        (line,) = [i for i, text in enumerate(file, 1) if text.endswith("  # the user's line\n")]
    out = checkpoint(Cache(), leaf(3, 4))
    with pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    error = caught.value
    assert error.fqn == "Cache"
    assert (error.expected, error.got) == ("(4, 3) float32 cpu", "(4, 6) float32 cpu")
    assert error.location == f"{__file__}:{line}"
    text = str(error)
    assert f"saved tensor {error.slot + 1} of {error.num_slots}" in text
    assert "x @ keys.t()" in error.operator
    assert f"First operator that differs: {error.operator}" in text
    assert f"{__file__}:{line}" in text
    assert isinstance(error, CheckpointError)


def test_debug_mode_slows_to_a_crawl(monkeypatch):
    """pytorch#153021, #163923: debug mode took a Python stack for each operator.

    Ours keeps a code object and a position; text is made when an error is printed.
    """
    import linecache
    import traceback

    def forbidden(*args, **kwargs):
        raise AssertionError("a stack was formatted although nothing differs")

    for module, name in (
        (traceback, "extract_stack"),
        (traceback, "format_stack"),
        (linecache, "getline"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    x, plain = leaf(4), leaf(4)
    checkpoint(lambda x: x.sin().cos(), x, debug=True).sum().backward()
    plain.sin().cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_debug_mode_does_not_work_with_policies():
    """pytorch#163923: debug mode replaced context_fn; here both are used."""
    context_fn = partial(create_selective_checkpoint_contexts, [aten.mm])
    out = checkpoint(
        lambda x, w: (x @ w).sin(), leaf(8, 8), leaf(8, 8), context_fn=context_fn, debug=True
    )
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 8**3)


# --- Found by our own tests


@both_impls
def test_default_device_of_a_with_block(impl):
    """``with torch.device(...)`` sets no global: only the stack of function modes shows it."""
    region = Read(lambda: torch.empty(0).device.type)
    with torch.device("meta"):
        out = checkpoint(region, leaf(4), impl=impl)
    out.sum().backward()
    assert region.seen == ["meta", "meta"]


@both_impls
def test_a_child_of_the_module_is_unfrozen_later(impl):
    """Batch norm of one child goes from eval to train while the root is in train all the time."""

    def run(call):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        for step in range(4):
            model[1].train(step >= 2)
            call(model, leaf(6, 4, seed=step)).sum().backward()
        return list(model.buffers())

    plain = run(lambda m, x: m(x))
    assert_same(run(partial(checkpoint, impl=impl)), plain)
    assert plain[2].item() == 2


@both_impls
def test_python_random_in_a_callable_whose_class_never_drew_before(impl):
    """What one call had shown about randomness was believed of all objects of its class."""

    class Call:
        def __init__(self, draw):
            self.draw, self.drawn = draw, []

        def __call__(self, x):
            self.drawn.append(self.draw())
            return x.sin().cos()

    checkpoint(Call(lambda: 0.0), leaf(4), impl=impl).sum().backward()
    drawing = Call(random.random)
    checkpoint(drawing, leaf(4), impl=impl).sum().backward()
    assert drawing.drawn[0] == drawing.drawn[1]


def test_torchs_own_checkpoint_still_has_the_first_bug():
    """If this fails, torch has fixed pytorch#96136 and the README's comparison is out of date."""
    module = nn.BatchNorm1d(4)
    torch.utils.checkpoint.checkpoint(module, leaf(6, 4), use_reentrant=True).sum().backward()
    assert module.num_batches_tracked.item() == 2
