"""A recompute sees the state around the region as the forward saw it, and leaves no trace.

Random states, autocast, default device, SDPA switches, Python's ``random``, default dtype,
the deterministic flag and what users register.
"""

from __future__ import annotations

import contextlib
import random
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

import wrappers
from wrappers import (
    CheckpointImpl,
    DefaultDeviceType,
    _device,
    checkpoint,
    get_device_states,
    is_recomputing,
    register_ambient,
    set_device_states,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

IMPLS = [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT]
both_impls = pytest.mark.parametrize("impl", IMPLS, ids=lambda impl: impl.name)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


class Log:
    """Reads some state in a region, in the forward and in the recompute."""

    def __init__(self, read):
        self.read = read
        self.forward = []
        self.recompute = []

    def __call__(self, x, **kwargs):
        (self.recompute if is_recomputing() else self.forward).append(self.read())
        return x.sin().cos()


# --- Random state of the host


def dropout_region(x):
    return dropout(x.sin(), 0.5).cos() * torch.rand_like(x)


def run_dropout(run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = leaf(64)
    torch.manual_seed(7)
    out = dropout(run(x).sin(), 0.5)
    torch.rand(3)
    out.sum().backward()
    return out, x.grad, torch.get_rng_state()


@both_impls
def test_dropout_repeats_and_the_outer_stream_is_undisturbed(impl):
    plain = run_dropout(dropout_region)
    ours = run_dropout(lambda x: checkpoint(dropout_region, x, impl=impl))
    assert all(map(torch.equal, ours, plain))


@both_impls
def test_random_state_is_put_back_when_the_recompute_raises(impl):
    def region(x):
        x = dropout(x.sin(), 0.5)
        if is_recomputing():
            raise ValueError("stop")
        return x.cos()

    out = checkpoint(region, leaf(8), impl=impl)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="stop"):
        out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@both_impls
def test_dropout_in_nested_regions_repeats(impl):
    def outer(x):
        x = dropout(x, 0.5)
        x = checkpoint(dropout_region, x, impl=impl)
        return dropout(x.sin(), 0.5).cos()

    plain_outer = lambda x: dropout(dropout_region(dropout(x, 0.5)).sin(), 0.5).cos()  # noqa: E731
    plain = run_dropout(plain_outer)
    ours = run_dropout(lambda x: checkpoint(outer, x, impl=impl))
    assert all(map(torch.equal, ours, plain))


class Block(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.drop(self.linear(x)).sin()


@both_impls
def test_opting_out_with_live_dropout_warns_once_and_names_the_region(impl):
    def lossy_region(x):
        return dropout(x.sin(), 0.5).cos()

    def step():
        checkpoint(lossy_region, leaf(4), preserve_rng_state=False, impl=impl).sum().backward()

    with pytest.warns(UserWarning, match="draws random numbers") as caught:
        step()
    step()  # A second warning would be an error.
    assert len(caught) == 1
    assert "lossy_region` draws random numbers" in str(caught[0].message)
    assert "Leave preserve_rng_state at True" in str(caught[0].message)


@both_impls
def test_opting_out_without_random_operators_is_silent(impl):
    # Warnings are errors in this suite.
    checkpoint(Log(lambda: None), leaf(4), preserve_rng_state=False, impl=impl).sum().backward()


@both_impls
def test_opting_out_is_silent_in_eval_mode_and_warns_when_dropout_comes_alive(impl):
    block = Block(0.5).eval()
    checkpoint(block, leaf(2, 4), preserve_rng_state=False, impl=impl).sum().backward()
    block.train()
    with pytest.warns(UserWarning, match="Block` draws random numbers"):
        checkpoint(block, leaf(2, 4), preserve_rng_state=False, impl=impl).sum().backward()


@both_impls
def test_opting_out_does_not_touch_the_random_state(impl):
    before = torch.get_rng_state()
    checkpoint(Log(lambda: None), leaf(4), preserve_rng_state=False, impl=impl).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# --- Random state of devices, on a simulated accelerator


class FakeDevices:
    """Devices with a counter as random state, behind torch.get_device_module."""

    def __init__(self) -> None:
        self.states: dict[torch.device, int] = {}
        self.log: list[tuple[str, torch.device, int]] = []

    def get_rng_state(self, device):
        state = self.states.setdefault(torch.device(device), 100)
        self.log.append(("get", torch.device(device), state))
        return torch.tensor([state])

    def set_rng_state(self, state, device):
        self.log.append(("set", torch.device(device), int(state)))
        self.states[torch.device(device)] = int(state)

    def is_initialized(self):
        return True

    def draw(self, device) -> int:
        device = torch.device(device)
        self.states[device] = self.states.setdefault(device, 100) + 1
        return self.states[device]


@pytest.fixture
def fake(monkeypatch):
    devices = FakeDevices()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: devices)
    return devices


@pytest.fixture
def on_device(monkeypatch):
    """Make tensors count as lying on a device: ``on_device(tensor, "cuda:1")``."""
    places: list[tuple[torch.Tensor, torch.device]] = []

    def rng_devices(tensors):
        found = {}
        for tensor in tensors:
            for placed, device in places:
                if tensor is placed:
                    found[device] = None
        return list(found)

    def place(tensor, device):
        places.append((tensor, torch.device(device)))
        return tensor

    monkeypatch.setattr(_device, "rng_devices", rng_devices)
    return place


def draws_of(fake, devices, call):
    """What a region draws on devices: in the forward, in the recompute, and the states after."""
    drawn = []

    def region(*args, **kwargs):
        drawn.append([fake.draw(device) for device in devices])
        return args[0].sin().cos()

    out = call(region)
    for device in devices:
        fake.draw(device)
    before = dict(fake.states)
    out.sum().backward()
    assert fake.states == before
    return drawn


@both_impls
def test_every_device_in_use_repeats_not_one_type_alone(fake, on_device, impl):
    x = leaf(4)
    a, b, c = (on_device(torch.ones(4), d) for d in ("cuda:0", "cuda:1", "xpu:0"))
    drawn = draws_of(
        fake,
        ["cuda:0", "cuda:1", "xpu:0"],
        lambda region: checkpoint(region, x, a, b, c, impl=impl),
    )
    assert drawn == [[101, 101, 101], [101, 101, 101]]


@both_impls
@pytest.mark.parametrize(
    "pack",
    [
        lambda t: ((), {"mask": t}),
        lambda t: ((), {"masks": {"a": [t]}}),
        lambda t: (([1, (t,)],), {}),
        lambda t: ((types.SimpleNamespace,), {"t": (None, t)}),
    ],
    ids=["kwarg", "nested kwarg", "nested argument", "kwarg tuple"],
)
def test_a_device_reached_only_through_kwargs_or_containers_repeats(fake, on_device, impl, pack):
    args, kwargs = pack(on_device(torch.ones(4), "mtia:2"))
    x = leaf(4)
    drawn = draws_of(fake, ["mtia:2"], lambda f: checkpoint(f, x, *args, impl=impl, **kwargs))
    assert drawn == [[101], [101]]


@both_impls
def test_no_device_state_is_taken_without_preserve_rng_state(fake, on_device, impl):
    x = on_device(leaf(4), "cuda:0")
    checkpoint(Log(lambda: None), x, preserve_rng_state=False, impl=impl).sum().backward()
    fake.log.clear()
    log = Log(lambda: None)
    for _ in range(2):
        checkpoint(log, x, preserve_rng_state=False, impl=impl).sum().backward()
    assert fake.log == []


@both_impls
def test_opting_out_warns_about_randomness_on_a_device(fake, on_device, impl):
    x = on_device(leaf(4), "cuda:0")

    def device_dropout(x):
        fake.draw("cuda:0")
        return x.sin().cos()

    with pytest.warns(UserWarning, match="device_dropout` draws random numbers"):
        checkpoint(device_dropout, x, preserve_rng_state=False, impl=impl).sum().backward()


class PlacedTensor:
    """As much of a tensor as rng_devices reads."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cpu = self.device.type == "cpu"


def test_rng_devices_lists_every_device_once_and_no_host_or_meta(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None
    )
    tensors = [PlacedTensor(d) for d in ("cpu", "cuda:1", "meta", "xpu:0", "cuda:1", "cuda:0")]
    found = _device.rng_devices(tensors)
    assert found == [torch.device(d) for d in ("cuda:1", "xpu:0", "cuda:0")]


@pytest.mark.parametrize("initialized", [True, False])
def test_rng_devices_adds_the_current_accelerator_only_if_initialised(monkeypatch, initialized):
    def current_accelerator(check_available=False):
        return torch.device("cuda")

    module = types.SimpleNamespace(is_initialized=lambda: initialized)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    if hasattr(_device, "_accelerator"):
        monkeypatch.setattr(_device, "_accelerator", torch.device("cuda"))
    found = _device.rng_devices([PlacedTensor("cuda:1")])
    expected = [torch.device("cuda:1")] + [torch.device("cuda:3")] * initialized
    assert sorted(found, key=str) == expected


def test_get_device_states_of_host_tensors_is_empty():
    assert get_device_states(torch.ones(2), [torch.ones(1)], 3, None) == ([], [])
    assert get_device_states(torch.ones(2, device="meta")) == ([], [])


def test_get_and_set_device_states(fake, monkeypatch):
    tensors = [PlacedTensor(d) for d in ("cpu", "xpu:1", "cuda:1", "cuda:0")]
    monkeypatch.setattr(_device._tree, "flatten", lambda value: (tensors, None))
    fake.states = {torch.device("cuda:0"): 5, torch.device("cuda:1"): 6}
    indices, states = get_device_states("any")
    assert sorted(indices) == [0, 1]
    assert [int(states[indices.index(i)]) for i in (0, 1)] == [5, 6]
    fake.states.clear()
    set_device_states(indices, states, device_type="cuda")
    assert fake.states == {torch.device("cuda:0"): 5, torch.device("cuda:1"): 6}


def test_set_device_states_uses_the_default_device_type(fake, monkeypatch):
    monkeypatch.setattr(DefaultDeviceType, "_device_type", None)
    DefaultDeviceType.set_device_type("xpu")
    assert DefaultDeviceType.get_device_type() == "xpu"
    set_device_states([2], [torch.tensor([9])])
    assert fake.states == {torch.device("xpu:2"): 9}


def test_set_device_states_of_the_host_or_meta_does_nothing(fake):
    set_device_states([0], [torch.tensor([9])], device_type="cpu")
    set_device_states([0], [torch.tensor([9])], device_type="meta")
    assert fake.log == []


# --- Autocast


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.up(x).relu()).float().sin()


def autocast_state():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


def gradients(run, around_forward, around_backward):
    module, x = Affine(), leaf(3, 4)
    with around_forward():
        out = run(module, x)
    before = autocast_state()
    with around_backward():
        inside = autocast_state()
        out.sum().backward()
        assert autocast_state() == inside
    assert autocast_state() == before
    return [out, x.grad, *(p.grad for p in module.parameters())]


off = contextlib.nullcontext


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def fp16():
    return torch.autocast("cpu", torch.float16)


def uncached():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def disabled():
    return torch.autocast("cpu", enabled=False)


@both_impls
@pytest.mark.parametrize("around_backward", [off, bf16, fp16, uncached, disabled])
@pytest.mark.parametrize("around_forward", [off, bf16, fp16, uncached, disabled])
def test_recompute_runs_under_the_autocast_of_the_forward(around_forward, around_backward, impl):
    # Backward's own operators see the autocast of backward, in the plain model too.
    plain = gradients(lambda m, x: m(x), around_forward, around_backward)
    ours = gradients(lambda m, x: checkpoint(m, x, impl=impl), around_forward, around_backward)
    assert all(map(torch.equal, ours, plain))


@both_impls
@pytest.mark.parametrize("around_backward", [off, bf16, fp16, uncached])
@pytest.mark.parametrize("around_forward", [bf16, fp16, uncached])
def test_recompute_reads_the_same_autocast_settings(around_forward, around_backward, impl):
    log = Log(autocast_state)
    with around_forward():
        out = checkpoint(log, leaf(4), impl=impl)
    with around_backward():
        out.sum().backward()
    assert log.recompute == log.forward


@both_impls
def test_recompute_of_an_autocast_free_forward_is_free_of_autocast(impl):
    log = Log(autocast_state)
    out = checkpoint(log, leaf(4), impl=impl)
    with fp16():
        out.sum().backward()
    assert [enabled for enabled, *_ in log.recompute] == [False]


@both_impls
def test_autocast_changed_inside_and_around_nested_regions(impl):
    # Two modules: autocast's cache of cast weights knows no dtype.
    def outer(run, modules, x):
        with fp16():
            x = run(modules[0], x)
        return run(modules[1], x).cos()

    def grads(run_outer):
        modules, x = nn.ModuleList([Affine(), Affine()]), leaf(3, 4)
        with bf16():
            out = run_outer(modules, x)
        out.sum().backward()
        return [out, x.grad, *(p.grad for p in modules.parameters())]

    plain = grads(lambda modules, x: outer(lambda f, x: f(x), modules, x))
    ours = grads(
        lambda modules, x: checkpoint(
            outer, lambda f, x: checkpoint(f, x, impl=impl), modules, x, impl=impl
        )
    )
    assert all(map(torch.equal, ours, plain))


@both_impls
def test_autocast_is_put_back_when_the_recompute_raises(impl):
    def region(x):
        if is_recomputing():
            raise ValueError("stop")
        return x.sin().cos()

    with bf16():
        out = checkpoint(region, leaf(4), impl=impl)
    with uncached():
        before = autocast_state()
        with pytest.raises(ValueError, match="stop"):
            out.sum().backward()
        assert autocast_state() == before
    assert not torch.is_autocast_enabled("cpu")


@both_impls
@pytest.mark.parametrize("is_first", [True, False])
def test_a_weight_shared_with_code_outside_under_one_autocast(impl, is_first):
    # Autocast caches the cast weight: one cast without grad mode must not serve code outside.
    def loss_of(run):
        module, x = Affine(), leaf(3, 4)
        with bf16():
            parts = [run(module, x), module(x)] if is_first else [module(x), run(module, x)]
        sum(parts).sum().backward()
        return [*parts, x.grad, *(p.grad for p in module.parameters())]

    plain = loss_of(lambda m, x: m(x))
    ours = loss_of(lambda m, x: checkpoint(m, x, impl=impl))
    # Summed in bfloat16 in one run and in float32 in the other; a lost half is no rounding.
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


@both_impls
def test_autocast_of_another_device_type_is_seen(impl):
    log = Log(lambda: (torch.is_autocast_enabled("xpu"), torch.get_autocast_dtype("xpu")))
    before = (torch.is_autocast_enabled("xpu"), torch.get_autocast_dtype("xpu"))
    torch.set_autocast_enabled("xpu", True)
    torch.set_autocast_dtype("xpu", torch.bfloat16)
    try:
        out = checkpoint(log, leaf(4), impl=impl)
    finally:
        torch.set_autocast_enabled("xpu", before[0])
        torch.set_autocast_dtype("xpu", before[1])
    out.sum().backward()
    assert log.recompute == log.forward == [(True, torch.bfloat16)]
    assert (torch.is_autocast_enabled("xpu"), torch.get_autocast_dtype("xpu")) == before


# --- Default device


def default_device():
    return torch.empty(0).device


@both_impls
def test_a_factory_function_finds_the_default_device_of_the_forward(impl):
    log = Log(default_device)
    with torch.device("meta"):
        out = checkpoint(log, leaf(4), impl=impl)
    out.sum().backward()
    assert log.recompute == log.forward == [torch.device("meta")]
    assert default_device() == torch.device("cpu")


@both_impls
def test_a_backward_under_another_default_device(impl):
    log = Log(default_device)
    x = leaf(4)
    out = checkpoint(log, x, impl=impl)
    loss = out.sum()
    with torch.device("meta"):
        torch.autograd.backward(loss, torch.ones((), device="cpu"))
        assert default_device() == torch.device("meta")
    assert log.recompute == [torch.device("cpu")]


@both_impls
def test_set_default_device_between_forward_and_backward(impl):
    log = Log(default_device)
    try:
        torch.set_default_device("meta")
        out = checkpoint(log, leaf_on_host(4), impl=impl)
        torch.set_default_device("cpu")
        out.sum().backward()
        assert default_device() == torch.device("cpu")
    finally:
        torch.set_default_device(None)
    assert log.recompute == [torch.device("meta")]


def leaf_on_host(size):
    return torch.ones(size, device="cpu", requires_grad=True)


@both_impls
def test_a_default_device_that_stays_for_the_whole_step(impl):
    # Tensor.backward hides torch function modes, and so the default device, from hooks.
    log = Log(default_device)
    try:
        torch.set_default_device("meta")
        loss = checkpoint(log, leaf_on_host(4), impl=impl).sum()
        loss.backward(torch.ones((), device="cpu"))
        assert default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    assert log.recompute == log.forward == [torch.device("meta")]


@both_impls
def test_default_device_nested_in_regions(impl):
    on_meta, on_host = Log(default_device), Log(default_device)

    def outer(x):
        with torch.device("meta"):
            x = checkpoint(on_meta, x, impl=impl)
        return checkpoint(on_host, x, impl=impl)

    checkpoint(outer, leaf(4), impl=impl).sum().backward()
    assert set(on_meta.forward + on_meta.recompute) == {torch.device("meta")}
    assert set(on_host.forward + on_host.recompute) == {torch.device("cpu")}
    assert default_device() == torch.device("cpu")


@both_impls
def test_default_device_is_put_back_when_the_recompute_raises(impl):
    def region(x):
        if is_recomputing():
            raise ValueError("stop")
        return x.sin().cos()

    with torch.device("meta"):
        out = checkpoint(region, leaf_on_host(4), impl=impl)
    with pytest.raises(ValueError, match="stop"):
        out.sum().backward()
    assert default_device() == torch.device("cpu")


# --- Kernel choice, default dtype, deterministic flag


def sdpa_flags():
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


class AttentionLog(Log):
    def __call__(self, x):
        super().__call__(x)
        q = x.view(1, 2, 4, 4)
        return scaled_dot_product_attention(q, q, q).sin()


@both_impls
def test_recompute_sees_the_sdpa_kernel_of_the_forward(impl):
    log = AttentionLog(sdpa_flags)
    before = sdpa_flags()
    x = leaf(32)
    with sdpa_kernel(SDPBackend.MATH):
        out = checkpoint(log, x, impl=impl)
    out.sum().backward()
    assert log.recompute == log.forward == [(False, False, True, False)]
    assert sdpa_flags() == before


@both_impls
def test_sdpa_kernel_around_backward_does_not_reach_the_recompute(impl):
    log = AttentionLog(sdpa_flags)
    x, plain_x = leaf(32), leaf(32)
    out = checkpoint(log, x, impl=impl)
    AttentionLog(sdpa_flags)(plain_x).sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        inside = sdpa_flags()
        out.sum().backward()
        assert sdpa_flags() == inside
    assert log.recompute == log.forward
    assert torch.equal(x.grad, plain_x.grad)


@both_impls
@pytest.mark.parametrize("name", ["flash", "mem_efficient", "math", "cudnn"])
def test_each_sdpa_switch_is_seen_on_its_own(impl, name):
    get = getattr(torch.backends.cuda, f"{name}_sdp_enabled")
    enable = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    before, log = get(), Log(get)
    enable(not before)
    try:
        out = checkpoint(log, leaf(4), impl=impl)
    finally:
        enable(before)
    out.sum().backward()
    assert log.recompute == log.forward == [not before]
    assert get() == before


@both_impls
def test_sdpa_priority_is_seen(impl):
    def order():
        return torch._C._get_sdp_priority_order()

    before, log = order(), Log(order)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = checkpoint(log, leaf(4), impl=impl)
    out.sum().backward()
    assert log.recompute == log.forward != [before]
    assert order() == before


@both_impls
def test_default_dtype_of_the_forward(impl):
    log = Log(torch.get_default_dtype)
    torch.set_default_dtype(torch.float64)
    try:
        out = checkpoint(log, leaf(4), impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    out.sum().backward()
    assert log.recompute == log.forward == [torch.float64]
    assert torch.get_default_dtype() == torch.float32


@both_impls
@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_flag_of_the_forward(impl, warn_only):
    def flag():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    log = Log(flag)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        out = checkpoint(log, leaf(4), impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert log.recompute == log.forward == [(True, warn_only)]
    assert flag() == (False, False)


@both_impls
def test_flags_are_put_back_when_the_recompute_raises(impl):
    def region(x):
        if is_recomputing():
            raise ValueError("stop")
        return x.sin().cos()

    with sdpa_kernel(SDPBackend.MATH):
        out = checkpoint(region, leaf(4), impl=impl)
    before = sdpa_flags()
    with pytest.raises(ValueError, match="stop"):
        out.sum().backward()
    assert sdpa_flags() == before


# --- Python's random


def make_layer_drop() -> nn.Module:
    """A class of its own each time: what calls of one class have shown is remembered."""
    return type("LayerDrop", (_LayerDrop,), {})()


class _LayerDrop(nn.Module):
    """Skips half of its layers, as Python's ``random`` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.enabled = True

    def forward(self, x):
        for layer in self.layers:
            if not self.enabled or random.random() < 0.5:
                x = layer(x).sin()
        return x


def run_layer_drop(run, num_steps: int, silent_steps: int = 0):
    """Gradients of every step, and the state of ``random`` at the end."""
    module = make_layer_drop()
    random.seed(5)
    results = []
    for step in range(num_steps):
        module.enabled = step >= silent_steps
        x = leaf(2, 4)
        out = run(module, x)
        random.random()  # The stream moves on before backward.
        out.sum().backward()
        results += [x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    return results, random.getstate()


def assert_equal_layer_drop(impl, *args):
    plain, plain_state = run_layer_drop(lambda m, x: m(x), *args)
    ours, state = run_layer_drop(lambda m, x: checkpoint(m, x, impl=impl), *args)
    assert len(ours) == len(plain)
    assert all(map(torch.equal, ours, plain))
    assert state == plain_state


@both_impls
@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_layer_drop_repeats(impl, num_steps):
    assert_equal_layer_drop(impl, num_steps)


@both_impls
@pytest.mark.parametrize("silent_steps", [1, 2, 63, 100])
def test_layer_drop_that_is_switched_on_later_repeats(impl, silent_steps):
    assert_equal_layer_drop(impl, silent_steps + 3, silent_steps)


@both_impls
def test_python_random_in_the_second_of_two_modules_of_one_class(impl):
    def run(call):
        first = make_layer_drop()
        second = type(first)()
        first.enabled = False
        random.seed(5)
        x = leaf(2, 4)
        out = call(second, call(first, x))
        random.random()
        out.sum().backward()
        return [x.grad, *(p.grad for p in second.parameters() if p.grad is not None)]

    plain = run(lambda m, x: m(x))
    ours = run(lambda m, x: checkpoint(m, x, impl=impl))
    assert len(ours) == len(plain)
    assert all(map(torch.equal, ours, plain))


@both_impls
def test_python_random_in_one_of_two_functions_with_the_same_code(impl):
    def region(x, draws):
        return (x * random.random()).sin() if draws else x.sin()

    random.seed(5)
    checkpoint(region, leaf(4), False, impl=impl).sum().backward()
    state, x = random.getstate(), leaf(4)
    checkpoint(region, x, True, impl=impl).sum().backward()
    random.setstate(state)
    plain = leaf(4)
    region(plain, True).sum().backward()
    assert torch.equal(x.grad, plain.grad)


@both_impls
def test_python_random_is_put_back_when_the_recompute_raises(impl):
    def region(x):
        random.random()
        if is_recomputing():
            raise ValueError("stop")
        return x.sin().cos()

    out = checkpoint(region, leaf(4), impl=impl)
    before = random.getstate()
    with pytest.raises(ValueError, match="stop"):
        out.sum().backward()
    assert random.getstate() == before


@both_impls
def test_python_gauss_repeats_whose_every_other_number_is_kept_back(impl):
    drawn = []

    def region(x):
        drawn.append(random.gauss(0.0, 1.0))
        return x.sin().cos()

    random.seed(1)
    random.gauss(0.0, 1.0)
    checkpoint(region, leaf(4), impl=impl).sum().backward()
    checkpoint(region, leaf(4), impl=impl).sum().backward()
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


@both_impls
def test_python_random_is_left_alone_without_preserve_rng_state(impl):
    drawn = []

    def region(x):
        drawn.append(random.random())
        return x.sin().cos()

    random.seed(1)
    checkpoint(region, leaf(4), preserve_rng_state=False, impl=impl).sum().backward()
    random.seed(1)
    assert drawn == [random.random(), random.random()]


# --- register_ambient


@pytest.fixture
def register():
    handles = []

    def add(*args):
        handles.append(register_ambient(*args))
        return handles[-1]

    yield add
    for handle in handles:
        handle.remove()


class Scale:
    """A global that a layer reads."""

    def __init__(self, value):
        self.value = value
        self.events = []

    def capture(self):
        return self.value

    def restore(self, state):
        self.events.append(state)
        self.value = state


@both_impls
def test_registered_state_is_the_forwards_in_the_recompute(register, impl):
    scale, x = Scale(2.0), leaf(4)
    register(scale.capture, scale.restore)
    out = checkpoint(lambda x: (x * scale.value).sin(), x, impl=impl)
    scale.value = 5.0
    out.sum().backward()
    assert scale.value == 5.0
    assert scale.events == [2.0, 5.0]
    plain = leaf(4)
    (plain * 2.0).sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)


@both_impls
def test_providers_are_restored_in_order_and_put_back_in_reverse(register, impl):
    events = []
    for name in "abc":
        register(lambda: None, lambda state, name=name: events.append(name))
    checkpoint(Log(lambda: events.append("run")), leaf(4), impl=impl).sum().backward()
    assert events == ["run", "a", "b", "c", "run", "c", "b", "a"]


@both_impls
def test_a_removed_provider_is_asked_no_more(register, impl):
    scale = Scale(1.0)
    handle = register(scale.capture, scale.restore)
    handle.remove()
    handle.remove()
    checkpoint(Log(lambda: None), leaf(4), impl=impl).sum().backward()
    assert scale.events == []


@both_impls
def test_a_graph_from_before_the_removal_still_restores(register, impl):
    scale, log = Scale(1.0), None
    handle = register(scale.capture, scale.restore)
    log = Log(lambda: scale.value)
    out = checkpoint(log, leaf(4), impl=impl)
    handle.remove()
    scale.value = 3.0
    out.sum().backward()
    assert log.recompute == [1.0]
    assert scale.value == 3.0


@both_impls
def test_a_provider_registered_after_the_forward_has_nothing_to_restore(register, impl):
    scale = Scale(1.0)
    out = checkpoint(Log(lambda: None), leaf(4), impl=impl)
    register(scale.capture, scale.restore)
    out.sum().backward()
    assert scale.events == []


@both_impls
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_registered_state_is_put_back_when_the_recompute_raises(register, impl, error):
    scale = Scale(1.0)
    register(scale.capture, scale.restore)

    def region(x):
        if is_recomputing():
            raise error("stop")
        return x.sin().cos()

    out = checkpoint(region, leaf(4), impl=impl)
    scale.value = 4.0
    with pytest.raises(error, match="stop"):
        out.sum().backward()
    assert scale.value == 4.0
    assert not is_recomputing()


@both_impls
def test_a_provider_that_raises_on_the_way_in_leaves_no_other_state_behind(register, impl):
    first, last = Scale(1.0), Scale(1.0)
    register(first.capture, first.restore)

    def fail(state):
        raise ValueError("no such state")

    register(lambda: None, fail)
    register(last.capture, last.restore)
    with sdpa_kernel(SDPBackend.MATH), bf16():
        out = checkpoint(lambda x: dropout(x.sin(), 0.5).cos(), leaf(4), impl=impl)
    first.value = last.value = 7.0
    before = (sdpa_flags(), autocast_state(), torch.get_rng_state().tolist())
    with pytest.raises(ValueError, match="no such state"):
        out.sum().backward()
    assert (first.value, last.value) == (7.0, 7.0)
    assert (sdpa_flags(), autocast_state(), torch.get_rng_state().tolist()) == before
    assert not is_recomputing()


@both_impls
def test_a_provider_that_raises_on_the_way_out_stops_no_other(register, impl):
    first = Scale(1.0)
    register(first.capture, first.restore)
    calls = []

    def restore(state):
        calls.append(state)
        if len(calls) == 2:
            raise ValueError("cannot go back")

    register(lambda: None, restore)
    out = checkpoint(Log(lambda: None), leaf(4), impl=impl)
    first.value = 7.0
    with pytest.raises(ValueError, match="cannot go back"):
        out.sum().backward()
    assert first.value == 7.0
    assert len(calls) == 2
    assert not is_recomputing()


@both_impls
def test_a_provider_whose_capture_raises_fails_the_forward_and_nothing_else(register, impl):
    def fail():
        raise ValueError("no capture")

    handle = register(fail, lambda state: None)
    with pytest.raises(ValueError, match="no capture"):
        checkpoint(Log(lambda: None), leaf(4), impl=impl)
    handle.remove()
    x = leaf(4)
    checkpoint(Log(lambda: None), x, impl=impl).sum().backward()
    plain = leaf(4)
    plain.sin().cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_two_registrations_of_the_same_callables_are_two(register):
    scale = Scale(1.0)
    first = register(scale.capture, scale.restore)
    register(scale.capture, scale.restore)
    first.remove()
    checkpoint(Log(lambda: None), leaf(4)).sum().backward()
    assert scale.events == [1.0, 1.0]


def test_register_ambient_needs_callables():
    with pytest.raises(TypeError, match=r"two callables: capture\(\) and restore\(state\)"):
        register_ambient(None, print)
    with pytest.raises(TypeError, match=r"two callables: capture\(\) and restore\(state\)"):
        register_ambient(print, 3)


# --- is_recomputing


@both_impls
def test_is_recomputing_only_in_the_recompute(impl):
    seen = []

    def region(x):
        seen.append(is_recomputing())
        return x.sin().cos()

    assert not is_recomputing()
    out = checkpoint(region, leaf(4), impl=impl)
    assert not is_recomputing()
    out.sum().backward()
    assert not is_recomputing()
    assert seen == [False, True]


@both_impls
def test_is_recomputing_is_per_thread(impl):
    seen = []

    def region(x):
        if is_recomputing():
            thread = threading.Thread(target=lambda: seen.append(is_recomputing()))
            thread.start()
            thread.join()
            seen.append(is_recomputing())
        return x.sin().cos()

    checkpoint(region, leaf(4), impl=impl).sum().backward()
    assert seen == [False, True]


@both_impls
def test_is_recomputing_in_nested_regions(impl):
    seen = []

    def inner(x):
        seen.append(("inner", is_recomputing()))
        return x.sin().cos()

    def outer(x):
        seen.append(("outer", is_recomputing()))
        return checkpoint(inner, x.sin(), impl=impl).sin()

    checkpoint(outer, leaf(4), impl=impl).sum().backward()
    assert seen[:2] == [("outer", False), ("inner", False)]
    assert {flag for _, flag in seen[2:]} == {True}


def test_without_grad_mode_nothing_is_captured(register):
    register(lambda: pytest.fail("captured"), lambda state: None)
    with torch.no_grad():
        wrappers.checkpoint(torch.sin, leaf(4))


@both_impls
def test_a_registered_state_is_put_back_though_the_forward_ran_under_a_function_mode(
    impl, register
):
    """The rerun ends without an exception here: what would have stopped it must be gone by then."""
    state = torch.zeros(2)
    register(state.clone, state.copy_)
    with torch.device("cpu"):
        out = checkpoint(torch.exp, leaf(4), impl=impl)
    state.fill_(5)
    out.sum().backward()
    assert state.tolist() == [5, 5]
