"""Storages are followed from the operator that makes them to their death."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from wrappers import _torch
from wrappers.plan.memory import Memory
from wrappers.plan.workspaces import workspace_bytes

aten = torch.ops.aten


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """Everything holds for both."""
    if request.param == "real":
        yield
        return
    with _torch.fake_mode():
        yield


def test_what_is_made_and_what_goes(tensors):
    before = torch.ones(256)
    with Memory() as memory:
        a = before + 1
        b = a * 2
        assert memory.alive_bytes == 2048
        del a
        assert memory.alive_bytes == 1024
        c = b.view(16, 16).t()
        b.add_(1)
        before.mul_(2)
        assert memory.alive_bytes == 1024
        del b
        assert memory.alive_bytes == 1024
        del c
    assert memory.alive_bytes == 0
    assert memory.peak() == 2048
    assert [change for change, _ in memory.changes] == [1024, 1024, -1024, -1024]
    names = [storage.operator for _, storage in memory.changes]
    assert names[:2] == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_peaks_between_two_moments(tensors):
    with Memory() as memory:
        a = torch.ones(64)
        start = memory.now()
        b = torch.ones(32)
        del b
        middle = memory.now()
        del a
    assert memory.peak() == memory.peak(start, middle) == 384
    assert memory.peak(middle) == 256
    assert [num for _, num in memory.alive_at(start)] == [256]
    assert memory.alive_at(memory.now()) == []


def test_views_keep_memory_alive_and_count_in_full(tensors):
    with Memory() as memory:
        row = torch.ones(8, 64)[0]
        assert memory.alive_bytes == 2048
        storage = memory.storage_of(row)
        del row
    assert storage.num_bytes == 0
    assert storage.died_at == memory.now()


def test_labels_and_pauses(tensors):
    with Memory() as memory:
        memory.label = "here"
        a = torch.ones(4)
        with memory.paused():
            b = torch.ones(4)
        assert memory.alive_bytes == 16
        assert memory.storage_of(a).label == "here"
        assert memory.storage_of(b) is None


def test_resized_storages_are_followed():
    """FSDP frees gathered parameters like this, and fills them again."""
    old = torch.ones(64)
    with Memory() as memory:
        new = torch.ones(64)
        new.untyped_storage().resize_(0)
        assert memory.alive_bytes == 0
        new.untyped_storage().resize_(128)
        old.untyped_storage().resize_(0)
        assert memory.alive_bytes == 128 - 256
        del new
    assert memory.alive_bytes == -256


def test_the_observer_sees_operators(tensors):
    seen = []
    with Memory(lambda func, args, kwargs, out: seen.append((func, out.shape))):
        torch.ones(4).sum()
    assert seen == [(aten.ones.default, (4,)), (aten.sum.default, ())]


def test_scratch_of_kernels_counts_for_a_moment(tensors):
    gradient, weight = torch.ones(()).expand(64, 32), torch.ones(32, 16)
    with Memory() as memory:
        gradient @ weight
    assert memory.peak() == 64 * 16 * 4 + 64 * 32 * 4
    assert memory.alive_bytes == 0
    with Memory() as memory:
        weight.t() @ weight
    assert memory.peak() == 16 * 16 * 4


def test_scratch_is_known_for_some_kernels_of_the_host():
    q = torch.ones(1, 2, 16, 8)
    args = (q, q, q)
    out = F.scaled_dot_product_attention(q, q, q)
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    num = workspace_bytes(attention, args, {}, out)
    assert num == 4 * (16 * 16 + 2 * 16 + 16 * 8) * torch.get_num_threads()
    assert workspace_bytes(aten.add.Tensor, (q, q), {}, q) == 0


def test_it_goes_with_its_last_user(tensors):
    """What it follows, and is still there, does not hold it."""
    gc.collect()
    gc.disable()
    try:
        with Memory() as memory:
            made = torch.ones(256)
        gone = weakref.ref(memory)
        del memory
        assert gone() is None
        assert made.numel() == 256
    finally:
        gc.enable()
