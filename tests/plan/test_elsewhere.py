"""Calls that differ by device run the operators of the accelerator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wrappers import _torch, profile
from wrappers.plan.elsewhere import AcceleratorOperators
from wrappers.select import by_class


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _names(function, *tensors, **kwargs):
    with _torch.fake_mode(), AcceleratorOperators(), _Names() as seen:
        made = [torch.empty(t.shape, dtype=t.dtype).requires_grad_() for t in tensors]
        out = function(*made, **kwargs)
        out.sum().backward()
        assert all(t.grad.shape == t.shape for t in made)
    return out, seen.names


FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"


@pytest.mark.parametrize(
    ("dtype", "settings", "name"),
    [
        (torch.bfloat16, {}, FLASH),
        (torch.float16, {"is_causal": True, "dropout_p": 0.1}, FLASH),
        (torch.float32, {}, EFFICIENT),
        (torch.bfloat16, {"attn_mask": torch.ones(16, 16, dtype=torch.bool)}, EFFICIENT),
    ],
)
def test_attention_is_one_fused_operator(dtype, settings, name):
    q = torch.ones(2, 4, 16, 8, dtype=dtype)
    if "attn_mask" in settings:
        with _torch.fake_mode():
            settings = {"attn_mask": torch.empty(16, 16, dtype=torch.bool)}
    out, names = _names(F.scaled_dot_product_attention, q, q, q, **settings)
    assert out.shape == q.shape
    assert name in names
    assert f"{name}_backward" in names


def test_grouped_keys_are_repeated():
    q, k = torch.ones(2, 4, 16, 8).half(), torch.ones(2, 2, 16, 8).half()
    out, names = _names(F.scaled_dot_product_attention, q, k, k, enable_gqa=True)
    assert out.shape == q.shape
    assert FLASH in names


def test_dropout_keeps_its_mask():
    _, names = _names(F.dropout, torch.ones(8), p=0.5, training=True)
    assert "native_dropout" in names
    _, names = _names(F.dropout, torch.ones(8), p=0.5, training=False)
    assert "native_dropout" not in names


def test_outside_of_it_nothing_changes():
    with _torch.fake_mode(), _Names() as seen:
        F.dropout(torch.empty(8), 0.5)
    assert "native_dropout" not in seen.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_attention_module_runs_the_accelerators_kernel(dtype):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return x + self.drop(self.attention(x, x, x, need_weights=False)[0])

    model = nn.Sequential(nn.Linear(32, 32), Attends()).to(dtype)
    x = torch.ones(2, 16, 32, dtype=dtype)
    plain = F.scaled_dot_product_attention, F.dropout
    found = profile(model, x, check_fn=by_class(Attends), hardware="H100", max_options=8)
    assert plain == (F.scaled_dot_product_attention, F.dropout)
    (structure,) = found.structures.values()
    names = {name.split(".")[1] for name in structure.calls}
    kernel, other = (EFFICIENT, FLASH) if dtype is torch.float32 else (FLASH, EFFICIENT)
    assert kernel in names
    assert other not in names
    assert not any("for_cpu" in name for name in names)
    assert "native_dropout" in names
