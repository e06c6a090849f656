"""Copies without memory share nothing with their originals that could change."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from wrappers import _torch, apply_activation_checkpointing, checkpoint_wrapper
from wrappers.errors import WrapperError
from wrappers.plan.fakes import Fakes
from wrappers.select import by_class

CPU = torch.device("cpu")


@pytest.fixture
def fakes():
    return Fakes(CPU)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.zeros(4))
        self.table = torch.ones(3)
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return self.b(self.a(x)) + self.mean


def test_tensors_keep_their_looks(fakes):
    original = torch.ones(6, 4)[1:].t()
    fake = fakes.tensor(original)
    assert _torch.is_fake(fake)
    assert (fake.shape, fake.stride()) == (original.shape, original.stride())
    assert fake.storage_offset() == original.storage_offset()
    assert _torch.storage_bytes(fake) == 6 * 4 * 4


def test_shared_memory_is_shared_again(fakes):
    whole = torch.ones(8)
    a, b = fakes.tensor(whole[:4]), fakes.tensor(whole[4:])
    assert _torch.storage_key(a) == _torch.storage_key(b)
    assert _torch.storage_key(a) != _torch.storage_key(fakes.tensor(torch.ones(8)))


def test_nested_values(fakes):
    made = fakes.values(({"a": torch.ones(2), "n": 3}, [torch.ones(1)], None))
    assert _torch.is_fake(made[0]["a"])
    assert (made[0]["n"], made[2]) == (3, None)


def test_a_copied_module_is_apart(fakes):
    layer = Layer().train()
    layer.a.weight.grad = torch.ones(4, 4)
    fake = fakes.module(layer)
    assert all(_torch.is_fake(t) for t in (*fake.parameters(), *fake.buffers(), fake.table))
    assert fake.b.weight is fake.a.weight
    with fakes.mode:
        fake(torch.ones(2, 4, device=CPU))
    fake.eval()
    assert layer.calls == []
    assert layer.training
    assert not any(_torch.is_fake(t) for t in (*layer.parameters(), *layer.buffers(), layer.table))
    assert torch.equal(layer.a.weight.grad, torch.ones(4, 4))


def test_wrappers_are_left_out(fakes):
    model = nn.Sequential(Layer(), checkpoint_wrapper(Layer()))
    assert [type(m) for m in fakes.module(model)] == [Layer, Layer]
    inplace = nn.Sequential(Layer())
    apply_activation_checkpointing(inplace, check_fn=by_class(Layer), inplace=True)
    assert "forward" not in vars(fakes.module(inplace)[0])
    assert "forward" in vars(inplace[0])


def test_frozen_parameters_stay_frozen(fakes):
    layer = Layer()
    layer.b.bias.requires_grad_(False)
    flags = [p.requires_grad for p in fakes.module(layer).parameters()]
    assert flags == [p.requires_grad for p in layer.parameters()]


def test_what_cannot_be_copied_is_a_clear_error(fakes):
    layer = Layer()
    layer.lock = threading.Lock()
    with pytest.raises(WrapperError, match=r"the Layer cannot be copied.*lock"):
        fakes.module(layer)


def test_realized_modules_have_memory_and_no_state_of_the_model(fakes):
    layer = Layer()
    made = fakes.realize(fakes.module(layer), CPU)
    assert made.b.weight is made.a.weight
    assert not any(_torch.is_fake(t) for t in (*made.parameters(), *made.buffers(), made.table))
    assert not torch.equal(made.a.weight, layer.a.weight)
    assert made(torch.ones(2, 4)).isfinite().all()
