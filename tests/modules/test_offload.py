"""What goes to the host, what stays, what comes back, and when it dies.

There is no accelerator here: ``_device.is_host`` is told that nothing lies on the host, so every
"device" tensor is copied to "host" memory and back, and the copies are counted.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from wrappers import _device, _knobs
from wrappers.errors import InputChangedError
from wrappers.modules.offload import OffloadWrapper, is_offloaded, offload_wrapper
from wrappers.offload import hooks
from wrappers.offload.hooks import HostOffload, offload_saved_tensors


@pytest.fixture
def d2h(monkeypatch):
    """Pretend that all tensors lie on an accelerator; return the bytes of each copy to the host."""
    copies: list[int] = []

    class Counted(hooks._HostCopy):
        def __init__(self, storage, **kwargs):
            super().__init__(storage, **kwargs)
            copies.append(storage.nbytes())

    monkeypatch.setattr(_device, "is_host", lambda tensor: False)
    monkeypatch.setattr(hooks, "_HostCopy", Counted)
    return copies


@pytest.fixture
def h2d(monkeypatch):
    """The bytes of each copy back."""
    copies: list[int] = []
    load = hooks._HostCopy.load

    def counted(self):
        copies.append(self.bytes.nbytes)
        return load(self)

    monkeypatch.setattr(hooks._HostCopy, "load", counted)
    return copies


class Attention(nn.Module):
    """Saves x for three products, views, transposes, a square matrix and its transpose."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q @ k.t()).softmax(-1)
        both = torch.cat([scores, scores.t()])
        left, right = both.chunk(2)
        return self.norm((left * right) @ v[:, ::1].exp())


def grads(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    module(x).square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def in_place(module, **kwargs):
    return offload_wrapper(module, inplace=True, **kwargs)


@pytest.mark.parametrize("face", [OffloadWrapper, in_place])
def test_gradients_are_bitwise_equal(face, d2h, h2d):
    plain = Attention(6)
    wrapped = face(copy.deepcopy(plain), min_bytes=0)
    x = torch.randn(6, 6)
    for _ in range(3):
        for ours, expected in zip(grads(wrapped, x), grads(plain, x), strict=True):
            assert torch.equal(ours, expected)
    assert len(d2h) > 6
    assert len(h2d) > len(d2h)


def test_one_copy_for_a_tensor_that_three_products_save(d2h):
    linears = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    class Qkv(nn.Module):
        def forward(self, x):
            x = x * 2
            return sum(linear(x).sum() for linear in linears)

    OffloadWrapper(Qkv(), min_bytes=0)(torch.ones(16, 8, requires_grad=True))
    assert d2h == [16 * 8 * 4]


def test_device_memory_is_dead_between_forward_and_backward(d2h):
    saved = []

    class Probe(nn.Module):
        def forward(self, x):
            hidden = x * 2
            saved.append(weakref.ref(hidden.untyped_storage()))
            out = hidden.sin()
            return out.sum()

    loss = OffloadWrapper(Probe(), min_bytes=0)(torch.ones(100, requires_grad=True))
    gc.collect()
    assert saved[0]() is None
    loss.backward()


def graph_on_host(host_bytes: list[weakref.ref]) -> torch.Tensor:
    offload = HostOffload(min_bytes=0, pin_memory=True)

    def pack(tensor):
        moved = offload.pack(tensor)
        host_bytes.append(weakref.ref(moved.copy.bytes))
        return moved

    with torch.autograd.graph.saved_tensors_hooks(pack, offload.unpack):
        return torch.ones(4, requires_grad=True).exp().sin()


def test_host_memory_dies_with_the_graph(d2h):
    host_bytes = []
    out = graph_on_host(host_bytes)
    gc.collect()
    assert [ref() is None for ref in host_bytes] == [False, False]
    del out
    gc.collect()
    assert [ref() is None for ref in host_bytes] == [True, True]


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
def test_views_come_back_as_they_were(view, d2h):
    offload = HostOffload(min_bytes=0, pin_memory=True)
    base = torch.randn(6, 6)
    whole, part = offload.pack(base), offload.pack(view(base))
    assert d2h == [6 * 6 * 4]
    expected = view(base.clone())
    base.zero_()
    for _ in range(2):
        got = offload.unpack(part)
        assert got.data_ptr() != base.data_ptr()
        assert (got.shape, got.stride(), got.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
        assert got.storage_offset() == view(base).storage_offset()
        assert torch.equal(got, expected)
    assert torch.equal(view(offload.unpack(whole)), expected)


def test_recycled_memory_is_not_taken_for_the_old_one(d2h):
    offload = HostOffload(min_bytes=0, pin_memory=True)
    packed = []
    for i in range(50):
        packed.append(offload.pack(torch.full((64,), float(i))))
    for i, moved in enumerate(packed):
        assert offload.unpack(moved)[0] == i


def test_a_change_in_place_makes_a_new_copy(d2h):
    offload = HostOffload(min_bytes=0, pin_memory=True)
    tensor = torch.zeros(4)
    before = offload.pack(tensor)
    tensor.add_(1)
    after = offload.pack(tensor)
    assert offload.unpack(before).sum() == 0
    assert offload.unpack(after).sum() == 4


def test_parameters_and_their_views_stay(d2h):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return (x @ self.weight.t()).sum() + (x @ self.weight[:4].t()).sum()

    x = torch.ones(2, 8)  # no grad, so nothing but the weights' views would be saved with x
    OffloadWrapper(Products(), min_bytes=0)(x.requires_grad_())
    assert d2h == [2 * 8 * 4]


def test_small_tensors_stay(d2h):
    for numel, expected in [(24, []), (25, [100]), (26, [104])]:
        d2h.clear()
        OffloadWrapper(Sin(), min_bytes=100)(torch.ones(numel, requires_grad=True))
        assert d2h == expected
    with _knobs.override(OFFLOAD_MIN_BYTES=8):
        assert OffloadWrapper(Sin())._min_bytes == 8


class Sin(nn.Module):
    def forward(self, x):
        return (x * 1).sin()


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_conjugated_views_stay(dtype, d2h):
    offload = HostOffload(min_bytes=0, pin_memory=True)
    tensor = torch.randn(4, dtype=dtype)
    assert torch.equal(offload.unpack(offload.pack(tensor.conj())), tensor.conj())
    sparse = torch.eye(3).to_sparse()
    assert offload.unpack(offload.pack(sparse)) is sparse
    assert d2h == []


def test_tensors_on_the_host_are_untouched(monkeypatch):
    monkeypatch.setattr(hooks, "_HostCopy", None)
    with offload_saved_tensors(min_bytes=0):
        offload = HostOffload(min_bytes=0, pin_memory=True)
        leaf = torch.ones(4, requires_grad=True)
        assert offload.unpack(offload.pack(leaf)) is leaf
        result = leaf * 2
        assert offload.unpack(offload.pack(result)).data_ptr() == result.data_ptr()
    plain = Attention(6)
    x = torch.randn(6, 6)
    for ours, expected in zip(grads(OffloadWrapper(plain), x), grads(plain, x), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_kept_result_does_not_keep_its_graph_alive(on_host, monkeypatch):
    monkeypatch.setattr(_device, "is_host", lambda tensor: on_host)
    with offload_saved_tensors(min_bytes=1000):
        out = torch.ones(4, requires_grad=True).exp()
    ref = weakref.ref(out)
    del out
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("on_host", [True, False])
def test_a_kept_tensor_changed_in_place_is_found(on_host, monkeypatch):
    monkeypatch.setattr(_device, "is_host", lambda tensor: on_host)
    linear = nn.Linear(4, 4)
    loss = OffloadWrapper(linear, min_bytes=1000)(torch.ones(2, 4, requires_grad=True)).sum()
    with torch.no_grad():
        linear.weight.add_(1)
    error = RuntimeError if on_host else InputChangedError
    with pytest.raises(error, match=r"version \d[;,] expected (version )?\d"):
        loss.backward()


def test_hooks_are_popped_when_forward_raises(d2h):
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        OffloadWrapper(Broken(), min_bytes=0)(torch.ones(3, requires_grad=True))
    torch.ones(3, requires_grad=True).sin()
    assert d2h == []


def test_without_grad_mode_there_are_no_hooks(d2h, monkeypatch):
    monkeypatch.setattr("wrappers.modules.offload.offload_saved_tensors", None)
    with torch.no_grad():
        OffloadWrapper(Sin(), min_bytes=0)(torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="NoneType"):
        OffloadWrapper(Sin(), min_bytes=0)(torch.ones(3, requires_grad=True))


def test_negative_min_bytes():
    with pytest.raises(ValueError, match="min_bytes must not be negative, got -1"):
        OffloadWrapper(Sin(), min_bytes=-1)


@pytest.mark.parametrize("inplace", [False, True])
def test_wrapping_twice_warns(inplace):
    module = offload_wrapper(Sin(), inplace=inplace)
    assert is_offloaded(module)
    with pytest.warns(UserWarning, match="a Sin is offloaded already"):
        assert offload_wrapper(module) is module


def test_compiled_without_a_graph_break(d2h):
    torch._dynamo.reset()
    module = OffloadWrapper(Attention(6), min_bytes=0)
    x = torch.randn(6, 6)
    expected = grads(module, x)
    copies = len(d2h)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(grads(compiled, x), expected, strict=True):
        assert torch.equal(ours, eager)
    assert len(d2h) == copies


def test_around_a_checkpointed_module_its_inputs_move(d2h):
    from wrappers.modules.checkpoint import CheckpointWrapper

    class Chain(nn.Module):
        def forward(self, x):
            return x.sin().cos().exp()

    x = torch.randn(10, requires_grad=True)
    model = nn.Sequential(nn.Identity(), OffloadWrapper(CheckpointWrapper(Chain()), min_bytes=0))
    model((x * 2).mul_(1).mul_(1)).sum().backward()
    assert d2h == [10 * 4]  # the region's input; nothing in the recompute
    (expected,) = torch.autograd.grad(Chain()(x * 2).sum(), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    plain = Attention(256).cuda()
    wrapped = OffloadWrapper(copy.deepcopy(plain), min_bytes=0)
    x = torch.randn(256, 256, device="cuda")
    for ours, expected in zip(grads(wrapped, x), grads(plain, x), strict=True):
        assert torch.equal(ours, expected)
    used = []
    for module in (plain, wrapped):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = module(x.detach().requires_grad_())
        used.append(torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes())
        del out
    assert used[1] < used[0] / 4


def test_meta_tensors_have_nothing_to_offload():
    module = OffloadWrapper(nn.Linear(4, 4, device="meta"), min_bytes=0)
    x = torch.ones(2, 4, device="meta", requires_grad=True)
    module(x).sin().sum().backward()
    assert x.grad.is_meta
